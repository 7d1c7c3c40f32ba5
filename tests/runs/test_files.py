"""What has a checksum that matches and makes no sense is refused where it is read, by name, and nothing else fails."""

import json
import math
import os
import random
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_nb.networks.training import Epoch, History, Recipe
from sparse_nb.robustness.evaluation import Record
from sparse_nb.runs import record_files, schema
from sparse_nb.runs.attempts import load_failures, save_failure
from sparse_nb.runs.exchange import export, merge
from sparse_nb.runs.files import sha256
from sparse_nb.runs.queries import Records
from sparse_nb.runs.record_files import parse_records, records_text
from sparse_nb.runs.schema import read_about, read_history
from sparse_nb.runs.store import Store, load_history, load_run, run_status, save_records, save_run
from sparse_nb.runs.verify import leftovers, verify
from sparse_nb.study.experiments import Clean, Experiment, WeightNoise, evaluation_identity, experiment_hash, prepare
from sparse_nb.study.versions import canonical, name_of

ONE, TWO = (
    Experiment("digits", "mlp", width=8, depth=1, budget=592, seed=seed, recipe=Recipe(epochs=1)) for seed in (0, 1)
)
WHERE = {"device": "cpu", "cpu": "AVX2", "threads": 1, "torch": "2.9", "commit": None}
GOOD = {"measure": "clean", "quantity": "accuracy", "name": "", "strength": 0.0, "draw": 0, "value": 0.5, "source": ""}

# each an input that got as far as a traceback, or into a table, in some release
ODD_RECORDS = {
    "a draw beyond 64 bits": {"draw": 10**40},
    "a draw at 2^63": {"draw": 2**63},
    "a draw that is a share": {"draw": 0.5},
    "a draw that is true": {"draw": True},
    "a draw below zero": {"draw": -1},
    "no strength": {"strength": None},
    "a strength that is text": {"strength": "0.1"},
    "a strength that is NaN": {"strength": math.nan},
    "a negative strength": {"strength": -0.1},
    "a lone surrogate": {"name": "\ud800"},
    "a terminal escape": {"name": "\x1b[2J"},
    "a name that is a list": {"name": ["a"]},
    "a name of a million letters": {"name": "a" * 10**6},
    "an accuracy of 7": {"value": 7.0},
    "an accuracy below 0": {"value": -1e-9},
    "NaN": {"value": math.nan},
    "infinity": {"value": math.inf},
    "an integer that no float can be": {"value": 10**400, "quantity": "loss"},
    "a value that is text": {"value": "0.5"},
    "a value that is true": {"value": True},
    "a measure that is a number": {"measure": 3},
    "a quantity that is missing": {"quantity": ...},
    "a source that is null": {"source": None},
    "a field too many": {"more": 1},
}
ODD_ABOUTS = {
    "HTML in epochs": {"result": {"epochs": "<img src=x onerror=alert(1)>"}},
    "epochs beyond 64 bits": {"result": {"epochs": 10**40}},
    "an accuracy of 7": {"result": {"train_accuracy": 7.0}},
    "a loss that is NaN": {"result": {"train_loss": math.nan}},
    "an unknown status": {"result": {"status": "<b>fine</b>"}},
    "no status": {"result": {"status": ...}},
    "a density above 1": {"result": {"density": 2.0}},
    "negative seconds": {"result": {"seconds": -1}},
    "a result that is a list": {"result": []},
    "a device that is a number": {"environment": {"device": 3}},
    "a device with an escape": {"environment": {"device": "\x1b]0;title\x07"}},
    "no device": {"environment": {"device": ...}},
    "threads in words": {"environment": {"threads": "many"}},
    "a library with a surrogate": {"environment": {"torchaudio": "\udfff"}},
    "a seed at 2^63": {"experiment": {"seed": 2**63}},
    "a seed far beyond": {"experiment": {"seed": 10**40}},
    "a width that is text": {"experiment": {"width": "8"}},
    "a width of null": {"experiment": {"width": None}},
    "a density of a budget": {"experiment": {"budget": 0.5}},
    "batch norm as text": {"experiment": {"batch_norm": "yes"}},
    "a dataset that is a list": {"experiment": {"dataset": ["digits"]}},
    "a code that is a number": {"code": 3},
    "data that are null": {"data": None},
}


def laid_over(good, odd):
    """The dict `good` with `odd` laid over it, part by part; ... takes an entry away."""
    parts = {
        k: laid_over(good[k], v) if isinstance(v, dict) and isinstance(good.get(k), dict) else v for k, v in odd.items()
    }
    return {name: value for name, value in {**good, **parts}.items() if value is not ...}


