"""The index under many processes, on a network filesystem, of another release, damaged, and on a read-only disk."""

import json
import multiprocessing
import os
import random
import sqlite3
import subprocess
import sys
import time
from collections import namedtuple
from contextlib import closing

import numpy as np
import pandas as pd
import psutil
import pytest

from sparse_nb.networks.training import Epoch, History, Recipe
from sparse_nb.robustness.evaluation import Record
from sparse_nb.runs import index as module
from sparse_nb.runs.index import _RECORD_KEY, index_path
from sparse_nb.runs.queries import Records
from sparse_nb.runs.store import Store, save_records, save_run
from sparse_nb.study.experiments import Clean, Experiment, WeightNoise, experiment_hash, prepare

FULL = os.environ.get("SPARSE_NB_FAULTS") == "full"
WRITERS, TURNS, FLIPS = 8, 200 if FULL else 15, 400 if FULL else 60
RECORDS = [
    Record("weight_noise", quantity, 0.5, strength=strength)
    for quantity in ("accuracy", "loss_increase")
    for strength in (0.0, 0.25)
]

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    ["pytest", "hypothesis", "nbclient", "sparse_nb.cli.commands", "sparse_nb.cli.main"]
)  # as in test_faults.py: one server for all


def keep_run(store, seed):
    """Keep an untrained network, as if it were trained."""
    experiment = Experiment("digits", "mlp", width=8, depth=1, budget=592, seed=seed, recipe=Recipe(epochs=1))
    epoch = Epoch(epoch=0, loss=2.3, accuracy=0.1, learning_rate=0.1, seconds=0.0)
    assert save_run(store, experiment, prepare(experiment), History((epoch,), "epochs", None), {"device": "cpu"})
    return experiment


def write_and_ask(root, seed, turns, answer, together):
    """Keep a run and, one after the other, its record files; after each the table must have it.

    Says in a file how long the longest answer took.
    """
    together.wait(60)
    store, waits = Store(root), []
    experiment = keep_run(store, seed)
    for turn in range(turns):
        save_records(store, experiment, WeightNoise(seed=turn), RECORDS)
        start = time.monotonic()
        found = store.table(experiment=experiment_hash(experiment))
        waits.append(time.monotonic() - start)
        assert len(found) == (turn + 1) * len(RECORDS), (seed, turn, len(found))
    answer.write_text(json.dumps(max(waits)))


def entered(root):
    """Number of values in the index, whatever they are."""
    with closing(sqlite3.connect(index_path(root))) as index:
        return index.execute("SELECT sum(length(numbers)) FROM folders").fetchone()[0] / 8


@pytest.mark.timed
def test_eight_writers_beside_a_reader(tmp_path, report):
    root, together = tmp_path / "runs", processes.Barrier(WRITERS + 1)
    answers = [tmp_path / str(seed) for seed in range(WRITERS)]
    writers = [
        processes.Process(target=write_and_ask, args=(root, seed, TURNS, path, together), daemon=True)
        for seed, path in enumerate(answers)
    ]
    for writer in writers:
        writer.start()
    together.wait(60)
    store, waits, rows = Store(root), [], [0]
    while any(writer.is_alive() for writer in writers):
        start = time.monotonic()
        rows.append(len(store.table()))
        waits.append(time.monotonic() - start)
        time.sleep(0.01)
    assert [writer.exitcode for writer in writers] == [0] * WRITERS
    assert rows == sorted(rows) and len(set(rows)) > 2  # nothing that was seen is gone, and it was read while it grew
    assert max(waits) < 1
    table = store.table()
    assert len(table) == WRITERS * TURNS * len(RECORDS) and not table.duplicated(list(_RECORD_KEY)).any()
    assert entered(root) == len(table)  # and the index holds no more than that
    report(
        f"{WRITERS} writers × {TURNS} transactions beside a reader",
        f"all {len(table):,} rows there; the reader's longest wait of {len(waits):,} was {max(waits):.2f} s",
    )


@pytest.fixture
def store(tmp_path):
    """A store with one run, measured."""
    store = Store(tmp_path / "runs")
    save_records(store, keep_run(store, 0), WeightNoise(), RECORDS)
    return store


@pytest.fixture
def filled(store):
    """A store with five runs, measured, with other values each."""
    for seed in range(1, 5):
        values = [Record("weight_noise", "accuracy", 1 / (2 + seed + draw), draw=draw) for draw in range(50)]
        save_records(store, keep_run(store, seed), WeightNoise(seed=seed), values)
    return store


