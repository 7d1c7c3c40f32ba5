"""What no cell can test of the figures' command: whole processes, what they publish, how they fail, stop and go on."""

import contextlib
import json
import multiprocessing
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from choreographer.browsers.chromium import Chromium
from nbclient import NotebookClient
from PIL import Image
from playwright.sync_api import sync_playwright
from scipy import special, stats

from sparse_nb import data
from sparse_nb.cli.main import main
from sparse_nb.networks.models import counted_weights
from sparse_nb.networks.sparse_layers import pattern
from sparse_nb.networks.training import Recipe
from sparse_nb.results import figure_files, plots, provenance, rendering, tables
from sparse_nb.runs.record_files import parse_records
from sparse_nb.runs.store import Store, load_history, load_run
from sparse_nb.study.experiments import Experiment, WeightNoise, counted_total
from sparse_nb.study.plans import plan
from sparse_nb.study.studies import narrow
from sparse_nb.sweep import sweep

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
NOTEBOOK = "fig01_weight_noise_width.ipynb"
ENDINGS = ("csv", "html", "ipynb", "png", "svg")
SCRIPT = "plotly.min.js"  # one copy for all pages of a folder
SMALL = ("--families", "mlp", "--epochs", "2", "--widths", "32", "128")  # four networks, trained in a second
RUN = re.compile(r"[0-9a-f]{16}")

# Commands that are to be stopped run in processes forked from one that has imported the package: they start at once.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["pytest", "nbclient", "sparse_nb.cli.commands", "sparse_nb.cli.main"])


def contents(folder):
    """Every file below the folder, with its content and the time of its last change."""
    return {
        str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns)
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file()
    }


def notebooks(folder, *cells):
    """A folder with a notebook under the figure's name and with its parameters, but these `cells` after them."""
    notebook = nbformat.read(ROOT / "figures" / NOTEBOOK, as_version=4)
    parameters = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    notebook.cells = [parameters, *map(nbformat.v4.new_code_cell, cells)]
    folder.mkdir()
    nbformat.write(notebook, folder / NOTEBOOK)
    return folder


# Takes a figure's place where only the command around it is tested: no import of the package, no browser.
DRAW = """
from pathlib import Path
folder = Path(out) / preset
folder.mkdir(parents=True, exist_ok=True)
for ending in ("csv", "html", "png", "svg"):
    (folder / f"fig01.{ending}").write_text("drawn from " + runs)
"""


def command(arguments, words):
    """Be `sparse-nb ARGUMENTS`, saying everything into the file `words`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where pytest runs in a shell's background
    with open(words, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    main([str(a) for a in arguments])


def start(arguments, words):
    process = processes.Process(target=command, args=(arguments, words), daemon=True)
    process.start()
    return process


def ended(process, seconds=60):
    """The exit status; a process that hangs is killed and fails the test."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        pytest.fail(f"still running after {seconds} s")
    return process.exitcode


def until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.002)


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """A folder with `runs`, `out` and `words` of one real command; read it, copy it, do not change it."""
    folder = tmp_path_factory.mktemp("drawn")
    asked = [
        BIN / "sparse-nb",
        "figures",
        "fig01",
        "--preset",
        "smoke",
        *SMALL,
        "--runs",
        folder / "runs",
        "--out",
        folder / "out",
    ]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (folder / "words").write_text(done.stdout)
    return folder


def test_command_publishes_five_files_and_leaves_nothing_else(drawn):
    published = sorted((drawn / "out").rglob("*"))
    assert [str(p.relative_to(drawn / "out")) for p in published] == [
        "smoke",
        *(f"smoke/fig01.{ending}" for ending in ENDINGS),
        f"smoke/{SCRIPT}",
    ]
    words = (drawn / "words").read_text().splitlines()
    assert words[0] == "4 networks: 4 made now, 0 already there; 4 measurements made now"
    folder = drawn / "out/smoke"
    assert words[1:] == [f"1 figure as html, svg, png, csv, ipynb; open {folder / 'fig01.html'}"]
    kept = {p.name for p in (drawn / "runs").iterdir()}
    assert len({name for name in kept if RUN.fullmatch(name)}) == 4
    assert {name for name in kept if not RUN.fullmatch(name)} <= {
        "index.sqlite",
        "index.sqlite-wal",
        "index.sqlite-shm",
    }


def in_terminal(tmp_path, *words, **environment):
    """What a command shows on a terminal of 80 columns, in the order of coming, and its exit status."""
    leader, follower = pty.openpty()
    env = os.environ | {"COLUMNS": "80", "TERM": "xterm"} | environment
    command = [sys.executable, "-m", "sparse_nb", *map(str, words)]
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=env, cwd=tmp_path)
    os.close(follower)
    shown = b""
    with contextlib.suppress(OSError):  # which Linux raises at the end
        while some := os.read(leader, 65536):
            shown += some
    os.close(leader)
    return re.sub("\x1b\\[[0-9;]*m", "", shown.decode()).replace("\r\n", "\n"), process.wait()


