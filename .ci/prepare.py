"""What `make prepare` runs: modules from notebooks, notebooks without what differs from run to run, README.md from its
notebook, and what is published in the pages of docs/."""

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

from nbdev.export import nb_export

BIN = Path(sys.executable).parent


def notebooks():
    """The notebooks that git holds, as an iterator of paths."""
    for folder in ("nbs", "figures", "benchmarks"):
        for notebook in Path(folder).rglob("*.ipynb"):
            if not {"rendered", ".ipynb_checkpoints"} & set(notebook.parts):
                yield notebook


def name_cells(notebook):
    """Give every cell without an id one in the file. Else nbdev makes up an id for the module and nbformat another for
    the notebook."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    nameless = [cell for cell in content["cells"] if "id" not in cell]
    for cell in nameless:
        cell["id"] = secrets.token_hex(4)
    if nameless:
        notebook.write_text(json.dumps(content, sort_keys=True, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def drop_progress(notebook):
    """Take what a notebook's cells wrote to the standard error, progress bars and warnings, out of its outputs, and the
    state of its widgets, which can be 100 MB, out of the file."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    content["metadata"].pop("widgets", None)
    for cell in content["cells"]:
        if "outputs" in cell:
            cell["outputs"] = [output for output in cell["outputs"] if output.get("name") != "stderr"]
    text = json.dumps(content, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    if text != notebook.read_text(encoding="utf-8"):
        notebook.write_text(text, encoding="utf-8")


def main():
    for notebook in notebooks():
        name_cells(notebook)
    for command in (
        ["nbdev_export"],
        *(["nbdev_clean", "--fname", folder] for folder in ("nbs", "figures", "benchmarks")),
    ):
        subprocess.run([BIN / command[0], *command[1:]], check=True)
    for notebook in notebooks():
        drop_progress(notebook)
    for script in (".ci/readme.py", "docs/values.py"):
        subprocess.run([sys.executable, script], check=True)
    os.chdir("benchmarks")
    nb_export("bench.ipynb", lib_path=".", solo_nb=True)


if __name__ == "__main__":
    main()
