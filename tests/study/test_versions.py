"""Names stay what they were, numbers too, and code that could change them is noticed."""

import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cases
from sparse_nb.networks.training import Recipe
from sparse_nb.study import experiments, versions

ROOT = Path(__file__).parents[2]
NAMES = json.loads((ROOT / "tests/golden/names.json").read_text(encoding="utf-8"))
MEASURES = {
    m.measure: m
    for m in (
        experiments.Clean,
        experiments.WeightNoise,
        experiments.ClassRecall,
        experiments.Corruption,
        experiments.Attack,
        experiments.Quantisation,
        experiments.Calibration,
        experiments.Curvature,
        experiments.CorrectImages,
    )
}


def described(entry):
    """The dataclass of an entry of names.json."""
    settings = {
        name: tuple(map(tuple, v)) if name == "origins" and v else tuple(v) if isinstance(v, list) else v
        for name, v in entry["settings"].items()
    }
    if "measure" in entry:
        return MEASURES[entry["measure"]](**settings)
    return experiments.Experiment(**settings | {"recipe": Recipe(**settings["recipe"])})


@pytest.mark.parametrize(
    "entry", NAMES["experiments"] + NAMES["evaluations"], ids=lambda entry: next(iter(entry["names"].values()))
)
def test_published_names_stay(entry, monkeypatch):
    made = described(entry)
    for version, name in entry["names"].items():
        if "measure" in entry:
            monkeypatch.setitem(versions.MEASURES, entry["measure"], version)
            assert versions.name_of("evaluation", experiments.evaluation_identity(made)) == name
        else:
            monkeypatch.setattr(versions, "TRAINING", version)
            assert versions.name_of("experiment", experiments.experiment_identity(made)) == name


def test_every_version_has_golden_names():
    assert {v for entry in NAMES["experiments"] for v in entry["names"]} >= {versions.FIRST["training"], "2"}
    assert {v for entry in NAMES["evaluations"] for v in entry["names"]} >= {
        *versions.MEASURES.values(),
        *(version for measure, version in versions.FIRST.items() if measure != "training"),
    }
    assert len(NAMES["experiments"] + NAMES["evaluations"]) >= 20


