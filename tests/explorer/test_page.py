"""What no cell can test of the page: by keyboard it plots what pandas finds, and hostile text stays text."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from choreographer.browsers.chromium import Chromium
from playwright.sync_api import sync_playwright
from plotly.offline import get_plotlyjs
from scipy import special, stats

from sparse_nb.claims.claims import CLAIMS
from sparse_nb.data import CLASSES
from sparse_nb.explorer.page import CONTROLS, write_page
from sparse_nb.explorer.texts import GLOSSARY, LABELS
from sparse_nb.results import axes, tables
from sparse_nb.study.figures import FIGURES
from sparse_nb.study.plans import plan
from sparse_nb.study.studies import narrow

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-quic"]
SELECTS = [*CONTROLS, "question"]


def kinds_of_records(point):
    """(quantity, name, strength, draw) of what a point's measurement records."""
    measure, e = point.evaluation.measure, point.evaluation
    if measure == "weight_noise":
        return [("accuracy", "", sigma, draw) for sigma in e.sigmas for draw in range(2)]
    if measure == "corruption":
        pairs = [pair.rpartition(" ") for _, pairs in e.origins for pair in pairs.split(", ")]
        return [
            ("accuracy", "", 0.0, 0),
            *(
                ("accuracy", name, float(severity), draw)
                for name, _, severity in pairs
                for draw in range(2 if "noise" in name else 1)
            ),
        ]
    if measure == "attack":
        return [("accuracy", name, epsilon, 0) for name in e.attacks for epsilon in e.epsilons]
    return [
        ("accuracy", "", 0.0, 0),
        ("lowest_recall", "", 0.0, 0),
        *(("recall", str(k), 0.0, 0) for k in range(CLASSES[point.experiment.dataset])),
    ]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Every combination of two datasets, families, ways to grow, rules and schedules, all measures; random numbers.

    On MNIST, the MLP of width 1024 has a diverged network, the one of width 2048 only diverged ones, and the one of
    width 256 a network that did not converge.
    """
    preset, rows, plans = narrow("laptop", datasets="mnist cifar10", families="mlp vgg", seeds=3), [], {}
    for name, figure in FIGURES.items():
        if name in preset.figures and figure.families != ("resnet",) and "control" not in figure.growths:
            plans.setdefault((figure.schedule, figure.measure), {}).update(
                dict.fromkeys(plan(name, preset, root=tmp_path_factory.mktemp("no_data")))
            )
    for (schedule, measure), points in plans.items():
        for point in points:
            place = {**tables.place_of(point), "schedule": schedule, "measure": measure, "effective_density": 1.0}
            mnist = place["dataset"] == "mnist" and place["family"] == "mlp"
            if mnist and (place["width"] == 2048 or (place["width"] == 1024 and place["seed"] == 1)):
                rows.append({**place, "status": "diverged"})
                continue
            status = "epochs" if mnist and place["width"] == 256 and place["seed"] == 2 else "converged"
            rows += [
                {**place, "status": status, "quantity": q, "name": n, "strength": s, "draw": d}
                for q, n, s, d in kinds_of_records(point)
            ]
    table = pd.DataFrame(rows)
    return table.assign(value=np.random.default_rng(0).random(len(table))).assign(
        value=lambda t: t.value.where(t.quantity.notna())
    )


@pytest.fixture(scope="module")
def path(table, tmp_path_factory):
    return write_page(table, tmp_path_factory.mktemp("page") / "explore.html", provenance=["Chosen numbers."])[0]


@pytest.fixture(scope="module")
def browser():
    found = Chromium.find_browser(skip_local=False)
    if not found:
        pytest.skip("there is no Chrome or Chromium to open the page in")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens a file as a page; afterwards: no message, no error, and no request for anything but files on disk."""
    contexts, said, asked = [], [], []

    def opened(path, *, width=1000, height=900, scheme="light", state=""):
        contexts.append(
            browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, accept_downloads=True)
        )
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri() + state)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []
    assert asked and all(url.startswith(("file:///", "data:", "blob:")) for url in asked), asked


def drawn(page):
    """What the plotly element holds, {name of the trace: trace}, the bars together as a list under "bars"."""
    traces = page.evaluate(
        """() => document.getElementById("chart").data.map(t =>
            ({name: t.name, x: [...t.x], y: [...t.y], text: t.text, marker: t.marker, error: t.error_y}))"""
    )
    return {trace["name"]: trace for trace in traces if trace["name"] != "bar"} | {
        "bars": [trace["error"] for trace in traces if trace["name"] == "bar"]
    }


