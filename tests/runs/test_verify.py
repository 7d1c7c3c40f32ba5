"""Damage is found and named, killed merges leave intact stores, and cleaning up deletes nothing that is in use."""

import dataclasses
import fcntl
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
from pathlib import Path

import pandas as pd
import pytest

from sparse_nb.networks.training import Recipe
from sparse_nb.runs import exchange
from sparse_nb.runs.exchange import Taken, export, merge, published_rows
from sparse_nb.runs.files import RUN_FILES, sha256
from sparse_nb.runs.index import RECORD_COLUMNS
from sparse_nb.runs.store import Store, load_run
from sparse_nb.runs.verify import Leftover, leftovers, remove, verify, verify_run
from sparse_nb.study.experiments import (
    ClassRecall,
    Clean,
    Experiment,
    WeightNoise,
    evaluation_hash,
    evaluation_identity,
)
from sparse_nb.study.versions import canonical, name_of
from sparse_nb.sweep import sweep

NETWORKS = [Experiment("digits", "mlp", width, 1, 2048, 0, Recipe(epochs=1)) for width in (32, 64, 256)]
MEASUREMENTS = [Clean(), ClassRecall(), WeightNoise(sigmas=(0.0, 0.3), draws=2)]
ONE = NETWORKS[1]

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["pytest", "sparse_nb.runs.exchange"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The root of a store with three networks, measured; copy it, do not change it."""
    root = tmp_path_factory.mktemp("trained")
    sweep.run(NETWORKS, MEASUREMENTS, store=Store(root), device="cpu", show=False)
    return root


@pytest.fixture
def store(trained, tmp_path):
    """A copy of that store, without its index, to be damaged."""
    shutil.copytree(trained, tmp_path / "runs", ignore=shutil.ignore_patterns("index*", ".attempts"))
    return Store(tmp_path / "runs")


@pytest.fixture
def empty(tmp_path):
    return Store(tmp_path / "empty")


def contents(root):
    """Every file of finished runs, as {name: bytes}."""
    return {
        str(p.relative_to(root)): p.read_bytes()
        for p in Path(root).glob("[0-9a-f]*/**/*")
        if p.is_file() and not p.name.startswith(".")
    }


def everything(root):
    """Every path below `root` with what a change of it would change."""
    return {
        path: (path.lstat().st_mtime_ns, path.lstat().st_ino, path.lstat().st_size)
        for path in [root, *Path(root).rglob("*")]
    }


def damages(store):
    """500 truncations and 500 flipped bits, as (path, damaged content, whole content), over all files of all runs."""
    chance, files = random.Random(0), sorted(path for path in store.root.rglob("*") if path.is_file())
    for number in range(1000):
        path = files[number // 2 % len(files)]
        whole = path.read_bytes()
        if number % 2:
            yield path, whole[: chance.randrange(len(whole))], whole
        else:
            bit = chance.randrange(8 * len(whole))
            yield path, whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :], whole


def names(sentence, path):
    """Does a sentence name a file, or, for a manifest, what it does not prove any more?"""
    return str(path) in sentence or (
        path.name == "manifest.json" and str(path.parent) in sentence and "manifest" in sentence
    )


def test_a_thousand_of_a_thousand_damages_are_found_and_named(store, report):
    found, kinds = 0, set()
    for path, damaged, whole in damages(store):
        folder = store.root / path.relative_to(store.root).parts[0]
        path.write_bytes(damaged)
        found += any(names(sentence, path) and "delete" in sentence for sentence in verify_run(folder).problems)
        path.write_bytes(whole)
        kinds.add(path.name if path.parent == folder else "records")
    report("500 truncations and 500 flipped bits", f"{found:,} found and named by verify")
    assert found == 1000 and kinds == {
        "manifest.json",
        "experiment.json",
        "history.jsonl",
        "model.safetensors",
        "records",
    }
    assert verify(store).problems == ()


def test_a_missing_file_is_damage_but_for_the_checkpoint(store):
    for path in sorted(store.folder(ONE).rglob("*.json*")):
        if path.parent == store.folder(ONE):
            whole = path.read_bytes()
            path.unlink()
            assert [sentence for sentence in verify(store).problems if str(path) in sentence]
            path.write_bytes(whole)
    (store.folder(ONE) / "model.safetensors").unlink()
    assert verify(store) == (3, 1, 9, verify(store).records, ())


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_are_never_executed(store, empty, tmp_path):
    trap, sprung = pickle.dumps(Trap(tmp_path / "sprung")), tmp_path / "sprung"
    pickle.loads(trap)
    assert sprung.exists()  # it would work
    sprung.unlink()
    for network, name in zip(NETWORKS, ("model.safetensors", "history.jsonl", "experiment.json"), strict=True):
        folder = store.folder(network)
        (folder / name).write_bytes(trap)
        proofs = json.loads((folder / "manifest.json").read_bytes())
        (folder / "manifest.json").write_text(
            json.dumps({**proofs, name: sha256(trap)})
        )  # whoever offers it vouches for it
    for records in store.root.glob("*/evaluations/*.jsonl"):
        records.write_bytes(trap)
    (store.root / ".attempts" / store.folder(ONE).name).mkdir(parents=True)
    (store.root / ".attempts" / store.folder(ONE).name / "state").write_bytes(trap)
    with pytest.raises(ValueError, match="does not hold this network"):
        load_run(store, NETWORKS[0])
    problems = verify(store).problems
    for path in [
        *store.root.glob("*/evaluations/*.jsonl"),
        *(store.folder(n) / f for n, f in zip(NETWORKS, RUN_FILES[::-1], strict=True) if f != "history.jsonl"),
    ]:
        assert any(str(path) in problem for problem in problems), path
    taken = merge(empty, store.root)
    assert taken[:4] == (0, 0, 0, 0) and len(taken.problems) >= 3 and contents(empty.root) == {}
    remove(store, leftovers(store, outdated=True))
    with pytest.raises(ValueError):
        export(store, None, tmp_path / "published")
    assert not sprung.exists() and not (tmp_path / "published").exists()


@pytest.mark.parametrize(
    "content", [b"[]", b"{}", b"null", b'{"experiment":{},"data":"","code":""}', b"[" * 100_000, b"\xff", b"1e999"]
)
def test_proven_nonsense_is_named_and_not_taken(content, store, empty):
    folder = store.folder(ONE)
    proofs = json.loads((folder / "manifest.json").read_bytes())
    (folder / "experiment.json").write_bytes(content)
    (folder / "manifest.json").write_text(json.dumps({**proofs, "experiment.json": sha256(content)}))
    assert [sentence for sentence in verify(store).problems if str(folder / "experiment.json") in sentence]
    assert merge(empty, store.root).runs == 2 and verify(empty).problems == ()
    (folder / "manifest.json").write_bytes(content)
    assert [sentence for sentence in verify(store).problems if str(folder / "manifest.json") in sentence]


def test_pipes_and_folders_in_the_place_of_files_are_named(store):
    for place in (
        store.folder(ONE) / "model.safetensors",
        store.folder(ONE) / "manifest.json",
        store.records_path(ONE, Clean()),
    ):
        whole = place.read_bytes()
        place.unlink()
        os.mkfifo(place)  # whoever reads it waits forever
        assert [sentence for sentence in verify(store).problems if str(place) in sentence]
        place.unlink()
        place.mkdir()
        assert [sentence for sentence in verify(store).problems if str(place) in sentence]
        place.rmdir()
        place.write_bytes(whole)
    assert verify(store).problems == ()


def test_of_damaged_copies_only_what_is_whole_is_taken(trained, store, tmp_path):
    source, some = contents(trained), [damage for number, damage in enumerate(damages(store)) if number % 23 == 0]
    for number, (path, damaged, whole) in enumerate(some):
        target = Store(tmp_path / f"target{number}")
        path.write_bytes(damaged)
        taken = merge(target, store.root)
        path.write_bytes(whole)
        is_records = path.parent.name == "evaluations"
        assert taken[:2] == ((3, 8) if is_records else (2, 6)) and any(
            names(problem, path) for problem in taken.problems
        )
        lost = path.relative_to(store.root)
        assert contents(target.root) == {
            n: c for n, c in source.items() if (n != str(lost) if is_records else not n.startswith(lost.parts[0]))
        }
        assert verify(target).problems == ()
        assert merge(target, trained).problems == () and contents(target.root) == source


def test_what_is_merged_from_is_never_written_to(store, empty):
    before = everything(store.root)
    merge(empty, store.root)
    merge(empty, store.root)
    assert everything(store.root) == before and contents(empty.root) == contents(store.root)


def test_merging_from_a_read_only_folder(store, empty):
    for path in [store.root, *store.root.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert merge(empty, store.root)[:3] == (3, 9, 3)
        sweep.run(
            NETWORKS, [WeightNoise(sigmas=(0.1,), draws=1)], store=empty, device="cpu", show=False
        )  # what was taken can be written to
    finally:
        for path in [store.root, *store.root.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)


def test_a_run_merged_without_its_checkpoint_counts_as_done(store, empty):
    for path in store.root.glob("*/model.safetensors"):
        path.unlink()
    assert merge(empty, store.root)[:3] == (3, 9, 0)
    done = sweep.run(NETWORKS, MEASUREMENTS, store=empty, device="cpu", show=False)
    assert (done.made, done.measured) == (0, 0)
    with pytest.raises(ValueError, match="model.safetensors"):
        load_run(empty, ONE)


def test_an_unfinished_folder_in_the_way_is_named_and_left(store, empty):
    (empty.folder(ONE) / "evaluations").mkdir(parents=True)
    (empty.folder(ONE) / "evaluations" / "mine").touch()
    taken = merge(empty, store.root)
    assert taken.runs == 2 and [problem for problem in taken.problems if str(empty.folder(ONE)) in problem]
    assert (empty.folder(ONE) / "evaluations" / "mine").exists()


def merge_and_die(target, other, steps):
    """Merge, in a process that kills itself before its step number `steps`: making, renaming, waiting for the disk."""
    count = iter(range(steps))

    def deadly(step):
        def run(*arguments, **options):
            if next(count, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*arguments, **options)

        return run

    for name in ("fsync", "mkdir", "rename", "replace"):
        setattr(os, name, deadly(getattr(os, name)))
    merge(Store(target), other)


def test_a_killed_merge_leaves_a_whole_store_and_the_next_one_completes_it(trained, tmp_path, report):
    source, killed, broken, partly = contents(trained), 0, 0, set()
    for steps in range(2, 86, 4):
        target = Store(tmp_path / f"target{steps}")
        process = processes.Process(target=merge_and_die, args=(target.root, trained, steps))
        process.start()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        assert verify(target).problems == () and contents(target.root).items() <= source.items()
        partly.add(len(list(target.root.glob("*/manifest.json"))))
        assert len(target.table()) == sum(
            content.count(b"\n") - 1 for name, content in contents(target.root).items() if "evaluations" in name
        )
        merge(target, trained)
        assert contents(target.root) == source
        found = leftovers(target, older_than=-1)
        broken += len(found)
        remove(target, found)
        assert merge(target, trained) == Taken(already_here=3) and not list(target.root.rglob(".writing-*"))
    report("merges killed at any step", f"{killed} killed; every store whole, and completed by the next merge")
    assert killed >= 18 and broken >= 18 and partly == {0, 1, 2, 3}


def test_what_is_spoilt_while_it_is_copied_is_not_taken(store, empty, monkeypatch):
    original, spoilt = exchange.write_whole, []

    def write_whole(path, content):
        original(path, content[:-1] if path.name in spoilt else content)

    monkeypatch.setattr(exchange, "write_whole", write_whole)
    for name in (*RUN_FILES, "manifest.json", store.records_path(ONE, Clean()).name):
        spoilt[:] = [name]
        taken = merge(empty, store.root)
        assert taken[:3] == (0, 0, 0) and len(taken.problems) == 3 and contents(empty.root) == {}
    spoilt.clear()
    assert merge(empty, store.root).problems == () and contents(empty.root) == contents(store.root)


def test_two_merges_at_once_leave_a_whole_store(trained, tmp_path):
    both = [processes.Process(target=merge_and_die, args=(tmp_path / "target", trained, 10**6)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    target = Store(tmp_path / "target")
    assert [process.exitcode for process in both] == [0, 0] and contents(target.root) == contents(trained)
    assert verify(target).problems == () and leftovers(target, older_than=-1) == []


def test_a_run_that_appears_during_the_merge_is_one_that_is_here(store, empty, monkeypatch):
    original, rival = exchange._verified_copy, []

    def _verified_copy(folder, names, root):
        if not rival:
            rival.append(
                shutil.copytree(folder, root / folder.name, ignore=shutil.ignore_patterns("model.safetensors"))
            )
        return original(folder, names, root)

    monkeypatch.setattr(exchange, "_verified_copy", _verified_copy)
    taken = merge(empty, store.root)
    assert (taken.runs, taken.already_here, taken.problems) == (2, 1, ()) and contents(empty.root) == contents(
        store.root
    )


def hold(lease, ready):
    """Be at work on an attempt until killed."""
    with open(lease) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        ready.set()
        signal.pause()


def test_an_attempt_is_left_alone_as_long_as_its_process_lives(store):
    attempt = store.root / ".attempts" / store.folder(ONE).name
    attempt.mkdir(parents=True)
    for name in ("lease", "state", "log.txt", ".writing-state"):
        (attempt / name).write_bytes(b"12345")
        os.utime(attempt / name, (0, 0))
    before, ready = leftovers(store), processes.Event()
    assert [entry.path for entry in before] == [attempt]
    process = processes.Process(target=hold, args=(attempt / "lease", ready))
    process.start()
    assert ready.wait(60)
    try:
        assert leftovers(store, older_than=0) == [] and remove(store, before) == 0
        assert leftovers(store, outdated=True) == [] and sorted(path.name for path in attempt.iterdir()) == [
            ".writing-state",
            "lease",
            "log.txt",
            "state",
        ]
    finally:
        process.kill()
        process.join()
    assert leftovers(store) == before and remove(store, before) == 20 and not attempt.exists()


def test_attempts_at_runs_that_are_not_finished_stay(store):
    attempt = store.root / ".attempts" / "0123456789abcdef"
    attempt.mkdir(parents=True)
    assert [(entry.path, entry.bytes) for entry in leftovers(store)] == [(attempt, 0)]
    for name in ("lease", "state", "failure.json", "log.txt"):
        (attempt / name).write_bytes(b"12345")
    assert leftovers(store, older_than=-1) == []
    finished = store.root / ".attempts" / store.folder(ONE).name
    finished.mkdir()
    (finished / "failure.json").write_bytes(b"12345")  # younger than the run: a measurement failed
    assert leftovers(store) == []
    os.utime(finished / "failure.json", (0, 0))
    assert remove(store, leftovers(store)) == 5 and attempt.exists() and not finished.exists()


def test_a_training_state_stays_while_its_run_is_damaged_or_lacks_its_checkpoint(store):
    attempt, checkpoint = store.root / ".attempts" / store.folder(ONE).name, store.folder(ONE) / "model.safetensors"
    attempt.mkdir(parents=True)
    (attempt / "state").write_bytes(b"12345")
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[:-1])
    assert leftovers(store) == []
    checkpoint.unlink()
    assert leftovers(store) == []
    checkpoint.write_bytes(whole)
    assert [entry.path for entry in leftovers(store)] == [attempt]


def test_links_are_never_followed(store, tmp_path):
    outside = tmp_path / "outside"
    shutil.copytree(store.root, outside)
    (outside / ".writing-mine").write_bytes(b"1")
    (outside / store.folder(ONE).name / "evaluations" / ".writing-mine").write_bytes(b"1")
    os.utime(outside / ".writing-mine", (0, 0))
    before = contents(outside), sorted(outside.rglob("*"))
    (store.root / ".writing-folder").symlink_to(outside)
    (store.root / ".writing-file").symlink_to(outside / ".writing-mine")
    (store.root / ".attempts").mkdir()
    (store.root / ".attempts" / store.folder(NETWORKS[0]).name).symlink_to(outside)
    shutil.rmtree(store.folder(ONE))
    store.folder(ONE).symlink_to(outside / store.folder(ONE).name)
    found = leftovers(store, outdated=True, older_than=-1)
    assert {entry.path.name for entry in found} == {".writing-folder", ".writing-file"}
    remove(store, found)
    assert (contents(outside), sorted(outside.rglob("*"))) == before and not list(store.root.glob(".writing-*"))
    (store.root / "inside").symlink_to(outside)
    with pytest.raises(ValueError, match="is not inside the store"):
        remove(store, [Leftover(store.root / "inside" / ".writing-mine", "", 1)])
    assert (outside / ".writing-mine").exists()


def test_exports_are_the_same_bytes_from_any_copy(store, empty, tmp_path):
    merge(empty, store.root)
    store.table()
    whole = [path.read_bytes() for path in export(store, None, tmp_path / "a" / "b")]
    assert whole == [
        path.read_bytes()
        for path in export(store, [*NETWORKS[::-1], dataclasses.replace(ONE, seed=7)], tmp_path / "a" / "b")
    ]
    assert whole == [path.read_bytes() for path in export(empty, NETWORKS, tmp_path / "c")]
    assert all(content[3:9] == bytes(5) + b"\x02" for content in whole[1:])  # no flags, so no name; no time


def test_exports_read_back_as_the_table(store, tmp_path):
    paths = export(store, NETWORKS, tmp_path / "published")
    assert [path.name for path in paths] == ["runs.tar.xz", "runs.csv.gz", "records.csv.gz", "evaluations.csv.gz"]
    runs, records, evaluations = (pd.read_csv(path, dtype=str, keep_default_na=False) for path in paths[1:])
    table = store.table()
    assert len(runs) == 3 and "stamp" not in runs and set(table.columns) == {*records.columns, *runs.columns, "stamp"}
    joined = records.merge(runs, on="experiment")
    for column in table.columns.drop("stamp"):
        kind = float if pd.api.types.is_numeric_dtype(table[column]) else str
        found = [None if text == "" and column not in ("name", "source") else kind(text) for text in joined[column]]
        assert found == [None if pd.isna(value) else value for value in table[column]], column
    rows = pd.DataFrame(list(published_rows(tmp_path / "published", "records")))[list(RECORD_COLUMNS)]
    pd.testing.assert_frame_equal(rows, table[list(RECORD_COLUMNS)], check_exact=True)
    fresh = Store(tmp_path / "fresh")
    assert merge(fresh, tmp_path / "published").problems == ()
    pd.testing.assert_frame_equal(fresh.table().drop(columns="stamp"), table.drop(columns="stamp"), check_exact=True)
    for row, measurement in zip(
        evaluations.sort_values("measure").itertuples(),
        sorted(MEASUREMENTS, key=lambda measurement: measurement.measure),
        strict=True,
    ):
        described = evaluation_identity(measurement)
        assert row.evaluation == evaluation_hash(measurement) == name_of("evaluation", described)
        assert (row.measure, row.code) == (measurement.measure, described["code"])
        assert json.loads(row.settings) == json.loads(canonical(described["evaluation"]))


def test_an_altered_export_is_refused_or_reads_the_same(store, tmp_path):
    paths, rows = export(store, NETWORKS, tmp_path / "published"), {}
    for table, path in (("runs", paths[1]), ("records", paths[2])):
        rows[table] = list(published_rows(tmp_path / "published", table))
        whole, chance = path.read_bytes(), random.Random(0)
        bits = [chance.randrange(8 * len(whole)) for _ in range(150)]
        variants = [whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :] for bit in bits]
        for variant in [*variants, *(whole[:length] for length in range(0, len(whole), 40))]:
            path.write_bytes(variant)
            try:
                assert list(published_rows(tmp_path / "published", table)) == rows[table]
            except ValueError as error:
                assert str(path) in str(error)
        path.write_bytes(whole)
    (tmp_path / "published" / "runs.csv.gz").unlink()
    with pytest.raises(FileNotFoundError, match="runs.csv.gz"):
        list(published_rows(tmp_path / "published", "runs"))


def test_diverged_and_pruned_networks_are_whole(empty, tmp_path):
    wild = dataclasses.replace(ONE, recipe=Recipe(epochs=2, learning_rate=1e10))
    pruned = dataclasses.replace(ONE, schedule="magnitude")
    sweep.run([wild, pruned], [Clean()], store=empty, device="cpu", show=False)
    assert verify(empty) == (3, 0, 1, 2, ()) and merge(Store(tmp_path / "copy"), empty.root)[:4] == (3, 1, 3, 0)
    export(empty, None, tmp_path / "published")
    fresh = Store(tmp_path / "fresh")
    assert merge(fresh, tmp_path / "published")[:2] == (3, 1)
    for found, expected in ((fresh.table(), empty.table()), (fresh.runs(), empty.runs())):
        pd.testing.assert_frame_equal(found.drop(columns="stamp"), expected.drop(columns="stamp"), check_exact=True)
