"""What is published, in words and tables: `python docs/values.py` writes it into the pages of docs/.

A page says where, in comments that are seen nowhere: <!-- value: gain noise water_filling -->…<!-- end -->. `make
prepare` renews what stands between them, and `make test` fails where a page is out of step.
"""

import html
import json
import math
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
PRESETS = (PRESET, "laptop2", "paper")  # whose published figures are shown, the first that has one
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


def folder_of(name):
    """Where the published figure that the book shows lies: of the first of `PRESETS` that has it."""
    folders = [RENDERED.parent / preset for preset in PRESETS]
    return next((folder for folder in folders if (folder / f"{name}.svg").exists()), RENDERED)


def published_rows(name, preset=""):
    """The table behind a published figure, as the code that draws has it; of another preset than is shown."""
    folder = RENDERED.parent / preset if preset else folder_of(name)
    rows = pd.read_csv(folder / f"{name}.csv", dtype={"claim": str})
    texts = [column for column in ("name", "numbers", "runs", "bound") if column in rows]
    return rows.assign(**rows[texts].astype(object).fillna(""))


def _signed(value):
    """As in +1.5, −0.2, 0.0."""
    return "0.0" if round(value, 1) == 0 else f"{value:+.1f}".replace("-", "−")


def _with_interval(row):
    """As in +1.5 [+0.8, +2.3], where the interval stays on one line."""
    return f"{_signed(row['mean'])} [{_signed(row.low)},\N{NO-BREAK SPACE}{_signed(row.high)}]"


_DISTURBANCES = {"clean": "undisturbed", "noise": "weight noise", "corruption": "corrupted images", "attack": "attacks"}


@cache
def pooled_effects(preset=PRESET, by=()):
    """`effects.pooled_effects` of what is published of a preset."""
    return module("claims.effects").pooled_effects(published_rows("effects", preset), list(by))


def _markdown(rows):
    return module("claims.verdicts").as_markdown(pd.DataFrame(rows))


def _row_of_effect(row):
    """What a table says of one pooled effect."""
    contrast = module("claims.contrasts").CONTRASTS[row.contrast]
    words = module("results.axes").WORDS
    odds = "" if pd.isna(row.logit_mean) else f"{row.logit_mean:+.2f} [{row.logit_low:+.2f}, {row.logit_high:+.2f}]"
    return {
        "contrast": row.contrast,
        "disturbance": _DISTURBANCES.get(row.disturbance, row.disturbance.replace("_", " ")),
        "rule": words.get(row["rule"], row["rule"]),
        "effect [95 % interval]": _with_interval(row),
        "unit": contrast.unit,
        "log odds": odds.replace("-", "−"),
        "equal weights": _signed(row.equal_mean),
        "one more panel": f"{_signed(row.predicted_low)} to {_signed(row.predicted_high)}",
        "I²": f"{100 * row.i2:.0f} %",
        "panels": f"{row.panels:.0f}",
        "reads": row.word,
    }


def effects_table():
    """Every pooled contrast with its interval, as Markdown; single corruptions have a table of their own."""
    pooled = pooled_effects()
    return _markdown(_row_of_effect(row) for _, row in pooled[pooled.contrast != "gain, one corruption"].iterrows())


def corruptions_table():
    """The gain under each corruption, a column for each rule, as Markdown."""
    pooled = pooled_effects()
    of_one, words = pooled[pooled.contrast == "gain, one corruption"], module("results.axes").WORDS
    rows = []
    for name, part in sorted(of_one.groupby("disturbance"), key=lambda pair: -pair[1].panels.max()):
        by_rule = {words[row["rule"]]: f"{_with_interval(row)}, {row.word}" for _, row in part.iterrows()}
        rows.append({"corruption": name.replace("_", " "), **by_rule, "panels": f"{part.panels.max():.0f}"})
    return _markdown(rows)


def gains_table(moderator):
    """The gain of each "family" or "dataset", as Markdown."""
    pooled, words = pooled_effects(by=(moderator,)), module("results.axes").WORDS
    gains, rows = pooled[(pooled.contrast == "gain") & pooled.disturbance.isin(_DISTURBANCES)], []
    for (name, rule), part in gains.groupby([moderator, "rule"], sort=False):
        cells = {_DISTURBANCES[row.disturbance]: _with_interval(row) for _, row in part.iterrows()}
        rows.append({moderator: words[name], "rule": words[rule], **cells, "panels": f"{part.panels.max():.0f}"})
    return _markdown(sorted(rows, key=lambda row: list(words.values()).index(row[moderator])))


