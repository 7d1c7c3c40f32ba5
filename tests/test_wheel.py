"""The package as somebody has it who has no checkout: an sdist that is complete, and a wheel that draws."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from email import message_from_string
from pathlib import Path
from urllib.parse import unquote

import pandas as pd
import pytest
import yaml

ROOT = Path(__file__).parent.parent
FIGURES = {path.name for path in (ROOT / "figures").glob("*.ipynb")}
SMALL = ("--families", "mlp", "--epochs", "2", "--widths", "32", "128")  # four networks, trained in a second
ADDED = re.compile(r"(PKG-INFO|setup\.cfg|\w+\.egg-info/.*)")  # by setuptools


@pytest.fixture(scope="module")
def names():
    """The files that git has, or would have after a commit."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("this is not a git repository")
    return {name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def built(names, tmp_path_factory):
    """The folder of an sdist, and of the wheel that was built from it, made from a copy of what git has."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("dist")
    for name in names:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, copy]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The folder that the wheel is installed in, without what it requires."""
    (wheel,) = built.glob("*.whl")
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", folder, wheel]
    subprocess.run(command, check=True, timeout=120)
    return folder


@pytest.fixture
def sparse_nb(installed, tmp_path):
    """A function that runs the installed command in an empty folder and returns what it said."""

    def run(*words):
        command = [sys.executable, "-m", "sparse_nb", *map(str, words)]
        environment = os.environ | {"PYTHONPATH": str(installed)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_an_sdist_has_what_git_has(built, names):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert {name for name in packed if not ADDED.fullmatch(name)} == names


def test_a_wheel_has_the_notebooks_that_it_runs(installed):
    there = {path.relative_to(installed / "sparse_nb") for path in (installed / "sparse_nb").rglob("*.ipynb")}
    wanted = {Path("notebooks/figures", name) for name in FIGURES} | {Path("notebooks/nbs/explore.ipynb")}
    assert len(FIGURES) >= 15 and there == wanted
    for path in there:
        source = ROOT / path.relative_to("notebooks")
        assert (installed / "sparse_nb" / path).read_bytes() == source.read_bytes()


def test_links_of_the_long_description_hold_away_from_the_project(installed):
    (metadata,) = installed.glob("*.dist-info/METADATA")
    text = message_from_string(metadata.read_text(encoding="utf-8")).get_payload()
    links = [a or b for a, b in re.findall(r'\]\(([^)\s]+)\)|(?:src|href)="([^"]+)"', text)]
    assert len(links) > 30 and [link for link in links if not link.startswith("https://")] == []
    home = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["repository-code"]
    inside = [re.fullmatch(rf"{home}/(?:blob|raw)/main/(.+)", link) for link in links if link.startswith(home)]
    assert len(inside) > 20 and [link[1] for link in inside if not (ROOT / unquote(link[1])).exists()] == []


def test_a_wheel_draws_in_an_empty_folder(sparse_nb, installed, tmp_path):
    sparse_nb("figures", "fig01", *SMALL)
    folder = tmp_path / "figures/rendered/smoke"
    endings = ("csv", "html", "ipynb", "png", "svg")
    assert {path.name for path in folder.iterdir()} == {*(f"fig01.{ending}" for ending in endings), "plotly.min.js"}
    ran = json.loads((folder / "fig01.ipynb").read_text(encoding="utf-8"))["metadata"]["papermill"]["input_path"]
    assert Path(ran).parent == installed / "sparse_nb/notebooks/figures"
    drawn = pd.read_csv(folder / "fig01.csv").query("quantity == 'accuracy'")
    assert set(drawn.width) == {32, 128} and drawn["mean"].between(0, 1).all()
    assert set(" ".join(drawn.runs).split()) == {path.parent.name for path in tmp_path.glob("runs/*/manifest.json")}

    sparse_nb("explore", "--static", "curves.html", *SMALL)
    assert "plotly" in (tmp_path / "curves.html").read_text(encoding="utf-8").lower()


def test_a_wheel_writes_a_study_that_it_reads(sparse_nb, tmp_path):
    sparse_nb("study", "new", "my.toml")
    assert "study my is right" in sparse_nb("study", "check", "my.toml")
    version = re.search(r"^version = (.+)$", (ROOT / "settings.ini").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert sparse_nb("--version") == f"sparse-nb {version}\n"