@pytest.mark.parametrize(
    "words, said",
    [
        (["--help"], "usage: sparse-nb"),
        (["index"], "there is no command 'index'. The commands are figures, sweep"),
        (["status", "--runs", "{drawn}/runs"], "left, in one process"),
        (["verify", "--runs", "{drawn}/runs"], "4 runs"),
        (["trace", "{drawn}/out/smoke/fig01.svg", "--runs", "{drawn}/runs"], "not converged"),
        (["claims", "--preset", "smoke", "--runs", "nowhere", "--notebooks", str(ROOT / "figures")], "is not there"),
    ],
)
def test_a_terminal_of_80_columns_breaks_lines_between_words_only(words, said, drawn, tmp_path):
    shown, _ = in_terminal(tmp_path, *(word.format(drawn=drawn) for word in words))
    lines = [line.rpartition("\r")[2] for line in shown.split("\n")]
    assert said in " ".join(shown.split())
    assert [line for line in lines if len(line) > 80 and " " in line.strip()] == []
    assert "Warning" not in shown and words[0] in ("--help", "index") or shown.startswith("Starting …\r")


def test_without_a_browser_all_but_pictures_is_written(drawn, tmp_path):
    where = ("--runs", drawn / "runs", "--notebooks", ROOT / "figures")
    shown, status = in_terminal(tmp_path, "figures", "fig01", *SMALL, *where, BROWSER_PATH="/nowhere/chrome")
    folder = tmp_path / "figures/rendered/smoke"
    assert status == 0 and "Traceback" not in shown
    assert "no SVG, PNG, since BROWSER_PATH is '/nowhere/chrome', where there is no program;" in shown
    assert {path.name for path in folder.iterdir()} == {"fig01.html", "fig01.csv", "fig01.ipynb", SCRIPT}


def test_png_is_a_picture(drawn):
    with Image.open(drawn / "out/smoke/fig01.png") as picture:
        picture.load()
        assert picture.format == "PNG" and 600 < picture.width < 3000 and 600 < picture.height < 3000
        colours = picture.convert("RGB").getcolors(maxcolors=2**24)
    assert max(count for count, _ in colours) < 0.99 * picture.width * picture.height and len(colours) > 50


def test_svg_says_what_it_shows_and_where_it_comes_from(drawn):
    tree = ElementTree.parse(drawn / "out/smoke/fig01.svg")
    assert tree.getroot().tag == "{http://www.w3.org/2000/svg}svg"
    for metadata in tree.getroot().findall("{http://www.w3.org/2000/svg}metadata"):  # which nobody sees
        tree.getroot().remove(metadata)
    text = " ".join(" ".join(tree.getroot().itertext()).split())
    code = json.loads(next(drawn.glob("runs/*/experiment.json")).read_bytes())["code"][:8]
    panel = ["Figure 1.", "noise σ", "0 (clean)", "remaining weights (%)", "accuracy (%)"]
    panel += ["digits accuracy (%) MLP"]  # the heading of the row, with its axis, and that of the column
    footer = [
        "Preset smoke",
        "mean over 2 seeds",
        "too few for an interval",
        "Smaller than the preset paper",
        "2 of 5 seeds",
        "at most 2 of 300 epochs",
    ]
    source = [f"data digits {data.checksum('digits')[:8]}", f"code {code}", "4 networks"]
    assert [words for words in panel + footer + source if words not in text] == []
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", text)


def test_a_browser_shows_of_the_svg_what_it_shows_without_metadata(drawn, tmp_path):
    text = (drawn / "out/smoke/fig01.svg").read_text(encoding="utf-8")
    (tmp_path / "bare.svg").write_text(re.sub("<metadata.*?</metadata>", "", text), encoding="utf-8")
    assert len(text) - 5000 < (tmp_path / "bare.svg").stat().st_size < len(text)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=Chromium.find_browser(skip_local=False))
        page, seen = browser.new_page(), []
        for path in (drawn / "out/smoke/fig01.svg", tmp_path / "bare.svg"):
            page.goto(path.as_uri())
            seen.append(page.screenshot())
            assert page.evaluate("document.documentElement.tagName") == "svg"
        browser.close()
    assert seen[0] == seen[1]


