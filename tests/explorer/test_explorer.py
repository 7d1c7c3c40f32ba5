"""The explorer in a real browser, served by Voilà and in JupyterLab, and what the server refuses."""

import asyncio
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from jupyter_client.manager import KernelManager
from tornado.websocket import websocket_connect

from sparse_nb.explorer.serve import start_server
from sparse_nb.runs.attempts import load_failures, save_failure
from sparse_nb.runs.store import Store
from sparse_nb.study.plans import plan
from sparse_nb.study.studies import narrow
from sparse_nb.sweep import sweep

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "nbs" / "explore.ipynb"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium or Chrome on the path")
PATIENCE = 120  # seconds
FIRST_PAINT = 3  # seconds, on a machine that has nothing else to do

POINT = """() => {
    const plot = document.querySelector('.js-plotly-plot'), box = plot.getBoundingClientRect()
    const {xaxis, yaxis} = plot._fullLayout, {x, y} = plot.data[1]
    return [box.x + xaxis._offset + xaxis.d2p(x[1]), box.y + yaxis._offset + yaxis.d2p(y[1])]
}"""  # where the second point of the curve is, in pixels


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def answer(url, **headers):
    """(status, body) of a GET."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=PATIENCE) as found:
            return found.status, found.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, ""


def wait_for_port(port, process):
    deadline = time.time() + PATIENCE
    while time.time() < deadline and process.poll() is None:
        try:
            return socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"the server is not there; its status is {process.poll()}")


def family(process):
    """The processes below a process, those of its kernels that have not ended among them."""
    return psutil.Process(process.pid).children(recursive=True)


def kernels(process):
    """How many kernels there are below a process; a kernel may ask another process for a verdict."""
    return sum("ipykernel_launcher" in found.cmdline() for found in family(process))


@contextmanager
def ended(process):
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Width curves of an MLP on digits under weight noise, of two seeds; one network is missing, and one failed."""
    store, points = (
        Store(tmp_path_factory.mktemp("explorer") / "runs"),
        plan("fig01", narrow("smoke", families="mlp", widths="32 128 512")),
    )
    points = [p for p in points if (p.experiment.width, p.experiment.seed) != (512, 1)]
    sweep.run([p.experiment for p in points], [points[0].evaluation], store=store, device="cpu", show=False)
    save_failure(
        store,
        dataclasses.replace(points[-1].experiment, width=256),
        "digits mlp width 256",
        "its process was killed by SIGSEGV",
        3,
    )
    return store


@pytest.fixture(scope="module")
def served(store, tmp_path_factory):
    """Address of the page served by Voilà."""
    port = free_port()
    with ended(start_server(PAGE, tmp_path_factory.mktemp("page"), runs=store.root, port=port)) as process:
        wait_for_port(port, process)
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-quic"]
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield found
        found.close()


@contextmanager
def watched_page(browser):
    """A page; afterwards: no error on its console, no request to another host."""
    page, errors, hosts = browser.new_page(viewport={"width": 1300, "height": 1000}), [], set()
    page.context.set_default_timeout(1000 * PATIENCE)  # of pages that it opens too
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: hosts.add(urllib.parse.urlsplit(request.url).hostname))
    yield page
    page.close()
    assert not errors
    assert hosts - {None, ""} <= {"127.0.0.1"}


def drawn(page):
    """The heights of the points of the disturbed curve, as plotly has them."""
    return page.evaluate("Array.from(document.querySelector('.js-plotly-plot').data[1].y)")


def expected(store, sigma):
    """The same, from the records."""
    table = store.table(strength=sigma, quantity="accuracy", measure="weight_noise")
    return [100 * table[table.width == width].groupby("seed").value.mean().mean() for width in (32, 128, 512)]


def expected_last(store):
    """The height of the sparsest point at the strength where the slider begins."""
    table = store.table(strength=0.5, quantity="accuracy", measure="weight_noise", schedule="static")
    return 100 * table[table.density == table.density.min()].groupby("seed").value.mean().mean()


