"""How long a store with many runs takes: to be indexed, read, listed by `status`, and to begin a sweep again.

`python benchmarks/large_store.py 10000 100000` makes a store of each size in a temporary folder, and prints a line for
each question. Nothing is trained: the folders are those of finished runs, merged without their checkpoints.
"""

import argparse
import contextlib
import io
import json
import random
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from sparse_nb.cli.main import main as sparse_nb
from sparse_nb.runs.files import sha256
from sparse_nb.runs.record_files import records_text
from sparse_nb.runs.store import Store
from sparse_nb.study.experiments import evaluation_hash, evaluation_identity, experiment_hash, experiment_identity
from sparse_nb.study.plans import measurements, plan
from sparse_nb.study.studies import load
from sparse_nb.sweep.jobs import missing_jobs
from sparse_nb.sweep.sweep import run

WIDTHS = (8, 10, 12, 16, 20, 24, 32, 48, 64, 96)
STUDY = """datasets = ["digits"]
rules = ["water_filling"]
seeds = {seeds}
figures = ["fig01"]
beside = ["clean"]

[families.mlp]
base = 8
widths = {widths}
recipe = {{epochs = 1}}

[weight_noise]
sigmas = [0, 0.1, 0.3, 0.5]
draws = 3
"""


def write_study(folder: Path, runs: int) -> Path:
    """The file of a study with so many runs, a multiple of ten, in `folder`."""
    path = folder / "many.toml"
    path.write_text(STUDY.format(seeds=runs // len(WIDTHS), widths=list(WIDTHS)))
    return path


def records_of(evaluation, seed: int) -> list[dict]:
    """Records as an evaluation gives them, with random values."""
    chance = random.Random(seed)
    strengths = getattr(evaluation, "sigmas", (0.0,))
    draws = getattr(evaluation, "draws", 1)
    about = [(q, s, d) for q in ("accuracy", "loss") for s in strengths for d in range(draws)]
    return [
        {
            "measure": evaluation.measure,
            "quantity": quantity,
            "name": "",
            "strength": strength,
            "draw": draw,
            "value": chance.random(),
            "source": "",
        }
        for quantity, strength, draw in about
    ]


def write_run(root: Path, experiment, evaluations) -> None:
    """The folder of a finished run with its records, as merged without its checkpoint."""
    result = {
        "status": "epochs",
        "diverged_at": None,
        "epochs": 1,
        "train_loss": 1.0,
        "train_accuracy": 0.5,
        "seconds": 1.0,
        "counted": experiment.counted,
        "density": experiment.density,
        "effective_density": experiment.density,
        "distance": 1.0,
    }
    here = {"device": "cpu", "device_name": "made up", "cpu": "AVX2", "threads": 1, "torch": "2.9"}
    about = {**experiment_identity(experiment), "result": result, "environment": here}
    epoch = {"epoch": 0, "loss": 1.0, "accuracy": 0.5, "learning_rate": 0.01, "seconds": 1.0}
    files = {
        "experiment.json": json.dumps(about, indent=1).encode(),
        "history.jsonl": json.dumps(epoch).encode() + b"\n",
    }
    checksums = {name: sha256(content) for name, content in files.items()} | {"model.safetensors": sha256(b"")}
    folder = root / experiment_hash(experiment)
    (folder / "evaluations").mkdir(parents=True)
    for name, content in {**files, "manifest.json": json.dumps(checksums, indent=1).encode()}.items():
        (folder / name).write_bytes(content)
    for evaluation in evaluations:
        identity = evaluation_identity(evaluation)
        name = evaluation_hash(evaluation)
        text = records_text(folder.name, identity, records_of(evaluation, experiment.seed))
        (folder / "evaluations" / f"{name}.jsonl").write_bytes(text)


def write_store(root: Path, study: Path) -> dict:
    """The folders of all runs of a study, below `root`; returns what the study wants, {experiment: its evaluations}."""
    preset = load(study)
    wanted = measurements(plan("fig01", preset), preset)
    for experiment, evaluations in wanted.items():
        write_run(root, experiment, evaluations)
    return wanted


def quiet(*words: str) -> None:
    """The command `sparse-nb`, in this process, without its output."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        sparse_nb(words)


def timed(words: str, call: Callable):
    """What `call` returns, with a line about the seconds that it took."""
    start, cpu = time.monotonic(), time.process_time()
    found = call()
    print(f"  {words:<58}{time.monotonic() - start:8.2f} s{time.process_time() - cpu:8.2f} s of CPU", flush=True)
    return found


def measure(root: Path, study: Path) -> None:
    """Ask a store of `write_store` whatever takes longer the more runs there are."""
    store, one = Store(root), {"seed": 0}
    timed("the index is made", store.runs)
    timed("all runs, index there", store.runs)
    timed("all records", store.table)
    timed("the records of one seed", lambda: store.table(**one))
    timed("status of smoke", lambda: quiet("status", "--runs", str(root)))
    preset = load(study)
    points = timed("the study is planned", lambda: plan("fig01", preset))
    wanted = measurements(points, preset)
    timed("what is missing of it", lambda: missing_jobs(wanted, wanted, store))
    timed("status of the study", lambda: quiet("status", str(study), "--runs", str(root)))
    timed("a sweep of it begins and ends", lambda: run(wanted, wanted, store=store, device="cpu", show=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=int, nargs="+", help="sizes of stores, multiples of ten, such as 10000")
    parser.add_argument("--folder", type=Path, help="where stores are made, or lie already; else a temporary folder")
    command = parser.parse_args()
    torch.set_num_threads(1)
    for runs in command.runs:
        with tempfile.TemporaryDirectory() as made:
            folder = (command.folder or Path(made)) / str(runs)
            folder.mkdir(parents=True, exist_ok=True)
            study = write_study(folder, runs)
            print(f"{runs:,} runs", flush=True)
            if not (folder / "runs").exists():
                timed("the store is made", partial(write_store, folder / "runs", study))
            measure(folder / "runs", study)


if __name__ == "__main__":
    main()
