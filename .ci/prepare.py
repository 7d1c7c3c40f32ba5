"""What `make prepare` runs: modules from notebooks, notebooks without what differs from run to run, README.md from its
notebook."""

import os
import subprocess
import sys
from pathlib import Path

from nbdev.export import nb_export

BIN = Path(sys.executable).parent


def main():
    for command in (
        ["nbdev_export"],
        *(["nbdev_clean", "--fname", folder] for folder in ("nbs", "figures", "benchmarks")),
    ):
        subprocess.run([BIN / command[0], *command[1:]], check=True)
    subprocess.run([sys.executable, Path(__file__).with_name("readme.py")], check=True)
    os.chdir("benchmarks")
    nb_export("bench.ipynb", lib_path=".", solo_nb=True)


if __name__ == "__main__":
    main()
