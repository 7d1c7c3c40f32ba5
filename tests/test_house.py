"""The files that describe the package say the same thing, and what they name exists."""

import ast
import json
import re
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import entry_points
from pathlib import Path

import pandas as pd
import pytest
import yaml
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sparse_nb.claims.effects import pooled_effects
from sparse_nb.claims.verdicts import as_markdown, claims_table, refuted_among_all
from sparse_nb.results.reproducibility import published_runs, reproducibility_table
from sparse_nb.study.figures import FIGURES
from sparse_nb.study.studies import PRESETS

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(
    path
    for folder in ("nbs", "figures", "benchmarks")
    for path in (ROOT / folder).rglob("*.ipynb")
    if "rendered" not in path.parts
)
CONDA_NAMES = {
    "torch": "pytorch",
    "kaleido": "python-kaleido",
    "playwright": "playwright-python",
    "build": "python-build",
}
NOT_CHAPTERS = ("__init__.py", "__main__.py", "_modidx.py")
PYTHONS = ("3.10.0", "3.11.0", "3.11.5", "3.12.0", "3.13.0", "3.14.0")


PARTS = (
    "randomness",
    "own",
    "data",
    "networks",
    "robustness",
    "study",
    "runs",
    "sweep",
    "results",
    "claims",
    "explorer",
    "cli",
)


def imports_of(path):
    """(the part of the module at `path`, the parts that it imports anywhere in its text)."""
    parts = path.relative_to(ROOT / "sparse_nb").with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            above = ("sparse_nb", *parts)[: -node.level] if node.level else ()
            names = (*above, *(node.module or "").split(".")) if node.module else above
            found |= {(*names, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
    return parts[0], {names[1] for names in found if names[0] == "sparse_nb" and names[1:] and names[1] in PARTS}


def test_imports_run_down_the_parts_only():
    modules = [path for path in (ROOT / "sparse_nb").rglob("*.py") if path.name not in NOT_CHAPTERS]
    assert len(modules) > 40 and {imports_of(path)[0] for path in modules} == set(PARTS)
    edges = {(part, other) for part, others in map(imports_of, modules) for other in others if other != part}
    assert {("cli", "runs"), ("results", "runs"), ("networks", "data")} <= edges
    assert {(low, high) for low, high in edges if PARTS.index(high) > PARTS.index(low)} == set()


def test_every_chapter_has_its_module_and_every_module_its_chapter():
    chapters = {
        path: re.search(r"default_exp ([\w.]+)", path.read_text(encoding="utf-8"))
        for path in ROOT.glob("nbs/**/*.ipynb")
    }
    exported = {found[1] for found in chapters.values() if found}
    modules = {
        ".".join(path.relative_to(ROOT / "sparse_nb").with_suffix("").parts)
        for path in (ROOT / "sparse_nb").rglob("*.py")
        if path.name not in NOT_CHAPTERS
    }
    assert exported == modules and {path.name for path, found in chapters.items() if not found} == {
        "explore.ipynb",
        "index.ipynb",
        "published.ipynb",
        "your_mask.ipynb",
        "your_network.ipynb",
    }
    for path, found in chapters.items():
        if found and "." in found[1]:
            assert path.parent.name.split("_")[-1] == found[1].split(".")[-2], f"{path} exports {found[1]}"


def settings():
    config = ConfigParser()
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def requirements():
    return [Requirement(r) for key in ("requirements", "dev_requirements") for r in settings()[key].split()]


def book_requirements():
    return [Requirement(r) for r in settings()["docs_requirements"].split()]


def public_names():
    """(module, its `__all__`, {name: node} of the functions and classes in it) of every module that has one."""
    for path in sorted((ROOT / "sparse_nb").rglob("*.py")):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        lists = [
            node for node in body if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
        ]
        listed = {name for node in lists for name in ast.literal_eval(node.value)}
        defined = (node for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef)))
        yield path.name, listed, {node.name: node for node in defined if node.name in listed}


def test_what_a_user_meets_is_small_described_and_typed():
    """Cells with `#| export` make the reference; what only other chapters use is exported with `#| exporti`."""
    modules, bare, untyped = list(public_names()), [], []
    assert 150 <= sum(len(listed) for _, listed, _ in modules) <= 190
    for module, _, defined in modules:
        bare += [(module, name) for name, node in defined.items() if not ast.get_docstring(node)]
        for name, node in defined.items():
            methods = [node] if isinstance(node, ast.FunctionDef) else node.body
            for method in methods:
                if isinstance(method, ast.FunctionDef) and not (method is not node and method.name.startswith("_")):
                    taken = [*method.args.posonlyargs, *method.args.args, *method.args.kwonlyargs]
                    hints = [a.annotation for a in taken if a.arg not in ("self", "cls")] + [method.returns]
                    untyped += [(module, name, method.name)] * (None in hints)
    assert (bare, untyped) == ([], [])


