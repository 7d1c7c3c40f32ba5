"""Whatever a figure's file holds: `figure_files.read` tells what it is or refuses it by name, at once."""

import json
import os
import random
import time
import zlib

import pandas as pd
import plotly.graph_objects as go
import pytest

from sparse_nb.cli import main as cli
from sparse_nb.results import figure_files, provenance, trace

ENDINGS = ("svg", "png", "html", "csv")
RUNS = tuple(f"{number:016x}" for number in range(40))


@pytest.fixture(scope="module")
def figure(tmp_path_factory):
    """The folder of a figure's four files."""
    folder = tmp_path_factory.mktemp("figure")
    made = provenance.Provenance(
        RUNS,
        evaluations=("0123456789abcdef",),
        preset="laptop",
        narrower=("Datasets: MNIST", "2 of 5 seeds"),
        seeds=(0, 1),
        code={"training": "2"},
        data={"mnist": "a" * 64},
        version="0.2.0",
        date="2026-01-31T23:59:59Z",
    )
    curves = pd.DataFrame({"mean": [0.9, 0.8], "runs": [" ".join(RUNS[:20]), " ".join(RUNS[20:])]})
    picture = go.Figure(go.Scatter(x=[1, 2], y=[0.9, 0.8])).update_layout(width=300, height=200)
    figure_files.publish(picture, curves, folder, "fig01", made)
    return folder


def mutated(content, chance):
    """`content` with some bytes changed, a part cut out, repeated or exchanged, or its end missing."""
    kind, at = chance.randrange(5), chance.randrange(len(content))
    length = min(chance.choice((1, 4, 40, 4000)), len(content) - at)
    if kind == 0:
        changed = bytearray(content)
        for _ in range(chance.choice((1, 3, 30))):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        return bytes(changed)
    if kind == 1:
        return content[:at]
    if kind == 2:
        return content[:at] + content[at + length :]
    if kind == 3:
        return content[:at] + content[at : at + length] * chance.choice((2, 50)) + content[at + length :]
    return content[:at] + bytes(chance.randrange(256) for _ in range(length)) + content[at + length :]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_changed_file_is_understood_or_refused_by_name(figure, ending, tmp_path):
    content, chance, path = (figure / f"fig01.{ending}").read_bytes(), random.Random(ending), tmp_path / f"fig.{ending}"
    where = content.find(b"provenance") if ending != "csv" else 0
    for turn in range(150):
        part = slice(max(0, where - 200), where + 2500) if turn % 3 else slice(None)  # mostly where it is read
        start, stop, _ = part.indices(len(content))
        path.write_bytes(content[:start] + mutated(content[start:stop], chance) + content[stop:])
        began = time.process_time()
        try:
            lines = trace.trace_lines(figure_files.read(path), tmp_path)
        except (ValueError, OSError) as error:
            assert str(path) in str(error)
            lines = [str(error)]
        assert all(line.isprintable() for line in lines)
        assert time.process_time() - began < 1


def png(*chunks):
    """A PNG file of some chunks, (kind, content) each."""
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, content in chunks:
        parts += [len(content).to_bytes(4, "big"), kind, content, zlib.crc32(kind + content).to_bytes(4, "big")]
    return b"".join(parts)


SIZE = (50_000).to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
PIXELS = zlib.compress(b"\0" * (50_000 // 8 + 1) * 50_000, 9)  # 300 MB of black
SAID = b'<script type="application/json" id="provenance">'


def forged(**fields):
    """A provenance as JSON with some fields that are not right."""
    return json.dumps({"runs": [RUNS[0]], "run_set": provenance.Provenance(RUNS[:1]).run_set} | fields).encode()


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("bomb.png", png((b"IHDR", SIZE), (b"IDAT", PIXELS), (b"IEND", b"")), "contains no provenance"),
        ("ztxt.png", png((b"IHDR", SIZE), (b"zTXt", b"provenance\0\0" + zlib.compress(b"[" * 10**7))), "no provenance"),
        ("many.html", SAID * 20_000, "ends within its provenance"),
        ("script.html", b"<script " * 120_000, "contains no provenance"),
        ("code.html", SAID + forged(code=7) + b"</script>", "its field 'code' is not what"),
        ("seeds.html", SAID + forged(seeds=[10**400]) + b"</script>", None),
        ("deep.html", SAID + b"[" * 900_000 + b"</script>", "nested too deeply"),
        ("huge.html", SAID + b"9" * 900_000 + b"</script>", "cannot be read"),
        ("escape.html", SAID + forged(preset="\x1b]0;owned\x07") + b"</script>", "its field 'preset' is not what"),
        ("field.html", SAID + forged(**{"\x1b[2J": 1}) + b"</script>", "its field '\\x1b[2J' is not what"),
        ("turned.html", SAID + forged(date="\u202e2026") + b"</script>", "its field 'date' is not what"),
        ("list.html", SAID + b"[1, 2]" + b"</script>", "does not name runs"),
        ("svg.svg", b"<svg" * 250_000, "cannot be read"),
        ("quotes.svg", b"<svg a='" * 120_000, "cannot be read"),
        ("nested.svg", b"<svg>" + b"<g>" * 300_000, "contains no provenance"),
        ("escape.csv", b"mean,runs\n1,\x1b[31mred\n", "cannot be read"),
        ("long.csv", b"mean,runs\n1," + b"0123456789abcdef " * 60_000, "cannot be read"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value and " " not in value else "",
)
def test_hostile_files_are_refused_at_once(name, content, words, tmp_path, capfd):
    path = tmp_path / name
    path.write_bytes(content)
    began = time.process_time()
    if words is None:
        trace.trace_lines(figure_files.read(path), tmp_path)
    else:
        with pytest.raises(SystemExit) as end:
            cli.main(["trace", str(path), "--runs", str(tmp_path / "runs")])
        out, said = capfd.readouterr()
        assert (end.value.code, out, said.count("\n")) == (1, "", 1)
        assert words in said and str(path) in said and said.rstrip("\n").isprintable()
    assert time.process_time() - began < 1


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.html")
    (tmp_path / "folder.svg").mkdir()
    (tmp_path / "link.png").symlink_to("/dev/zero")
    for name in ("pipe.html", "folder.svg", "link.png"):
        with pytest.raises(ValueError, match=f"{name} is not a file but a folder, a pipe or a device"):
            figure_files.read(tmp_path / name)
    with open(tmp_path / "large.svg", "wb") as file:
        file.truncate(10**9)
    with pytest.raises(ValueError, match="large.svg has 1,000,000,000 bytes; no figure has more than"):
        figure_files.read(tmp_path / "large.svg")


def test_trace_of_a_published_figure_in_a_fresh_clone_names_merge_once(figure, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.main(["trace", str(figure / "fig01.svg")])
    said = capfd.readouterr().out.splitlines()
    assert said[-1] == "40 of its 40 runs are not in runs; `sparse-nb merge OTHER` imports another folder's"
    (tmp_path / "results/laptop/mnist-mlp").mkdir(parents=True)
    (tmp_path / "results/laptop/mnist-mlp/runs.tar.xz").write_bytes(b"")
    cli.main(["trace", str(figure / "fig01.svg")])
    assert capfd.readouterr().out.splitlines() == [
        *said[:-1],
        "40 of its 40 runs are not in runs; `sparse-nb merge results/laptop` imports what is published",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results"]
