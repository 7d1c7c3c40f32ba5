"""Sweeps that are killed, crash, hang, run out of memory or disk, and meet each other: nothing is lost, doubled or
silently wrong.

Counts are small by default; `make bench-faults` sets SPARSE_NB_FAULTS=full and prints what is said here through
`report`.
"""

import dataclasses
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress
from pathlib import Path

import cloudpickle
import psutil
import pytest

from sparse_nb.networks.training import Recipe
from sparse_nb.runs.attempts import load_failures
from sparse_nb.runs.files import sha256
from sparse_nb.runs.index import _RECORD_KEY
from sparse_nb.runs.store import Store
from sparse_nb.study.experiments import (
    Attack,
    ClassRecall,
    Clean,
    Corruption,
    Experiment,
    WeightNoise,
    evaluation_hash,
    experiment_hash,
    experiment_identity,
)
from sparse_nb.sweep import jobs, sweep
from sparse_nb.sweep.jobs import missing_jobs

FULL = os.environ.get("SPARSE_NB_FAULTS") == "full"
NOISE = WeightNoise(sigmas=(0.0, 0.3), draws=2)
NETS = [
    Experiment("digits", "mlp", width, 1, 25_408, seed, Recipe(epochs=8)) for width in (32, 128, 512) for seed in (0, 1)
]
NETS += [dataclasses.replace(NETS[2], schedule="magnitude", budget=5000)]
MEASURES = [Clean(), NOISE]
MADE = len(NETS) + 1  # with the dense parent of the pruned one

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["pytest", "sparse_nb.sweep.sweep"])


def sweep_all(root, **how):
    sweep.run(NETS, MEASURES, store=Store(root), keep_every=0, show=False, **how)


def started(root, **how):
    process = processes.Process(target=sweep_all, args=(root,), kwargs=how)
    process.start()
    return process


def kept(root):
    """{path: bytes} of every checkpoint and record file: all that must be bit-identical. (A history holds seconds.)"""
    root = Path(root)
    return {
        str(path.relative_to(root)): path.read_bytes()
        for kind in ("[0-9a-f]*/model.safetensors", "[0-9a-f]*/evaluations/*.jsonl")
        for path in root.glob(kind)
    }


def assert_as_undisturbed(root, undisturbed):
    assert kept(root) == kept(undisturbed)
    table = Store(root).table()
    assert len(table) == len(Store(undisturbed).table()) and not table.duplicated(list(_RECORD_KEY)).any()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    root = tmp_path_factory.mktemp("undisturbed")
    start = time.monotonic()
    sweep_all(root)
    assert len(kept(root)) == MADE + 2 * len(NETS)
    return root, time.monotonic() - start


# kill -9 --------------------------------------------------------------------------------------------------------------


def kill_drivers(count, undisturbed, folder):
    """Kill the process of a sweep at random moments until there were `count` kills; finished sweeps are checked, and
    the next begins."""
    root, seconds = undisturbed
    chance, kills, sweeps = random.Random(0), 0, 0
    while kills < count or sweeps == 0:
        process = started(folder / f"sweep{sweeps}")
        process.join(chance.uniform(0, seconds) if kills < count else None)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        if process.exitcode == 0:
            assert_as_undisturbed(folder / f"sweep{sweeps}", root)
            sweeps += 1
    return kills, sweeps


def test_kill_9_of_the_driver(undisturbed, tmp_path, report):
    kills, sweeps = kill_drivers(120 if FULL else 5, undisturbed, tmp_path)
    report(
        "kill -9 of the driver",
        f"{kills} kills, {sweeps} sweeps finished, 0 records lost or doubled, all bit-identical",
    )


