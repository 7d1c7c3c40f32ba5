"""What becomes of damaged files, rivals, folders in the way and full disks: refused by name, never believed, never
silently replaced."""

import dataclasses
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
import tyro
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from papermill.translators import PythonTranslator

from sparse_nb import data
from sparse_nb.cli import options
from sparse_nb.cli.commands import narrowed, notebook_parameters
from sparse_nb.cli.main import main
from sparse_nb.networks import allocation, models
from sparse_nb.networks.training import Recipe
from sparse_nb.robustness import weight_noise
from sparse_nb.robustness.evaluation import evaluate
from sparse_nb.runs.files import sha256
from sparse_nb.runs.index import _RECORD_KEY
from sparse_nb.runs.record_files import parse_records
from sparse_nb.runs.store import Store, load_history, load_run, run_status, save_run
from sparse_nb.study.experiments import (
    Clean,
    Experiment,
    WeightNoise,
    counted_total,
    evaluation_hash,
    evaluation_identity,
    experiment_hash,
    experiment_identity,
    train,
)
from sparse_nb.study.figures import FIGURES
from sparse_nb.study.plans import plan
from sparse_nb.study.studies import PRESETS, narrow
from sparse_nb.study.versions import canonical, digest, name_of
from sparse_nb.sweep import sweep
from sparse_nb.sweep.jobs import Job, run_job

