"""Many networks: what a sweep does for each does not grow with their number. Counted, not timed."""

import os
from collections import Counter
from concurrent.futures import Future

import large_store
import pytest

from sparse_nb.networks.training import Recipe
from sparse_nb.runs import files, index, queries, record_files
from sparse_nb.runs.store import Store
from sparse_nb.study.experiments import Clean, Experiment
from sparse_nb.study.plans import measurements, plan
from sparse_nb.study.studies import load
from sparse_nb.sweep import sweep
from sparse_nb.sweep.engines import Engine
from sparse_nb.sweep.jobs import Outcome, missing_jobs


@pytest.fixture
def counted(monkeypatch):
    """count(owner, name): counts the calls of what a module or a class has under this name; returns all counts."""
    calls = Counter()

    def count(owner, name):
        function = getattr(owner, name)

        def counting(*args, **options):
            calls[name] += 1
            return function(*args, **options)

        monkeypatch.setattr(owner, name, counting)
        return calls

    return count


@pytest.fixture
def large(tmp_path):
    """(what a study of 200 networks wants, a store in which all of it is there)."""
    study = large_store.write_study(tmp_path, 200)
    wanted = large_store.write_store(tmp_path / "runs", study)
    assert len(wanted) == 200 and all(len(evaluations) == 2 for evaluations in wanted.values())
    for path in (tmp_path / "runs").rglob("*"):
        if path.is_dir():
            os.utime(path, (1e9, 1e9))  # they were finished long ago
    return wanted, Store(tmp_path / "runs")


def drive(networks, schedule, store):
    """Empty a board of so many networks by calls that are over at once."""
    seeds = networks if schedule == "static" else networks // 2
    nets = [
        Experiment("digits", "mlp", 16, 1, 1000, seed, Recipe(epochs=1), schedule=schedule) for seed in range(seeds)
    ]
    board = sweep._Board(missing_jobs(nets, [Clean()], store))
    assert len(board.waiting) == networks  # with "magnitude", a dense network for each that is pruned

    def submit(job, slot):
        future = Future()
        if job.experiment.seed % 100 == 7:
            future.set_exception(ValueError("cannot be"))
        else:
            future.set_result(Outcome("done", True, 1, trained=(1, 1.0)))
        return future

    with sweep._Progress(board, show=False) as progress:
        sweep._carry_out(board, Engine(submit, lambda: 2, True), submit, store, progress)
    assert not board.waiting and len(board.done) + len(board.failed) == networks and board.failed


@pytest.mark.parametrize("schedule", ["static", "magnitude"])
def test_a_network_costs_the_driver_the_same_among_few_and_among_many(schedule, counted, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "save_failure", lambda *about: None)
    calls, hashed = counted(Experiment, "__hash__"), [0]
    for networks in (200, 1600):
        drive(networks, schedule, Store(tmp_path / str(networks)))
        hashed.append(calls["__hash__"])
    few, many = hashed[1], hashed[2] - hashed[1]
    assert many < 1.5 * 8 * few, (few, many)  # if each went through all of them, this were 64 times


def test_a_complete_study_is_resumed_without_opening_a_file(large, counted):
    wanted, store = large
    readers = [(files, "read_bytes"), (record_files, "read_bytes"), (index, "read_about")]
    for owner, name in (*readers, (sweep, "run_status"), (os, "listdir")):
        calls = counted(owner, name)
    summary = sweep.run(wanted, wanted, store=store, device="cpu", show=False)
    assert (summary.wanted, summary.made, summary.measured, summary.diverged) == (200, 0, 0, 0)
    assert calls["read_bytes"] == calls["read_about"] == calls["run_status"] == 0 and calls["listdir"] == 1


def test_a_question_to_a_store_that_is_known_opens_no_file_of_it(large, counted):
    _, store = large
    checks = counted(record_files, "check_records")
    assert len(store.runs()) == 200 and checks["check_records"] <= 2  # two kinds of files, 400 of them
    calls = counted(files, "read_bytes")
    counted(record_files, "read_bytes")
    counted(os, "scandir"), counted(os, "stat")
    assert len(store.runs()) == 200 and len(store.table()) == 200 * (2 + 24)
    assert calls["read_bytes"] == calls["scandir"] == 0 and calls["stat"] < 2 * (2 * 200 + 50)


def test_with_a_limit_of_time_the_store_is_asked_once(tmp_path, counted):
    nets = [Experiment("digits", "mlp", 16, 1, 1000, seed, Recipe(epochs=1), train_images=50) for seed in range(3)]
    store = Store(tmp_path / "runs")
    calls = counted(queries.Records, "runs")
    known = counted(sweep, "_remember")
    assert sweep.run(nets, [], store=store, device="cpu", minutes=60, show=False).made == 3
    assert calls["runs"] == 1 and known["_remember"] == 3


def test_a_plan_looks_for_files_once_for_each_dataset_and_family(counted, tmp_path):
    """Whether official corruptions are there is asked of the disk; it takes a hundred questions."""
    from sparse_nb.study import plans

    calls = counted(plans.corruptions, "origins")
    study = load("smoke")
    few = plan("fig02", study, root=tmp_path)
    once = calls["origins"]
    assert 0 < once <= len(study.families)
    text = (tmp_path / "wide.toml", 'extends = "smoke"\nseeds = 20\n')
    text[0].write_text(text[1])
    many = plan("fig02", load(text[0]), root=tmp_path)
    assert len(many) == 10 * len(few) and calls["origins"] == 2 * once
    assert len(measurements(many)) == len(many)
