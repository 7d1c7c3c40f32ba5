"""What the markers of pyproject.toml ask for: a test whose needs are not met here is skipped, and says why."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests/golden")]


def unmet(marker, config):
    """Why a test with `marker` cannot run here, or None."""
    root = os.environ.get("SPARSE_NB_DATA")
    if marker == "data" and not root:
        return "needs the real images: SPARSE_NB_DATA is not set"
    if marker == "data" and not all((Path(root) / part).is_dir() for part in ("MNIST/raw", "cifar-10-batches-py")):
        return f"needs the real images: SPARSE_NB_DATA={root} lacks MNIST/raw or cifar-10-batches-py"
    if marker == "gpu" and not torch.cuda.is_available():
        return "needs a CUDA device"
    if marker == "book" and "book" not in config.option.markexpr:
        return "builds the book, a minute: pytest -m book"
    if marker == "book" and not importlib.util.find_spec("sphinx"):
        return "needs Sphinx, which make book installs"
    if marker == "slow" and "slow" not in config.option.markexpr:
        return "takes minutes: pytest -m slow"
    return None


def pytest_collection_modifyitems(config, items):
    for item in items:
        for marker in item.iter_markers():
            if reason := unmet(marker.name, config):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Networks this small train many times faster with one thread wherever cores are shared, in this process and in
    those it starts."""
    threads, before = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    torch.set_num_threads(threads)
    os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)


@pytest.fixture
def report():
    """A function that adds a line, a name and words, to the report of `make bench-faults`."""

    def add(name, words):
        if path := os.environ.get("SPARSE_NB_FAULTS_REPORT"):
            with open(path, "a", encoding="utf-8") as file:
                print(f"{name:<48}{words}", file=file)

    return add


@pytest.fixture(scope="session")
def run_in():
    """run(folder, *words): (status, output and errors) of the command, as a user runs it: in a new process whose
    current folder is `folder`."""
    code = "import sys; sys.path = [p for p in sys.path if p]; from sparse_nb.cli.main import main; main(sys.argv[1:])"

    def run(folder, *words):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", code, *words]
        ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        return ran.returncode, ran.stdout + ran.stderr

    return run