ROOT = Path(__file__).parents[2]
SMALL = dict(families=("mlp",), epochs=2, widths=(32, 128))
FLAGS = ("--families", "mlp", "--epochs", "2", "--widths", "32", "128")
POINTS = plan("fig01", narrow("smoke", **SMALL))
EXPERIMENTS, MEASUREMENT = [point.experiment for point in POINTS], POINTS[0].evaluation
ONE, OTHER = EXPERIMENTS[1], EXPERIMENTS[3]  # of width 128, sparse, seeds 0 and 1
RUN = re.compile(r"[0-9a-f]{16}")
EXAMPLES = 10_000 if os.environ.get("SPARSE_NB_FAULTS") == "full" else 60

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["pytest", "hypothesis", "nbclient", "sparse_nb.cli.commands", "sparse_nb.cli.main"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The root of a store with four networks, measured; copy it, do not change it."""
    root = tmp_path_factory.mktemp("trained")
    sweep.run(EXPERIMENTS, [MEASUREMENT], store=Store(root), show=False)
    return root


@pytest.fixture
def store(trained, tmp_path):
    """A copy of that store, without its index, to be damaged."""
    shutil.copytree(trained, tmp_path / "runs", ignore=shutil.ignore_patterns("index*"))
    return Store(tmp_path / "runs")


def figures(tmp_path, capfd, *flags):
    """Exit status and words of `sparse-nb figures fig01 …` in this process, on the store in `tmp_path/runs`."""
    paths = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--notebooks", str(ROOT / "figures")]
    with pytest.raises(SystemExit) as end:
        main(["figures", "fig01", *FLAGS, *paths, *flags])
    return end.value.code, "".join(capfd.readouterr())


def assert_refused(outcome, *names):
    """Non-zero exit, one sentence that holds each of `names`, no traceback."""
    code, said = outcome
    assert code == 1 and [name for name in names if str(name) not in said] == []
    assert "sparse-nb: " in said and "Traceback" not in said


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def some_bits(path, count=24):
    """The first and the last bits of a file and some between, the same ones every time."""
    bits = 8 * path.stat().st_size
    return [0, 7, bits - 8, bits - 1, *random.Random(path.name).sample(range(bits), count)]


READERS = {
    "model.safetensors": [load_run],
    "history.jsonl": [load_history],
    "experiment.json": [
        run_status,
        load_history,
        lambda store, experiment: store.table(),
        lambda store, experiment: store.runs(),
    ],
}


@pytest.mark.parametrize("name", READERS)
def test_a_flipped_bit_is_refused_by_whoever_reads_the_file(name, store):
    path = store.folder(ONE) / name
    whole = path.read_bytes()
    for bit in some_bits(path):
        flip(path, bit)
        for reader in READERS[name]:
            with pytest.raises(ValueError, match=re.escape(str(path))):
                reader(store, ONE)
        path.write_bytes(whole)
    for reader in READERS[name]:
        reader(store, ONE)  # as it was, it is accepted again


def test_a_flipped_bit_of_a_manifest_is_refused_by_one_reader_at_least(store):
    path = store.folder(ONE) / "manifest.json"
    whole = path.read_bytes()
    for bit in some_bits(path, 100):
        flip(path, bit)
        refused = []
        for reader in (load_run, load_history, run_status):
            try:
                reader(store, ONE)
            except ValueError as error:
                refused.append(str(error))
        assert refused and all(path.parent.name in words and "manifest" in words for words in refused), bit
        path.write_bytes(whole)


def test_a_flipped_bit_of_a_record_file_is_refused(store):
    path = store.records_path(ONE, MEASUREMENT)
    whole = path.read_bytes()
    for bit in [*some_bits(path), *(8 * i + 1 for i in range(whole.index(b"\n") + 1))]:  # every byte of its header too
        flip(path, bit)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            parse_records(path)
        path.write_bytes(whole)
    flip(path, 8 * len(whole) - 100)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        store.table()


def test_a_flipped_bit_behind_the_index_changes_no_number(store):
    before, path = store.table(), store.records_path(ONE, MEASUREMENT)
    for bit in some_bits(path, 3):
        flip(path, bit)
        try:
            pd.testing.assert_frame_equal(store.table(), before)
        except ValueError as error:
            assert str(path) in str(error)
        flip(path, bit)


@pytest.mark.parametrize("name", [*READERS, "manifest.json"])
def test_a_truncated_file_is_refused(name, store):
    path = store.folder(ONE) / name
    halve(path)
    for reader in READERS.get(name, [load_run, load_history, run_status]):
        with pytest.raises(ValueError, match=re.escape(str(path.parent))):
            reader(store, ONE)
    path.write_bytes(b"")
    for reader in READERS.get(name, [load_run, load_history, run_status]):
        with pytest.raises(ValueError, match=re.escape(str(path.parent))):
            reader(store, ONE)


def test_a_record_file_truncated_at_any_line_is_refused(store):
    path = store.records_path(ONE, MEASUREMENT)
    lines = path.read_bytes().splitlines(keepends=True)
    for kept in range(len(lines)):
        path.write_bytes(b"".join(lines[:kept]))
        with pytest.raises(ValueError, match=re.escape(str(path))):
            parse_records(path)


@pytest.mark.parametrize("damage", [lambda path: flip(path, 4321), halve], ids=["bit", "half"])
@pytest.mark.parametrize("name", ["model.safetensors", "experiment.json", "manifest.json"])
def test_the_figure_command_refuses_damage_by_name_and_leaves_it_there(name, damage, store, tmp_path, capfd):
    path = store.folder(ONE) / name
    if name == "manifest.json" and damage is not halve:
        about = json.loads(path.read_bytes())["experiment.json"]
        flip(path, 8 * path.read_bytes().index(about.encode()))
    else:
        damage(path)
    if name == "model.safetensors":
        store.records_path(ONE, MEASUREMENT).unlink()  # so that the network is needed
    before = contents(store.root)
    assert_refused(figures(tmp_path, capfd), "manifest", path if name != "manifest.json" else path.parent.name)
    assert {
        n: c for n, c in contents(store.root).items() if not n.startswith(("index", ".attempts"))
    } == before  # nothing trained, nothing mended
    assert list((tmp_path / "out").rglob("*.*")) == []


def test_the_figure_command_refuses_damaged_records_by_name(store, tmp_path, capfd):
    path = store.records_path(ONE, MEASUREMENT)
    (tmp_path / "out/smoke").mkdir(parents=True)
    (tmp_path / "out/smoke/fig01.png").write_bytes(b"as published before")
    flip(path, 8 * path.stat().st_size - 100)
    before = contents(tmp_path / "out"), path.read_bytes()
    outcome = figures(tmp_path, capfd)
    assert (contents(tmp_path / "out"), path.read_bytes()) == before
    assert outcome[0] == 1 and str(path) in outcome[1]
    assert_refused(outcome)


def test_records_of_one_network_are_not_taken_for_anothers(store):
    one, other = (store.records_path(experiment, MEASUREMENT) for experiment in (ONE, OTHER))
    assert one.read_bytes() != other.read_bytes()
    shutil.copy(other, one)
    with pytest.raises(ValueError, match=re.escape(str(one))):
        store.table()


def test_a_run_under_anothers_name_is_refused(store):
    shutil.rmtree(store.folder(ONE))
    shutil.copytree(store.folder(OTHER), store.folder(ONE))
    for reader in (load_run, run_status, lambda store, experiment: store.table()):
        with pytest.raises(ValueError, match=store.folder(ONE).name):
            reader(store, ONE)


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_in_place_of_a_checkpoint_is_never_executed(store, tmp_path, capfd, report):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "it would")))
    assert (tmp_path / "it would").is_dir()
    path, manifest = (store.folder(ONE) / name for name in ("model.safetensors", "manifest.json"))
    store.records_path(ONE, MEASUREMENT).unlink()
    torch.save(Bomb(tmp_path / "executed"), tmp_path / "zip")
    for content in (pickle.dumps(Bomb(tmp_path / "executed")), (tmp_path / "zip").read_bytes()):
        path.write_bytes(content)
        manifest.write_text(json.dumps({**json.loads(manifest.read_bytes()), path.name: sha256(content)}))
        with pytest.raises(Exception) as refusal:
            load_run(store, ONE)
        assert not (tmp_path / "executed").exists()
        assert isinstance(refusal.value, ValueError) and str(path) in str(refusal.value)
        assert_refused(figures(tmp_path, capfd), path)
        assert not (tmp_path / "executed").exists()
    report("pickles as a checkpoint", "4 offered, 0 executed")


def sweep_and_read(runs, answer, together, turns):
    """Sweep at the same time as a rival, then read the table as often as it does, each time from no index; says in a
    file what was seen."""
    store, seen = Store(runs), []
    together.wait(30)
    summary = sweep.run(EXPERIMENTS, [MEASUREMENT], store=store, show=False)
    for _ in range(turns):
        if together.wait(30) == 0:
            for part in store.root.glob("index*"):
                part.unlink()
        together.wait(30)
        table = store.table()
        seen.append((len(table), int(table.duplicated(list(_RECORD_KEY)).sum())))
    answer.write_text(json.dumps([dataclasses.asdict(summary), seen]))


def test_two_processes_share_a_store(trained, tmp_path):
    answers, together = [tmp_path / "one", tmp_path / "other"], processes.Barrier(2)
    rivals = [
        processes.Process(target=sweep_and_read, args=(tmp_path / "runs", path, together, 20), daemon=True)
        for path in answers
    ]
    for rival in rivals:
        rival.start()
    for rival in rivals:
        rival.join(60)
        assert rival.exitcode == 0
    for path in answers:
        summary, seen = json.loads(path.read_text())
        assert summary["wanted"] == 4 and seen == [[4 * 36, 0]] * 20
    assert {p.name for p in (tmp_path / "runs").iterdir() if p.is_dir()} == {experiment_hash(e) for e in EXPERIMENTS}
    for experiment in EXPERIMENTS:
        (records,) = (Store(tmp_path / "runs").folder(experiment) / "evaluations").iterdir()
        assert records.read_bytes() == Store(trained).records_path(experiment, MEASUREMENT).read_bytes()
        load_run(Store(tmp_path / "runs"), experiment)


def test_records_are_of_the_network_that_is_kept_when_a_rival_was_first(tmp_path):
    store, rival = Store(tmp_path), []

    def load(dataset, split):
        """The images; while they are fetched for training, another machine finishes the same run with slightly other
        weights."""
        images = data.load_images(dataset, split)
        if split == "train" and not rival:
            model, history = train(ONE, images)
            with torch.no_grad():
                model.classifier.bias += torch.randn(10, generator=torch.Generator().manual_seed(0))
            rival.append(save_run(store, ONE, model, history, {"device": "elsewhere"}))
        return images

    run_job(Job(ONE, True, (Clean(),)), store, load, torch.device("cpu"))
    assert rival == [True]
    kept = load_run(store, ONE)
    wanted = {record.quantity: record.value for record in evaluate(kept, data.load_images("digits", "test"))}
    assert {record["quantity"]: record["value"] for record in parse_records(store.records_path(ONE, Clean()))} == wanted


@pytest.mark.parametrize("option", ["--runs file", "--runs file/runs", "--out file", "--out file/out", "--out out2"])
def test_a_file_in_the_way_is_named_before_any_work(option, tmp_path, capfd):
    option, place = option.split()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "out2").mkdir()
    (tmp_path / "out2/smoke").write_text("mine")
    assert_refused(figures(tmp_path, capfd, option, str(tmp_path / place)), tmp_path / place, "cannot be written")
    assert set(contents(tmp_path)) == {"file", "out2/smoke"} and (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into folders that are read-only for others")
@pytest.mark.parametrize("option", ["--runs", "--out"])
def test_a_read_only_folder_is_named_before_any_work(option, tmp_path, capfd):
    (tmp_path / "locked").mkdir(mode=0o555)
    assert_refused(figures(tmp_path, capfd, option, str(tmp_path / "locked")), tmp_path / "locked", "cannot be written")
    assert contents(tmp_path) == {}


def with_a_full_disk(arguments, words, room):
    """Be `sparse-nb ARGUMENTS` where no file can grow beyond `room` bytes, saying everything into the file `words`."""
    with open(words, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    main(arguments)


def test_a_full_disk_leaves_only_whole_runs(trained, tmp_path):
    room = 150_000  # enough for the dense checkpoint, 100 kB, not for the sparse one with its positions
    sizes = {e.width: (Store(trained).folder(e) / "model.safetensors").stat().st_size for e in EXPERIMENTS}
    assert sizes[32] < room < sizes[128]
    paths = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--notebooks", str(ROOT / "figures")]
    process = processes.Process(
        target=with_a_full_disk, args=(["figures", "fig01", *FLAGS, *paths], tmp_path / "words", room), daemon=True
    )
    process.start()
    process.join(60)
    said = (tmp_path / "words").read_text()
    assert process.exitcode == 1 and "sparse-nb: " in said and "Traceback" not in said
    folders = [p for p in (tmp_path / "runs").iterdir() if p.is_dir()]
    assert [p.name for p in folders] == [experiment_hash(EXPERIMENTS[0])]  # and no leavings of the second
    load_run(Store(tmp_path / "runs"), EXPERIMENTS[0])


@pytest.mark.parametrize("budget", [0, -1, 1, 101_633, 10**12, 25_408.5, "many", None])
def test_an_impossible_budget_is_refused(budget):
    assert counted_total("digits", "mlp", 128, 1) == 101_632
    with pytest.raises(
        (ValueError, TypeError), match=re.escape(f"{budget:,}" if isinstance(budget, int) else str(budget))
    ):
        Experiment("digits", "mlp", 128, 1, budget, 0, Recipe())


def some(names):
    return st.lists(st.sampled_from(names), unique=True).map(tuple)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(sorted(PRESETS)),
    some(data.DATASETS),
    some(models.FAMILIES),
    some(allocation.RULES),
    st.lists(st.integers(1, 10**6), max_size=4, unique=True).map(tuple),
    st.none() | st.integers(1, 50),
    st.none() | st.integers(1, 500),
)
def test_command_line_and_notebook_ask_for_the_same(preset, datasets, families, rules, widths, seeds, epochs):
    asked = dict(
        preset=preset, datasets=datasets, families=families, rules=rules, widths=widths, seeds=seeds, epochs=epochs
    )
    flags = []
    for name, value in asked.items():
        values = value if isinstance(value, tuple) else (value,)
        if value not in ((), None):
            flags += [f"--{name}", *map(str, values)]
    command = tyro.cli(options.Figures, args=flags)
    injected = {}
    exec(PythonTranslator.codify(notebook_parameters(command)), injected)  # what papermill writes into the notebook
    in_notebook = narrow(injected["preset"], **{name: injected[name] for name in asked if name != "preset"})
    wanted = PRESETS[preset]
    assert in_notebook == narrowed(command)
    assert in_notebook.datasets == (datasets or wanted.datasets) and in_notebook.rules == (rules or wanted.rules)
    assert tuple(in_notebook.families) == (families or tuple(wanted.families)) and in_notebook.seeds == (
        seeds or wanted.seeds
    )
    for family, setting in in_notebook.families.items():
        assert setting.widths == (tuple(sorted(widths)) or wanted.families[family].widths)
        assert setting.recipe == dataclasses.replace(
            wanted.families[family].recipe, epochs=epochs or wanted.families[family].recipe.epochs
        )


@pytest.mark.parametrize("figure", FIGURES)
def test_a_figures_notebook_takes_every_parameter_that_the_command_gives(figure):
    notebook = nbformat.read(ROOT / "figures" / f"{FIGURES[figure].notebook}.ipynb", as_version=4)
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    taken = {}
    exec(cell.source, taken)
    assert taken.keys() - {"__builtins__"} == {*notebook_parameters(options.Figures(figures=(figure,))), "out"}


def shuffled(value, order):
    """Plain data with every dict's entries in another order."""
    if isinstance(value, dict):
        names = list(value)
        order.shuffle(names)
        return {name: shuffled(value[name], order) for name in names}
    return [shuffled(item, order) for item in value] if isinstance(value, (list, tuple)) else value


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.sampled_from(EXPERIMENTS), st.randoms(use_true_random=False))
def test_a_name_does_not_depend_on_the_order_of_fields(experiment, order):
    for identity, name in [
        (experiment_identity(experiment), experiment_hash(experiment)),
        (evaluation_identity(MEASUREMENT), evaluation_hash(MEASUREMENT)),
    ]:
        kind = "experiment" if "experiment" in identity else "evaluation"
        assert name_of(kind, json.loads(json.dumps(shuffled(identity, order)))) == name