@pytest.fixture(scope="module")
def computed():
    """{case: what it comes to}, in a process with oneDNN as users have it; the tests cap it on AVX2 (.ci/stages.py)."""
    environment = {name: value for name, value in os.environ.items() if name != "ONEDNN_MAX_CPU_ISA"}
    done = subprocess.run([sys.executable, cases.__file__], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", cases.NAMES)
def test_golden_case(name, computed):
    assert cases.compare(name, computed[name], cases.listed()) is None


def test_golden_cases_say_what_was_checked(record_property):
    golden = cases.listed()
    versioned = {golden[name]["version"] for name in golden}
    assert set(golden) == set(cases.NAMES) and versioned == set(versions.versions_now()) - {"own"}  # of others' code
    listed = [name for name in golden if cases.kind_for(name) in golden[name]["bits"]]
    record_property(
        "checked", f"bits of {len(listed)} cases, losses of {len(golden) - len(listed)}, on {cases.machine()}"
    )


def test_the_lock_is_in_step_and_lists_every_version():
    versions.check_in_step()
    assert set(json.loads(versions.lock_file().read_text(encoding="utf-8"))) == set(versions.versions_now())


def copy_of_project(folder):
    """A copy of the package and of what `make versions` needs."""
    for name in ("sparse_nb", "tests/golden", ".ci"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def make_versions(project):
    return subprocess.run(
        [sys.executable, ".ci/versions.py"],
        cwd=project,
        env={"PYTHONPATH": str(project), "PATH": ""},
        capture_output=True,
        text=True,
    )


def edit(project, module, old, new):
    path = project / "sparse_nb" / f"{module.replace('.', '/')}.py"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def in_step(project):
    asked = "from sparse_nb.study import versions; versions.check_in_step()"
    return subprocess.run(
        [sys.executable, "-c", asked], cwd=project, env={"PYTHONPATH": str(project)}, capture_output=True, text=True
    )


def test_a_renamed_variable_needs_make_versions_and_another_order_of_summation_a_new_version(tmp_path):
    project = copy_of_project(tmp_path)
    edit(
        project,
        "networks.training",
        "losses, correct, sizes = [], [], []",
        "losses, correct, sizes = [], [], []  # nothing changes here",
    )
    assert in_step(project).returncode == 0
    edit(project, "networks.training", "order", "arrangement")
    assert "networks.training (shapes training)" in in_step(project).stderr
    said = make_versions(project)
    assert said.returncode == 0 and "the lock was renewed" in said.stdout, said.stdout + said.stderr
    assert in_step(project).returncode == 0

    edit(
        project,
        "networks.walks",
        "        h = filled(biases[i])\n        for e in range(starts[i], starts[i + 1]):",
        "        h = filled(biases[i])\n        for e in range(starts[i + 1] - 1, starts[i] - 1, -1):",
    )
    assert "networks.walks (shapes training, clean" in in_step(project).stderr
    said = make_versions(project)
    assert said.returncode == 1 and "raise versions.TRAINING" in said.stdout, said.stdout + said.stderr
    edit(project, "study.versions", 'TRAINING = "2"', 'TRAINING = "3"')
    edit(project, "study.versions", '), "2") | dict', '), "3") | dict')
    edit(project, "study.versions", '), "1"\n)', '), "2"\n)')
    said = make_versions(project)
    assert said.returncode == 0 and "made again for raised versions: attack" in said.stdout, said.stdout + said.stderr
    assert in_step(project).returncode == 0


LIVE = """
import sys, pathlib
from sparse_nb import data
from sparse_nb.sweep import sweep
from sparse_nb.study.experiments import Clean, Experiment, experiment_identity
from sparse_nb.runs.store import Store
from sparse_nb.networks.training import Recipe
net = [Experiment("digits", "mlp", 8, 1, 300, 0, Recipe(epochs=1))]
path = pathlib.Path(sys.argv[1])
path.write_text(path.read_text().replace("optimiser.zero_grad()", "optimiser.zero_grad(); pass"))
print(sweep.run(net, [Clean()], store=Store(sys.argv[2]), show=False, workers=int(sys.argv[3]) or None))
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_code_edited_under_a_live_process_never_gets_its_name(tmp_path, workers):
    project = copy_of_project(tmp_path / "project")
    path = project / "sparse_nb/networks/training.py"
    said = subprocess.run(
        [sys.executable, "-c", LIVE, path, tmp_path / "runs", str(workers)],
        cwd=project,
        env={"PYTHONPATH": str(project)},
        capture_output=True,
        text=True,
    )
    if workers:  # they would load the new code
        assert (
            said.returncode == 1
            and "training" in said.stderr.splitlines()[-1]
            and "start again" in said.stderr.splitlines()[-1]
        ), said.stderr
        assert not list((tmp_path / "runs").glob("*/manifest.json"))
    else:  # the old code runs, under the name that it had
        assert "changed on disk" in said.stderr and "1 made now" in said.stdout, said.stderr
        (about,) = [json.loads(p.read_text()) for p in (tmp_path / "runs").glob("*/experiment.json")]
        assert (
            about["code"] == versions.TRAINING and about["environment"]["text"] == versions.source_provenance()["text"]
        )


def test_a_worker_with_other_code_refuses(monkeypatch):
    from sparse_nb.sweep import jobs

    with pytest.raises(RuntimeError, match="other code"):
        jobs.run_elsewhere(None, jobs.Terms(".", None, "cpu", "0" * 16))


def test_a_new_field_at_its_default_renames_nothing_from_version_2_on():
    @dataclasses.dataclass(frozen=True)
    class Widened(experiments.Clean):
        colour: str = "red"

    for version, same in (("2", True), (versions.FIRST["clean"], False)):
        old, new = (
            versions.name_of("evaluation", versions.identity("evaluation", e, version, measure="clean"))
            for e in (experiments.Clean(), Widened())
        )
        assert (old == new) == same
    changed = versions.identity("evaluation", Widened(colour="blue"), "2", measure="clean")
    assert versions.name_of("evaluation", changed) != versions.name_of(
        "evaluation", versions.identity("evaluation", Widened(), "2", measure="clean")
    )


def test_the_package_reads_its_sources_before_anything_else():
    asked = "import sys, sparse_nb; print([m for m in sys.modules if m.startswith('sparse_nb.')])"
    said = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "['sparse_nb.study', 'sparse_nb.study.versions']"
    assert importlib.import_module("sparse_nb.study.versions") is versions