def by_hand(rows):
    """{width: (mean, what the 95 % interval reaches below it, and above)} over seeds, in percent: a t-interval of the
    log-odds at the mean; first a mean over each network's records. None and None for two seeds."""
    of_seed = rows.groupby(["width", "seed"]).value.mean().groupby("width").agg(["mean", "std", "size"])
    found = {}
    for width, mean, spread, seeds in of_seed.itertuples():
        reach = stats.t.ppf(0.975, seeds - 1) * spread / np.sqrt(seeds) / (mean * (1 - mean)) if 0 < mean < 1 else 0
        low, high = (special.expit(special.logit(mean) + sign * reach) for sign in (-1, 1))
        found[width] = 100 * mean, *((100 * (mean - low), 100 * (high - mean)) if seeds > 2 else (None, None))
    return found


def assert_draws(page, rows, expected):
    """The page plots the means and bars `expected` (of `by_hand`) at the places of `rows`, and gaps where none are."""
    places = rows.drop_duplicates("width").sort_values("density", ascending=False)
    found = drawn(page)
    assert len(found["points"]["y"]) == len(places) > 1
    for width, density, x, y, bar in zip(
        places.width, places.density, found["points"]["x"], found["points"]["y"], found["bars"], strict=True
    ):
        assert x == pytest.approx(100 * density, rel=1e-5)
        mean, below, above = expected.get(width, (None, None, None))
        assert y is None if mean is None else y == pytest.approx(mean, abs=0.0051)
        for side, reach in (("arrayminus", below), ("array", above)):
            assert bar[side][0] == pytest.approx(reach, abs=0.0101) if reach is not None else not bar["visible"]
    pairs = [width for width, (_, below, _) in expected.items() if below is None]
    of_seed = 100 * rows[rows.width.isin(pairs)].groupby(["width", "seed"]).value.mean()
    assert sorted(found["seeds"]["y"]) == pytest.approx(sorted(of_seed.dropna()), abs=0.0051)


def middle_of_point(page, number):
    """Where a point of the curve is, in pixels."""
    return page.evaluate(
        """number => {
            const points = [...document.querySelectorAll("#chart .trace")].map(t => t.querySelectorAll(".point"));
            const box = points.find(p => p.length > 2)[number].getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        }""",
        number,
    )


def keyboard_to(page, name):
    """Press Tab until the control has the focus, which must be seen."""
    for _ in range(30):
        if page.evaluate("document.activeElement.id") == name:
            break
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == name
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def chosen(page, name):
    return page.evaluate("name => document.getElementById(name).selectedOptions[0].textContent", name)


def choose(page, name, words):
    """Choose by keyboard the option with these words."""
    keyboard_to(page, name)
    page.keyboard.press("Home")
    for _ in range(40):
        if chosen(page, name) == words:
            return
        page.keyboard.press("ArrowDown")
    raise AssertionError(f"{name} cannot be set to {words}")


def test_slider_by_keyboard_draws_what_pandas_finds(table, path, open_page):
    page = open_page(path)
    noise = table[
        (table.dataset == "mnist")
        & (table.family == "mlp")
        & (table.growth == "width")
        & (table.schedule == "static")
        & (table.rule == "water_filling")
        & (table.measure == "weight_noise")
    ]
    sigmas = sorted(noise.strength.dropna().unique())
    keyboard_to(page, "strength")
    seen = []
    for steps, sigma in enumerate(reversed(sigmas)):
        if steps:
            page.keyboard.press("ArrowLeft")
        words = f"{sigma:g}" if sigma else "0 (clean)"
        assert page.inner_text("#value") == words == page.get_attribute("#strength", "aria-valuetext")
        assert f"σ = {words}" in page.inner_text("#title")
        assert_draws(
            page, noise[noise.strength.isna() | (noise.strength == sigma)], by_hand(noise[noise.strength == sigma])
        )
        clean = by_hand(noise[noise.strength == 0])
        assert [y for y in drawn(page)["clean"]["y"] if y is not None] == pytest.approx(
            [clean[width][0] for width in sorted(clean)], abs=0.0051
        )
        seen.append(tuple(drawn(page)["points"]["y"]))
    assert len(set(seen)) == len(sigmas) == 11


