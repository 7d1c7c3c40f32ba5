"""The book as a reader meets it: links that lead somewhere, nothing from elsewhere, figures that answer.

`make test` runs it in a stage of its own: pytest -m book.
"""

import csv
import functools
import http.server
import json
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import pytest

pytestmark = pytest.mark.book
ROOT = Path(__file__).parent.parent.parent
RENDERED = ROOT / "figures/rendered"
PUBLISHED = {path.stem: path for preset in ("paper", "laptop2", "laptop") for path in (RENDERED / preset).glob("*.svg")}
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-quic"]
FIVE = (
    "nbs/index.html",
    "docs/answer.html",
    "figures/fig01_weight_noise_width.html",
    "nbs/2_networks/03_masks.html",
    "reference/sparse_nb/sparse_nb.networks.masks.html",
)


@pytest.fixture(scope="session")
def book():
    """The folder of the book, built; a dead link or another warning of Sphinx fails."""
    done = subprocess.run([sys.executable, ".ci/book.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return ROOT / "docs/_build/html"


class Page(HTMLParser):
    """What a page links to, what it loads, its anchors, and its text: of code, and of all else."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.anchors, self.code, self.prose, self._pre = [], [], {""}, "", "", 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors |= {given.get("id") or "", given.get("name") or ""}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("canonical", "author"):
            self.loads.append(given.get("href") or "")
        elif given.get("src"):
            self.loads.append(given["src"])
        self._pre += tag == "pre"

    def handle_endtag(self, tag):
        self._pre -= tag == "pre"

    def handle_data(self, data):
        if self._pre:
            self.code += data
        else:
            self.prose += data


@pytest.fixture(scope="session")
def pages(book):
    return {path: Page(path) for path in book.rglob("*.html") if "_static" not in path.parts}


def test_no_link_inside_the_book_is_dead(book, pages):
    assert len(pages) > 100
    dead = set()
    for path, page in pages.items():
        for link in page.links + page.loads:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            known = target in pages and unquote(parts.fragment) in pages[target].anchors
            if not target.exists() or (parts.fragment and target.suffix == ".html" and not known):
                dead.add((str(path.relative_to(book)), link))
    assert not dead


def test_nothing_is_loaded_from_another_host(book, pages):
    foreign = {(path.name, load) for path, page in pages.items() for load in page.loads if re.match(r"(\w+:)?//", load)}
    for sheet in book.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        foreign |= {(sheet.name, url) for url in re.findall(r"(?:url\(|@import )[\"']?((?:https?:)?//[^\"')]+)", text)}
    assert not foreign


def test_no_directive_is_seen_on_a_page(pages):
    chapters = {path: page for path, page in pages.items() if "nbs" in path.parts}
    assert len(chapters) > 60 and any("import torch" in page.code for page in chapters.values())
    assert not [path.name for path, page in chapters.items() if re.search(r"^#\s*\|", page.code, re.MULTILINE)]


def test_tables_are_tables_and_progress_bars_are_not_shown(book, pages):
    index, chapters = pages[book / "nbs/index.html"], [page for path, page in pages.items() if "nbs" in path.parts]
    assert "lowest class recall" in index.prose and "training.fit" in index.code
    assert not [page.links[0] for page in chapters if re.search(r"\|\s*:?---|\|\s*$", page.prose, re.MULTILINE)]
    assert not re.search(r"\d%\||\[\d\d:\d\d", index.code + index.prose)


def test_names_in_prose_link_to_the_reference(book):
    page = (book / "docs/start.html").read_text(encoding="utf-8")
    assert 'sparse_nb.networks.masks.html#sparse_nb.networks.masks.random_masks"' in page


def test_figures_are_those_that_are_published(pages):
    """Every published plot can be pointed at; its panels and points are those of SVG and CSV, of `laptop` first."""
    plots = {}
    for path in pages:
        if "figures" in path.parts:
            text = path.read_text(encoding="utf-8")
            for name, data in re.findall(r'<script type="application/json" id="(\w+)">(.*?)</script>', text, re.DOTALL):
                plots[name] = json.loads(data.replace("<\\/", "</"))
    assert set(plots) == set(PUBLISHED) and PUBLISHED["fig01"].parent.name == "laptop"
    for name, plot in plots.items():
        texts = ElementTree.parse(PUBLISHED[name]).iter("{http://www.w3.org/2000/svg}text")
        published = {"".join(text.itertext()) for text in texts if text.get("class") == "annotation-text"}
        said = [a for a in plot["layout"].get("annotations", ()) if a.get("font", {}).get("size") != 10]  # no footers
        titles = {a["text"] for a in said if a.get("text")}
        plain = {re.sub(r"<br>|</?[bi]>", "", title) for title in titles}
        assert plain <= published, f"{name}: {sorted(plain - published)[:3]}"
        assert plain or not name.startswith("fig")
    with open(PUBLISHED["fig01"].with_suffix(".csv"), encoding="utf-8") as table:
        runs = {run for row in csv.DictReader(table) for run in row["runs"].split()}
    shown = set(re.findall(r"\b[0-9a-f]{16}\b", json.dumps(plots["fig01"]["data"])))
    assert shown == runs and len(shown) > 400


@pytest.fixture(scope="module")
def browse(book):
    """A function that opens a page of the served book: (browser's page, errors and foreign requests so far)."""
    from choreographer.browsers.chromium import Chromium
    from playwright.sync_api import sync_playwright

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=book))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_address[1]}/"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=Chromium.find_browser(skip_local=False), args=FLAGS)

        def open_page(path, width=1366, height=768, scheme="light"):
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.set_default_timeout(60_000)
            wrong = []
            page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on(
                "request",
                lambda request: (
                    request.url.startswith("http") and not request.url.startswith(here) and wrong.append(request.url)
                ),
            )
            page.goto(here + path)
            return page, wrong

        yield open_page
        browser.close()
    server.shutdown()