def plain(value):
    """Canonical JSON of anything, NaN too, and surrogates as escapes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A store with two networks, measured; copy it, do not change it."""
    store = Store(tmp_path_factory.mktemp("trained") / "runs")
    epoch = Epoch(epoch=1, loss=2.3, accuracy=0.1, learning_rate=0.1, seconds=0.0)
    for network in (ONE, TWO):
        save_run(store, network, prepare(network), History((epoch,), "epochs", None), WHERE)
        save_records(store, network, Clean(), [Record("clean", "accuracy", 0.5), Record("clean", "loss", 1.0)])
        save_records(store, network, WeightNoise(), [Record("weight_noise", "accuracy", 0.5, strength=0.1)])
    return store


@pytest.fixture
def store(trained, tmp_path):
    """A copy of that store, to be changed."""
    return Store(shutil.copytree(trained.root, tmp_path / "runs"))


def offer_records(store, records):
    """Replace a measurement of ONE by `records`, whatever they are, with checksums that match; returns the path."""
    path = store.records_path(ONE, Clean())
    body = "".join(plain(record) + "\n" for record in records).encode()
    header = json.loads(path.read_bytes().partition(b"\n")[0]) | {"records": len(records), "sha256": sha256(body)}
    path.write_bytes(canonical(header | {"sealed": record_files._seal(header)}).encode() + b"\n" + body)
    return path