OTHERS = {
    "dataset": "mnist",
    "family": "vgg",
    "width": 129,
    "depth": 2,
    "budget": 25_409,
    "seed": 7,
    "recipe": Recipe(epochs=3),
    "rule": "erk",
    "initial_scale": "dense",
    "train_images": 100,
    "batch_norm": False,
    "schedule": "magnitude",
    "repeat": 2,
}
OF_ONE_SCHEDULE = {
    ("drop", 0.2): ("set", "rigl"),
    ("update_every", 50): ("set", "rigl"),
    ("update_until", 5): ("set", "rigl", "beta_lasso"),
    ("rewind", 2): ("imp",),
    ("l1", 1e-3): ("beta_lasso",),
    ("beta", 10.0): ("beta_lasso",),
}
RECIPES = {
    "epochs": 3,
    "learning_rate": 0.02,
    "decay": "cosine",
    "momentum": 0.8,
    "weight_decay": 1e-4,
    "batch_size": 33,
    "stop_loss": None,
    "augment": True,
}
MEASUREMENTS = {"sigmas": (0, 0.1), "draws": 4, "seed": 1, "scope": "all", "test_images": 10, "parts": True}


def test_a_name_changes_with_every_field():
    fields = {
        described: {field.name for field in dataclasses.fields(described)}
        for described in (Experiment, Recipe, WeightNoise)
    }
    assert fields == {
        Experiment: {*OTHERS, *(name for name, _ in OF_ONE_SCHEDULE), "pruning", "bits", "version"},
        Recipe: {*RECIPES},
        WeightNoise: {*MEASUREMENTS, "version"},
    }
    changed = [dict(recipe=dataclasses.replace(ONE.recipe, **{name: value})) for name, value in RECIPES.items()]
    changed += [{name: value} for name, value in OTHERS.items() if name not in ("recipe", "family", "batch_norm")]
    names = [experiment_hash(dataclasses.replace(ONE, **change)) for change in changed]
    mlp, vgg, resnet = (
        Experiment("digits", family, 32, depth, 10_000, 0, Recipe())
        for family, depth in (("mlp", 18), ("vgg", 11), ("resnet", 18))
    )
    names += [experiment_hash(e) for e in (mlp, vgg, resnet, dataclasses.replace(vgg, batch_norm=False))]
    names += [experiment_hash(dataclasses.replace(vgg, bits="portable"))]
    assert experiment_hash(dataclasses.replace(mlp, batch_norm=False)) == experiment_hash(mlp)  # an MLP has none
    assert experiment_hash(dataclasses.replace(mlp, bits="portable")) == experiment_hash(mlp)  # it is in any case
    names += [
        experiment_hash(dataclasses.replace(ONE, schedule="magnitude", pruning="global"))
    ]  # of no meaning for other schedules
    for (name, value), schedules in OF_ONE_SCHEDULE.items():
        assert experiment_hash(dataclasses.replace(ONE, **{name: value})) == experiment_hash(ONE)
        for schedule in schedules:
            names.append(experiment_hash(dataclasses.replace(ONE, schedule=schedule, **{name: value})))
    names += [experiment_hash(dataclasses.replace(ONE, schedule=each)) for each in ("set", "rigl", "imp", "beta_lasso")]
    assert len({*names, experiment_hash(ONE)}) == len(names) + 1 and all(RUN.fullmatch(name) for name in names)
    measured = [
        evaluation_hash(dataclasses.replace(MEASUREMENT, **{name: value})) for name, value in MEASUREMENTS.items()
    ]
    assert (
        len({*measured, evaluation_hash(MEASUREMENT), evaluation_hash(Clean()), evaluation_hash(Clean(10))})
        == len(measured) + 3
    )


