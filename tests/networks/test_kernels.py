"""Kernels where numba finds no folder for its cache, as in a container whose package and home are read-only."""

import subprocess
import sys

import numba
import pytest
from numba.core import caching

from sparse_nb.networks import kernels

CACHE = getattr(caching, "CacheImpl", None) or caching._CacheImpl  # the private name is that of older releases


def test_compiling_needs_no_cache(monkeypatch):
    monkeypatch.setattr(CACHE, "_locator_classes", [])

    def twice(x):
        return 2 * x

    with pytest.raises(RuntimeError, match="no locator available"):
        numba.njit(cache=True)(twice)
    assert kernels._compiled(twice)(21) == 42


NOWHERE = """
from numba.core import caching
(getattr(caching, "CacheImpl", None) or caching._CacheImpl)._locator_classes = []
import torch
from sparse_nb.networks import masks, models, sparse_layers
model = models.build_model("mlp", (1, 8, 8), 10, width=300, depth=1)
kept = masks.random_masks(model, 900, seed=0)
masks.initialise(model, kept, seed=0)
images = torch.rand(5, 1, 8, 8)
wanted = model(images)
print((sparse_layers.sparse_network(model, kept)(images) - wanted).abs().max().item() < 1e-5)
"""


def test_a_sparse_network_runs_without_a_cache():
    said = subprocess.run([sys.executable, "-c", NOWHERE], capture_output=True, text=True)
    assert said.stdout == "True\n", said.stderr
