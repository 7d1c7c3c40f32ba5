"""Nothing that a figure or the widget draws leaves its frame, no interval leaves 0 to 100 %, and no two lines of a
panel look alike to any eye: the cells of every figure's notebook, run on a store of three seeds, and on one of two,
whose points have dots instead; then every view of every curve of that store.
"""

import itertools
import math
from pathlib import Path

import nbformat
import numpy as np
import plotly.graph_objects as go
import pytest
from test_eyes import alike

from sparse_nb.explorer.views import VIEWS, kinds_of, plot_compared, strengths_of, views_of
from sparse_nb.results import rendering
from sparse_nb.results.catalogue import CHOICES, add_failures, load_curve, read_catalogue
from sparse_nb.results.tables import points_of
from sparse_nb.runs.store import Store
from sparse_nb.study.figures import FIGURES
from sparse_nb.study.studies import PRESETS

ROOT = Path(__file__).parents[2]


def has_points(trace):
    """Whether a trace is more than an entry of the legend, or a line that has no points in its panel."""
    return trace.x is not None and len(trace.x) > 0 and trace.x[0] is not None


def ends_of(figure):
    """(ends of everything drawn, ends of its intervals): (x, y, x axis, y axis) of each."""
    everything, intervals = [], []
    for trace in figure.data:
        if not has_points(trace):
            continue
        axes = [getattr(figure.layout, f"{a}axis{(trace[f'{a}axis'] or a)[1:]}") for a in "xy"]
        x, y = (np.asarray(values, float) for values in (trace.x, trace.y))
        everything += [(*place, *axes) for place in zip(x, y, strict=True) if not np.isnan(place).any()]
        if trace.error_y.array is not None:
            above, below = (np.asarray(trace.error_y[side], float) for side in ("array", "arrayminus"))
            for bar in (y + above, y - below):
                intervals += [(*place, *axes) for place in zip(x, bar, strict=True) if not np.isnan(place).any()]
    return everything + intervals, intervals


def leaves(value, axis):
    """Whether a value is outside the range of its axis."""
    low, high = sorted(axis.range or (-math.inf, math.inf))
    return not low <= (math.log10(value) if axis.type == "log" else value) <= high


def outside(figure):
    """(how much of what is drawn leaves its frame, how many ends of intervals leave 0 to 100 %, ends of intervals)."""
    everything, intervals = ends_of(figure)
    cut = sum(leaves(x, x_axis) or leaves(y, y_axis) for x, y, x_axis, y_axis in everything)
    return cut, sum(not -1e-9 <= y <= 100 + 1e-9 for _, y, *_ in intervals), len(intervals)


def test_the_check_sees_what_is_cut():
    from plotly.subplots import make_subplots

    figure = make_subplots(1, 2)
    figure.add_scatter(x=[0, 1], y=[50, 99], error_y=dict(array=[5, 2], arrayminus=[5, math.nan]), row=1, col=2)
    figure.update_layout(xaxis2_range=[-1, 2], yaxis2_range=[48, 104])
    assert outside(figure) == (1, 1, 3)  # 45 is below the frame; 101 is inside it, and no accuracy


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("frames") / "runs"


def drawn_by(figure, runs, seeds, monkeypatch):
    """{name: (figure, points)} that the notebook of a figure publishes, in this process and without a browser."""
    published = {}

    def publish(made, curves, folder, name, *rest):
        published[name] = made, curves
        return [Path(folder) / f"{name}.csv"]

    monkeypatch.setattr(rendering, "publish", publish)
    spec = FIGURES[figure]
    family = spec.families[0]
    widths = "" if "control" in spec.growths else " ".join(map(str, PRESETS["smoke"].families[family].widths[:2]))
    asked = dict(families=family, widths=widths, seeds=seeds, epochs=1, device="cpu", runs=str(runs))
    notebook = nbformat.read(ROOT / f"figures/{spec.notebook}.ipynb", as_version=4)
    parameters, *cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    scope = {}
    exec(parameters, scope)
    scope |= asked | {"out": str(runs.parent / "out")}
    for cell in cells:
        exec(cell, scope)
    return published


@pytest.mark.parametrize("figure", FIGURES)
def test_every_figure_is_inside_its_frame_and_readable(figure, runs, monkeypatch, capsys):
    for name, (made, curves) in drawn_by(figure, runs, 3, monkeypatch).items():
        cut, impossible, ends = outside(made)
        assert (name, alike(made)) == (name, set())
        assert (name, cut, impossible) == (name, 0, 0) and (ends > 0) == (figure != "fig15")
        assert len(list(made.select_xaxes())) == len({trace.xaxis for trace in made.data if has_points(trace)})
        if figure == "fig15":
            continue  # losses of single networks, without intervals
        shares = curves[~curves.quantity.isin(["loss_increase", "loss", "largest_eigenvalue"])]
        assert shares.low.ge(0).all() and shares.high.le(1).all()
        assert (shares.low.le(shares["mean"]) & shares["mean"].le(shares.high)).all()


def test_two_seeds_are_dots_and_inside(runs, monkeypatch, capsys):
    ((made, curves),) = drawn_by("fig01", runs, 2, monkeypatch).values()
    cut, _, ends = outside(made)
    assert (cut, ends) == (0, 0) and set(curves.seeds) == {2}
    dots = [y for trace in made.data if trace.mode == "markers" for y in trace.y]
    strengths = {trace.name for trace in made.data if trace.mode == "lines+markers" and has_points(trace)}
    shown = curves[
        (curves.quantity == "accuracy") & curves.strength.isin([float(name.split()[0]) for name in strengths])
    ]
    assert sorted(dots) == pytest.approx(sorted(100 * np.concatenate([shown.lowest, shown.highest])))


def views_drawn(store, most):
    """Every plot of every curve in a store, of at most so many seeds, as (what it is, figure)."""
    catalogue = read_catalogue(store)
    for choice in catalogue.dropna(subset="measure")[CHOICES].drop_duplicates().to_dict("records"):
        members, records = load_curve(store, catalogue, choice)
        points = add_failures(points_of(members[members.seed < most], records), [])
        what = {name: choice[name] for name in ("measure", "growth")}
        for view, kind in itertools.product(views_of(points, choice["measure"]), kinds_of(points)):
            if view == "heat map" or (view != "curves" and kind != kinds_of(points)[0]):
                continue  # a heat map has no ends; the others show all kinds
            for strength in strengths_of(points, kind):
                how = what | dict(name=kind, strength=strength, title="")
                second = points[(points.name == kind) & (points.strength == strengths_of(points, kind)[0])]
                yield (view, *how.values()), go.Figure(VIEWS[view](points, **how))
                if view == "curves":
                    yield (
                        ("compared", *how.values()),
                        go.Figure(plot_compared(points, (second, choice["growth"]), **how)),
                    )


@pytest.mark.parametrize("most", [3, 2, 1])
def test_nothing_that_the_widget_draws_leaves_its_frame(most, runs, monkeypatch, capsys):
    for figure in ("fig01", "fig02", "fig03", "fig06", "fig08"):
        drawn_by(figure, runs, 3, monkeypatch)
    seen, ends = set(), 0
    for what, made in views_drawn(Store(runs), most):
        cut, impossible, of_this = outside(made)
        assert (what, cut, impossible) == (what, 0, 0)
        seen, ends = seen | {what[0]}, ends + of_this
    assert seen == {"curves", "compared", "small multiples", "classes", "connectivity"} and ends > 1000
