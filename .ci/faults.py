"""What `make bench-faults` runs: the tests of survival with full counts; their figures are printed and kept in
results/bench/faults.txt. `python .ci/faults.py runs/test_index …` runs and prints some of them, and keeps nothing."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = (
    "sweep/test_survival",
    "sweep/test_faults",
    "sweep/test_machines",
    "runs/test_index",
    "runs/test_files",
    "runs/test_verify",
    "robustness/test_archives",
    "data/test_data",
)


def main():
    tests = sys.argv[1:] or TESTS
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "report"
        said.touch()
        environment = os.environ | {
            "SPARSE_NB_FAULTS": "full",
            "SPARSE_NB_FAULTS_REPORT": str(said),
            "OMP_NUM_THREADS": "1",
        }
        status = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *(f"tests/{name}.py" for name in tests)], cwd=ROOT, env=environment
        ).returncode
        lines = said.read_text(encoding="utf-8")
    print(f"\n{lines}", end="")
    if status == 0 and tests == TESTS:
        (ROOT / "results/bench/faults.txt").write_text(lines, encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