def own_size_table():
    """Every contrast of the one panel at the paper's own size, a column for each rule, as Markdown."""
    found, words = published_rows("effects", "paper"), module("results.axes").WORDS
    found = found[found.contrast != "gain, one corruption"].rename(columns={"effect": "mean"})
    units, rows = module("claims.contrasts").CONTRASTS, []
    for (contrast, disturbance), part in found.groupby(["contrast", "disturbance"], sort=False):
        by_rule = {words[row["rule"]]: _with_interval(row) for _, row in part.iterrows()}
        said = _DISTURBANCES.get(disturbance, disturbance)
        rows.append({"contrast": contrast, "disturbance": said, **by_rule, "unit": units[contrast].unit})
    return module("claims.verdicts").as_markdown(pd.DataFrame(rows).fillna(""))


def panels_table(preset="laptop2"):
    """The gain and the layout in each panel of a preset, as Markdown."""
    found, words = published_rows("effects", preset), module("results.axes").WORDS
    found = found[found.contrast.isin(["gain", "layout"]) & found.disturbance.isin(_DISTURBANCES)]
    rows = []
    for (family, dataset, contrast, rule), part in found.groupby(["family", "dataset", "contrast", "rule"], sort=False):
        cells = {
            _DISTURBANCES[row.disturbance]: _with_interval(row)
            for _, row in part.rename(columns={"effect": "mean"}).iterrows()
        }
        what = words[rule] if contrast == "gain" else "water-filling minus proportional"
        panel = f"{words[family]} on {words[dataset]}"
        rows.append({"panel": panel, "": what, **cells, "seeds": f"{part.seeds.min():.0f}"})
    return _markdown(rows)


def clean_accuracy(dataset, family, which, preset="laptop2"):
    """The mean accuracy without disturbance of the "dense" network or of the "best" of its curves, as in 72 %."""
    curves = published_rows("fig01", preset)
    here = curves[(curves.dataset == dataset) & (curves.family == family) & (curves.quantity == "accuracy")]
    here = here[here.strength == 0]
    found = here[here.density == here.density.max()]["mean"].iloc[0] if which == "dense" else here["mean"].max()
    return f"{100 * found:.1f}\N{NO-BREAK SPACE}%"


def proxy_table(preset="laptop2"):
    """Claim 13: rank correlations of the loss increases under noise and rounding, of panels with three seeds or more,
    as Markdown."""
    rows, words, proxy = [], module("results.axes").WORDS, module("results.proxy")
    found = proxy.costly_correlations(published_rows("fig15", preset))
    for (dataset, rule, family), part in found.groupby(["dataset", "rule", "family"], sort=False):
        if part.seed.nunique() < 3:
            continue
        cells = {}
        for form, of_form in part.groupby("format", sort=False):
            mean = module("claims.pooling").interval(of_form.correlation.to_numpy())
            cells[proxy.FORMATS[form]] = f"{mean['effect']:.2f} [{mean['low']:.2f}, {min(1.0, mean['high']):.2f}]"
        panel = f"{words[family]} on {words[dataset]}, {words[rule]}"
        rows.append({"panel": panel, **cells, "seeds": part.seed.nunique()})
    return _markdown(rows)


def calibration_table():
    """Calibration error and curvature of the dense networks, of those with a sixteenth of the weights, and of the
    sparsest, for panels with three seeds or more, as Markdown."""
    curves, words, shown = published_rows("fig17"), module("results.axes").WORDS, module("results.calibration_curves")
    rows = []
    for (dataset, rule, family), part in curves.groupby(["dataset", "rule", "family"], sort=False):
        if part.seeds.min() < 3:
            continue
        cells = {}
        for quantity, heading in shown.HEADINGS.items():
            points, percent = part[part.quantity == quantity].set_index("density"), quantity != shown.CURVATURE
            sixteenth = min(points.index, key=lambda density: abs(math.log2(16 * density)))
            shown_densities = dict.fromkeys((max(points.index), sixteenth, min(points.index)))
            cells[heading] = " → ".join(
                "{} [{},\N{NO-BREAK SPACE}{}]".format(
                    *(f"{(100 if percent else 1) * points.loc[density, side]:.1f}" for side in ("mean", "low", "high"))
                )
                for density in shown_densities
            )
        rows.append(
            {"panel": f"{words[family]} on {words[dataset]}, {words[rule]}", **cells, "seeds": part.seeds.min()}
        )
    return _markdown(rows)