@pytest.mark.parametrize("ending", ["svg", "png", "html", "csv"])
def test_trace_leads_from_a_figure_to_every_run_behind_it(ending, drawn, tmp_path, capfd):
    main(["trace", str(drawn / f"out/smoke/fig01.{ending}"), "--runs", str(drawn / "runs")])
    lines = capfd.readouterr().out.splitlines()
    listed = {line.split()[0]: line for line in lines if RUN.fullmatch(line.split()[0])}
    assert set(listed) == {p.name for p in (drawn / "runs").iterdir() if RUN.fullmatch(p.name)} and len(listed) == 4
    for run, line in listed.items():
        about = json.loads((drawn / "runs" / run / "experiment.json").read_bytes())["experiment"]
        assert (
            f"digits mlp width {about['width']} depth 1 " in line
            and f"seed {about['seed']}: not converged by its last epoch, 2;" in line
        )
        assert line.endswith(str(drawn / "runs" / run))
    if ending != "csv":
        (evaluation,) = {path for path in drawn.glob("runs/*/evaluations/*") if path.parent.parent.name == run}
        code = json.loads(evaluation.read_text().splitlines()[0])["code"]
        head = [" ".join(line.split()) for line in lines]
        assert (
            f"code weight_noise {code} (as here)" in head
            and f"data digits {data.checksum('digits')}" in head
            and "seeds 0, 1" in head
        )

    main(["trace", str(drawn / f"out/smoke/fig01.{ending}"), "--runs", str(tmp_path / "nowhere")])
    said = capfd.readouterr().out.splitlines()
    assert said[:-1] == [line for line in lines if not RUN.fullmatch(line.split()[0])]
    assert said[-1].startswith(f"4 of its 4 runs are not in {tmp_path / 'nowhere'}; `sparse-nb merge ")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("fig.pdf", "", "accepted: .svg, .png, .html, .csv"),
        ("fig.svg", "<svg xmlns='http://www.w3.org/2000/svg'/>", "contains no provenance"),
        ("fig.svg", "<svg", "cannot be read"),
        ("fig.png", "", "cannot be read"),
        ("fig.html", '<script type="application/json" id="provenance">[]</script>', "cannot be read"),
        ("fig.csv", "mean\n0.9\n", "contains no provenance"),
        ("fig.csv", None, "there is no file"),
    ],
)
def test_trace_says_in_one_sentence_what_cannot_be_traced(name, content, words, tmp_path, capfd):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit) as end:
        main(["trace", str(tmp_path / name), "--runs", str(tmp_path / "runs")])
    out, said = capfd.readouterr()
    assert (end.value.code, out) == (1, "") and said.count("\n") == 1 and words in said and str(tmp_path / name) in said


@pytest.mark.parametrize("notebook", sorted(ROOT.glob("figures/*.ipynb")), ids=lambda path: path.stem)
def test_every_figure_reads_its_parameters_first_and_ends_with_its_claims(notebook):
    figure = notebook.stem.split("_")[0]
    cells = nbformat.read(notebook, as_version=4).cells
    parameters, setup, *others = [cell for cell in cells if cell.cell_type == "code"]
    assert len(cells) <= 12 and parameters.metadata.tags == ["parameters"]
    names = [line.split(" = ")[0] for line in parameters.source.splitlines()]
    wanted = [
        n
        for n in rendering.PARAMETERS
        if figure not in rendering.OF_CLAIMS or n not in ("device", "finished", "engine", "workers")
    ]
    assert names == wanted
    assert f'rendering = Rendering.from_parameters("{figure}", globals())' in setup.source
    text = "\n".join(cell.source for cell in others)
    if figure in rendering.OF_CLAIMS:
        assert "made.line]" in text.replace(",\n", "") and "rendering.publish(figure, " in text
    else:
        assert re.search(r"(rendering|part)\.footer\(", text) and re.search(
            r"(rendering|part)\.publish\(figure, ", text
        )
        said = f'print(figure_claims("{figure}", rendering.preset, rendering.store, root=rendering.parameters["data"]))'
        assert others[-1].source == said


def test_a_store_of_mixed_code_is_not_drawn(drawn, tmp_path):
    """A measurement by other code, under the name of this one's, as only a hand can put it there."""
    shutil.copytree(drawn / "runs", tmp_path / "runs")
    changed = sorted(tmp_path.glob("runs/*/evaluations/*"))[-1]
    changed.write_text(re.sub('"code":"[^"]+"', '"code":"1"', changed.read_text(), count=1))
    store, preset = Store(tmp_path / "runs"), narrow("smoke", families="mlp", epochs=2, widths="32 128")
    with pytest.raises(ValueError, match=re.escape(str(changed))):
        provenance.of_points(preset, plan("fig01", preset), store)


def test_html_asks_no_other_host(drawn):
    asked = []

    class Links(HTMLParser):
        def handle_starttag(self, tag, attributes):
            asked.extend(
                (tag, name, value) for name, value in attributes if name in ("src", "href", "srcset", "data", "action")
            )

    page = (drawn / "out/smoke/fig01.html").read_text(encoding="utf-8")
    Links().feed(page)
    assert asked == [("script", "src", SCRIPT)]
    assert "Plotly.newPlot" in page and len(page) < 200_000 < (drawn / "out/smoke" / SCRIPT).stat().st_size


def test_hover_of_one_seed_has_no_interval(drawn):
    """Two seeds are named; of one seed the picture says that there is no interval."""
    page = (drawn / "out/smoke/fig01.html").read_text(encoding="utf-8")
    assert "no interval from one seed" not in page
    assert re.search(r"\d+\.\d % \(two seeds: \d+\.\d and \d+\.\d\)", page)
    store, points = (
        Store(drawn / "runs"),
        plan("fig01", narrow("smoke", families="mlp", epochs=2, widths="32 128", seeds=1)),
    )
    curves = tables.summarise_curves(tables.collect(store, points))
    lines = plots.strength_lines(curves, "accuracy")
    figure = plots.draw_panels(curves, lines, title="", legend="", value="", footer=[])
    texts = [text for trace in figure.data if trace.customdata is not None for text in trace.customdata]
    assert len(texts) == 2 * 4 and all(re.match(r"\d+\.\d % \(no interval from one seed\)<br>", text) for text in texts)


