"""Write README.md from nbs/index.ipynb, in the folder where it is called.

Cells that begin with an nbdev directive (`#|`) are left out, and of those tagged `hide_input` the code; relative links,
which hold in nbs/, are made to hold at the top.
"""

import posixpath
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

RELATIVE_LINK = re.compile(r"""(\]\(|src="|href=")(?![a-z]+:|[#/])([^)"\s]+)""")
BLANK_LINES = re.compile(r"\n(?:[ \t]*\n){2,}")


def readme(notebook):
    """The text of README.md. notebook: path of index.ipynb; its folder is where its links start."""
    leave_out = Config(
        {
            "RegexRemovePreprocessor": {"patterns": [r"\s*#\s*\|"]},
            "TagRemovePreprocessor": {"enabled": True, "remove_input_tags": ["hide_input"]},
        }
    )
    cells = nbformat.read(notebook, as_version=4)
    for cell in cells.cells:
        if "outputs" in cell:  # of a progress bar nothing is shown
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    cells.metadata.language_info = {"name": "python"}  # nbdev_clean takes it away
    text, resources = MarkdownExporter(config=leave_out).from_notebook_node(cells)
    if resources.get("outputs"):
        sys.exit(f"{notebook} has picture outputs, which a README cannot hold: link a file below figures/ instead")
    folder = notebook.parent.as_posix()
    text = RELATIVE_LINK.sub(lambda link: link[1] + posixpath.normpath(posixpath.join(folder, link[2])), text)
    return BLANK_LINES.sub("\n\n", text).strip() + "\n"


if __name__ == "__main__":
    Path("README.md").write_text(readme(Path("nbs/index.ipynb")), encoding="utf-8")