def claims_table():
    """Every claim with its verdict, as Markdown."""
    verdicts = module("claims.verdicts")
    return verdicts.as_markdown(verdicts.claims_table(published_rows("claims"), pooled=pooled_effects(), tests=True))


def gain(disturbance, rule, contrast="gain"):
    """One pooled effect in words, as in +1.5 [+0.8, +2.3]."""
    pooled = pooled_effects()
    (row,) = pooled[(pooled.contrast == contrast) & (pooled.disturbance == disturbance) & (pooled.rule == rule)].iloc
    return _with_interval(row)


def contrasts():
    """The hash of the definitions that the published effects name."""
    (found,) = set(published_rows("effects").contrasts)
    return f"`{found}`"


def stored_table(header):
    """The Markdown table that begins with `header`, as nbs/published.ipynb stores it: making it takes torch."""
    for cell in nbformat.read(ROOT / "nbs/published.ipynb", as_version=4).cells:
        for output in cell.get("outputs", ()):
            if (text := output.get("data", {}).get("text/markdown", "")).startswith(header):
                return text
    raise ValueError(f"nbs/published.ipynb has no stored output that begins with {header!r}, which docs/*.md shows")


def zoo_table():
    """The published trained networks, as Markdown."""
    networks, words = json.loads((ROOT / "results/zoo/zoo.json").read_bytes()), module("results.axes").WORDS
    rows = []
    for name, entry in networks.items():
        described, result = entry["about"]["experiment"], entry["about"]["result"]
        rows.append(
            {
                "name": f"`{name}`",
                "network": f"{words[described['family']]} on {words[described['dataset']]}",
                "weights": f"{described['budget']:,}",
                "density": f"{100 * result['density']:.3g} %",
                "accuracy": f"{100 * entry['accuracy']:.1f} %",
                "size": f"{entry['bytes'] / 1e6:.1f} MB",
            }
        )
    return _markdown(sorted(rows, key=lambda row: (-float(row["density"].split()[0]), row["name"])))


def figure_list():
    """A card for each figure: a link with a small picture, if one is published, and the title."""
    cards = []
    for name, figure in module("study.figures").FIGURES.items():
        title = f"Figure {int(name[3:])}. {html.escape(figure.title)}"
        preset = folder_of(name).name if (folder_of(name) / f"{name}.svg").exists() else ""
        image = f'<img loading="lazy" width="320" src="../figures/rendered/{preset}/{name}.svg" alt=""><br>'
        note = "" if preset == PRESET else f"<br>({preset}, in part)" if preset else "<br>(not published yet)"
        shown = f"{image if preset else ''}<span>{title}{note}</span>"
        cards.append(f'<p><a class="card" href="../figures/{figure.notebook}.ipynb">{shown}</a></p>')
    return "\n".join(['<div class="cards">', *cards, "</div>"])


VALUES = {
    "claims": claims_table,
    "effects": effects_table,
    "corruptions": corruptions_table,
    "families": lambda: gains_table("family"),
    "datasets": lambda: gains_table("dataset"),
    "own size": own_size_table,
    "second edition": panels_table,
    "accuracy": clean_accuracy,
    "proxy": proxy_table,
    "calibration": calibration_table,
    "contrasts": contrasts,
    "figures": figure_list,
    "zoo": zoo_table,
    "costs": lambda: stored_table("| figure | shows |"),
    "reproducibility": lambda: stored_table("| question | answer |"),
    "gain": gain,
    "layout": lambda disturbance, rule="water_filling": gain(disturbance, rule, "layout"),
}


def filled(page):
    """The Markdown `page` with every marked value as it is published now."""

    def renew(match):
        name, *asked = [match[1]] if match[1] in VALUES else match[1].split()
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