def worker_processes():
    """The processes that work for this one: those that the fork server made, or that were spawned for Dask."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "spawn_main" in " ".join(child.cmdline()) or (
                child.parent().pid != os.getpid() and "forkserver" in " ".join(child.cmdline())
            ):
                found.append(child)
    return found


def sweep_while_workers_die(root, kills, seconds, seed):
    """A sweep with two workers in this process, and a thread that kills a worker `kills` times."""
    chance, killed = random.Random(seed), []

    def killer():
        for _ in range(kills):
            time.sleep(chance.uniform(0, seconds / 2))
            victims = worker_processes()
            if victims:
                with suppress(psutil.NoSuchProcess):
                    victim = chance.choice(victims)
                    victim.kill()
                    killed.append(victim.pid)

    thread = threading.Thread(target=killer)
    thread.start()
    summary = sweep.run(NETS, MEASURES, store=Store(root), keep_every=0, show=False, workers=2)
    thread.join()
    return summary, len(killed)


def test_kill_9_of_workers(undisturbed, tmp_path, report):
    root, seconds = undisturbed
    kills, sweeps = 0, 0
    while kills < (60 if FULL else 2):  # at most two in a sweep, so that no network can be hit three times
        summary, killed = sweep_while_workers_die(tmp_path / f"sweep{sweeps}", 2, seconds, sweeps)
        assert (
            summary.failed == () and summary.made <= MADE
        )  # who is killed between keeping a network and saying so does not say so
        assert_as_undisturbed(tmp_path / f"sweep{sweeps}", root)
        kills, sweeps = kills + killed, sweeps + 1
    report(
        "kill -9 of workers", f"{kills} kills, {sweeps} sweeps finished, 0 records lost or doubled, all bit-identical"
    )


def test_the_workers_of_a_killed_driver_end_and_the_next_sweep_goes_on(undisturbed, tmp_path):
    process = started(tmp_path, workers=2)
    while not list(tmp_path.glob(".attempts/*/progress")):
        assert process.is_alive()
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 3  # the fork server and two workers
    os.kill(process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []
    sweep_all(tmp_path)
    assert_as_undisturbed(tmp_path, undisturbed[0])


KERNEL = """
import os, threading, time
from sparse_nb.sweep import sweep
from test_survival import MEASURES, NETS
from sparse_nb.runs.store import Store
threading.Timer(float(seconds), os.kill, (os.getpid(), 9)).start()
sweep.run(NETS, MEASURES, store=Store(root), keep_every=0, show=False)
time.sleep(60)  # should the sweep end before its time
"""


def test_kill_9_of_the_notebooks_kernel(undisturbed, tmp_path, report):
    import nbformat
    import papermill

    root, seconds = undisturbed
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("seconds = 1\nroot = ''\ntests = ''")])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    notebook.cells.append(nbformat.v4.new_code_cell("import sys; sys.path.insert(0, tests)"))
    notebook.cells.append(nbformat.v4.new_code_cell(KERNEL))
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(notebook, tmp_path / "sweep.ipynb")
    kills, chance = 20 if FULL else 1, random.Random(0)
    for kill in range(kills):
        runs = tmp_path / f"kernel{kill}"
        with pytest.raises(Exception, match="(?i)kernel"):
            papermill.execute_notebook(
                tmp_path / "sweep.ipynb",
                tmp_path / "out.ipynb",
                progress_bar=False,
                extra_arguments=["--log-level=ERROR"],
                parameters={
                    "seconds": chance.uniform(0.05, 0.7 * seconds),
                    "root": str(runs),
                    "tests": str(Path(__file__).parent),
                },
            )
        sweep_all(runs)
        assert_as_undisturbed(runs, root)
    report(
        "kill -9 of the notebook's kernel",
        f"{kills} kills, each sweep finished, 0 records lost or doubled, all bit-identical",
    )


# Crashes, loops, hunger -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Poison(Clean):
    """A measurement that kills, hangs or starves whoever makes it."""

    how: str = ""  # a default would be left out of the name, which would be that of Clean

    def run(self, model, images):
        if self.how == "crash":
            os.abort()
        if self.how == "loop":
            while True:
                pass
        hoard = []
        while True:
            hoard.append(bytearray(2**30))


def test_poison_jobs_fail_after_three_tries_and_the_rest_goes_on(tmp_path, monkeypatch, report):
    monkeypatch.setattr(sweep, "memory_share", lambda workers: 3 * 2**30)
    poisoned = {NETS[1]: [Poison(how="crash")], NETS[2]: [Poison(how="loop")], NETS[3]: [Poison(how="memory")]}
    wanted = {experiment: [*MEASURES, *poisoned.get(experiment, [])] for experiment in NETS}
    # What is compiled at first use comes from the cache afterwards, so that the limit below is not spent on compiling.
    sweep.run(NETS, MEASURES, store=Store(tmp_path / "compiled"), workers=1, show=False)
    store = Store(tmp_path / "runs")
    summary = sweep.run(wanted, wanted, store=store, workers=2, limit=25 / 60, show=False)
    reasons = {failure["run"]: (failure["tries"], failure["reason"]) for failure in load_failures(store)}
    assert (
        len(summary.failed) == len(reasons) == 3 and summary.made == MADE - 3
    )  # the poisoned ones are made, and fail when they are measured
    for experiment, words in zip(
        poisoned, ("was killed by SIGABRT", "took longer than the limit", "memory ran out"), strict=True
    ):
        tries, reason = reasons[experiment_hash(experiment)]
        assert tries == 3 and words in reason
    logs = {failure["run"]: "\n".join(failure["log"]) for failure in load_failures(store)}
    assert (
        "Fatal Python error: Aborted" in logs[experiment_hash(NETS[1])]
        and "MemoryError" in logs[experiment_hash(NETS[3])]
    )
    for experiment in NETS:
        assert all(store.has_records(experiment, measure) for measure in MEASURES)
    mended = sweep.run(NETS, MEASURES, store=store, show=False)
    assert (mended.made, mended.measured, mended.failed) == (0, 0, ())
    report(
        "poison jobs (crash, endless loop, no memory)",
        f"3 of 3 failed after 3 tries with their reasons, {len(NETS) - 3} of {len(NETS) - 3} others done",
    )


# Dask -----------------------------------------------------------------------------------------------------------------

COUNT = 60 if FULL else 16


def counted(job, *arguments):
    """`run_elsewhere`, after a line in the file that the environment names: an execution."""
    with open(Path(arguments[0].runs).parent / "executions", "a") as file:
        file.write(experiment_hash(job.experiment) + "\n")
    time.sleep(0.3)  # so that a kill finds somebody at work
    return jobs.run_elsewhere(job, *arguments)


def test_dask_finishes_all_jobs_though_workers_are_killed(tmp_path, monkeypatch, report):
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(sweep, "run_elsewhere", counted)
    nets = [Experiment("digits", "mlp", 128, 1, 25_408, seed, Recipe(epochs=1)) for seed in range(COUNT)]
    store, kills, over = Store(tmp_path / "runs"), [], threading.Event()

    def killer():
        chance, executions, before = random.Random(0), tmp_path / "executions", 0
        while len(kills) < (5 if FULL else 2) and not over.is_set():
            time.sleep(chance.uniform(0.1, 0.5))
            begun = len(executions.read_text().split()) if executions.exists() else 0
            victims = worker_processes()
            if victims and begun >= before + 4:  # so that no job is hit three times: that would be a poisonous one
                with suppress(psutil.NoSuchProcess):
                    chance.choice(victims).kill()
                    kills.append(time.monotonic())
                    before = begun

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        summary = sweep.run(nets, [Clean()], store=store, engine="dask", workers=2, show=False)
    finally:
        over.set()
        thread.join()
    executions = (tmp_path / "executions").read_text().split()
    assert (
        summary.failed == ()
        and all(store.has_records(net, Clean()) for net in nets)
        and len(store.table()) == 2 * COUNT
    )
    assert len(kills) >= 1 and len(executions) <= COUNT + len(kills)
    report(
        "Dask",
        f"{COUNT} of {COUNT} jobs done, {len(kills)} worker kills, "
        f"{len(executions)} executions (at most {COUNT + len(kills)})",
    )
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_a_poison_job_on_dask_fails_and_the_rest_goes_on(tmp_path):
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    store, wanted = (
        Store(tmp_path),
        {net: [Clean(), *([Poison(how="crash")] if net is NETS[0] else [])] for net in NETS[:3]},
    )
    summary = sweep.run(wanted, wanted, store=store, engine="dask", workers=2, show=False)
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    (failure,) = load_failures(store)
    assert (
        failure["run"] == experiment_hash(NETS[0]) and "each of the 3 workers that tried it died" in failure["reason"]
    )
    assert len(summary.failed) == 1 and all(store.has_records(net, Clean()) for net in NETS[:3])


def test_a_cluster_that_goes_away_ends_the_sweep_with_one_sentence(tmp_path):
    nets = [Experiment("digits", "mlp", 128, 1, 25_408, seed, Recipe(epochs=300)) for seed in range(4)]
    code = textwrap.dedent("""
        import sys, time
        from distributed import LocalCluster
        if __name__ == "__main__":
            own = dict.fromkeys(("dashboard_address", "worker_dashboard_address"), "127.0.0.1:0")
            cluster = LocalCluster(n_workers=1, threads_per_worker=1, host="127.0.0.1", **own)
            print(cluster.scheduler_address, flush=True)
            time.sleep(120)
    """)
    (tmp_path / "cluster.py").write_text(code)
    cluster = subprocess.Popen(
        [sys.executable, tmp_path / "cluster.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        address = cluster.stdout.readline().strip()
        threading.Timer(4, os.killpg, (cluster.pid, signal.SIGKILL)).start()
        with pytest.raises(ConnectionError, match="the Dask cluster .*is gone"):
            sweep.run(nets, [Clean()], store=Store(tmp_path / "runs"), engine="dask", scheduler=address, show=False)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(cluster.pid, signal.SIGKILL)
        cluster.wait()


# Two at once, and full disks ------------------------------------------------------------------------------------------


def sweep_and_say(root, answer, together):
    together.wait(60)
    answer.write_text(json.dumps(dataclasses.asdict(sweep.run(NETS, MEASURES, store=Store(root), show=False))))


def test_two_sweeps_on_one_store_train_no_network_twice(undisturbed, tmp_path, report):
    answers, together = [tmp_path / "one", tmp_path / "other"], processes.Barrier(2)
    rivals = [processes.Process(target=sweep_and_say, args=(tmp_path / "runs", path, together)) for path in answers]
    for rival in rivals:
        rival.start()
    for rival in rivals:
        rival.join(120)
        assert rival.exitcode == 0
    summaries = [json.loads(path.read_text()) for path in answers]
    assert sum(summary["made"] for summary in summaries) == MADE
    assert sum(summary["measured"] for summary in summaries) == len(NETS) * len(MEASURES)
    assert_as_undisturbed(tmp_path / "runs", undisturbed[0])
    report("two sweeps on one store at once", f"both finished, {MADE} networks made once each")


@pytest.fixture
def small_disk(tmp_path):
    """A function that gives a fresh, empty disk of some bytes."""
    mounted = []

    def mount(size):
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True
        ).returncode:
            pytest.skip("no right to mount a tmpfs")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", place])


def test_a_full_disk_is_said_and_the_sweep_resumes_when_there_is_room(undisturbed, small_disk, report):
    root, needed = undisturbed[0], sum(path.stat().st_blocks * 512 for path in undisturbed[0].rglob("*"))
    ends, tries = 0, 40 if FULL else 5
    for i in range(tries):
        disk = small_disk(int(needed * 1.5) + 2**20)
        ballast = disk / "ballast"
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        room = int(needed * i / tries)
        ballast.write_bytes(bytes(max(0, free - room)))
        try:
            sweep.run(NETS, MEASURES, store=Store(disk / "runs"), show=False, keep_every=0)
        except OSError as error:
            ends += 1
            assert "No space left" in str(error)
        ballast.unlink()
        table = Store(disk / "runs").table()  # what was finished is readable
        assert set(table.experiment) <= {experiment_hash(net) for net in NETS}
        sweep.run(NETS, MEASURES, store=Store(disk / "runs"), show=False)
        assert_as_undisturbed(disk / "runs", root)
    assert ends > tries / 2
    report(
        "disk full at different writes",
        f"{ends} of {tries} sweeps ended with 'No space left', earlier results readable, "
        "all finished when there was room",
    )


# Time that is over ----------------------------------------------------------------------------------------------------


def test_minutes_begin_nothing_that_cannot_end_and_exit_cleanly(tmp_path):
    long = [Experiment("digits", "mlp", 512, 1, 25_408, seed, Recipe(epochs=5000)) for seed in (0, 1)]
    store = Store(tmp_path)
    start = time.monotonic()
    summary = sweep.run(long, [Clean()], store=store, show=False, minutes=2 / 60)
    assert time.monotonic() - start < 20 and summary.late == 2 and summary.made == 0
    jobs_left = missing_jobs(long, [Clean()], store)
    assert len(jobs_left) == 2 and not list(Path(tmp_path).glob("*/manifest.json"))
    again = sweep.run([*long, NETS[0]], [Clean()], store=store, show=False, minutes=0.5)
    assert again.made == 1 and again.late == 2  # what fits is done


# Many runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.timed
def test_a_sweep_over_1000_finished_runs_begins_and_ends_within_2_seconds(undisturbed, tmp_path, report):
    nets = [dataclasses.replace(NETS[0], seed=seed) for seed in range(1000)]
    about = json.loads((Store(undisturbed[0]).folder(NETS[0]) / "experiment.json").read_bytes())
    for net in nets:
        folder = tmp_path / experiment_hash(net)
        (folder / "evaluations").mkdir(parents=True)
        content = json.dumps({**about, **experiment_identity(net)}).encode()
        (folder / "experiment.json").write_bytes(content)
        (folder / "manifest.json").write_text(json.dumps({"experiment.json": sha256(content)}))
        for measure in MEASURES:
            (folder / "evaluations" / f"{evaluation_hash(measure)}.jsonl").touch()
    start = time.monotonic()
    summary = sweep.run(nets, MEASURES, store=Store(tmp_path), show=False)
    seconds = time.monotonic() - start
    assert (summary.wanted, summary.made, summary.measured) == (1000, 0, 0) and seconds < 2
    report("a sweep over 1,000 finished runs", f"{seconds:.2f} s")


# Devices --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_family_is_trained_kept_pruned_and_measured_on_each_device(device, tmp_path):
    """The MLP has units that nobody hears, and its sparse product; the convolutional networks have batch norm and a
    last, smaller batch."""
    mlp = Experiment("digits", "mlp", 2048, 2, 10_000, 0, Recipe(epochs=2))
    vgg, resnet = (
        Experiment("digits", family, 8, depth, 5_000, 0, Recipe(epochs=2), rule="proportional")
        for family, depth in [("vgg", 11), ("resnet", 18)]
    )
    pruned = dataclasses.replace(vgg, schedule="magnitude")
    measures = [
        Clean(),
        NOISE,
        ClassRecall(),
        Corruption(draws=1, test_images=50),
        Attack(steps=2, epsilons=(0.0, 0.1), test_images=20),
    ]
    store = Store(tmp_path)
    done = sweep.run([mlp, vgg, resnet, pruned], measures, store=store, device=device, show=False)
    assert (done.made, done.measured, done.failed) == (5, 20, ()), done
    assert set(store.runs().device) == {device} and (store.runs().effective_density > 0).all()
    clean = store.table(measure="clean", quantity="accuracy").value
    assert len(clean) == 4 and (clean >= 0.05).all()


@pytest.mark.parametrize(
    ("asked", "threads"), [({"OMP_NUM_THREADS": "1"}, 1), ({"OMP_NUM_THREADS": "7"}, None), ({}, None)]
)
def test_workers_take_the_cores_that_they_may_use(asked, threads, tmp_path):
    net = Experiment("digits", "mlp", 16, 1, 1000, 0, Recipe(epochs=1))
    cores = sorted(os.sched_getaffinity(0))[:1]  # as `taskset -c 0`
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_survival as t; t.sweep_on_one_core(sys.argv[2])"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | asked
    folder = Path(__file__).parent
    done = subprocess.run(
        ["taskset", "-c", str(cores[0]), sys.executable, "-c", code, str(folder), str(tmp_path)],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    about = json.loads((Store(tmp_path).folder(net) / "experiment.json").read_bytes())
    assert about["environment"]["threads"] == (threads or 1)


def sweep_on_one_core(root):
    sweep.run(
        [Experiment("digits", "mlp", 16, 1, 1000, 0, Recipe(epochs=1))], [], store=Store(root), workers=1, show=False
    )