rates = st.floats(allow_nan=False, allow_infinity=False, min_value=0, max_value=1e6) | st.integers(0, 10**6)
described = st.builds(
    lambda rate, decay, seed, scale: dataclasses.replace(
        ONE, recipe=Recipe(learning_rate=rate, weight_decay=decay), seed=seed, initial_scale=scale
    ),
    rates,
    rates,
    st.integers(0, 2**63 - 1),
    st.sampled_from(["sparse", "dense"]),
)


@settings(max_examples=200, deadline=None)
@given(described, described)
def test_equal_experiments_and_only_they_have_one_name(one, other):
    assert (digest(one) == digest(other)) == (one == other)
    assert digest(json.loads(canonical(one))) == digest(one)
    rates = {name: float(getattr(one.recipe, name)) for name in ("learning_rate", "weight_decay")}  # 1.0 is 1
    assert digest(one) == digest(dataclasses.replace(one, recipe=dataclasses.replace(one.recipe, **rates)))


def test_weight_noise_takes_any_sequence_of_sigmas_for_the_same_measurement():
    assert evaluation_hash(WeightNoise(sigmas=weight_noise.SIGMAS)) == evaluation_hash(WeightNoise())
    assert digest(WeightNoise(sigmas=list(weight_noise.SIGMAS))) == digest(WeightNoise())