def move_slider(page, store):
    """Move the slider by keyboard through all strengths and back to the first, and see the curve follow."""
    page.wait_for_selector(".js-plotly-plot .scatterlayer .trace")
    assert drawn(page) == pytest.approx(expected(store, 0.5))  # where there is most to see, as on the page
    slider = page.locator("[role=slider]").first
    slider.focus()
    for key, sigma in [("Home", 0.1), ("ArrowRight", 0.2), ("ArrowRight", 0.3), ("End", 0.5)]:
        page.keyboard.press(key)
        wanted = expected(store, sigma)
        page.wait_for_function(
            "y => Math.abs(document.querySelector('.js-plotly-plot').data[1].y[0] - y) < 1e-6", arg=wanted[0]
        )
        assert drawn(page) == pytest.approx(wanted)


def slowness():
    """How many times longer than alone this process takes now: the machine may be busy with other things."""
    start, used = time.perf_counter(), time.process_time()
    while time.process_time() - used < 0.3:
        pass
    return (time.perf_counter() - start) / 0.3


def keep_picture(page, name):
    if folder := os.environ.get("SPARSE_NB_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


@needs_browser
def test_served_page(browser, served, store):
    with watched_page(browser) as page:
        page.goto(served)
        move_slider(page, store)
        assert "load_run" not in page.content()
        page.get_by_label("Networks at").select_option(index=1)
        page.wait_for_selector("pre:has-text('load_run(Store(')")
        at = page.evaluate(POINT)
        page.mouse.move(*at)
        page.wait_for_selector(".js-plotly-plot .hoverlayer .hovertext")
        page.mouse.click(*at)
        page.wait_for_function("document.querySelector('pre').innerText.includes('width=128')")
        keep_picture(page, "served")
        code = page.locator("pre").inner_text()
    loaded = subprocess.run(
        [sys.executable, "-c", code + "\nprint(sum(p.numel() for p in model.parameters()))"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert loaded.returncode == 0 and int(loaded.stdout) > 1000, loaded.stderr  # what was shown, pasted


@needs_browser
def test_plot_follows_in_a_browser_that_is_slow_to_read_plotly(browser, served, store):
    """anywidget gives a widget's program two seconds; if it comes later, it drops every message from then on."""
    slow = """
        const given = URL.createObjectURL, wait = "await new Promise(done => setTimeout(done, 3000));";
        URL.createObjectURL = blob => given(blob.size > 1e6 ? new Blob([wait, blob], {type: blob.type}) : blob);
    """
    with watched_page(browser) as page:
        page.add_init_script(slow)
        page.goto(served)
        move_slider(page, store)


@needs_browser
@pytest.mark.parametrize("width, height", [(1366, 768), (390, 844)])
def test_served_page_is_as_wide_as_the_screen(browser, served, width, height):
    with watched_page(browser) as page:
        page.set_viewport_size({"width": width, "height": height})
        page.goto(served)
        page.wait_for_selector(".js-plotly-plot .scatterlayer .trace")
        page.wait_for_timeout(500)  # the plot takes its size
        plot, slider = page.locator(".js-plotly-plot").bounding_box(), page.locator("[role=slider]").bounding_box()
        assert 0.85 * width < plot["width"] <= width and plot["x"] >= 0
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert 0 <= slider["x"] and slider["x"] + slider["width"] <= width
        assert plot["y"] + plot["height"] - slider["y"] < height  # both on one screen
        keep_picture(page, f"served-{width}")


@needs_browser
def test_a_second_curve_is_compared(browser, served, store):
    with watched_page(browser) as page:
        page.goto(served)
        page.wait_for_selector(".js-plotly-plot .scatterlayer .trace")
        page.get_by_role("button", name="Compare with").click()
        page.get_by_text("compared with (diamonds): MLP on digits").wait_for()
        page.wait_for_function("() => document.querySelector('.js-plotly-plot')?.data?.length === 9")
        page.locator("[role=slider]").first.focus()
        page.keyboard.press("Home")
        page.wait_for_function(
            "() => document.querySelector('.js-plotly-plot').data[1].y[0] !== "
            "document.querySelector('.js-plotly-plot').data[8].y[0]"
        )
        assert drawn(page) == pytest.approx(expected(store, 0.1))
        pinned = page.evaluate("Array.from(document.querySelector('.js-plotly-plot').data[8].y)")
        assert pinned == pytest.approx(expected(store, 0.5))
        page.get_by_role("button", name="Stop comparing").click()
        page.wait_for_function("() => document.querySelector('.js-plotly-plot')?.data?.length === 7")


@needs_browser
def test_a_view_is_sent_by_its_link(browser, served, store):
    with watched_page(browser) as page:
        page.goto(f"{served}/?strength=0.1&with=strength:0.3&rule=%3Cimg%3E")
        page.wait_for_function("() => document.querySelector('.js-plotly-plot')?.data?.length === 9")
        assert drawn(page) == pytest.approx(expected(store, 0.1))
        compared = page.evaluate("Array.from(document.querySelector('.js-plotly-plot').data[8].y)")
        assert compared == pytest.approx(expected(store, 0.3))
        link = page.get_by_role("link", name="Link to this view")
        with page.context.expect_page() as opened:
            link.click()
        opened.value.wait_for_function("() => document.querySelector('.js-plotly-plot')?.data?.length === 9")
        assert drawn(opened.value) == pytest.approx(expected(store, 0.1))
        assert opened.value.get_by_role("link", name="Link to this view").get_attribute("href") == link.get_attribute(
            "href"
        )
        opened.value.close()


@needs_browser
def test_the_verdict_of_the_claim_is_told(browser, served):
    with watched_page(browser) as page:
        page.goto(served)
        page.get_by_text("in this panel: claim 1 of the paper").wait_for()
        assert page.get_by_text("unfinished", exact=True).is_visible()  # the preset has more widths
        page.get_by_text("looking up").wait_for(state="hidden")


@needs_browser
def test_a_cell_of_the_heat_map_is_chosen_by_click(browser, served, store):
    with watched_page(browser) as page:
        page.goto(served)
        page.get_by_role("button", name="heat map").click()
        cells = page.locator(".js-plotly-plot .heatmaplayer image")
        cells.wait_for()
        box = cells.bounding_box()
        columns, rows = page.evaluate(
            "(({x, y}) => [x.length, y.length])(document.querySelector('.js-plotly-plot').data[0])"
        )
        assert (columns, rows) == (4, 5)  # a column for the network that failed as well
        at = (
            box["x"] + 1.5 * box["width"] / columns,
            box["y"] + 1.5 * box["height"] / rows,
        )  # the second column, the fourth strength
        page.mouse.move(*at)
        page.wait_for_selector(".js-plotly-plot .hoverlayer .hovertext")
        page.mouse.click(*at)
        page.wait_for_function("document.querySelector('pre')?.innerText.includes('width=128')")
        page.locator(".widget-readout").get_by_text("σ = 0.4", exact=True).wait_for()
        value = store.table(strength=0.4, quantity="accuracy", measure="weight_noise", width=128, seed=0).value.mean()
        assert f"{100 * value:.1f} %" in page.content()


@needs_browser
def test_what_failed_has_a_mark_at_its_place(browser, served):
    with watched_page(browser) as page:
        page.goto(served)
        page.wait_for_selector(".js-plotly-plot .scatterlayer .trace")
        failed = page.evaluate(
            """(({x, y, name, text}) => ({x: [...x], name, text}))(
                document.querySelector(".js-plotly-plot").data[5])"""
        )
        assert failed == {"x": [12.5], "name": "failed", "text": ["1 failed"]}
        page.mouse.move(
            *page.evaluate(
                POINT.replace("plot.data[1]", "plot.data[5]").replace("x[1]", "x[0]").replace("y[1]", "y[0]")
            )
        )
        page.wait_for_selector(".js-plotly-plot .hoverlayer .hovertext")
        assert "SIGSEGV" in page.text_content(".js-plotly-plot .hoverlayer")


FIRST_VIEW = """
import sys, time
from sparse_nb.explorer.widgets import explore
explore(sys.argv[1])
heavy = ("torch", "numba", "scipy.stats", "torchvision", "torchattacks")
print(time.process_time(), *(name for name in heavy if name in sys.modules))
"""


@pytest.mark.timed
def test_first_view_is_drawn_without_torch(store):
    said = subprocess.run(
        [sys.executable, "-c", FIRST_VIEW, store.root], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    assert len(said) == 1 and float(said[0]) < FIRST_PAINT / 2, (
        said
    )  # seconds of this process alone, whatever else the machine does


@pytest.mark.timed
@needs_browser
def test_in_jupyterlab(browser, store, tmp_path):
    port, page_copy = free_port(), tmp_path / "explore.ipynb"
    shutil.copy(PAGE, page_copy)
    command = [
        sys.executable,
        "-m",
        "jupyter",
        "lab",
        "--no-browser",
        f"--port={port}",
        "--ip=127.0.0.1",
        "--IdentityProvider.token=",
        f"--ServerApp.root_dir={tmp_path}",
        "--allow-root",
        "--LabApp.news_url=",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        f"--LabApp.workspaces_dir={tmp_path / 'workspaces'}",
        f"--LabApp.user_settings_dir={tmp_path / 'settings'}",
    ]
    environment = os.environ | {
        "SPARSE_NB_RUNS": str(store.root),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    with ended(subprocess.Popen(command, env=environment, cwd=tmp_path)) as process:
        wait_for_port(port, process)
        with watched_page(browser) as page:
            page.goto(f"http://127.0.0.1:{port}/lab/tree/explore.ipynb")
            page.get_by_role("heading", name="Sparsity and robustness").wait_for()
            page.get_by_text("| Idle").wait_for()  # the kernel
            page.get_by_role("menuitem", name="Run", exact=True).click()
            busy, start = slowness(), time.perf_counter()
            page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
            page.wait_for_selector(".js-plotly-plot .scatterlayer .trace path.point")
            seconds = time.perf_counter() - start
            busy = max(busy, slowness())
            print(f"first paint {seconds:.1f} s after the kernel was ready, {busy:.1f} times slower than alone")
            assert seconds < 1.5 * FIRST_PAINT * busy
            move_slider(page, store)
            keep_picture(page, "lab")


def test_server_gives_no_code(served):
    """Neither sources, nor files, nor an interface to them, nor anything under another host's name."""
    assert "import" not in answer(f"{served}/voila/files/explore.ipynb")[1]
    for path in (
        "api/contents",
        "api/contents/explore.ipynb",
        "api/kernels",
        "api/sessions",
        "api/terminals",
        "terminals/1",
        "lab",
        "files/explore.ipynb",
        "voila/files/explore.ipynb",
    ):
        status, body = answer(f"{served}/{path}")
        assert (
            status in (403, 404, 405)
            or "sparse_nb.explorer.widgets" not in body
            and '"cells"' not in body
            and "[{" not in body
        ), (path, status)
    assert answer(served, Host="evil.example")[0] == 403


def test_server_executes_nothing_that_is_sent(served):
    """A kernel's channel, which the page needs, does not take code."""
    kernel = re.search(r'"kernelId": ?"([0-9a-f-]{36})"', answer(served)[1])[1]
    session, identity = uuid.uuid4().hex, uuid.uuid4().hex
    header = {
        "msg_id": identity,
        "msg_type": "execute_request",
        "session": session,
        "username": "",
        "version": "5.3",
        "date": "",
    }
    message = {
        "header": header,
        "parent_header": {},
        "metadata": {},
        "channel": "shell",
        "buffers": [],
        "content": {"code": "print(6 * 7)", "silent": False, "user_expressions": {}},
    }

    async def say():
        channel = await websocket_connect(
            f"{served.replace('http', 'ws')}/api/kernels/{kernel}/channels?session_id={session}"
        )
        await channel.write_message(json.dumps(message))
        asked = {
            **message,
            "header": {**header, "msg_id": uuid.uuid4().hex, "msg_type": "kernel_info_request"},
            "content": {},
        }
        await channel.write_message(json.dumps(asked))
        seen = []
        while not seen or seen[-1]["msg_type"] != "kernel_info_reply":
            seen.append(json.loads(await channel.read_message()))
        channel.close()
        return seen

    async def talk():
        return await asyncio.wait_for(say(), PATIENCE)

    with ThreadPoolExecutor(1) as elsewhere:  # playwright keeps this thread's loop busy
        seen = elsewhere.submit(asyncio.run, talk()).result()
    assert not any(
        m["parent_header"].get("msg_id") == identity or m["msg_type"] in ("execute_reply", "stream") for m in seen
    )


@pytest.mark.parametrize("site, status", [("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)])
def test_another_page_starts_no_kernel(store, tmp_path, site, status):
    port = free_port()
    with ended(start_server(PAGE, tmp_path, runs=store.root, port=port)) as process:
        wait_for_port(port, process)
        before = kernels(process)
        assert answer(f"http://127.0.0.1:{port}/", **{"Sec-Fetch-Site": site})[0] == status
        assert (kernels(process) > before) == (status == 200)


@needs_browser
def test_an_image_on_another_page_starts_no_kernel(browser, store, tmp_path):
    port = free_port()
    with ended(start_server(PAGE, tmp_path, runs=store.root, port=port)) as process:
        wait_for_port(port, process)
        before, other = kernels(process), browser.new_page()
        sources = [f"http://127.0.0.1:{port}/?{n}" for n in range(4)]
        other.set_content("".join(f"<img src='{source}' onerror='document.title += 1'>" for source in sources))
        other.wait_for_function("document.title == '1111'")
        other.close()
        assert kernels(process) == before


def test_no_more_kernels_than_the_limit(store, tmp_path):
    """Of visits at the same time, and one after the other, only so many get a kernel; the page says why."""
    port = free_port()
    with ended(start_server(PAGE, tmp_path, runs=store.root, port=port, most_kernels=2)) as process:
        wait_for_port(port, process)
        with ThreadPoolExecutor(5) as visitors:
            found = [status for status, _ in visitors.map(answer, [f"http://127.0.0.1:{port}/"] * 5)]
        assert sorted(found) == [200, 200, 503, 503, 503]
        assert answer(f"http://127.0.0.1:{port}/")[0] == 503 and kernels(process) == 2


@needs_browser
def test_a_closed_page_makes_room_for_the_next(browser, store, tmp_path):
    """Where one kernel is allowed, a second reader waits for the first to leave, and no longer."""
    port = free_port()
    with ended(start_server(PAGE, tmp_path, runs=store.root, port=port, most_kernels=1)) as process:
        wait_for_port(port, process)
        for _ in range(2):
            with watched_page(browser) as page:
                page.goto(f"http://127.0.0.1:{port}")
                page.wait_for_selector(".js-plotly-plot .scatterlayer .trace")
                assert answer(f"http://127.0.0.1:{port}/")[0] == 503
            time.sleep(1)  # the server hears that the page is gone


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_server_ends_with_its_command(store, number):
    port, words = free_port(), ["explore", "--runs", str(store.root), "--notebooks", str(PAGE.parent)]
    start = "import sys; from sparse_nb.cli.main import main; main(sys.argv[1:])"
    command = subprocess.Popen([sys.executable, "-c", start, *words, "--port", str(port)], cwd=ROOT)
    wait_for_port(port, command)
    assert answer(f"http://127.0.0.1:{port}/")[0] == 200
    below = family(command)
    assert len(below) >= 2  # the server and a kernel
    command.send_signal(number)
    command.wait(PATIENCE)
    gone, alive = psutil.wait_procs(below, timeout=PATIENCE)
    for process in alive:
        process.kill()
    assert not alive
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), 1)


TRAIN = """
from sparse_nb.explorer.widgets import _Explorer
from sparse_nb.runs.store import Store
explorer = _Explorer(Store({root!r}))
explorer.training.train.click()
"""


def test_closing_the_kernel_interrupts_a_training_and_fails_nothing(tmp_path):
    """As JupyterLab does it when it is closed, or a kernel is restarted."""
    store, manager = Store(tmp_path / "runs"), KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(ROOT))
    try:
        client = manager.blocking_client()
        client.start_channels()
        client.wait_for_ready(timeout=PATIENCE)
        client.execute(TRAIN.format(root=str(store.root)))
        deadline = time.time() + PATIENCE
        while not list(store.root.glob(".attempts/*/lease")) and time.time() < deadline:
            time.sleep(0.02)
        assert list(store.root.glob(".attempts/*/lease"))
        client.stop_channels()
    finally:
        manager.shutdown_kernel()
    assert load_failures(store) == [] and store.runs().empty
    points = [p for p in plan("fig01", narrow("smoke", families="mlp", widths="32")) if p.experiment.seed == 0]
    done = sweep.run([p.experiment for p in points], [], store=store, device="cpu", show=False)  # nothing is in the way
    assert len(store.runs()) == 1, done


HOSTILE = """<img src=x onerror="document.title='hurt'"><script>alert(1)</script></pre><a href='//evil.example'>&lt;"""
STRANGERS = """
import os
from IPython.display import display
import sparse_nb.explorer.widgets as w

catalogue, curve, failures, text = w.read_catalogue, w.load_curve, w.load_failures, os.environ["HOSTILE"]


def read_catalogue(store):
    columns = ["dataset", "family", "rule", "status", "epochs"]
    return catalogue(store).astype(dict.fromkeys(columns, object)).assign(**dict.fromkeys(columns, text))


def load_curve(store, catalogue, chosen):
    members, records = curve(store, catalogue, chosen)
    return members, records.assign(name=records.name.replace("weight noise", text))


def load_failures(store):
    more = {"reason": text, "network": text}
    return [f | more | {"experiment": f["experiment"] | {"rule": text}} for f in failures(store)]


w.read_catalogue, w.load_curve, w.load_failures = read_catalogue, load_curve, load_failures
display(w.explore(os.environ["SPARSE_NB_RUNS"]))
"""


@needs_browser
def test_hostile_texts_stay_texts(browser, store, tmp_path, monkeypatch):
    """Data, family, rule, status, epochs, the name of a disturbance and reasons of failures that are HTML."""
    page_copy, folder, port = tmp_path / "explore.ipynb", tmp_path / "page", free_port()
    notebook = json.loads(PAGE.read_text())
    notebook["cells"][-1] |= {"source": STRANGERS}
    page_copy.write_text(json.dumps(notebook))
    folder.mkdir()
    monkeypatch.setenv("HOSTILE", HOSTILE)
    process = start_server(page_copy, folder, runs=store.root, port=port)
    with ended(process), watched_page(browser) as page:
        wait_for_port(port, process)
        page.goto(f"http://127.0.0.1:{port}")
        page.wait_for_selector(".js-plotly-plot .scatterlayer .trace")
        page.get_by_label("Networks at").select_option(index=1)
        page.wait_for_selector("pre:has-text('Store')")
        assert page.get_by_role("cell", name=HOSTILE).count() == 4  # status and epochs of two networks
        menu = page.get_by_label("Dataset").locator("option").all_text_contents()
        assert [words.replace("\xa0", " ") for words in menu] == [HOSTILE]
        assert page.get_by_text(f"{HOSTILE} on {HOSTILE}, growing in width").is_visible()
        assert "".join(page.locator("span:has(> svg)").all_text_contents()).count(HOSTILE) == 1  # the key of the plot
        assert page.get_by_text(f"failed (open cross): {HOSTILE}: {HOSTILE}").is_visible()
        page.locator("[role=slider]").first.focus()
        page.keyboard.press("End")  # far from the clean curve
        page.wait_for_function("document.querySelector('.js-plotly-plot').data[1].name.includes('0.5')")
        for place, shown in ((1, "x[1]"), (5, "x[0]")):
            at = POINT.replace("data[1]", f"data[{place}]").replace("x[1]", shown).replace("y[1]", "y" + shown[1:])
            page.mouse.move(0, 0)
            page.mouse.move(*page.evaluate(at))
            page.wait_for_selector(".js-plotly-plot .hoverlayer .hovertext")
            assert HOSTILE in page.text_content(".js-plotly-plot .hoverlayer")
        for view in ("heat map", "connectivity", "gallery", "curves"):
            page.get_by_role("button", name=view).click()
        page.wait_for_selector(".js-plotly-plot .scatterlayer .trace")
        assert page.title() != "hurt" and page.locator("img[src=x]").count() == 0
        # the link to the view says what is chosen, in letters; it leads to this server
        assert page.evaluate("[...document.links].filter(link => link.hostname.includes('evil')).length") == 0
        keep_picture(page, "hostile")


@needs_browser
def test_one_more_point_from_the_page(browser, served, store):
    """The missing network is trained from the page; stopped before, it leaves the store as it was."""
    with watched_page(browser) as page:
        page.goto(served)
        page.wait_for_selector(".js-plotly-plot .scatterlayer .trace")
        before = len(store.runs())
        page.get_by_role("button", name="train one more point").click()
        page.get_by_role("button", name="stop").click()
        page.get_by_text("stopped; what was finished is kept").wait_for()
        assert len(store.runs()) == before and drawn(page) == pytest.approx(expected(store, 0.5))
        page.get_by_role("button", name="train one more point").click()
        page.get_by_text(re.compile(r"^training MLP on digits, width \d+, .* seed \d: about \d+ s")).wait_for()
        page.get_by_text("done", exact=True).wait_for()
        assert len(store.runs()) == before + 1 and store.table(width=[512, 2048]).experiment.nunique() == 2
        page.wait_for_function(
            "y => document.querySelector('.js-plotly-plot').data[1].y.includes(y)", arg=expected_last(store)
        )
        keep_picture(page, "grown")


def own_addresses():
    """Addresses of this machine that are not its loopback, IPv4."""
    found = [each for interface in psutil.net_if_addrs().values() for each in interface]
    return [each.address for each in found if each.family == socket.AF_INET and not each.address.startswith("127.")]


@pytest.mark.skipif(not own_addresses(), reason="needs an address that is not the loopback")
def test_on_a_public_address_a_kernel_needs_the_token(store):
    """As `explore --public` prints it; over plain http a browser does not say from where a request comes."""
    host, port = own_addresses()[0], free_port()
    words = [
        "explore",
        "--runs",
        str(store.root),
        "--notebooks",
        str(PAGE.parent),
        "--address",
        host,
        "--port",
        str(port),
    ]
    start = [sys.executable, "-c", "import sys; from sparse_nb.cli.main import main; main(sys.argv[1:])", *words]
    refused = subprocess.run(start, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1 and "--public says that you want it" in refused.stderr
    with ended(subprocess.Popen([*start, "--public"], cwd=ROOT, stdout=subprocess.PIPE, text=True)) as command:
        place = re.search(rf"http://{host}:{port}/\?token=([\w-]{{16,}})", command.stdout.readline())
        deadline = time.time() + PATIENCE
        while time.time() < deadline and command.poll() is None:
            with suppress(OSError):
                socket.create_connection((host, port), 1).close()
                break
            time.sleep(0.1)
        before = kernels(command)
        page = f"http://{host}:{port}/"
        for address in (page, f"{page}?token=", f"{page}?token={place[1]}x", f"{page}voila/render/explore.ipynb"):
            assert answer(address)[0] in (403, 404), address
        assert answer(place[0], **{"Sec-Fetch-Site": "cross-site"})[0] == 403
        assert kernels(command) == before and place[1] not in " ".join(map(str, shown(command)))
        assert answer(place[0])[0] == 200 and kernels(command) == before + 1


def shown(process):
    """What a list of processes shows of those below a process."""
    return [each.cmdline() for each in family(process)]