def test_pyproject_mirrors_settings_for_nbdev_3():
    mirror = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["nbdev"]
    as_ini = {k: " ".join(v) if isinstance(v, list) else str(v) for k, v in mirror.items()}
    assert as_ini == {k: settings()[k] for k in mirror}
    # Every key that nbdev 2 acts upon and that nbdev 3 still reads is there.
    both = "lib_path nbs_path doc_path recursive tst_flags put_version_in_init update_pyproject branch"
    both += " allowed_cell_metadata_keys"
    assert set(both.split()) <= set(mirror)


def test_conda_environment_has_the_packages_and_ranges_of_settings():
    listed = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    under_pip = next(item["pip"] for item in listed if isinstance(item, dict))
    from_conda = [item for item in listed if isinstance(item, str) and item != "pip"]

    assert "torchattacks" in {Requirement(r).name for r in under_pip}
    wanted = {f"python>={settings()['min_python']}"}
    for r in requirements():
        name = r.name if r.name in {Requirement(p).name for p in under_pip} else CONDA_NAMES.get(r.name, r.name)
        wanted.add(str(Requirement(f"{name}{r.specifier}")))
    assert {str(Requirement(r)) for r in from_conda + under_pip} == wanted


def test_binder_installs_the_conda_environment():
    assert (ROOT / ".binder/environment.yml").read_bytes() == (ROOT / "environment.yml").read_bytes()
    assert "pip install --no-cache-dir --no-deps -e ." in (ROOT / ".binder/postBuild").read_text(encoding="utf-8")


@pytest.mark.parametrize("python", PYTHONS)
def test_lock_pins_each_requirement_once_within_its_range(python):
    environment = {"python_version": python.rpartition(".")[0], "python_full_version": python}
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pin = Requirement(line)
        if pin.marker is None or Marker(str(pin.marker)).evaluate(environment):
            (version,) = pin.specifier
            assert version.operator == "==", line
            assert canonicalize_name(pin.name) not in pins, f"{pin.name} is pinned twice for Python {python}"
            pins[canonicalize_name(pin.name)] = version.version
    for r in requirements() + book_requirements():
        assert r.specifier.contains(pins[canonicalize_name(r.name)]), (
            f"{r} is locked at {pins[canonicalize_name(r.name)]}"
        )


def test_what_pip_is_told():
    asked = ["--name", "--version", "--license"]
    said = subprocess.run(
        [sys.executable, "setup.py", "-q", *asked], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert said.split() == ["sparse-nb", settings()["version"], "Apache-2.0"]
    assert "pkg_resources" not in (ROOT / "setup.py").read_text(encoding="utf-8")
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == settings()["version"]


def test_console_scripts_are_installed_and_resolve():
    installed = {f"{e.name}={e.value}": e for e in entry_points(group="console_scripts")}
    for script in settings()["console_scripts"].split():
        assert callable(installed[script].load())


def test_make_lists_every_target_that_it_has():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    help_text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^  make (\S+)", help_text, re.MULTILINE) == phony.split()
    assert {"figures", "test", "lab", "bench", "readme"} <= set(phony.split())


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.name)
def test_notebook_outputs_kept_in_git_are_text_and_small_pictures(notebook):
    content = json.loads(notebook.read_text(encoding="utf-8"))
    cells = content["cells"]
    assert "widgets" not in content["metadata"]  # the state of widgets may be many megabytes
    kinds = {kind for cell in cells for output in cell.get("outputs", []) for kind in output.get("data", {})}
    assert {kind for kind in kinds if not kind.startswith("text/")} <= {
        "image/png",
        "image/jpeg",
    }  # Pillow shows itself as both
    assert not any(output["output_type"] == "error" for cell in cells for output in cell.get("outputs", []))
    assert notebook.stat().st_size < 1_000_000