def test_base_best_diverged_and_unconverged_are_marked(table, path, open_page):
    page = open_page(path)
    found = drawn(page)
    widths = [2**k for k in range(7, 16)]
    measured = [y for y in found["points"]["y"] if y is not None]
    marked = dict(zip(found["marked"]["x"], found["marked"]["y"], strict=True))
    assert marked[100] == found["points"]["y"][0] and max(measured) in marked.values()
    symbols = dict(zip(widths, found["points"]["marker"]["symbol"], strict=True))
    assert {width for width, symbol in symbols.items() if symbol == "circle-open"} == {256, 1024, 2048}
    assert (
        found["diverged"]["text"] == ["1 of 3 diverged", "3 of 3 diverged"]
        and found["points"]["y"][widths.index(2048)] is None
    )
    assert found["points"]["marker"]["color"] == [axes.density_colour(128 / width) for width in widths]
    place = table[
        (table.dataset == "mnist")
        & (table.family == "mlp")
        & (table.width == 512)
        & (table.schedule == "static")
        & (table.rule == "water_filling")
        & (table.growth == "width")
    ]
    hover = found["points"]["text"][2]
    assert (
        "3 seeds" in hover
        and "remaining weights 25\u00a0%" in hover
        and not any(run in hover for run in place.experiment.unique())
    )
    page.mouse.move(*middle_of_point(page, 2))
    page.wait_for_selector("#chart .hoverlayer .hovertext")
    assert "3 seeds" in page.text_content("#chart .hoverlayer .hovertext")
    assert page.is_hidden("#picked")
    page.mouse.down()
    page.mouse.up()
    page.wait_for_selector("#picked")
    page.mouse.move(0, 0)
    assert all(run in page.inner_text("#picked") for run in place.experiment.unique())  # stays, to be copied
    choose(page, "family", "VGG")
    assert page.is_hidden("#picked")
    kept = ["closed", "open", "interval", "pairs", "clean", "compared", "diverged"]
    assert [name for name in kept if page.is_visible(f"#key-{name}")] == ["closed", "interval", "clean"]


ENDS = """number => {
    let ends = 0, cut = 0, impossible = 0
    for (const curve of data.curves) {
        pinned = number === null ? null : {curve: data.curves[number], question: 0, stop: 0}
        for (const [question, [, , , stops]] of curve.questions.entries()) for (const stop of stops.keys()) {
            const {data: traces, layout} = figureOf({curve, question, stop}), [low, high] = layout.yaxis.range
            for (const {name, y, error_y} of traces) for (const [i, value] of y.entries()) {
                if (value === null) continue
                const all = [value, value + (error_y?.array?.[i] ?? 0), value - (error_y?.arrayminus?.[i] ?? 0)]
                ends += all.length
                cut += all.filter(end => end < low || end > high).length
                impossible += name === "diverged" ? 0 : all.filter(end => end < -1e-9 || end > 100 + 1e-9).length
            }
        }
    }
    return [ends, cut, impossible]
}"""


@pytest.mark.parametrize("second", [None, 0, -1])
def test_nothing_that_the_page_draws_leaves_its_frame(table, path, open_page, second):
    page = open_page(path)
    curves = page.evaluate("data.curves.length")
    ends, cut, impossible = page.evaluate(ENDS, None if second is None else second % curves)
    assert (cut, impossible) == (0, 0) and curves > 30 and ends > 50_000


QUESTIONS = [
    (
        "corrupted images",
        "mean of all",
        "4",
        lambda t: (
            t[(t.measure == "corruption") & (t.strength == 4)]
            .groupby(["width", "seed", "name"])
            .value.mean()
            .reset_index()
        ),
    ),
    (
        "corrupted images",
        "gaussian noise",
        "2",
        lambda t: t[(t.measure == "corruption") & (t.strength == 2) & (t.name == "gaussian_noise")],
    ),
    ("corrupted images", "fog", "0 (clean)", lambda t: t[(t.measure == "corruption") & (t.strength == 0)]),
    (
        "adversarial attacks",
        "PGD",
        "8/255",
        lambda t: t[(t.measure == "attack") & (t.strength == 8 / 255) & (t.name == "pgd")],
    ),
    ("none (class recall)", "lowest of all", "", lambda t: t[t.quantity == "lowest_recall"]),
    ("none (class recall)", "class 3", "", lambda t: t[(t.quantity == "recall") & (t.name == "3")]),
]


@pytest.mark.parametrize("measure, question, stop, records", QUESTIONS)
def test_every_measure_by_keyboard(table, path, open_page, measure, question, stop, records):
    page = open_page(path)
    for name, words in [
        ("dataset", "CIFAR-10"),
        ("family", "VGG"),
        ("rule", "proportional"),
        ("measure", measure),
        ("question", question),
    ]:
        choose(page, name, words)
    if stop:
        keyboard_to(page, "strength")
        page.keyboard.press("Home")
        for _ in range(10):
            if page.inner_text("#value") != stop:
                page.keyboard.press("ArrowRight")
        assert page.inner_text("#value") == stop
    assert page.is_visible("#strength") == bool(stop)
    curve = table[
        (table.dataset == "cifar10")
        & (table.family == "vgg")
        & (table.rule == "proportional")
        & (table.schedule == "static")
        & (table.growth == "width")
    ]
    assert_draws(page, curve, by_hand(records(curve)))
    assert question in page.inner_text("#title")