@pytest.mark.timed
def test_a_reader_does_not_wait_for_a_writer(store):
    before = store.table()
    with closing(sqlite3.connect(index_path(store.root))) as index, module._writing(index):
        index.execute("DELETE FROM folders")
        start = time.monotonic()
        pd.testing.assert_frame_equal(store.table(), before)
        assert time.monotonic() - start < 1
        index.rollback()


def test_what_a_rival_enters_while_the_disk_is_read_is_not_taken_for_gone(store, monkeypatch):
    experiment, look = keep_run(store, 1), module._changes
    store.table()

    def look_while_a_rival_finishes(root, known):
        seen = look(root, known)
        monkeypatch.setattr(module, "_changes", look)
        save_records(store, experiment, Clean(), [Record("clean", "accuracy", 0.5)])
        assert len(store.table(measure="clean")) == 1
        return seen

    monkeypatch.setattr(module, "_changes", look_while_a_rival_finishes)
    assert len(store.table(measure="clean")) == 1


def test_a_rival_that_enters_the_same_folder_at_the_same_time_loses_nothing(store, monkeypatch):
    experiment, enter = keep_run(store, 1), module._enter_changes
    store.table()
    save_records(store, experiment, Clean(), [Record("clean", "accuracy", 0.5)])

    def enter_after_a_rival(index, root, changes):
        monkeypatch.setattr(module, "_enter_changes", enter)
        save_records(store, experiment, WeightNoise(), RECORDS)
        assert len(store.table(experiment=experiment_hash(experiment))) == 1 + len(RECORDS)
        enter(index, root, changes)

    monkeypatch.setattr(module, "_enter_changes", enter_after_a_rival)
    assert len(store.table(experiment=experiment_hash(experiment))) == 1 + len(RECORDS)
    assert entered(store.root) == len(store.table()) == 1 + 2 * len(RECORDS)


def test_an_index_of_another_release_is_built_again(store):
    before = store.table()
    with closing(sqlite3.connect(index_path(store.root))) as index:
        index.executescript(
            "DROP TABLE shared; CREATE TABLE other (a); ALTER TABLE folders RENAME COLUMN numbers TO wrong; "
            "PRAGMA user_version = 1"
        )
    pd.testing.assert_frame_equal(store.table(), before)


def test_a_damaged_page_of_the_index_is_built_again(store):
    before, path = (store.table(), store.runs()), index_path(store.root)
    whole = path.read_bytes()
    for page in range(len(whole) // 4096):
        path.write_bytes(whole[: 4096 * page] + b"\xff" * 4096 + whole[4096 * (page + 1) :])
        pd.testing.assert_frame_equal(store.table(), before[0])
        path.write_bytes(whole[: 4096 * page] + b"\xff" * 4096 + whole[4096 * (page + 1) :])
        pd.testing.assert_frame_equal(store.runs(), before[1])


@pytest.mark.parametrize("write", [True, False])
def test_no_flipped_bit_of_the_index_changes_a_table(write, filled, report):
    """Half of the bits anywhere, half of them where rows lie. Each question is sometimes the first one."""
    path, chance = index_path(filled.root), random.Random(write)
    before = {"table": filled.table(), "runs": filled.runs(), "measurements": filled.measurements()}
    whole, changed, noticed = path.read_bytes(), 0, 0
    used = [place for place, byte in enumerate(whole) if byte]  # most bytes of so small an index are zeros
    for number in range(FLIPS):
        place = chance.choice(used) if number % 2 else chance.randrange(len(whole))
        flipped = whole[:place] + bytes([whole[place] ^ 1 << chance.randrange(8)]) + whole[place + 1 :]
        path.write_bytes(flipped)
        records = Records(filled.root, write=write)
        for question in chance.sample(list(before), 3):
            changed += not getattr(records, question)().equals(before[question])
        noticed += path.read_bytes() != flipped
        for part in path.parent.glob("index.sqlite-*"):
            part.unlink()
    if write:
        report(f"{FLIPS} flipped bits in the index", f"{changed} changed a table; {noticed} times it was built again")
        assert noticed > FLIPS / 8
    assert changed == 0 and (write or noticed == 0)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE folders SET summary = replace(summary, '0.1', '0.25')",
        "UPDATE folders SET numbers = zeroblob(length(numbers))",
        "UPDATE folders SET numbers = NULL",
        "UPDATE folders SET seen = '1 1'",
        "UPDATE folders SET folder = folder + 1",
        "UPDATE folders SET checksum = NULL",
        "UPDATE shared SET text = replace(text, 'loss_increase', 'loss')",
        "DELETE FROM shared",
        "DELETE FROM folders WHERE folder = (SELECT max(folder) FROM folders)",
    ],
)
@pytest.mark.parametrize("write", [True, False])
def test_a_number_changed_in_the_index_changes_no_table(change, write, filled):
    before = filled.table(), filled.runs()
    with closing(sqlite3.connect(index_path(filled.root))) as index, index:
        assert index.execute(change).rowcount
    for question, expected in zip(("table", "runs"), before, strict=True):
        pd.testing.assert_frame_equal(getattr(Records(filled.root, write=write), question)(), expected)


