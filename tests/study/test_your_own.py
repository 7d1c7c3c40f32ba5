"""Families, datasets, masks and corruptions of the user's own: trained in workers, named by their versions, refused
before training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
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


MASKS = """import math

import torch
from sparse_nb.networks.allocation import allocate


def same_fan_in(shapes, budget, *, generator):
    masks = {}
    for (name, shape), kept in zip(shapes.items(), allocate(list(shapes.values()), budget)):
        units, inputs = shape[0], math.prod(shape[1:])
        share = torch.full((units,), kept // units)
        share[torch.randperm(units, generator=generator)[: kept % units]] += 1
        rank = torch.rand(units, inputs, generator=generator).argsort(1).argsort(1)
        masks[name] = (rank < share[:, None]).view(shape)
    return masks


same_fan_in.version = "1"
"""
DAMAGE = """import torch


def scratches(pixels, severity, *, generator):
    count, width = len(pixels), pixels.shape[-1]
    places = torch.randint(width, (count, severity), generator=generator)
    scratched = torch.zeros(count, width, dtype=torch.bool).scatter_(1, places, True)
    return pixels.masked_fill(scratched[:, None, None], 255)


scratches.version = "1"
"""
OF_MASKS = """datasets = ["digits"]
rules = ["water_filling", "ourlab.masks:same_fan_in"]
seeds = 1
figures = ["fig02", "fig04", "fig09", "fig13"]

[families.mlp]
base = 16
widths = [16, 64]
recipe = {epochs = 3, batch_size = 32}

[weight_noise]
sigmas = [0, 0.3]
draws = 1

[corruption]
names = ["fog", "ourlab.damage:scratches"]
draws = 1
test_images = 100
"""


@pytest.fixture
def lab(tmp_path):
    """A folder with a package and a study, in which `sparse-nb` is run as a user runs it."""
    (tmp_path / "ourlab").mkdir()
    (tmp_path / "ourlab/parts.py").write_text("SLOPE = 0.1\n")
    (tmp_path / "ourlab/nets.py").write_text(NETS)
    (tmp_path / "ourlab/images.py").write_text(IMAGES)
    (tmp_path / "stripes.toml").write_text(STUDY)
    (tmp_path / "ourlab/masks.py").write_text(MASKS)
    (tmp_path / "ourlab/damage.py").write_text(DAMAGE)
    (tmp_path / "masks.toml").write_text(OF_MASKS)
    return tmp_path


def replace(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_it_is_trained_in_workers_and_a_changed_text_is_refused(lab, run_in):
    status, said = run_in(lab, "sweep", "stripes.toml", "--workers", "1")
    assert status == 0 and "2 networks: 2 made now" in said, said
    remembered = json.loads((lab / "runs/.own.json").read_text())
    assert set(remembered) == {"ourlab.nets:tiny@1", "ourlab.images:stripes@1"}
    abouts = [json.loads(path.read_text()) for path in (lab / "runs").glob("*/experiment.json")]
    assert {about["experiment"]["family"] for about in abouts} == {"ourlab.nets:tiny@1"}
    assert {about["result"]["effective_density"] for about in abouts} == {0.5, 1.0}  # of 280 and 140 weights

    replace(lab / "ourlab/nets.py", "def tiny", "# a comment\ndef tiny")
    status, said = run_in(lab, "sweep", "stripes.toml", "--seeds", "2")
    assert status == 0 and "4 networks: 2 made now, 2 already there" in said, said

    replace(lab / "ourlab/parts.py", "0.1", "0.2")
    status, said = run_in(lab, "sweep", "stripes.toml", "--seeds", "3")
    assert status == 1 and "the code changed under the same version" in said, said
    assert "give tiny.version another text" in said and "Traceback" not in said

    replace(lab / "ourlab/nets.py", 'version = "1"', 'version = "2"')
    status, said = run_in(lab, "sweep", "stripes.toml")
    assert status == 0 and "2 networks: 2 made now" in said, said

    replace(lab / "ourlab/images.py", "255\n    return", "254\n    return")
    status, said = run_in(lab, "sweep", "stripes.toml")
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
    "no network": ("ourlab/nets.py", "return nn.Sequential", "return len", "(called with "),
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
    "no rule": ("masks.toml", "masks:same", "masks:sane", "line 2: rules: ourlab.masks"),
    "another budget": (
        "ourlab/masks.py",
        "values()), budget)",
        "values()), budget - 1)",
        "keeps 12,703 weights; accepted: 12,704, the budget (mlp, width 64, depth 1, on digits)",
    ),
    "a mask's shape": (
        "ourlab/masks.py",
        ".view(shape)",
        ".T",
        "gives, for hidden1.weight, a torch.bool (784, 64); accepted: a number, or a torch.bool (64, 784)",
    ),
    "numbers for masks": ("ourlab/masks.py", "(rank < share[:, None])", "rank", "a torch.int64 (64, 784); accepted"),
    "another mask each time": (
        "ourlab/masks.py",
        "torch.rand(units, inputs, generator=generator)",
        "torch.rand(units, inputs)",
        "keeps other weights when it is called again with the same generator",
    ),
    "a rule that fails": ("ourlab/masks.py", "return masks", "return mask", "same_fan_in: NameError: name 'mask'"),
    "no corruption": ("masks.toml", '"fog"', '"fig"', "line 16: corruption.names has 'fig'; accepted: shot_noise"),
    "too severe": ("masks.toml", "test_images", "severities = [6]\ntest_images", "corruption.names: severity is 6"),
    "a corruption's shape": (
        "ourlab/damage.py",
        "255)",
        "255)[:1]",
        "gives torch.uint8 (1, 1, 28, 28) at severity 3; accepted: torch.uint8 (2, 1, 28, 28)",
    ),
    "floats": ("ourlab/damage.py", "255)", "255) / 255", "gives torch.float32 (2, 1, 28, 28) at severity 3"),
    "values up to 1": ("ourlab/damage.py", "255)", "255) // 255", "gives values from 0 to 1 at severity 3"),
    "another corruption each time": (
        "ourlab/damage.py",
        ", generator=generator)\n    scratched",
        ")\n    scratched",
        "gives other images when it is called again with the same generator",
    ),
    "no version of it": ("ourlab/damage.py", 'scratches.version = "1"', "", 'write scratches.version = "1" below the'),
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
    study = "masks.toml" if file in ("masks.toml", "ourlab/masks.py", "ourlab/damage.py") else "stripes.toml"
    from sparse_nb import data
    from sparse_nb.cli.main import main

    for name in [name for name in sys.modules if name.partition(".")[0] == "ourlab"]:
        del sys.modules[name]
    monkeypatch.chdir(lab)
    monkeypatch.setattr(sys, "path", [*sys.path])
    data._own_sets.cache_clear(), data._own_checksum.cache_clear()
    with pytest.raises(SystemExit) as ended:
        main(["sweep", study])
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


def test_a_mask_and_a_corruption_are_drawn_listed_and_judged(lab, run_in):
    status, said = run_in(lab, "figures", "masks.toml", "--no-pictures", "--workers", "1")
    assert status == 0 and "0 failed" not in said and "4 figures as html" in said, said
    rule, corruption = "ourlab.masks:same_fan_in@1", "ourlab.damage:scratches@1"
    drawn = lab / "figures/rendered/masks"
    tables = {name: pd.read_csv(drawn / f"{name}.csv") for name in ("fig02", "fig04", "fig13")}
    assert all(rule in set(table.rule) for table in tables.values())
    assert set(tables["fig13"].rule) == {"water_filling", "proportional", "erk", rule}
    for name in ("fig09", "fig09_ourlab.masks.same_fan_in"):
        kinds = pd.read_csv(drawn / f"{name}.csv")
        assert {"fog", corruption} <= set(kinds.name) and "scratches" in (drawn / f"{name}.html").read_text()

    abouts = [json.loads(path.read_text()) for path in (lab / "runs").glob("*/experiment.json")]
    sparse = [about for about in abouts if about["experiment"].get("rule") == rule]
    assert {about["experiment"].get("schedule", "static") for about in sparse} == {"static", "magnitude"}
    assert {about["result"]["density"] for about in sparse} == {0.25}
    assert json.loads((lab / "runs/.own.json").read_text()).keys() == {rule, corruption}

    for words, expected in {
        ("trace", str(drawn / "fig02.html")): f"static {rule} seed 0",
        ("status", "masks.toml", "--rules", "ourlab.masks:same_fan_in"): "all",
        ("claims", "masks.toml", "--no-pictures"): "undecided",
        ("explore", "masks.toml", "--static", "curves.html"): "curves.html",
        ("verify",): "checked",
    }.items():
        status, said = run_in(lab, *words)
        assert status == 0 and expected in said and "Traceback" not in said, said
    page = (lab / "curves.html").read_text()
    assert "same fan in" in page and "scratches" in page

    replace(lab / "ourlab/damage.py", "255)", "254)")
    status, said = run_in(lab, "sweep", "masks.toml", "--seeds", "2")
    assert status == 1 and f"{corruption} is not what it was" in said and "give scratches.version another text" in said
    replace(lab / "ourlab/damage.py", 'version = "1"', 'version = "2"')
    status, said = run_in(lab, "sweep", "masks.toml")
    assert status == 0 and "0 made now" in said and "3 measurements made now" in said, said