def test_every_select_changes_by_keyboard_and_only_what_exists_can_be_chosen(table, path, open_page):
    page = open_page(path)
    for name in SELECTS:
        if name == "question":
            choose(page, "measure", "adversarial attacks")
        before, picture = chosen(page, name), drawn(page)["points"]["y"]
        keyboard_to(page, name)
        page.keyboard.press("ArrowDown")
        assert chosen(page, name) != before and drawn(page)["points"]["y"] != picture
        page.keyboard.press("ArrowUp")
        assert chosen(page, name) == before
    combinations = set(table[list(CONTROLS)].itertuples(index=False, name=None))
    offered = page.evaluate("""() => {
      const found = [], selects = [...document.querySelectorAll("select.where")];
      const walk = i => {
        if (i === selects.length) return found.push(selects.map(s => s.selectedOptions[0].textContent));
        for (const value of [...selects[i].options].filter(o => !o.disabled).map(o => o.value)) {
          selects[i].value = value;
          selects[i].dispatchEvent(new Event("change"));
          walk(i + 1);
        }
      };
      walk(0);
      return found;
    }""")
    words = {
        tuple(CONTROLS[name][value] for name, value in zip(CONTROLS, combination, strict=True))
        for combination in combinations
    }
    assert {tuple(combination) for combination in offered} == words and len(offered) == len(words) == 2 * 2 * (
        2 * (4 + 3 + 2) + 1
    )  # measures by width, by depth, after pruning; of ERK, noise by width


def test_depth_has_evenly_spaced_steps(table, path, open_page):
    page = open_page(path)
    choose(page, "family", "VGG")
    choose(page, "growth", "depth")
    assert drawn(page)["points"]["x"] == [0, 1, 2, 3, 4, 5]
    assert page.evaluate("document.getElementById('chart').layout.xaxis.title.text") == "depth, remaining weights (%)"


def test_numbers_are_in_a_table_and_titles_in_words(path, open_page):
    page = open_page(path)
    keyboard = page.locator("#numbers summary")
    keyboard.focus()
    page.keyboard.press("Enter")
    rows = page.locator("#rows tr").all_inner_texts()
    assert len(rows) == 9 and rows[0].startswith("100\u00a0%") and "3 diverged" in rows[4]
    means = [None if "–" in row.split("\t")[3] else float(row.split("\t")[3].split("\u00a0")[0]) for row in rows]
    assert means == [None if y is None else pytest.approx(y, abs=0.051) for y in drawn(page)["points"]["y"]]
    layout = page.evaluate(
        """(({xaxis, yaxis}) => [xaxis.title.text, yaxis.title.text, xaxis.type, xaxis.range])(
            document.getElementById("chart").layout)"""
    )
    assert layout[:3] == ["remaining weights (%)", "accuracy (%)", "log"] and layout[3][0] > layout[3][1]
    assert page.inner_text("#title") == "MLP on MNIST, growing in width: accuracy under weight noise, σ = 0.5"
    for label in (*(LABELS[name] for name in CONTROLS), "Noise σ"):
        assert page.get_by_label(label, exact=True).is_visible()


@pytest.mark.parametrize("width", [320, 390])
def test_phone(path, open_page, width):
    page = open_page(path, width=width, height=844)
    assert page.is_hidden("#dataset")
    page.click("#numbers summary")
    page.click("#menus summary")
    for measure in ("weight noise", "corrupted images", "adversarial attacks", "none (class recall)"):
        page.select_option("#measure", label=measure)
        assert page.evaluate("document.documentElement.scrollWidth") == width
    sizes = page.evaluate(
        """[...document.querySelectorAll("select, input, button")].filter(e => e.offsetParent)
            .map(e => e.getBoundingClientRect().height)"""
    )
    assert min(sizes) >= 40
    assert page.evaluate("document.querySelector('#chart .main-svg').getBoundingClientRect().width") <= width


