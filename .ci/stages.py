"""What `make test` runs: every stage, a line for each, the log of a stage that failed, what pytest says, and last the
failed stages again with the ends of their logs.

Logs: .stages/.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / ".stages"
BIN = Path(sys.executable).parent
WORKERS = 2
SECONDS = 2400  # a stage that takes longer hangs
LAST_LINES = 25  # of a failed stage's log, repeated at the end


def run(command, log, cwd=ROOT, **variables):
    """Exit status of `command` with `variables` in its environment and its output in the open file `log`.

    It and all that it started are killed after SECONDS.
    """
    environment = {k: v for k, v in os.environ.items() if k != "IN_TEST"}  # which would make nbdev_export do nothing
    if (
        torch.backends.cpu.get_cpu_capability() == "AVX2"
    ):  # where tests with ResNets of few channels meet the fault of `jobs.sound_kernels`
        environment.setdefault("ONEDNN_MAX_CPU_ISA", "AVX")
    environment |= {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"} | variables
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        print(f"\nkilled after {SECONDS} s", file=log, flush=True)
        return 1
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def in_step(log):
    """0 if exporting, cleaning and writing the README changes nothing in a copy of what git would commit here; else the
    differences go to `log`."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if names.returncode:
        print("SKIPPED this is not a git repository", file=log, flush=True)
        return 0
    with tempfile.TemporaryDirectory() as copy:
        for name in filter(None, names.stdout.split("\0")):
            if (ROOT / name).is_file():
                target = Path(copy, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, target)
        git = ["git", "-c", "user.name=x", "-c", "user.email=x@x"]
        commands = [
            ["git", "init", "-q"],
            ["git", "add", "-A"],
            [*git, "commit", "-qm", "x"],
            [sys.executable, ".ci/prepare.py"],
        ]
        if any(run(command, log, cwd=copy) for command in commands):
            return 1
        return run(["git", "diff", "--exit-code", "--stat", "-p", "-U1"], log, cwd=copy)


def lint(log):
    commands = (
        [BIN / "ruff", "check", "--output-format", "concise"],
        # a name that only a test cell of the notebook imports is missing in the module
        [BIN / "ruff", "check", "--output-format", "concise", "--select", "F821", "sparse_nb"],
        [BIN / "ruff", "format", "--check"],
        [BIN / "mypy"],
    )
    return max([run(command, log) for command in commands])


def notebooks(log):
    data = os.environ.get("SPARSE_NB_DATA")
    real = data and (Path(data) / "MNIST/raw").is_dir() and (Path(data) / "cifar-10-batches-py").is_dir()
    if not real:
        print(
            "SKIPPED cells marked data: SPARSE_NB_DATA does not hold the real MNIST and CIFAR-10", file=log, flush=True
        )
    command = [
        BIN / "nbdev_test",
        "--n_workers",
        str(WORKERS),
        "--do_print",
        "--timing",
        *(["--flags", "data"] if real else []),
    ]
    return run(command, log, OMP_NUM_THREADS=str(max(1, (os.cpu_count() or 1) // WORKERS)))


PYTEST = [sys.executable, "-m", "pytest", "-q", "-rs", "-m"]


def outputs(log):
    return run([sys.executable, ".ci/outputs.py"], log, OMP_NUM_THREADS="1")


def timed_tests(log):
    return run([*PYTEST, "timed"], log)


def book(log):
    return run([*PYTEST, "book"], log)


def pytest(log):
    return run([*PYTEST, "not timed and not book", "-n", str(WORKERS), "--dist", "loadfile"], log)


def main():
    LOGS.mkdir(exist_ok=True)
    failed = {}
    for stage in (in_step, lint, notebooks, outputs, timed_tests, book, pytest):
        name = stage.__name__.replace("_", " ")
        print(f"{name:<14}", end="", flush=True)
        start = time.monotonic()
        with open(LOGS / f"{stage.__name__}.log", "w+", encoding="utf-8") as log:
            status = stage(log)
            print(f"{'FAILED' if status else 'ok':<8}{time.monotonic() - start:7.1f} s", flush=True)
            log.seek(0)
            said = log.read().splitlines()
        if status:
            failed[name] = said[-LAST_LINES:]
            print(*said, sep="\n")
        else:
            print(*(f"{line}\n" for line in said if line.startswith("SKIPPED")), sep="", end="")
        if stage in (timed_tests, book, pytest) and not status:
            print(said[-1])  # 12 passed, 3 skipped in 4.5s
    for name, said in failed.items():  # whoever is shown only the end of this output sees the reason
        print(f"\n{name} FAILED:", *said, sep="\n")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