def test_on_a_network_filesystem_the_index_lies_in_the_cache_folder(store, tmp_path, monkeypatch):
    before = store.table()
    assert index_path(store.root).exists() and index_path(store.root).parent == store.root
    index_path(store.root).unlink()
    Mount = namedtuple("Mount", "mountpoint fstype")
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: [Mount("/", "ext4"), Mount(str(store.root), "nfs4")])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = index_path(store.root)
    for damage in (lambda: None, lambda: path.write_bytes(b"no database, and too short to be one " * 200), path.unlink):
        damage()
        pd.testing.assert_frame_equal(store.table(), before)
        assert path.parent == tmp_path / "cache" / "sparse-nb" and path.exists() and not list(store.root.glob("index*"))
    assert index_path(tmp_path / "other") != path  # that one is on "/", though
    monkeypatch.chdir(tmp_path)
    assert index_path("runs") == path


def test_without_a_place_for_the_index_it_is_in_memory(store, tmp_path, monkeypatch):
    before = store.table()
    index_path(store.root).unlink()
    Mount = namedtuple("Mount", "mountpoint fstype")
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: [Mount("/", "lustre")])
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    pd.testing.assert_frame_equal(Store(store.root).table(), before)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(module.Path, "home", classmethod(lambda cls: (_ for _ in ()).throw(RuntimeError("no home"))))
    assert index_path(store.root) is None
    pd.testing.assert_frame_equal(Store(store.root).table(), before)


def state(root):
    """Every path below `root` with what a change of it would change."""
    paths = [root, *root.rglob("*")]
    return {path: (path.lstat().st_mtime_ns, path.lstat().st_ino, path.lstat().st_size) for path in paths}


@pytest.mark.parametrize("has_index", [True, False])
def test_a_store_that_is_only_read_stays_as_it_is(has_index, filled):
    before = filled.table(), filled.runs(), filled.measurements()
    if not has_index:
        index_path(filled.root).unlink()
    looked, reading = state(filled.root), Store(filled.root, write=False)
    for _ in range(2):
        for question, expected in zip(("table", "runs", "measurements"), before, strict=True):
            pd.testing.assert_frame_equal(getattr(reading, question)(), expected)
    assert state(filled.root) == looked
    save_records(filled, keep_run(filled, 9), Clean(), [Record("clean", "accuracy", 0.25)])  # by another process
    assert list(reading.table(measure="clean").value) == [0.25] and len(reading.table()) == len(before[0]) + 1


def test_a_read_only_store_writes_nothing_and_a_mistyped_one_is_not_made(store, tmp_path):
    reading, experiment = Store(store.root, write=False), keep_run(store, 3)
    for write in (lambda: save_records(reading, experiment, Clean(), []), lambda: keep_run(reading, 4)):
        with pytest.raises(PermissionError, match="is only read"):
            write()
    with pytest.raises(FileNotFoundError, match=f"the runs folder {tmp_path / 'rnus'} is not there"):
        Store(tmp_path / "rnus", write=False)
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        Store(tmp_path / "file", write=False)
    assert len(Records(tmp_path / "rnus").table()) == 0 and not (tmp_path / "rnus").exists()


