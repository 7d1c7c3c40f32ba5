"""What `make book` runs: the book from the chapters' stored outputs and what is published, into docs/_build/html.

`book.py explorer` makes the explorer's page of it, docs/static/curves.html, from the published runs, which takes torch;
`make publish` does it.
"""

import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "docs/_build"
SOURCE = BUILD / "source"
PRESET = "laptop"
SECOND = "laptop2"  # published in part, with measures that the first has not
PAGES = ("nbs/**/*.ipynb", "figures/*.ipynb", "benchmarks/*.ipynb", "docs/*.md", "CHANGELOG.md", "CONTRIBUTING.md")
PUBLISHED = f"figures/rendered/{PRESET}"
FIRST_PAGE = '<!DOCTYPE html><meta charset="utf-8"><title>sparse-nb</title>'
FIRST_PAGE += '<meta http-equiv="refresh" content="0; url=nbs/index.html"><a href="nbs/index.html">sparse-nb</a>\n'


def _published(ending):
    """The published files of figures with this ending."""
    return [path for preset in (PRESET, SECOND, "paper") for path in ROOT.glob(f"figures/rendered/{preset}/*.{ending}")]


def _lay_out():
    """The folder that Sphinx reads, laid out as the book is: only what belongs to it, and not a virtual environment."""
    wanted = {path.relative_to(ROOT) for pattern in PAGES for path in ROOT.glob(pattern)}
    wanted = {path for path in wanted if ".ipynb_checkpoints" not in path.parts}
    published = {path.relative_to(ROOT) for kind in ("svg", "csv") for path in _published(kind)}
    for path in SOURCE.rglob("*") if SOURCE.exists() else ():
        part = path.relative_to(SOURCE)
        if path.is_file() and part.parts[0] not in ("reference", "extra", "static") and part not in wanted | published:
            path.unlink()
    shutil.rmtree(SOURCE / "extra", ignore_errors=True)
    copies = [(path, SOURCE / path) for path in wanted | published]
    copies += [(path, SOURCE / "extra" / path) for path in published]
    for path, copy in copies:
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.exists() or copy.stat().st_mtime != (ROOT / path).stat().st_mtime:
            shutil.copy2(ROOT / path, copy)
    (SOURCE / "extra/index.html").write_text(FIRST_PAGE, encoding="utf-8")


def _add_libraries():
    """plotly.js and MathJax, one file each, from their Python packages."""
    from plotly.offline import get_plotlyjs

    static = SOURCE / "static"
    static.mkdir(parents=True, exist_ok=True)
    (static / "plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")
    for file in importlib.metadata.files("sphinx-mathjax-offline"):
        if file.name == "tex-svg-full.js":
            shutil.copy(file.locate(), static / "mathjax.js")


def build():
    _lay_out()
    _add_libraries()
    where = ["-c", ROOT / "docs", "-d", BUILD / "doctrees"]
    strict = ["-q", "-W", "--keep-going"]  # a dead link is a warning
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-j", "auto", *where, *strict, SOURCE, BUILD / "html"]
    status = subprocess.run(command).returncode
    print(
        f"the book: {(BUILD / 'html/index.html').relative_to(ROOT)}" if not status else "the book has faults",
        flush=True,
    )
    return status


def explorer():
    """The explorer's page of all published runs and verdicts, without plotly.js, which lies beside it in the book."""
    import pandas as pd

    from sparse_nb.explorer.page import store_page
    from sparse_nb.runs import exchange
    from sparse_nb.runs.store import Store
    from sparse_nb.study.studies import PRESETS

    with tempfile.TemporaryDirectory() as folder:
        store, page = Store(Path(folder, "runs")), Path(folder, "curves.html")
        exchange.merge(store, ROOT / "results" / PRESET)
        exchange.merge(store, ROOT / "results" / SECOND)
        judged = pd.read_csv(ROOT / PUBLISHED / "claims.csv", dtype={"claim": str}).fillna({"numbers": ""})
        effects = pd.read_csv(ROOT / PUBLISHED / "effects.csv")
        claims = {"judged": judged, "effects": effects}
        store_page(store, PRESETS[PRESET], page, others=[PRESETS[SECOND]], include_plotlyjs="directory", **claims)
        shutil.copy(page, ROOT / "docs/static/curves.html")
    print("docs/static/curves.html")
    return 0


if __name__ == "__main__":
    sys.exit(explorer() if sys.argv[1:] == ["explorer"] else build())