def plain_accuracy(checkpoint, images):
    """Clean accuracy of a stored MLP, from its tensors and nothing of the package."""
    tensors = safetensors.torch.load_file(checkpoint)

    def weight(layer):
        bias = tensors[f"{layer}.bias"]
        if f"{layer}.positions" not in tensors:
            return tensors[f"{layer}.weight"], bias
        inputs = 28 * 28 if layer == "hidden1" else len(tensors["hidden1.bias"])
        dense = np.zeros(len(bias) * inputs, np.float32)
        dense[tensors[f"{layer}.positions"].numpy()] = tensors[f"{layer}.weight"].numpy()
        return torch.from_numpy(dense.reshape(len(bias), inputs)), bias

    x = ((images.pixels.float() / 255 - 0.1307) / 0.3081).flatten(1)
    return float(
        (F.linear(F.relu(F.linear(x, *weight("hidden1"))), *weight("classifier")).argmax(1) == images.labels).sum()
    ) / len(x)


def test_csv_holds_the_numbers_of_the_stored_networks(drawn):
    curves, images = pd.read_csv(drawn / "out/smoke/fig01.csv"), data.load_images("digits", "test")
    assert len(curves) == 2 * 6 * 2  # widths, sigmas, quantities
    points = set(curves[["width", "density", "networks", "seeds", "ended"]].itertuples(index=False, name=None))
    assert points == {(32, 1.0, 2, 2, "2 epochs"), (128, 0.25, 2, 2, "2 epochs")}
    for row in curves.itertuples():
        means = []  # of each network, over the draws of its noise
        for run in row.runs.split():
            about = json.loads((drawn / "runs" / run / "experiment.json").read_bytes())
            assert (about["experiment"]["width"], about["experiment"]["budget"], about["result"]["epochs"]) == (
                row.width,
                25_408,
                2,
            )
            (stored,) = (drawn / "runs" / run / "evaluations").iterdir()
            records = [json.loads(line) for line in stored.read_text().splitlines()[1:]]
            values = [r["value"] for r in records if (r["quantity"], r["strength"]) == (row.quantity, row.strength)]
            assert len(values) == 3
            if row.strength == 0:
                clean = (
                    plain_accuracy(drawn / "runs" / run / "model.safetensors", images)
                    if row.quantity == "accuracy"
                    else 0.0
                )
                assert values == [clean] * 3
            means.append(np.mean(values))
        mean, half = np.mean(means), stats.t.ppf(0.975, df=1) * np.std(means, ddof=1) / np.sqrt(2)
        bounds = mean - half, mean + half
        if row.quantity == "accuracy":  # on the logit scale, by the delta method
            bounds = special.expit(special.logit(mean) + np.array([-half, half]) / (mean * (1 - mean)))
        assert (row.mean, row.low, row.high) == pytest.approx((mean, *bounds), abs=1e-12)
        assert (row.lowest, row.highest) == pytest.approx((min(means), max(means)), abs=1e-12)