def test_dark(path, open_page):
    page = open_page(path, scheme="dark")
    grounds = (
        "[getComputedStyle(document.body).backgroundColor, document.getElementById('chart')._fullLayout.paper_bgcolor]"
    )
    dark = drawn(page)["points"]["marker"]["color"]
    assert [axes.luminance(colour) for colour in page.evaluate(grounds)] == [axes.luminance(axes.DARK_BACKGROUND)] * 2
    ink = page.evaluate("getComputedStyle(document.body).color")
    assert axes.contrast(ink, axes.DARK_BACKGROUND) > 7
    page.emulate_media(color_scheme="light")
    assert axes.luminance(page.evaluate(grounds)[0]) == 1
    page.wait_for_function("document.getElementById('chart')._fullLayout.paper_bgcolor === 'white'")
    assert drawn(page)["points"]["marker"]["color"] == dark  # one colour for one density, day and night


COLOURS = """() => {
    const found = [], ground = element => {
        for (let e = element; e; e = e.parentElement) {
            const colour = getComputedStyle(e).backgroundColor;
            if (!/rgba\\(.*, 0\\)/.test(colour)) return colour;
        }
    };
    for (const e of document.querySelectorAll("body *")) {
        const own = [...e.childNodes].some(node => node.nodeType === 3 && node.data.trim());
        if (!own || !e.getClientRects().length || ["SCRIPT", "STYLE", "OPTION"].includes(e.tagName)) continue;
        const style = getComputedStyle(e);
        found.push([e.textContent, e instanceof SVGElement ? style.fill : style.color, ground(e)]);
    }
    for (const {name, marker} of document.getElementById("chart").data)
        for (const colour of [marker?.color ?? []].flat()) found.push([name, colour, ground(document.body)]);
    return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_markers_are_readable_by_day_and_by_night(path, open_page, scheme):
    """WCAG 2.1 asks for 4.5 to 1 for text, and 3 to 1 for what a plot is read by."""
    page = open_page(path, scheme=scheme)
    page.click("#compare")
    page.select_option("#family", label="VGG")
    page.click("#numbers summary")
    page.mouse.click(*middle_of_point(page, 2))
    page.wait_for_selector("#picked")
    colours = page.evaluate(COLOURS)
    traces = {trace["name"] for trace in page.evaluate("document.getElementById('chart').data")}
    said = [text for text, *_ in colours]
    assert {"points", "compared"} <= traces and len(said) > 100
    assert any("remaining weights (%)" in text for text in said)
    faint = [
        (text, ink, ground)
        for text, ink, ground in colours
        if axes.contrast(ink, ground) < (3 if text in traces else 4.5)
    ]
    assert faint == []


TICKS = """() => [...document.querySelectorAll("#chart .xtick text")].filter(e => e.textContent.trim()).map(e => {
    const box = e.getBoundingClientRect();
    return [box.left, box.right, e.getAttribute("transform")];
})"""


@pytest.mark.parametrize("width", [320, 390, 1366])
def test_labels_of_ticks_are_straight_and_apart(path, open_page, width):
    page, seen = open_page(path, width=width, height=844), 0
    for growth in ("width", "depth"):
        for family in ("vgg", "mlp"):
            for compared in (False, True):
                page.evaluate("words => { location.hash = words; }", f"#growth={growth}&family={family}&dataset=mnist")
                page.wait_for_function("words => location.hash.includes(words)", arg=f"growth={growth}&family={family}")
                if compared:
                    page.click("#compare")
                    page.evaluate("location.hash += '&growth=depth'")
                ticks = sorted(page.evaluate(TICKS))
                assert all(right + 3 < left for (_, right, _), (left, _, _) in itertools.pairwise(ticks)), ticks
                assert not any("rotate" in transform for *_, transform in ticks) and len(ticks) >= 4
                assert ticks[0][0] >= 0 and ticks[-1][1] <= width
                seen += len(ticks)
    assert seen > 8 * 4


def test_rounded_weights_and_a_second_study(table, open_page, tmp_path):
    """A measure of which the page is told nothing; and the same curves of another study, behind a menu."""
    noise = table[(table.dataset == "mnist") & (table.measure == "weight_noise") & (table.schedule == "static")]
    clean = noise[noise.strength == 0].assign(measure="clean")
    some = noise.strength.isin([0.1, 0.2, 0.3]) | noise.strength.isna()
    rounded = noise[some].assign(measure="quantisation")
    rounded = rounded.assign(strength=(10 * rounded.strength).round() + 1, name="integer_per_channel")
    both = [noise.assign(study="first"), *(t.assign(study="second") for t in (noise, clean, rounded))]
    page = open_page(write_page(pd.concat(both), tmp_path / "explore.html")[0])
    assert chosen(page, "study") == "first" and page.locator("#study option").count() == 2
    choose(page, "measure", "rounded weights")
    assert chosen(page, "study") == "second" and page.is_visible("#key-clean")
    assert [page.get_attribute("#strength", name) for name in ("min", "max")] == ["0", "2"]
    keyboard_to(page, "strength")
    page.keyboard.press("End")
    assert page.inner_text("#value") == "4 bits" and page.inner_text("#title").endswith("rounded weights, 4 bits")
    curve = dict(rule="water_filling", family="mlp", growth="width")
    mlp, of_mlp = (t[(t[list(curve)] == pd.Series(curve)).all(axis=1)] for t in (noise, rounded))
    assert_draws(page, of_mlp[~of_mlp.strength.isin([2, 3])], by_hand(of_mlp[of_mlp.strength == 4]))
    of_clean = by_hand(mlp[mlp.strength == 0])
    assert [y for y in drawn(page)["clean"]["y"] if y is not None] == pytest.approx(
        [of_clean[width][0] for width in sorted(of_clean)], abs=0.0051
    )
    page.wait_for_function("() => location.hash.includes('measure=rounded-weights&study=second')")
    page.click("#compare")
    assert "study second" in page.inner_text("#compared") and "study second" in page.inner_text("#method")


HOSTILE = """</script><!--<script>window.hurt=1</script><img src=x onerror="hurt=1"><a href='//evil.example'>&lt;"""


def test_hostile_text_stays_text(table, open_page, tmp_path):
    """A name, a status, a hash, a footer and a command that are HTML are shown as they are and run nothing."""
    some = table[(table.measure == "corruption") & (table.dataset == "cifar10") & (table.family == "vgg")].copy()
    some["name"] = some.name.replace("fog", HOSTILE)
    some["status"] = HOSTILE
    run = HOSTILE.replace(" ", "/")
    some["experiment"] = some.experiment.replace(some.experiment.iloc[0], run)
    page = open_page(write_page(some, tmp_path / "explore.html", provenance=[HOSTILE])[0])
    assert page.inner_text("footer") == HOSTILE
    choose(page, "question", HOSTILE)
    assert HOSTILE in page.inner_text("#title")
    page.click("#numbers summary")
    assert HOSTILE in page.inner_text("#rows") and run in page.inner_text("#rows")
    page.click("#compare")
    assert HOSTILE in page.inner_text("#compared")
    page.locator("#chart").scroll_into_view_if_needed()
    box = middle_of_point(page, 0)
    page.mouse.move(*box)
    page.wait_for_selector("#chart .hoverlayer .hovertext")
    assert HOSTILE in page.text_content("#chart .hoverlayer")
    page.mouse.click(*box)
    assert run in page.inner_text("#picked")
    with page.expect_download() as download:
        page.click("#save")
    download.value.save_as(tmp_path / "saved.svg")
    assert not re.search("<(img|a|script)\\b", (tmp_path / "saved.svg").read_text())
    assert page.evaluate("window.hurt") is None and page.locator("img, a").count() == 0
    empty = open_page(write_page(pd.DataFrame(), tmp_path / "empty.html", provenance=[HOSTILE], fill=HOSTILE)[0])
    assert empty.inner_text("pre") == HOSTILE and empty.evaluate("window.hurt") is None


def test_picture_is_saved_as_vectors(path, open_page, tmp_path):
    page = open_page(path)
    page.click("#compare")
    choose(page, "rule", "proportional")
    with page.expect_download() as download:
        page.click("#save")
    download.value.save_as(tmp_path / "picture.svg")
    picture = (tmp_path / "picture.svg").read_text()
    assert picture.startswith("<svg") and "<image" not in picture and "remaining weights (%)" in picture
    said = " ".join(ElementTree.fromstring(picture).itertext())
    assert page.inner_text("#title") in said and "sparse-nb. Chosen numbers." in said and "before training" in said
    assert "allocation rule: proportional. Diamonds: " in said and "allocation rule: water-filling." in said


def test_library_beside_the_page(table, open_page, tmp_path):
    paths = write_page(table[table.measure == "class_recall"], tmp_path / "explore.html", include_plotlyjs="directory")
    assert [path.name for path in paths] == ["explore.html", "plotly.min.js"] and paths[0].stat().st_size < 100_000
    page = open_page(paths[0])
    assert len(drawn(page)["points"]["y"]) == 9


def test_page_of_an_empty_store(open_page, tmp_path):
    page = open_page(write_page(pd.DataFrame(), tmp_path / "explore.html", fill="sparse-nb sweep --preset laptop")[0])
    assert "sparse-nb sweep --preset laptop" in page.inner_text("main") and page.locator("select").count() == 0


def test_data_of_all_these_curves_are_small(path):
    assert path.stat().st_size - len(get_plotlyjs().encode()) < 1_000_000


AGAIN = """
import sys
import pandas as pd
from sparse_nb.explorer.page import write_page
write_page(pd.read_csv(sys.argv[1], keep_default_na=False), sys.argv[2], include_plotlyjs="directory")
"""


def test_bytes_repeat_in_another_process(table, tmp_path):
    some = table[(table.measure == "class_recall") & (table.dataset == "cifar10")]
    some.to_csv(tmp_path / "table.csv", index=False)
    written = write_page(
        pd.read_csv(tmp_path / "table.csv", keep_default_na=False), tmp_path / "here.html", include_plotlyjs="directory"
    )[0].read_bytes()
    for seed in "12":
        words = [sys.executable, "-c", AGAIN, tmp_path / "table.csv", tmp_path / f"{seed}.html"]
        subprocess.run(words, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
        assert (tmp_path / f"{seed}.html").read_bytes() == written


@pytest.mark.parametrize("width, height", [(1366, 768), (390, 844)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_chart_and_slider_are_on_one_screen(path, open_page, width, height, scheme):
    page = open_page(path, width=width, height=height, scheme=scheme, state="#measure=corrupted-images")
    for name in ("#title", "#strength", "#value", "#chart"):
        box = page.locator(name).bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] <= height, name
        assert box["x"] >= 0 and box["x"] + box["width"] <= width, name
    assert page.locator("#chart").bounding_box()["height"] >= 240
    assert page.evaluate("document.documentElement.scrollWidth") == width


ELSEWHERE = [
    ("dataset", "CIFAR-10"),
    ("family", "VGG"),
    ("growth", "depth"),
    ("rule", "proportional"),
    ("measure", "corrupted images"),
    ("question", "glass blur"),
]


def test_the_address_restores_the_view(path, open_page):
    page = open_page(path)
    assert "#" not in page.url
    for name, words in ELSEWHERE:
        choose(page, name, words)
    keyboard_to(page, "strength")
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("() => location.hash.includes('question=glass-blur&strength=2')")
    again = open_page_like(open_page, path, page)
    again.click("#compare")
    again.select_option("#family", label="MLP")
    again.wait_for_function("() => location.hash.includes('with=') && location.hash.includes('family=mlp')")
    third = open_page_like(open_page, path, again)
    assert "diamonds" in third.inner_text("#compared") and "VGG" in third.inner_text("#compared")
    third.evaluate("location.hash = '#family=vgg&measure=weight-noise'")  # as typed, or by the button Back
    third.wait_for_function("() => document.getElementById('title').textContent.startsWith('VGG on MNIST')")
    assert third.is_hidden("#compared")


def open_page_like(open_page, path, page):
    """The address of `page` opened in another browser context, which shows the same."""
    again = open_page(path, state="#" + page.url.partition("#")[2])
    assert again.inner_text("#title") == page.inner_text("#title")
    assert [chosen(again, name) for name in SELECTS] == [chosen(page, name) for name in SELECTS]
    assert drawn(again) == drawn(page)
    return again


def test_a_second_curve_is_compared(table, path, open_page):
    page = open_page(path)
    before = drawn(page)["points"]
    assert "compared" not in drawn(page) and page.get_attribute("#compare", "aria-pressed") == "false"
    keyboard_to(page, "compare")
    page.keyboard.press("Enter")
    page.focus("#dataset")
    choose(page, "family", "VGG")
    found = drawn(page)
    assert found["compared"]["y"] == before["y"] and found["compared"]["x"] == before["x"]
    vgg = table[(table.dataset == "mnist") & (table.family == "vgg") & (table.growth == "width")]
    vgg = vgg[(vgg.schedule == "static") & (vgg.rule == "water_filling") & (vgg.measure == "weight_noise")]
    assert_draws(page, vgg, by_hand(vgg[vgg.strength == 0.5]))
    assert found["points"]["y"] != before["y"] and page.is_visible("#key-compared")
    low, high = page.evaluate("document.getElementById('chart').layout.xaxis.range")[::-1]
    assert all(low < np.log10(x) < high for x in (*found["compared"]["x"], *found["points"]["x"]))
    choose(page, "growth", "depth")  # its own axis has places without a scale: both are plotted against density
    found, layout = drawn(page), page.evaluate("document.getElementById('chart').layout.xaxis")
    assert layout["type"] == "log" and layout["title"]["text"] == "remaining weights (%)"
    depths = table[(table.dataset == "mnist") & (table.family == "vgg") & (table.growth == "depth")].density.unique()
    assert found["points"]["x"] == pytest.approx([100 * density for density in sorted(depths, reverse=True)], rel=1e-5)
    page.click("#compare")
    assert "compared" not in drawn(page) and page.is_hidden("#key-compared")
    assert drawn(page)["points"]["x"] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "state",
    [
        f"#dataset={HOSTILE}&family={HOSTILE}&question={HOSTILE}&strength={HOSTILE}&with={HOSTILE}",
        "#with=" + "/".join([HOSTILE.replace("/", "")] * 8),
        "#dataset=__proto__&strength=constructor&family=toString&with=__proto__",
        "#%E0%A4%A&dataset=%00&strength=-1&question=999&with=%2F%2F%2F%2F%2F%2F%2F",
        f"#{HOSTILE}",
        "#" + "dataset=" * 20_000,
    ],
)
def test_a_hostile_address_does_nothing(path, open_page, state):
    page, usual = open_page(path, state=state), open_page(path)
    assert page.evaluate("window.hurt") is None and page.locator("img, a").count() == 0
    assert page.inner_text("main") == usual.inner_text("main") and drawn(page) == drawn(usual)


def test_a_link_is_copied_or_shown(path, open_page):
    page = open_page(path)
    page.evaluate("() => { navigator.clipboard.writeText = async words => { window.copied = words; }; }")
    page.click("#link")
    page.wait_for_function("() => document.getElementById('link').textContent === 'Copied'")
    assert page.evaluate("window.copied").startswith(path.as_uri() + "#dataset=mnist&family=mlp&growth=width")
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error(0)); }")
    page.click("#link")
    page.wait_for_selector("#address")
    assert page.input_value("#address") == page.evaluate("window.copied")


def test_words_are_explained_to_mouse_and_keyboard(path, open_page):
    page = open_page(path)
    for name in CONTROLS:
        assert page.is_hidden(f"#{name}-hint")
        keyboard_to(page, name)
        assert page.inner_text(f"#{name}-hint") == GLOSSARY[name] and page.is_visible(f"#{name}-hint")
        assert page.get_attribute(f"#{name}", "aria-describedby") == f"{name}-hint"
    page.evaluate("document.activeElement.blur()")
    page.hover("label[for=rule]")
    assert page.is_visible("#rule-hint")
    on_top = """() => {
        const hint = document.getElementById("rule-hint"), box = hint.getBoundingClientRect();
        hint.style.pointerEvents = "auto";
        return document.elementFromPoint(box.right - 5, box.bottom - 5) === hint;
    }"""
    assert page.evaluate(on_top)  # not below the plot


def test_the_claim_of_the_panel_is_told(table, open_page, tmp_path):
    panel = dict(claim="1", dataset="mnist", rule="water_filling", family="mlp", growth="width", seeds=3)
    judged = pd.DataFrame([panel | {"verdict": "refuted", "numbers": "some <b>numbers</b>"}])
    place = dict(contrast="gain", disturbance="noise", rule="water_filling", dataset="mnist", family="mlp")
    effects = pd.DataFrame([place | {"effect": 1.26, "low": -0.4, "high": 2.9}])
    some = table[(table.dataset == "mnist") & (table.measure == "weight_noise") & (table.schedule == "static")]
    page = open_page(write_page(some, tmp_path / "explore.html", judged=judged, effects=effects)[0])
    said = page.inner_text("#claim")
    assert said.startswith("refuted in this panel") and CLAIMS["1"].sentence in said and "some <b>numbers</b>" in said
    assert "+1.3 points" in said and "-0.4 to +2.9" in said and page.locator("#claim b").inner_text() == "refuted"
    choose(page, "rule", "proportional")
    assert page.inner_text("#claim") == "No sentence of the paper is tested on this curve."


ROOT = Path(__file__).parents[2]


def test_the_published_page_is_made_of_these_files():
    """docs/static/curves.html has to be made again (`python .ci/book.py explorer`) when its parts change."""
    page, parts = (ROOT / "docs/static/curves.html").read_text(encoding="utf-8"), ROOT / "sparse_nb/explorer"
    script, style, elements = ((parts / f"page.{kind}").read_text(encoding="utf-8") for kind in ("js", "css", "html"))
    assert f"<script>\n{script}</script>" in page and f"<style>\n{style}</style>" in page
    with_curves = re.sub(r"<!-- otherwise -->.*?<!-- end -->\n", "", elements, flags=re.DOTALL)
    fixed = re.split(r"[$]\w+|<!-- if there are curves -->\n", with_curves)
    assert len(fixed) > 8 and [part for part in fixed if part not in page] == []
    assert all(f">{LABELS[name]}</label>" in page and GLOSSARY[name] in page for name in CONTROLS)
    assert "rounded weights" in page and len(page.encode()) < 600_000