def test_an_old_folder_is_not_looked_through_until_something_is_put_into_it(filled, monkeypatch):
    looked = []
    look = module._look_into
    monkeypatch.setattr(module, "_look_into", lambda folder: looked.append(os.path.basename(folder)) or look(folder))
    before = filled.table()
    assert len(set(looked)) == 5  # they are new
    for path in filled.root.rglob("*"):
        if path.is_dir():
            os.utime(path, (1e9, 1e9))
    pd.testing.assert_frame_equal(filled.table(), before)
    looked.clear()
    pd.testing.assert_frame_equal(filled.table(), before)
    assert looked == []
    experiment = Experiment("digits", "mlp", width=8, depth=1, budget=592, seed=2, recipe=Recipe(epochs=1))
    save_records(filled, experiment, Clean(), [Record("clean", "accuracy", 0.5)])
    assert len(filled.table()) == len(before) + 1 and set(looked) == {experiment_hash(experiment)}
    filled.records_path(experiment, Clean()).unlink()
    pd.testing.assert_frame_equal(filled.table(), before)
    (filled.folder(experiment) / "manifest.json").unlink()
    assert experiment_hash(experiment) not in set(filled.table().experiment) and len(filled.runs()) == 4


def test_foreign_files_are_passed_over(filled):
    before, run = filled.table(), filled.root / filled.runs().experiment[0]
    for name in ("._0123456789abcdef.jsonl", "notes.jsonl", "0123456789abcdef.jsonl.bak"):
        (run / "evaluations" / name).write_bytes(b"\0\5\x16\7")
    os.mkfifo(run / "evaluations" / "0123456789abcdef.jsonl")  # a reader would wait
    for name in (f"{run.name}.bak", f"._{run.name}", run.name.upper()[:15] + "G", "0" * 17):
        (filled.root / name).mkdir()
        (filled.root / name / "manifest.json").write_text("{}")
    (filled.root / ("1" * 16)).write_text("a file")
    (filled.root / ("2" * 16)).mkdir()
    os.mkfifo(filled.root / ("2" * 16) / "manifest.json")
    for write in (True, False):
        pd.testing.assert_frame_equal(Records(filled.root, write=write).table(), before)
        assert len(Records(filled.root, write=write).runs()) == 5


def test_the_kind_of_machine_is_in_the_table(store):
    experiment = Experiment("digits", "mlp", width=8, depth=1, budget=592, seed=7, recipe=Recipe(epochs=1))
    epoch = Epoch(epoch=0, loss=2.3, accuracy=0.1, learning_rate=0.1, seconds=0.0)
    where = {"device": "cpu", "cpu": "AVX512", "threads": 3, "torch": "2.9", "commit": None}
    assert save_run(store, experiment, prepare(experiment), History((epoch,), "epochs", None), where)
    save_records(store, experiment, Clean(), [Record("clean", "accuracy", 0.5)])
    row = store.table(experiment=experiment_hash(experiment)).iloc[0]
    assert (row.device, row.cpu, row.threads, row.torch) == ("cpu", "AVX512", 3, "2.9")
    assert set(store.runs(cpu=None).seed) == {0}  # of an earlier release, which did not record it


def test_the_table_is_what_the_files_say(filled):
    """Against the record files, read without this package."""
    rows = []
    for path in sorted(filled.root.glob("*/evaluations/*.jsonl")):
        for line in path.read_text().splitlines()[1:]:
            rows.append({"experiment": path.parent.parent.name, "evaluation": path.stem} | json.loads(line))
    expected = pd.DataFrame(rows).sort_values(list(_RECORD_KEY), kind="stable", ignore_index=True)
    table = filled.table()
    for column in expected:
        assert list(table[column]) == list(expected[column]), column
    assert table.strength.dtype == table.value.dtype == np.float64 and table.draw.dtype == np.int64
    some = expected[(expected.quantity == "accuracy") & expected.strength.isin([0, 0.25])]
    assert list(filled.table(quantity="accuracy", strength=(0, 0.25)).value) == list(some.value)
    assert list(filled.table(value=0.5, seed=[0, 1]).value) == [0.5] * len(RECORDS)


def test_tables_need_no_torch(filled):
    code = (
        "import sys; from sparse_nb.runs.queries import Records; from sparse_nb.runs.attempts import load_failures; "
        "r = Records(sys.argv[1]); print(len(r.table()), len(load_failures(r)), 'torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code, filled.root], capture_output=True, text=True, check=True).stdout
    assert said.split() == [str(len(filled.table())), "0", "False"]
