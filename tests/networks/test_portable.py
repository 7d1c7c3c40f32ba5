"""Portable kernels give the bits that are listed, on this machine as it is and as one with AVX2 only.

And their code is kept on the disk, or not, as the disk allows.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import portable
import pytest

ROOT = Path(__file__).parents[2]
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}  # threads that wait do not compute


def run(command, **environment):
    """What Python prints, in a process with more in its environment, in the folder of the package to import."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **PASSIVE, **environment}
    how = dict(env=environment, capture_output=True, text=True, cwd=environment["PYTHONPATH"])
    found = subprocess.run([sys.executable, *command], **how)
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


def check(threads, environment, *datasets):
    """Compare the cases with the listed ones; NUMBA_CPU_NAME and the others are read when a process starts."""
    out = run([portable.__file__, *datasets], OMP_NUM_THREADS=str(threads), **environment)
    found, listed = json.loads(out), portable.listed()
    assert set(found) <= set(listed) and len(found) > 15
    assert found == {name: listed[name] for name in found}


@pytest.mark.parametrize("threads, environment", ((1, {}), (2, portable.AVX2)), ids=("as it is", "AVX2, two threads"))
def test_portable_bits(threads, environment):
    check(threads, environment, "digits")


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("environment", ({}, portable.AVX2), ids=("as it is", "AVX2"))
@pytest.mark.parametrize("threads", (1, 2))
def test_portable_bits_of_mnist(threads, environment):
    check(threads, environment, "digits", "mnist")


OTHER_TILES = """
import sys
from sparse_nb.networks import lanes
here = lanes.long_registers()
lanes.long_registers = lambda: not here
sys.path.insert(0, sys.argv[1])
import cases
from sparse_nb.networks.convolution_kernels import _PIXELS
assert _PIXELS == (1 if here else 4)
for name in sys.argv[2:]:
    print(cases.compute(name)["bits"])
"""


def test_tiles_of_another_processor_give_the_same_bits(tmp_path):
    names = ["portable vgg, proportional", "portable resnet, water-filling"]
    out = run(["-c", OTHER_TILES, str(ROOT / "tests/golden"), *names], NUMBA_CACHE_DIR=str(tmp_path))
    assert out.split() == [portable.listed()[name] for name in names]


USE = """
import sys, torch, sparse_nb
from sparse_nb.networks import cross_entropy, dense_kernels
assert sparse_nb.__path__[0].startswith(sys.argv[1]), sparse_nb.__path__
logits = dense_kernels.linear(torch.arange(6.0).view(2, 3), torch.ones(4, 3))
loss = cross_entropy.cross_entropy(logits, torch.tensor([0, 1]))
hits = sum(sum(f.stats.cache_hits.values()) for f in (cross_entropy._losses, dense_kernels._forward))
print(loss.item(), hits)
"""


def test_code_is_kept_on_the_disk(tmp_path):
    cache = {"NUMBA_CACHE_DIR": str(tmp_path)}
    first, second = (run(["-c", USE, str(ROOT)], **cache).split() for _ in range(2))
    assert first == [second[0], "0"] and second[1] == "2"


def test_code_works_where_nothing_can_be_written(tmp_path):
    shutil.copytree(ROOT / "sparse_nb", tmp_path / "sparse_nb", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in (tmp_path / "sparse_nb", *(tmp_path / "sparse_nb").rglob("*")):
        if folder.is_dir():
            (folder / "__pycache__").touch()  # a file where a folder is wanted: holds root back as well
    nowhere = str(tmp_path / "sparse_nb/__init__.py/nothing")
    environment = {"HOME": nowhere, "XDG_CACHE_HOME": nowhere, "NUMBA_CACHE_DIR": "", "PYTHONDONTWRITEBYTECODE": "1"}
    value, hits = run(["-c", USE, str(tmp_path)], **environment, PYTHONPATH=str(tmp_path)).split()
    assert hits == "0" and abs(float(value) - 1.3862943611) < 1e-6  # four equal logits
