"""A family and a dataset of somebody's own: trained in workers, named by their versions, refused before training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
NETS = """from torch import nn

from .parts import SLOPE


def tiny(image_shape, classes, *, width, depth):
    return nn.Sequential(nn.Conv2d(image_shape[0], width, 3, 2), nn.LeakyReLU(SLOPE), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(4 * width, classes))


tiny.version = "1"
"""
IMAGES = """import torch


def stripes(split):
    images = torch.zeros(60, 3, 8, 8, dtype=torch.uint8)
    images[::2, :, ::2] = 255
    images[1::2, :, :, ::2] = 255
    return images, torch.arange(60) % 2, ["rows", "columns"]


stripes.version = "1"
"""
STUDY = """datasets = ["ourlab.images:stripes"]
rules = ["erk"]
seeds = 1
figures = ["fig01"]

[families."ourlab.nets:tiny"]
base = 4
widths = [4, 8]
recipe = {epochs = 1, batch_size = 20}

[weight_noise]
sigmas = [0, 0.5]
draws = 1
"""


@pytest.fixture
def lab(tmp_path):
    """A folder with a package and a study, in which `sparse-nb` is run as a user runs it."""
    (tmp_path / "ourlab").mkdir()
    (tmp_path / "ourlab/parts.py").write_text("SLOPE = 0.1\n")
    (tmp_path / "ourlab/nets.py").write_text(NETS)
    (tmp_path / "ourlab/images.py").write_text(IMAGES)
    (tmp_path / "stripes.toml").write_text(STUDY)
    return tmp_path


def run(folder, *words):
    """(status, output and errors) of the command in a new process with `folder` as its current folder."""
    code = "import sys; sys.path = [p for p in sys.path if p]; from sparse_nb.cli.main import main; main(sys.argv[1:])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *words]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return ran.returncode, ran.stdout + ran.stderr


def replace(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_it_is_trained_in_workers_and_a_changed_text_is_refused(lab):
    status, said = run(lab, "sweep", "stripes.toml", "--workers", "1")
    assert status == 0 and "2 networks: 2 made now" in said, said
    remembered = json.loads((lab / "runs/.own.json").read_text())
    assert set(remembered) == {"ourlab.nets:tiny@1", "ourlab.images:stripes@1"}
    abouts = [json.loads(path.read_text()) for path in (lab / "runs").glob("*/experiment.json")]
    assert {about["experiment"]["family"] for about in abouts} == {"ourlab.nets:tiny@1"}
    assert {about["result"]["effective_density"] for about in abouts} == {0.5, 1.0}  # of 280 and 140 weights

    replace(lab / "ourlab/nets.py", "def tiny", "# a comment\ndef tiny")
    status, said = run(lab, "sweep", "stripes.toml", "--seeds", "2")
    assert status == 0 and "4 networks: 2 made now, 2 already there" in said, said

    replace(lab / "ourlab/parts.py", "0.1", "0.2")
    status, said = run(lab, "sweep", "stripes.toml", "--seeds", "3")
    assert status == 1 and "the code changed under the same version" in said, said
    assert "give tiny.version another text" in said and "Traceback" not in said

    replace(lab / "ourlab/nets.py", 'version = "1"', 'version = "2"')
    status, said = run(lab, "sweep", "stripes.toml")
    assert status == 0 and "2 networks: 2 made now" in said, said

    replace(lab / "ourlab/images.py", "255\n    return", "254\n    return")
    status, said = run(lab, "sweep", "stripes.toml")
    assert status == 1 and "ourlab.images:stripes@1 is not what it was" in said, said


MISTAKES = {
    "no module": (
        "stripes.toml",
        "ourlab.nets",
        "ourlab.nest",
        'line 6: families."ourlab.nest:tiny": there is no module',
    ),
    "no function": ("stripes.toml", "nets:tiny", "nets:tinny", "has no function tinny; did you mean tiny?"),
    "no version": ("ourlab/nets.py", 'tiny.version = "1"', "", 'write tiny.version = "1" below the function'),
    "shape": ("ourlab/nets.py", "width, classes)", "width, 3)", "gives torch.float32 (2, 3) for images (2, 3, 8, 8)"),
    "no network": ("ourlab/nets.py", "return nn.Sequential", "return len", "cannot be built with"),
    "too narrow": (
        "stripes.toml",
        "[4, 8]",
        "[3, 8]",
        'line 8: families."ourlab.nets:tiny".widths: the network of width 3',
    ),
    "bits": ("stripes.toml", "seeds =", 'bits = "portble"\nseeds =', "bits is 'portble'; accepted: native, portable"),
    "no portable form": (
        "stripes.toml",
        "seeds =",
        'bits = "portable"\nseeds =',
        "a portable network begins with models.Normalise",
    ),
    "labels": ("ourlab/images.py", "% 2", "% 3", "labels lie in 0 .. 2; they must lie in 0 .. 1"),
    "pixels": ("ourlab/images.py", ", dtype=torch.uint8", "", "images are torch.float32"),
    "a broken module": (
        "ourlab/nets.py",
        "from .parts",
        "from .prats",
        "cannot be imported: No module named 'ourlab.prats'",
    ),
    "a figure without it": (
        "stripes.toml",
        "fig01",
        "fig09",
        "line 4: figures has fig09, which shows none of the families",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_before_any_training(lab, mistake, monkeypatch, capsys):
    file, old, new, words = MISTAKES[mistake]
    replace(lab / file, old, new)
    from sparse_nb import data
    from sparse_nb.cli.main import main

    for name in [name for name in sys.modules if name.partition(".")[0] == "ourlab"]:
        del sys.modules[name]
    monkeypatch.chdir(lab)
    monkeypatch.setattr(sys, "path", [*sys.path])
    data._own_sets.cache_clear(), data._own_checksum.cache_clear()
    with pytest.raises(SystemExit) as ended:
        main(["sweep", "stripes.toml"])
    said = capsys.readouterr().err
    assert ended.value.code == 1 and words in said and said.count("\n") == 1, said
    assert not (lab / "runs").exists() or not list((lab / "runs").glob("*/manifest.json"))


def test_an_archive_cannot_have_code_called(lab):
    """A run that names a function of an installed module is data, and stays data."""
    code = """
from sparse_nb import data
from sparse_nb.study.experiments import Experiment
from sparse_nb.networks.training import Recipe
for what in (lambda: data.SIZES["os:system@1"], lambda: data.load_images("os:system", "test"),
             lambda: Experiment("digits", "os:system@1", 4, 1, 10, 0, Recipe())):
    try:
        what()
    except ValueError as error:
        print(error)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert ran.stdout.count("is code that no study opened here names") == 3, ran.stdout + ran.stderr