@pytest.mark.parametrize("width, height, scheme", ((1366, 768, "light"), (390, 844, "dark")), ids=("laptop", "phone"))
def test_five_pages_in_a_browser(browse, width, height, scheme):
    for path in FIVE:
        page, wrong = browse(path, width, height, scheme)
        page.wait_for_load_state("load")
        too_wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert (path, wrong, too_wide) == (path, [], 0)
        page.close()


def test_a_point_names_its_runs(browse):
    page, wrong = browse(FIVE[2])
    page.wait_for_selector(".plot .main-svg .point")
    page.locator(".plot").scroll_into_view_if_needed()
    page.evaluate("Plotly.Fx.hover(document.querySelector('.plot'), [{curveNumber: 0, pointNumber: 0}], 'xy')")
    said = page.locator(".plot .hoverlayer").text_content()
    first = PUBLISHED["fig01"].with_suffix(".csv").read_text(encoding="utf-8").splitlines()[1].split(",")[13].split()[0]
    assert first in said and wrong == []


QUESTIONS = {  # the links that are followed from the front page, none of the side bar, and what is then seen
    "What did they find?": (("The answer in numbers",), "undisturbed"),
    "How do I run it on my network?": (("Prune a network of your own",), "The same number of weights"),
    "Which run is this point?": (("Where to begin", "From a point to its runs"), "sparse-nb trace"),
    "How long does figure 2 take?": (("Where to begin", "What it costs"), "fig02"),
    "Where do I change the corruption?": (("Where to begin", "Where to change what"), "MNIST-C"),
}


@pytest.mark.parametrize("width, height", ((1366, 768), (390, 844)), ids=("laptop", "phone"))
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_is_answered_within_two_clicks(browse, question, width, height):
    clicks, answer = QUESTIONS[question]
    page, wrong = browse("nbs/index.html", width, height)
    for text in clicks:
        page.locator("article a:visible", has_text=text).first.click()
        page.wait_for_load_state("load")
    found = page.locator("article").get_by_text(answer).first
    found.wait_for()
    found.scroll_into_view_if_needed()
    assert len(clicks) <= 2 and wrong == []


def test_the_search_finds_a_word_and_equations_are_set(browse):
    page, wrong = browse("search.html?q=quantisation")
    page.wait_for_selector("#search-results li a")
    assert any("05_quantisation" in link.get_attribute("href") for link in page.locator("#search-results li a").all())
    page, more = browse("nbs/3_robustness/02_weight_noise.html")
    page.wait_for_selector("mjx-container svg", state="attached")
    assert wrong == more == []


def test_the_explorer_draws(browse):
    page, wrong = browse("docs/explorer.html")
    page.frame_locator("iframe.explorer").locator("#chart .main-svg").first.wait_for()
    assert wrong == []
