"""What another processor does with a training that was begun on this one: an MLP goes on, to the same bits, from
AVX-512 to AVX2; everything else begins again, so that its weights are those of one machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import portable
import pytest
import torch

from sparse_nb.networks.training import Recipe
from sparse_nb.study.experiments import Experiment

ROOT = Path(__file__).parents[2]
FULL = os.environ.get("SPARSE_NB_FAULTS") == "full"
COUNT = 20 if FULL else 2
HERE = torch.backends.cpu.get_cpu_capability()
# this machine's processor as an older one
OTHER = portable.AVX2 if HERE == "AVX512" else {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}

WORK = """
import json, sys
import torch
from sparse_nb import data
from sparse_nb.networks.training import Recipe
from sparse_nb.runs.files import read_manifest
from sparse_nb.runs.store import Store
from sparse_nb.study.experiments import Experiment
from sparse_nb.sweep.jobs import Job, run_job

class Killed(BaseException):
    pass

root, kill, networks = sys.argv[1], sys.argv[2] == "kill", eval(sys.argv[3])
store, first, load = Store(root), [], data.load_images
for number, network in enumerate(networks):
    seen = []
    def report(share, said):
        seen.append(said.split()[1])
        if kill and len(seen) == 2 + number % 2:
            raise Killed
    try:
        run_job(Job(network, True, ()), store, load, torch.device("cpu"), report=report, keep_every=0)
    except Killed:
        pass
    first.append(int(seen[0]))
found = {} if kill else [read_manifest(store.folder(network))["model.safetensors"] for network in networks]
print(json.dumps([torch.backends.cpu.get_cpu_capability(), first, found]))
"""


def work(root, networks, environment, kill=False):
    """(processor's instructions, first epoch of each training, checksums of the weights) of a process on a machine."""
    command = [sys.executable, "-c", WORK, str(root), "kill" if kill else "finish", repr(networks)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | environment | {"PYTHONPATH": path}
    found = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads(found.stdout.splitlines()[-1])


@pytest.mark.parametrize("family", ["mlp", "vgg"])
def test_a_state_of_another_processor(family, tmp_path, report):
    shape = dict(mlp=(48, 1, 5000), vgg=(4, 11, 9000))[family]
    networks = [
        Experiment("digits", family, *shape, seed, Recipe(epochs=4, batch_size=32, stop_loss=None), train_images=96)
        for seed in range(COUNT)
    ]
    here, first, _ = work(tmp_path / "crossed", networks, {}, kill=True)
    assert first == [1] * COUNT and len(list((tmp_path / "crossed").glob(".attempts/*/state"))) == COUNT
    there, first, crossed = work(tmp_path / "crossed", networks, OTHER)
    _, _, undisturbed = work(tmp_path / "undisturbed", networks, OTHER)
    assert here == HERE != there and crossed == undisturbed
    resumed = sum(epoch > 1 for epoch in first)
    assert resumed == (COUNT if family == "mlp" and {here, there} == {"AVX2", "AVX512"} else 0)
    kind = {"mlp": "MLP", "vgg": "VGG"}[family]
    report(
        f"{COUNT} {kind} states, {here} to {there}",
        f"{resumed} resumed, {COUNT - resumed} begun again; all weights those of one undisturbed machine",
    )
