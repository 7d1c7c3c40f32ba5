"""The index under many processes, on a network filesystem, of another release."""

import json
import multiprocessing
import os
import sqlite3
import time
from collections import namedtuple
from contextlib import closing

import pandas as pd
import psutil
import pytest

from sparse_nb.networks.training import Epoch, History, Recipe
from sparse_nb.robustness.evaluation import Record
from sparse_nb.runs.store import RECORD_KEY, Store, index_path, save_records, save_run, writing
from sparse_nb.study.experiments import Clean, Experiment, WeightNoise, experiment_hash, prepare

FULL = os.environ.get("SPARSE_NB_FAULTS") == "full"
WRITERS, TURNS = 8, 200 if FULL else 15
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
    """Keep a run and, one after the other, its record files; after each the table must have it. Says in a file how long the longest answer took."""
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
    assert len(table) == WRITERS * TURNS * len(RECORDS) and not table.duplicated(list(RECORD_KEY)).any()
    with closing(sqlite3.connect(index_path(root))) as index:  # and the index holds no more than that
        assert index.execute("SELECT count(*) FROM records").fetchone()[0] == len(table)
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


@pytest.mark.timed
def test_a_reader_does_not_wait_for_a_writer(store):
    before = store.table()
    with closing(sqlite3.connect(index_path(store.root))) as index, writing(index):
        index.execute("DELETE FROM records")
        start = time.monotonic()
        pd.testing.assert_frame_equal(store.table(), before)
        assert time.monotonic() - start < 1
        index.rollback()


def test_what_a_rival_enters_while_the_disk_is_read_is_not_taken_for_gone(store, monkeypatch):
    from sparse_nb.runs import store as module

    experiment, look = keep_run(store, 1), module.stamps_on_disk
    store.table()

    def look_while_a_rival_finishes(root):
        seen = look(root)
        monkeypatch.setattr(module, "stamps_on_disk", look)
        save_records(store, experiment, Clean(), [Record("clean", "accuracy", 0.5)])
        assert len(store.table(measure="clean")) == 1
        return seen

    monkeypatch.setattr(module, "stamps_on_disk", look_while_a_rival_finishes)
    assert len(store.table(measure="clean")) == 1


def test_an_index_of_another_release_is_built_again(store):
    before = store.table()
    with closing(sqlite3.connect(index_path(store.root))) as index:
        index.executescript(
            "DROP TABLE kinds; CREATE TABLE other (a); ALTER TABLE records RENAME COLUMN value TO wrong; PRAGMA user_version = 1"
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