def test_published_notebook_ran_whole_with_what_was_asked(drawn):
    notebook = nbformat.read(drawn / "out/smoke/fig01.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    (injected,) = (cell for cell in code if "injected-parameters" in cell.metadata.tags)
    found = {}
    exec(injected.source, found)
    del found["__builtins__"]
    asked = dict(
        preset="smoke",
        datasets="",
        families="mlp",
        rules="",
        widths="32 128",
        seeds=None,
        epochs=2,
        device="auto",
        finished=False,
        engine="local",
        workers=None,
        data=None,
        pictures="svg png",
    )
    assert {name: found[name] for name in asked} == asked and found.keys() - asked.keys() == {"runs", "out"}
    assert Path(found["runs"]) == drawn / "runs"


def test_published_notebook_names_the_folder_that_it_was_drawn_for(drawn):
    assert ".writing-" not in (drawn / "out/smoke/fig01.ipynb").read_text(encoding="utf-8")


def test_second_command_trains_nothing(drawn, tmp_path):
    before = contents(drawn / "runs")
    arguments = ["figures", "fig01", *SMALL, "--runs", drawn / "runs", "--out", tmp_path / "out"]
    process = start([*arguments, "--notebooks", notebooks(tmp_path / "notebooks", DRAW)], tmp_path / "words")
    assert ended(process) == 0
    assert (
        (tmp_path / "words")
        .read_text()
        .startswith("4 networks: 0 made now, 4 already there; 0 measurements made now\n")
    )
    assert sorted(p.name for p in (tmp_path / "out/smoke").iterdir()) == [f"fig01.{ending}" for ending in ENDINGS]
    after = contents(drawn / "runs")
    assert {name: after[name] for name in after if not name.startswith("index")} == {
        name: before[name] for name in before if not name.startswith("index")
    }


def test_a_machine_that_forgets_draws_from_what_is_published_without_training(drawn, tmp_path):
    shutil.copytree(drawn / "runs", tmp_path / "before")
    preset = ["--preset", "smoke", *SMALL]
    for arguments in (
        ["export", "fig01", *preset, "--runs", tmp_path / "before", "--out", tmp_path / "results"],
        ["merge", tmp_path / "results/smoke", "--runs", tmp_path / "runs"],
        ["figures", "fig01", *preset, "--runs", tmp_path / "runs", "--out", tmp_path / "out"],
        ["explore", *preset, "--runs", tmp_path / "runs", "--static", tmp_path / "curves.html"],
    ):
        done = subprocess.run([BIN / "sparse-nb", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        if arguments[0] == "figures":
            assert done.stdout.startswith("4 networks: 0 made now, 4 already there; 0 measurements made now\n")
    assert (tmp_path / "out/smoke/fig01.csv").read_bytes() == (drawn / "out/smoke/fig01.csv").read_bytes()
    assert (tmp_path / "curves.html").stat().st_size > 10_000 and not list(tmp_path.glob("runs/*/model.safetensors"))


def test_what_is_finished_of_a_larger_plan_is_drawn_and_nothing_is_trained(drawn, tmp_path):
    before = {name: found for name, found in contents(drawn / "runs").items() if not name.startswith("index")}
    asked = [
        "figures",
        "fig01",
        "fig06",
        *SMALL,
        "--seeds",
        "3",
        "--finished",
        "--runs",
        drawn / "runs",
        "--out",
        tmp_path / "out",
    ]
    done = subprocess.run([BIN / "sparse-nb", *asked], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == [
        "fig01: 4 of 6 points are finished in complete curves",
        "fig06: 0 of 12 points are finished",
    ]
    assert sorted(p.name for p in (tmp_path / "out/smoke").iterdir()) == [
        *(f"fig01.{ending}" for ending in ENDINGS),
        SCRIPT,
    ]
    assert (tmp_path / "out/smoke/fig01.csv").read_bytes() == (drawn / "out/smoke/fig01.csv").read_bytes()
    assert "mean over 2 seeds" in " ".join((tmp_path / "out/smoke/fig01.svg").read_text(encoding="utf-8").split())
    assert {name: found for name, found in contents(drawn / "runs").items() if not name.startswith("index")} == before


def test_plain_papermill_draws_the_same_numbers(drawn, tmp_path):
    parameters = {
        "preset": "smoke",
        "families": "mlp",
        "epochs": "2",
        "widths": "32 128",
        "runs": drawn / "runs",
        "out": tmp_path / "out",
    }
    flags = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    asked = [BIN / "papermill", f"figures/{NOTEBOOK}", tmp_path / "out.ipynb", *flags]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/smoke/fig01.csv").read_bytes() == (drawn / "out/smoke/fig01.csv").read_bytes()
    assert "0 made now, 4 already there" in (tmp_path / "out.ipynb").read_text()
    assert sorted(p.name for p in (tmp_path / "out/smoke").iterdir()) == [
        *(f"fig01.{e}" for e in ENDINGS if e != "ipynb"),
        SCRIPT,
    ]


def papermill(cwd, ran, **parameters):
    """What `papermill` says that is run in the folder `cwd`, with the parameters as text, and its exit status."""
    flags = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    asked = [BIN / "papermill", ROOT / "figures" / NOTEBOOK, ran, *flags]
    done = subprocess.run(asked, cwd=cwd, capture_output=True, text=True, timeout=120)
    return done.stderr, done.returncode


def test_finished_false_on_papermills_command_line_is_false(drawn, tmp_path):
    small = {"families": "mlp", "epochs": 2, "widths": "32 128", "runs": drawn / "runs", "out": tmp_path / "out"}
    said, status = papermill(ROOT, tmp_path / "ran.ipynb", finished="false", seeds=2, **small)
    assert status == 0, said
    ran = (tmp_path / "ran.ipynb").read_text()
    assert "4 networks: 0 made now, 4 already there" in ran and "4 of 4 points" in ran
    assert "What the paper says of figure 1, on preset smoke" in ran and "undecided" in ran


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"finished": "perhaps"}, "finished is 'perhaps'; accepted: true or false"),
        ({"presset": "laptop"}, "presset is not a parameter; accepted: preset, datasets"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_mistaken_parameter_of_papermill_is_refused_before_anything(wrong, words, tmp_path):
    where = {"runs": tmp_path / "runs", "out": tmp_path / "out"}
    said, status = papermill(ROOT, tmp_path / "ran.ipynb", families="mlp", **where, **wrong)
    assert status == 1 and words in said
    assert [path.name for path in tmp_path.iterdir()] == ["ran.ipynb"]


def test_papermill_in_a_folder_without_figures_writes_nothing_into_the_parent(tmp_path):
    (tmp_path / "thesis/chapter").mkdir(parents=True)
    said, status = papermill(tmp_path / "thesis/chapter", tmp_path / "ran.ipynb", families="mlp", epochs=1)
    assert status == 1 and f"there is no folder figures in {tmp_path / 'thesis/chapter'}" in said
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "ran.ipynb",
        "thesis",
        "thesis/chapter",
    ]


def test_a_kernel_that_is_not_installed_is_noticed_before_training(tmp_path, capfd):
    notebook = nbformat.read(notebooks(tmp_path / "notebooks", DRAW) / NOTEBOOK, as_version=4)
    notebook.metadata["kernelspec"] = {"name": "my_env", "display_name": "my_env", "language": "python"}
    nbformat.write(notebook, tmp_path / "notebooks" / NOTEBOOK)
    where = ["--runs", tmp_path / "runs", "--out", tmp_path / "out", "--notebooks", tmp_path / "notebooks"]
    with pytest.raises(SystemExit):
        main([str(word) for word in ("figures", "fig01", *SMALL, *where)])
    said = capfd.readouterr().err
    assert "asks for the kernel 'my_env'; installed: " in said and "python3" in said
    assert [path.name for path in tmp_path.iterdir()] == ["notebooks"]


def test_in_jupyterlab_everything_lands_in_the_projects_folder(drawn, tmp_path):
    shutil.copytree(drawn / "runs", tmp_path / "runs")
    (tmp_path / "figures").mkdir()
    notebook = nbformat.read(ROOT / "figures" / NOTEBOOK, as_version=4)
    at = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell("families, epochs, widths = 'mlp', 2, '32 128'"))
    NotebookClient(
        notebook, timeout=60, kernel_name="python3", resources={"metadata": {"path": str(tmp_path / "figures")}}
    ).execute()
    assert sorted(p.name for p in (tmp_path / "figures/rendered/smoke").iterdir()) == [
        *(f"fig01.{e}" for e in ENDINGS if e != "ipynb"),
        SCRIPT,
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figures", "runs"]
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == ["rendered"]
    assert "0 made now" in str(notebook)  # it found the project's runs


@pytest.mark.parametrize(
    "wrong, accepted",
    [
        (["fig99"], ["fig01"]),
        (["--preset", "labtop"], ["smoke", "laptop", "paper"]),
        (["--datasets", "imagenet"], ["digits", "mnist", "cifar10", "cifar100"]),
        (["--families", "mlp", "transformer"], ["mlp", "vgg", "resnet"]),
        (["--rules", "uniform"], ["water_filling", "proportional", "erk"]),
        (["--device", "tpu"], ["auto", "cpu", "cuda"]),
        (["--famlies", "mlp"], ["--families"]),
        (["--seeds", "two"], ["--seeds"]),
        (["--seeds", "0"], ["1 to 10,000"]),
        (["--epochs", "-1"], ["1 to 1,000,000"]),
        (["--families", "mlp", "--widths", "0"], ["at least 1"]),
        (["--families", "mlp", "--widths", "8"], ["budget"]),  # narrower than the base: it cannot hold the budget
        (["--notebooks", "nowhere"], ["--notebooks"]),
    ],
    ids=lambda words: words[-1],
)
def test_wrong_words_are_refused_before_any_work(wrong, accepted, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        main(["figures", *wrong, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    said = "".join(capfd.readouterr())
    assert end.value.code in (1, 2)
    assert wrong[-1] in said and [word for word in accepted if word not in said] == []
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_dry_run_says_what_is_missing_and_does_nothing(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    main(["figures", "fig01", *SMALL, "--dry-run", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[-1].startswith("4 networks to do")
    assert any(
        "digits mlp width 128 depth 1 25.00% static water_filling seed 1, at most 2 epochs: train, weight_noise; about"
        in line
        for line in lines
    )
    assert contents(tmp_path) == {}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "cell, words",
    [
        ("raise ArithmeticError('seven is not prime')", "seven is not prime"),
        ("import os; os.kill(os.getpid(), 9)", "fig01 was not drawn"),
    ],
    ids=["failed cell", "killed kernel"],
)
def test_a_notebook_that_stops_publishes_nothing(cell, words, drawn, tmp_path):
    shutil.copytree(drawn / "out", tmp_path / "out")
    before = contents(tmp_path / "out")
    arguments = ["figures", "fig01", *SMALL, "--runs", drawn / "runs", "--out", tmp_path / "out"]
    process = start([*arguments, "--notebooks", notebooks(tmp_path / "notebooks", DRAW, cell, "1")], tmp_path / "words")
    assert ended(process, 30) == 1
    said = (tmp_path / "words").read_text()
    assert words in said and "sparse-nb: fig01 was not drawn" in said and "smoke/fig01.html" not in said
    assert contents(tmp_path / "out") == before and sorted(p.name for p in (tmp_path / "out").iterdir()) == ["smoke"]


def test_a_notebook_that_draws_too_little_publishes_nothing(drawn, tmp_path):
    cells = DRAW, "(folder / 'fig01.svg').unlink()"
    arguments = ["figures", "fig01", *SMALL, "--runs", drawn / "runs", "--out", tmp_path / "out"]
    process = start([*arguments, "--notebooks", notebooks(tmp_path / "notebooks", *cells)], tmp_path / "words")
    assert ended(process, 30) == 1
    assert "svg" in (tmp_path / "words").read_text() and contents(tmp_path / "out") == {}


def test_ctrl_c_while_a_notebook_runs(drawn, tmp_path):
    shutil.copytree(drawn / "out", tmp_path / "out")
    before, running = contents(tmp_path / "out"), tmp_path / "running"
    slow = f"import os, pathlib, time; pathlib.Path({str(running)!r}).write_text(str(os.getpid())); time.sleep(60)"
    arguments = ["figures", "fig01", *SMALL, "--runs", drawn / "runs", "--out", tmp_path / "out"]
    process = start([*arguments, "--notebooks", notebooks(tmp_path / "notebooks", DRAW, slow)], tmp_path / "words")
    until(lambda: running.exists() and running.read_text())
    os.kill(process.pid, signal.SIGINT)
    status = ended(process, 20)
    kernel = Path(f"/proc/{running.read_text()}")
    until(
        lambda: not kernel.exists() or "\nState:\tZ" in (kernel / "status").read_text(), 10
    )  # no orphan is left computing
    assert contents(tmp_path / "out") == before
    assert status == 130 and "interrupted" in (tmp_path / "words").read_text()


LONGER = dict(families=("mlp",), seeds=2, epochs=6, widths=(32, 128, 512))  # six networks, to be interrupted


def longer_command(folder):
    flags = [
        word
        for name, value in LONGER.items()
        for word in (f"--{name}", *(value if isinstance(value, tuple) else [value]))
    ]
    paths = ["--runs", folder / "runs", "--out", folder / "out", "--notebooks", notebooks(folder / "notebooks", DRAW)]
    return ["figures", "fig01", *flags, *paths]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The store of the longer sweep, trained in one go, and the seconds that this took."""
    store, points = Store(tmp_path_factory.mktemp("undisturbed")), plan("fig01", narrow("smoke", **LONGER))
    began = time.monotonic()
    sweep.run([p.experiment for p in points], [points[0].evaluation], store=store, show=False)
    return store, points, time.monotonic() - began


def numbers(runs):
    """Contents of checkpoints and record files, which are the same whoever computed them when."""
    return {
        str(p.relative_to(runs)): p.read_bytes()
        for g in ("*/model.safetensors", "*/evaluations/*")
        for p in Path(runs).glob(g)
    }


FILES = ("experiment.json", "history.jsonl", "manifest.json", "model.safetensors")


def only_whole_runs(runs, points):
    """Assert that each run that is there is whole and proven; returns how many there are."""
    store, whole = Store(runs), 0
    for experiment in {point.experiment for point in points}:
        folder = store.folder(experiment)
        if folder.exists():
            whole += 1
            assert {p.name for p in folder.iterdir()} == {"evaluations", *FILES}
            load_run(store, experiment)
            assert len(load_history(store, experiment).epochs) == LONGER["epochs"]
            for path in folder.glob("evaluations/*.jsonl"):
                assert len(parse_records(path)) == 36
    return whole


def test_ctrl_c_in_training_keeps_whole_runs_and_goes_on_to_the_same_numbers(undisturbed, tmp_path):
    _, points, _ = undisturbed
    arguments = longer_command(tmp_path)
    process = start(arguments, tmp_path / "words")
    until(lambda: any(RUN.fullmatch(p.name) for p in tmp_path.glob("runs/*")))
    os.kill(process.pid, signal.SIGINT)
    assert ended(process, 20) == 130
    said = (tmp_path / "words").read_text()
    assert "sparse-nb: interrupted; finished networks and measurements are kept" in said and "Traceback" not in said
    kept = only_whole_runs(tmp_path / "runs", points)
    assert 1 <= kept < 6
    assert [p.name for p in (tmp_path / "runs").iterdir() if p.is_dir() and not RUN.fullmatch(p.name)] == []
    assert contents(tmp_path / "out") == {}

    assert ended(start(arguments, tmp_path / "words")) == 0
    assert f"6 networks: {6 - kept} made now, {kept} already there" in (tmp_path / "words").read_text()
    assert numbers(tmp_path / "runs") == numbers(undisturbed[0].root)


def test_kill_9_at_any_moment_loses_at_most_the_network_in_hand(undisturbed, tmp_path):
    _, points, seconds = undisturbed
    arguments, moments, kept = longer_command(tmp_path), random.Random(9), 0
    for _ in range(4):
        process = start(arguments, tmp_path / "words")
        until(lambda kept=kept: min(kept + 1, 6) <= sum(bool(RUN.fullmatch(p.name)) for p in tmp_path.glob("runs/*")))
        # somewhere in measuring that network or training the next; the notebook at the end alone takes over a second
        time.sleep(moments.uniform(0, min(seconds / 6, 1)))
        process.kill()
        assert ended(process, 10) == -signal.SIGKILL
        now = only_whole_runs(tmp_path / "runs", points)
        assert now >= kept
        kept = now
        if kept == 6:
            break
    assert ended(start(arguments, tmp_path / "words")) == 0
    assert numbers(tmp_path / "runs") == numbers(undisturbed[0].root)
    assert len(Store(tmp_path / "runs").table()) == 6 * 36
    assert json.loads((tmp_path / "out/smoke/fig01.ipynb").read_text())["nbformat"] == 4


@pytest.mark.parametrize("family, depth", [("vgg", 11), ("resnet", 18)])
def test_convolutions_go_through_the_store(family, depth, tmp_path):
    store, budget = Store(tmp_path / "runs"), counted_total("digits", family, 4, depth)
    recipe = Recipe(epochs=1, batch_size=32)
    wanted = [
        Experiment("digits", family, 6, depth, budget, 0, recipe, schedule=s, train_images=64)
        for s in ("static", "magnitude")
    ]
    summary = sweep.run(
        wanted, [WeightNoise(sigmas=(0, 0.1), draws=1, test_images=50)], store=store, device="cpu", show=False
    )
    assert (summary.made, summary.measured) == (3, 2)  # the dense parent of the pruned one is the third
    for experiment in wanted:
        model = load_run(store, experiment)
        kept = {name: int(weight.count_nonzero()) for name, weight in counted_weights(model).items()}
        assert sum(kept.values()) == budget and kept == {
            name: len(positions) for name, positions in pattern(model).items()
        }


def noisy_accuracy(folder):
    """The mean accuracy over all noise above 0 in the records of a run's folder, with nothing of the package."""
    (stored,) = (folder / "evaluations").iterdir()
    records = [json.loads(line) for line in stored.read_text().splitlines()[1:]]
    return np.mean([r["value"] for r in records if r["quantity"] == "accuracy" and r["strength"] > 0])


def test_controls_draw_the_numbers_of_the_stored_networks(tmp_path):
    """Figures 12 and 13: the three ways begin at one network, every point is the mean of its runs, and the networks of
    figure 1 are not made twice.
    """
    asked = [
        BIN / "sparse-nb",
        "figures",
        "fig12",
        "fig13",
        "--preset",
        "smoke",
        "--families",
        "mlp",
        "--epochs",
        "1",
        "--runs",
        tmp_path / "runs",
        "--out",
        tmp_path / "out",
    ]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "out/smoke").iterdir()) == [
        *(f"{figure}.{e}" for figure in ("fig12", "fig13") for e in ENDINGS),
        SCRIPT,
    ]
    control, rules = (pd.read_csv(tmp_path / f"out/smoke/{figure}.csv") for figure in ("fig12", "fig13"))
    control, rules = control[control.quantity == "noisy_accuracy"], rules[rules.quantity == "noisy_accuracy"]
    for row in [*control.itertuples(), *rules.itertuples()]:
        assert row.mean == pytest.approx(
            np.mean([noisy_accuracy(tmp_path / "runs" / run) for run in row.runs.split()]), abs=1e-12
        )
    first = control[control.step == 0]
    assert set(first.arm) == {"fewer", "sparser", "both"} and first.runs.nunique() == 1 and set(first.width) == {32}
    assert (
        set(control[control.arm == "fewer"].density) == {1} and control[control.arm == "sparser"].budget.nunique() == 1
    )
    assert (
        set(rules.rule) == {"water_filling", "proportional", "erk"}
        and (rules.effective_density <= rules.density + 1e-12).all()
    )
    again = rules[rules.rule == "water_filling"].set_index("width").runs
    assert all(
        again[row.width] == row.runs
        for row in control[(control.arm == "sparser") & control.width.isin([32, 128, 512])].itertuples()
    )
    assert "Mean distance between the rules" in (tmp_path / "out/smoke/fig13.svg").read_text()


def test_claims_are_judged_from_the_store_and_drawn(drawn, tmp_path, capfd):
    """The networks of `drawn`: two places of one curve, two seeds. Each row of the table names the runs that it
    compares, and the picture its provenance.
    """
    where = ("--runs", drawn / "runs", "--out", tmp_path, "--notebooks", ROOT / "figures")
    main([str(word) for word in ("claims", "--preset", "smoke", *SMALL, *where)])
    said, folder = capfd.readouterr().out, tmp_path / "smoke"
    here = ("claims", "effects")  # there is no control for the hero, and one panel only
    files = {f"{name}.{ending}" for name in here for ending in ENDINGS} | {SCRIPT, "claims.tex"}
    assert "unfinished" in said and {p.name for p in folder.iterdir()} == files
    judged = pd.read_csv(folder / "claims.csv", dtype={"claim": str})
    final = judged[judged.verdict != "unfinished"]
    assert set(final.claim) == {"1", "10"} and set(final.verdict) == {"undecided"} and set(final.seeds) == {2}
    assert {"2", "9"} <= set(judged.claim) - set(final.claim) and judged[
        judged.verdict == "unfinished"
    ].p_for.isna().all()
    runs = {path.parent.name for path in (drawn / "runs").glob("*/manifest.json")}
    assert set(" ".join(final.runs).split()) <= runs == set(figure_files.read(folder / "claims.svg").runs)


def test_nothing_is_judged_of_an_empty_store(tmp_path, capfd):
    Store(tmp_path / "runs")
    with pytest.raises(SystemExit):
        main(["claims", "--preset", "smoke", "--runs", str(tmp_path / "runs"), "--notebooks", str(ROOT / "figures")])
    assert "no claim can be judged by what is in" in capfd.readouterr().err