def offer_about(store, about):
    """Replace ONE by a run of this description, whatever it is, with a name and manifest for it; returns the path."""
    try:
        name = name_of("experiment", about)
    except Exception:  # it cannot be named
        name = store.folder(ONE).name
    folder = store.folder(ONE).rename(store.root / name)
    if name != store.folder(ONE).name:  # they are of another run
        for records in (folder / "evaluations").iterdir():
            records.unlink()
    content = plain(about).encode()
    (folder / "experiment.json").write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_bytes()) | {"experiment.json": sha256(content)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder / "experiment.json"


def assert_refused(store, path, tmp_path):
    """Every reader of the file at `path` names it; the other run is merged, and what was refused is not."""
    for read in (
        store.table,
        store.runs,
        store.measurements,
        lambda: Records(store.root, write=False).table(),
        lambda: export(store, None, tmp_path / "published"),
    ):
        with pytest.raises(ValueError) as caught:
            read()
        assert str(path) in str(caught.value)
    assert not (tmp_path / "published").exists()
    said = [sentence for sentence in verify(store).problems if str(path) in sentence]
    assert len(said) == 1 and "delete" in said[0] and len(said[0]) < 1000
    target = Store(tmp_path / "target")
    taken = merge(target, store.root)
    assert any(str(path) in problem for problem in taken.problems) and verify(target).problems == ()
    assert target.has_records(TWO, Clean()) and not target.has_records(ONE, Clean()) and len(target.table()) >= 3
    leftovers(store, outdated=True)


@pytest.mark.parametrize("odd", ODD_RECORDS)
def test_an_odd_record_is_refused(odd, store, tmp_path):
    assert_refused(store, offer_records(store, [GOOD | {"name": "b"}, laid_over(GOOD, ODD_RECORDS[odd])]), tmp_path)


@pytest.mark.parametrize("odd", [[[]], [3], ["text"], [None], [GOOD, GOOD], [GOOD, GOOD | {"source": "other"}, GOOD]])
def test_what_is_no_list_of_records_is_refused(odd, store, tmp_path):
    assert_refused(store, offer_records(store, odd), tmp_path)


@pytest.mark.parametrize("odd", ODD_ABOUTS)
def test_an_odd_description_is_refused(odd, store, tmp_path):
    about = json.loads((store.folder(ONE) / "experiment.json").read_bytes())
    path = offer_about(store, laid_over(about, ODD_ABOUTS[odd]))
    assert_refused(store, path, tmp_path)
    for ask in (run_status, load_run, load_history):
        if store.folder(ONE).exists():
            with pytest.raises(ValueError, match=str(path)):
                ask(store, ONE)


@pytest.mark.parametrize("odd", ["[", "3", "{}", '{"epoch": 1}', None])
def test_an_odd_history_is_refused(odd, store):
    path = store.folder(ONE) / "history.jsonl"
    content = path.read_bytes().replace(b'"loss": 2.3', b'"loss": "<b>"') if odd is None else odd.encode()
    path.write_bytes(content)
    manifest = json.loads((path.parent / "manifest.json").read_bytes()) | {path.name: sha256(content)}
    (path.parent / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"{path} holds a line that is not an epoch"):
        load_history(store, ONE)
    assert [sentence for sentence in verify(store).problems if str(path) in sentence]


def test_a_loss_of_nan_in_a_history_is_a_diverged_network_and_is_kept(store):
    wild = Experiment("digits", "mlp", width=8, depth=1, budget=592, seed=5, recipe=Recipe(epochs=1))
    epoch = Epoch(epoch=1, loss=math.nan, accuracy=0.1, learning_rate=0.1, seconds=0.0)
    save_run(store, wild, prepare(wild), History((epoch,), "diverged", 1), WHERE)
    assert math.isnan(load_history(store, wild).epochs[0].loss) and verify(store).problems == ()
    assert math.isnan(store.runs(seed=5).train_loss.astype(float).item())


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(min_value=-(10**30), max_value=10**30)
    | st.floats()
    | st.text(st.characters(), max_size=8),  # surrogates too
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FULL = os.environ.get("SPARSE_NB_FAULTS") == "full"
shared = settings(
    max_examples=500 if FULL else 60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def sane(value):
    """Is this a value that may be in a table? Said with other words than the package's."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, str):
        return len(value) <= 1000 and all(character.isprintable() for character in value)
    return isinstance(value, (int, float)) and math.isfinite(value) and abs(value) < 2**63


@shared
@given(odd=st.dictionaries(st.sampled_from([*GOOD, "more"]), JSON, min_size=1, max_size=3))
def test_any_record_is_either_sane_or_refused_by_name(odd, trained, tmp_path):
    store = Store(tmp_path / "runs")
    shutil.copytree(trained.root, store.root, dirs_exist_ok=True)
    path = offer_records(store, [GOOD | odd])
    try:
        (record,) = parse_records(path)
    except ValueError as error:
        assert str(path) in str(error)
        with pytest.raises(ValueError, match=str(path)):
            Records(store.root, write=False).table()
        return
    assert set(record) == set(GOOD) and all(
        isinstance(record[k], str) for k in ("measure", "quantity", "name", "source")
    )
    assert type(record["draw"]) is int and type(record["value"]) in (int, float) and record["strength"] >= 0
    assert sane(record["draw"]) and math.isfinite(record["value"]) and math.isfinite(record["strength"])
    assert all(sane(record[name]) for name in ("measure", "quantity", "name", "source"))
    found = Records(store.root, write=False).table(experiment=experiment_hash(ONE), value=record["value"])
    assert record["value"] in list(found.value)
    assert not verify(store).problems


@shared
@given(
    part=st.sampled_from(["experiment", "result", "environment"]),
    odd=st.dictionaries(
        st.sampled_from(
            [*Experiment.__dataclass_fields__, *schema._RESULT_MORE, "status", "device", "cpu", "threads", "x"]
        ),
        JSON,
        min_size=1,
        max_size=3,
    ),
)
def test_any_description_is_either_sane_or_refused_by_name(part, odd, trained, tmp_path):
    store = Store(tmp_path / "runs")
    shutil.rmtree(store.root)
    shutil.copytree(trained.root, store.root)
    about = json.loads((store.folder(ONE) / "experiment.json").read_bytes())
    path = offer_about(store, about | {part: about[part] | odd})
    try:
        read_about(path.parent)
    except ValueError as error:
        assert str(path) in str(error)
        with pytest.raises(ValueError, match=str(path)):
            Records(store.root, write=False).runs()
        return
    runs = Records(store.root, write=False).runs(experiment=path.parent.name)
    for value in runs.iloc[0]:
        assert value is None or value != value or sane(value)
    assert len(runs) == 1 and not [problem for problem in verify(store).problems if "experiment.json" in problem]


ODD_VALUES = [None, True, -1, 7.0, 0.5, 10**40, 2**63, math.nan, -math.inf, "\ud800", "\x1b[2J", "<img>", "", [], {}]


def mutated(value, chance):
    """Plain data with one value in it replaced, taken away, or laid beside another."""
    if not isinstance(value, dict) or not value or chance.random() < 0.1:
        return chance.choice(ODD_VALUES)
    name, how = chance.choice(list(value)), chance.random()
    if how < 0.1:
        return {key: item for key, item in value.items() if key != name}
    if how < 0.2:
        return value | {chance.choice(["more", "\udc00", "a" * 10**6]): chance.choice(ODD_VALUES)}
    return value | {name: mutated(value[name], chance)}


def test_mutated_files_are_sane_or_refused_by_name(trained, tmp_path, report):
    """Records and descriptions, with checksums that match: what merge takes, every reader can read."""
    count, chance, refused = 150 if FULL else 30, random.Random(0), {"records": 0, "descriptions": 0}
    for kind in refused:
        for number in range(count):
            store = Store(shutil.copytree(trained.root, tmp_path / f"{kind}{number}"))
            if kind == "records":
                path = offer_records(store, [mutated(GOOD, chance)])
            else:
                path = offer_about(
                    store, mutated(json.loads((store.folder(ONE) / "experiment.json").read_bytes()), chance)
                )
            target = Store(tmp_path / f"{kind}{number}-target")
            said, taken = verify(store).problems, merge(target, store.root)
            assert bool(said) == bool(taken.problems) and all(str(path) in sentence for sentence in said)
            assert verify(target).problems == () and not target.table().empty and len(target.runs()) + bool(said) >= 2
            assert all(sane(value) for value in target.table().value)
            if said:
                with pytest.raises(ValueError, match=str(path)):
                    Records(store.root, write=False).table()
            refused[kind] += bool(said)
            shutil.rmtree(store.root), shutil.rmtree(target.root)
        report(
            f"{count} mutated {kind}, checksums matching",
            f"{refused[kind]} refused by name by merge, verify and tables; {count - refused[kind]} sane; 0 tracebacks",
        )
    assert min(refused.values()) > count / 2


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b"NaN", b"1" * 5000, b"{}", b"[]"]
)
def test_nonsense_in_any_file_is_refused_by_name(content, store):
    for name in ("experiment.json", "history.jsonl", "manifest.json"):
        path = store.folder(ONE) / name
        whole, manifest = path.read_bytes(), (path.parent / "manifest.json").read_bytes()
        path.write_bytes(content)
        if name != "manifest.json":
            found = json.loads(manifest) | {name: sha256(content)}
            (path.parent / "manifest.json").write_text(json.dumps(found))
        read = read_history if name == "history.jsonl" and content else read_about
        if name != "history.jsonl" or content:
            with pytest.raises(ValueError, match=str(store.folder(ONE))):
                read(store.folder(ONE))
        path.write_bytes(whole)
        (path.parent / "manifest.json").write_bytes(manifest)
    path = store.records_path(ONE, Clean())
    for variant in (content, path.read_bytes().partition(b"\n")[0] + b"\n" + content, content + b"\n" + content):
        path.write_bytes(variant)
        with pytest.raises(ValueError, match=str(path)):
            parse_records(path)


def test_a_pipe_never_makes_a_reader_wait(store):
    for path in (
        store.folder(ONE) / "experiment.json",
        store.folder(ONE) / "manifest.json",
        store.records_path(ONE, Clean()),
    ):
        path.unlink()
        os.mkfifo(path)
    for read in (lambda: read_about(store.folder(ONE)), lambda: parse_records(store.records_path(ONE, Clean()))):
        with pytest.raises(ValueError, match="it is not a file"):
            read()
    assert list(store.runs().seed) == [1]  # without a manifest it is no finished run


def test_an_odd_note_of_a_failure_is_named(store):
    save_failure(store, TWO, "digits mlp", "killed", 3)
    path = store.root / ".attempts" / store.folder(TWO).name / "failure.json"
    good = json.loads(path.read_bytes())
    for odd in (
        [],
        {},
        good | {"when": 3},
        good | {"log": "text"},
        good | {"log": [3]},
        good | {"tries": 10**40},
        good | {"density": math.nan},
        good | {"reason": None},
        good | {"experiment": good["experiment"] | {"seed": "<b>"}},
        good | {"experiment": good["experiment"] | {"recipe": {"epochs": 2**63}}},
    ):
        path.write_text(json.dumps(odd))
        with pytest.raises(ValueError, match=f"{path} is not a record of a failure"):
            load_failures(store)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=f"{path} is not a record of a failure"):
        load_failures(store)


def test_records_text_is_what_is_parsed(tmp_path):
    path = tmp_path / experiment_hash(ONE) / "evaluations" / f"{Clean.__name__}.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(records_text(experiment_hash(ONE), evaluation_identity(Clean()), [GOOD]))
    with pytest.raises(ValueError, match="does not match its header or its name"):
        parse_records(path)
    right = path.rename(path.with_name(f"{name_of('evaluation', evaluation_identity(Clean()))}.jsonl"))
    assert parse_records(right) == [GOOD]
