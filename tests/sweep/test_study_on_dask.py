"""A study in a file, with a family of the user's own, on a Dask cluster: through the command, as a user runs it."""

import pandas as pd
import pytest

from sparse_nb.runs.queries import Records

NETS = """from torch import nn


def tiny(image_shape, classes, *, width, depth):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, width), nn.LeakyReLU(), nn.Linear(width, classes))


tiny.version = "1"
"""
STUDY = """datasets = ["digits"]
rules = ["erk"]
seeds = 1
figures = ["fig01"]

[families."ourlab.nets:tiny"]
base = 4
widths = [4, 8]
recipe = {epochs = 1, batch_size = 32}

[weight_noise]
sigmas = [0, 0.5]
draws = 1
"""


@pytest.fixture
def lab(tmp_path):
    (tmp_path / "ourlab").mkdir()
    (tmp_path / "ourlab/nets.py").write_text(NETS)
    (tmp_path / "tiny.toml").write_text(STUDY)
    return tmp_path


def test_workers_of_a_cluster_find_a_family_by_its_import_path(lab, run_in):
    status, said = run_in(lab, "sweep", "tiny.toml", "--engine", "dask", "--workers", "2", "--runs", "cluster")
    assert status == 0 and "2 networks: 2 made now" in said, said
    status, said = run_in(lab, "sweep", "tiny.toml", "--runs", "here")
    assert status == 0 and "2 networks: 2 made now" in said, said
    columns = ["experiment", "evaluation", "quantity", "strength", "draw", "value", "family", "train_loss"]
    tables = [Records(lab / runs).table()[columns] for runs in ("cluster", "here")]
    pd.testing.assert_frame_equal(*tables)
    assert set(tables[0].family) == {"ourlab.nets:tiny@1"} and len(tables[0]) == 2 * 4

    status, said = run_in(lab, "sweep", "tiny.toml", "--engine", "dask", "--workers", "2", "--runs", "cluster")
    assert status == 0 and "2 networks: 0 made now, 2 already there" in said, said


def test_what_is_wrong_in_a_family_is_said_before_a_cluster_is_made(lab, run_in):
    (lab / "ourlab/nets.py").write_text(NETS.replace("width, classes)", "width, 3)"))
    status, said = run_in(lab, "sweep", "tiny.toml", "--engine", "dask", "--workers", "1", "--runs", "cluster")
    assert status == 1 and "gives torch.float32 (2, 3)" in said and "Traceback" not in said, said
    assert not (lab / "cluster").exists()
