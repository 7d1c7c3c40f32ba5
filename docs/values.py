"""What is published, in words and tables: `python docs/values.py` writes it into the pages of docs/.

A page says where, in comments that are seen nowhere: <!-- value: gain noise water_filling -->…<!-- end -->. `make
prepare` renews what stands between them, and `make test` fails where a page is out of step.
"""

import html
import re
import sys
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import nbformat
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
PRESET = "laptop"
RENDERED = ROOT / "figures/rendered" / PRESET
VALUE = re.compile(r"<!-- value: ([\w ]+) -->.*?<!-- end -->", re.DOTALL)
# Imported by the modules that draw, and needed to train and measure only.
ABSENT = ("torch", "torchvision", "torchattacks", "numba", "llvmlite", "safetensors", "sklearn", "choreographer")
ABSENT += ("psutil", "tqdm", "pebble", "distributed")


class _Kind(type):
    """The type of whatever an absent package is asked for: a class that may be a base, an annotation, a decorator."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Kind(name, (_Absent,), {})

    def __or__(cls, other):
        return cls

    __ror__ = __or__

    def __getitem__(cls, key):
        return cls


class _Absent(metaclass=_Kind):
    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, function=None, *args, **kwargs):
        return function

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent()


class _AbsentModule(ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Kind(name, (_Absent,), {})


class _AbsentPackages(MetaPathFinder, Loader):
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in ABSENT else None

    def create_module(self, spec):
        return _AbsentModule(spec.name)

    def exec_module(self, module):
        pass


@contextmanager
def _without_torch():
    """Import modules of the package as if heavy packages were there. They are neither imported nor left behind, so
    that a drawing that needed one would fail."""
    finder = _AbsentPackages()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _AbsentModule)]:
            del sys.modules[name]


@cache
def module(name):
    """A module of the package, imported without torch."""
    with _without_torch():
        return import_module(f"sparse_nb.{name}")


def published_rows(name):
    """The table behind a published figure, as the code that draws has it."""
    rows = pd.read_csv(RENDERED / f"{name}.csv", dtype={"claim": str})
    texts = [column for column in ("name", "numbers", "runs", "bound") if column in rows]
    return rows.assign(**rows[texts].fillna(""))


def _signed(value):
    """As in +1.5, −0.2, 0.0."""
    return "0.0" if round(value, 1) == 0 else f"{value:+.1f}".replace("-", "−")


def _with_interval(row):
    """As in +1.5 [+0.8, +2.3], where the interval stays on one line."""
    return f"{_signed(row['mean'])} [{_signed(row.low)},\N{NO-BREAK SPACE}{_signed(row.high)}]"


_DISTURBANCES = {"clean": "undisturbed", "noise": "weight noise", "corruption": "corrupted images", "attack": "attacks"}


def effects_table():
    """Every pooled contrast with its interval in points, as Markdown."""
    effects = module("claims.effects")
    pooled = effects.pooled_effects(published_rows("effects"))
    words = module("results.axes").WORDS
    rows = [
        {
            "contrast": row.contrast,
            "disturbance": _DISTURBANCES.get(row.disturbance, row.disturbance),
            "rule": words.get(row["rule"], row["rule"]),
            "effect [95 % interval]": _with_interval(row),
            "unit": effects.CONTRASTS[row.contrast].unit,
            "one more panel": f"{_signed(row.predicted_low)} to {_signed(row.predicted_high)}",
            "panels": f"{row.panels:.0f}",
            "reads": row.word,
        }
        for _, row in pooled.iterrows()
    ]
    table = pd.DataFrame(rows)
    if set(table.unit) == {"points"}:  # which the page says
        table = table.drop(columns="unit")
    return module("claims.verdicts").as_markdown(table)


def claims_table():
    """Every claim with its verdict, as Markdown."""
    verdicts = module("claims.verdicts")
    pooled = module("claims.effects").pooled_effects(published_rows("effects"))
    return verdicts.as_markdown(verdicts.claims_table(published_rows("claims"), pooled=pooled))


def gain(disturbance, rule, contrast="gain"):
    """One pooled effect in words, as in +1.5 [+0.8, +2.3]."""
    pooled = module("claims.effects").pooled_effects(published_rows("effects"))
    (row,) = pooled[(pooled.contrast == contrast) & (pooled.disturbance == disturbance) & (pooled.rule == rule)].iloc
    return _with_interval(row)


def stored_table(header):
    """The Markdown table that begins with `header`, as nbs/published.ipynb stores it: making it takes torch."""
    for cell in nbformat.read(ROOT / "nbs/published.ipynb", as_version=4).cells:
        for output in cell.get("outputs", ()):
            if (text := output.get("data", {}).get("text/markdown", "")).startswith(header):
                return text
    raise ValueError(f"nbs/published.ipynb has no stored output that begins with {header!r}, which docs/*.md shows")


def figure_list():
    """A card for each figure: a link with a small picture, if one is published, and the title."""
    cards = []
    for name, figure in module("study.figures").FIGURES.items():
        title = f"Figure {int(name[3:])}. {html.escape(figure.title)}"
        image = f'<img loading="lazy" width="320" src="../figures/rendered/{PRESET}/{name}.svg" alt=""><br>'
        there = (RENDERED / f"{name}.svg").exists()
        shown = f"{image}<span>{title}</span>" if there else f"<span>{title}<br>(not published yet)</span>"
        cards.append(f'<p><a class="card" href="../figures/{figure.notebook}.ipynb">{shown}</a></p>')
    return "\n".join(['<div class="cards">', *cards, "</div>"])


VALUES = {
    "claims": claims_table,
    "effects": effects_table,
    "figures": figure_list,
    "costs": lambda: stored_table("| figure | shows |"),
    "reproducibility": lambda: stored_table("| question | answer |"),
    "gain": gain,
    "layout": lambda disturbance, rule="water_filling": gain(disturbance, rule, "layout"),
}


def filled(page):
    """The Markdown `page` with every marked value as it is published now."""

    def renew(match):
        name, *asked = match[1].split()
        text = VALUES[name](*asked)
        apart = "\n\n" if "\n" in text else ""
        return f"<!-- value: {match[1]} -->{apart}{text}{apart}<!-- end -->"

    return VALUE.sub(renew, page)


def write():
    """Renew the pages of docs/ that show what is published."""
    for path in sorted((ROOT / "docs").glob("*.md")):
        page = path.read_text(encoding="utf-8")
        if (now := filled(page)) != page:
            path.write_text(now, encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    write()
