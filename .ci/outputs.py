"""Are the outputs stored in the chapters those of this code?

Executes chapters as nbdev_test does, without cells marked slow, gpu or data, and compares what they print with what is
stored: words exactly, numbers to one part in a thousand or 1e-8, pictures by their presence. Outputs of cells tagged
`volatile` (times, memory) may differ. With --write the outputs are stored instead.

    python .ci/outputs.py [--write] [NOTEBOOK …]

Without names: the chapters changed since the last tag, or in the last commit where there is no tag; all with CI_FULL=1.
"""

import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = re.compile(r"^#\|\s*(slow|gpu|data|eval:\s*false)\b", re.MULTILINE)
NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:e[-+]?\d+)?", re.IGNORECASE)
PASSING = [  # what differs from run to run wherever it occurs
    (re.compile(r"/tmp/[\w./-]+"), "/tmp/…"),
    (re.compile(r"0x[0-9a-f]{6,}"), "0x…"),
    (re.compile(r"\x1b\[[0-9;]*m"), ""),
]
TOLERANCE = 1e-3
RESIDUE = 1e-8  # smaller differences are what rounding leaves behind, and every kind of processor rounds in its own way


def chapters():
    return sorted(
        path
        for folder in ("nbs", "benchmarks")
        for path in (ROOT / folder).rglob("*.ipynb")
        if ".ipynb_checkpoints" not in path.parts
    )


def changed():
    """The chapters changed since the last tag, or in the last commit where there is none; all if CI_FULL is set."""
    if os.environ.get("CI_FULL"):
        return chapters()
    said = subprocess.run(["git", "describe", "--tags", "--abbrev=0"], cwd=ROOT, capture_output=True, text=True)
    since = "HEAD~1" if said.returncode else said.stdout.strip()
    listed = subprocess.run(["git", "diff", "--name-only", since], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.split()
    return chapters() if listed.returncode else [path for path in chapters() if str(path.relative_to(ROOT)) in names]


def executed(path):
    """The notebook at `path` with the outputs of this code; cells that are left out have none. Raises
    CellExecutionError."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
            if LEFT_OUT.search(cell.source):
                cell.cell_type = "raw"
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    client = NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}, store_widget_state=False
    )
    client.extra_arguments = ["--log-level=CRITICAL"]  # a kernel warns that it speaks TCP, on loopback
    return client.execute()


def text_of(outputs):
    """What the outputs of a cell say as text, and the kinds of pictures among them."""
    said, pictures = [], []
    for output in outputs:
        if output.output_type == "stream" and output.name == "stdout":
            said.append(output.text)
        elif output.output_type in ("execute_result", "display_data"):
            pictures += [kind for kind in output.data if kind.startswith("image/")]
            said.append("" if pictures else output.data.get("text/plain", ""))
    text = "\n".join(part.rstrip() for part in said)
    for pattern, instead in PASSING:
        text = pattern.sub(instead, text)
    return text.strip(), sorted(pictures)


def numbers(text):
    return [float(found.replace(",", "")) for found in NUMBER.findall(text)]


def differs(stored, now):
    """Whether two texts say something different: other words, or numbers further apart than one part in a thousand."""
    words = [re.sub(r"[\s─━-]+", " ", NUMBER.sub("#", text)) for text in (stored, now)]
    if words[0] != words[1]:
        return True
    return any(
        abs(a - b) > max(TOLERANCE * max(abs(a), abs(b)), RESIDUE)
        for a, b in zip(numbers(stored), numbers(now), strict=True)
    )


def compare(path, write):
    """What differs in the chapter at `path`, a list of str. write: store the new outputs."""
    notebook = nbformat.read(path, as_version=4)
    try:
        done = executed(path)
    except CellExecutionError as error:
        return [f"{path.relative_to(ROOT)} stops: {error}"]
    found = []
    for number, (cell, new) in enumerate(zip(notebook.cells, done.cells, strict=True)):
        if cell.cell_type != "code" or new.cell_type == "raw":
            continue
        before, now = text_of(cell.outputs), text_of(new.outputs)
        if differs(before[0], now[0]) or before[1] != now[1]:
            if "volatile" not in cell.metadata.get("tags", []):
                stored, new_text = (f"{text[:300]!r} {pictures}" for text, pictures in (before, now))
                found.append(f"{path.relative_to(ROOT)}, cell {number}: stored {stored}, now {new_text}")
            if write:
                cell.outputs = [
                    output for output in new.outputs if output.output_type != "stream" or output.name == "stdout"
                ]
                for output in cell.outputs:
                    output.pop("execution_count", None) if output.output_type != "execute_result" else output.update(
                        execution_count=None
                    )
                    if "data" in output:
                        output.data = {
                            kind: data for kind, data in output.data.items() if kind.startswith(("text/", "image/"))
                        }
    if write:
        nbformat.write(notebook, path)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    paths = [path.resolve() for path in options.notebooks] or changed()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["IN_TEST"] = "1"  # chapters do not export, or one would rewrite modules while another imports them
    with ThreadPoolExecutor(2) as pool:
        found = [line for lines in pool.map(lambda path: compare(path, options.write), paths) for line in lines]
    print(*found, sep="\n", end="\n" * bool(found))
    print(f"{len(paths)} chapters executed, {len(found)} outputs differ")
    return int(bool(found) and not options.write)


if __name__ == "__main__":
    sys.exit(main())