def test_links_inside_the_project_lead_somewhere():
    links = {}
    pages = [*ROOT.glob("docs/*.md"), *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"))]
    for file in (*NOTEBOOKS, *pages):
        text = file.read_text(encoding="utf-8")
        parts = (
            ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
            if file.suffix == ".ipynb"
            else [text]
        )
        for link in (a or b for part in parts for a, b in re.findall(r'\]\(([^)\s]+)\)|(?:src|href)="([^"]+)"', part)):
            if not re.match(r"[a-z]+:", link):
                links[file, link] = file.parent / link.partition("#")[0]
    assert len(links) > 100 and [link for link, target in links.items() if not target.exists()] == []


def test_pages_of_docs_hold_their_values(monkeypatch):
    """What is read on a code host is what is published, and no placeholder for it."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    from values import VALUE, filled

    pages = {path.name: path.read_text(encoding="utf-8") for path in ROOT.glob("docs/*.md")}
    marks = [match for page in pages.values() for match in VALUE.finditer(page)]
    assert len(marks) > 15 and all(len(re.sub("<!--.*?-->", "", match[0])) > 3 for match in marks)
    assert [name for name, page in pages.items() if "{{" in page] == []
    assert [name for name, page in pages.items() if filled(page) != page] == [], "run make prepare"


def test_make_names_a_torch_that_it_does_not_know():
    done = subprocess.run(["make", "help", "TORCH=gpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and "TORCH is gpu; it is cpu, or" in done.stderr


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.name)
def test_cells_hold_no_control_characters(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    strange = [
        (cell["id"], character)
        for cell in cells
        for character in "".join(cell["source"])
        if ord(character) < 32 and character not in "\n\t"
    ]
    assert not strange, "a backslash that an editor took for itself, as in \\bar"


def test_no_file_in_git_is_large():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is not a git repository")
    sizes = {name: (ROOT / name).stat().st_size for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    assert [name for name, size in sizes.items() if size > 2**20] == []
    assert sum(sizes.values()) < 50 * 2**20


def test_every_environment_variable_is_on_its_page():
    texts = [path for folder in ("nbs", "tests", ".ci", "docs") for path in (ROOT / folder).rglob("*.py")]
    texts += [*NOTEBOOKS, ROOT / "Makefile"]
    read = r"SPARSE_NB_[A-Z_]*[A-Z]|(?<=environ\.get\(.)[A-Z_]+|(?<=environ\[.)[A-Z_]+"
    sources = (path.read_text(encoding="utf-8").replace('\\"', '"') for path in texts)
    used = {name for source in sources for name in re.findall(read, source)}
    page = (ROOT / "docs/environment.md").read_text(encoding="utf-8")
    of_others = {"HOME", "PATH", "PYTHONPATH", "HOSTILE", "IN_TEST"}
    assert len(used) > 10 and {name for name in used - of_others if f"`{name}" not in page} == set()
    assert {name for name in re.findall(r"SPARSE_NB_\w+", page)} <= used


def test_the_front_page_is_short():
    """Words that are read: without code, addresses and numbers."""
    page = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    page = re.sub(r"<[^>]+>", " ", re.sub(r"\]\([^)]*\)", "]", page))
    assert 600 <= sum(bool(re.search("[A-Za-z]", word)) for word in page.split()) <= 900


def test_pages_show_what_is_published():
    """The tables of nbs/published.ipynb and the figures of the front page are those that lie in figures/rendered and
    results."""
    cells = json.loads((ROOT / "nbs/published.ipynb").read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    page = "\n".join("".join(output.get("data", {}).get("text/markdown", "")) for output in outputs)
    claims = pd.read_csv(ROOT / "figures/rendered/laptop/claims.csv", dtype={"claim": str})
    published = published_runs(ROOT / "results/laptop")
    pooled = pooled_effects(pd.read_csv(ROOT / "figures/rendered/laptop/effects.csv"))
    for table in (claims_table(claims, pooled=pooled), reproducibility_table(published, PRESETS["laptop"])):
        assert as_markdown(table) in page, "run nbs/published.ipynb"
    assert f"claims {', '.join(refuted_among_all(claims))} would still be refuted" in page, "run nbs/published.ipynb"
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(" ".join(claims.runs.dropna()).split()) <= set(published.experiment)
    rendered = [ROOT / "figures/rendered" / preset for preset in ("paper", "laptop2", "laptop")]
    drawn = [path for folder in rendered for path in folder.glob("fig??.svg")]
    displayed = {path.stem: path.relative_to(ROOT).as_posix() for path in drawn}
    shown = re.findall(r'src="(figures/rendered/\w+/fig\d\d\.svg)"', page)
    assert len(displayed) > 10 and sorted(shown) == sorted(displayed.values()), "run nbs/index.ipynb, then make prepare"
    assert set(displayed) <= set(FIGURES)
