"""What is published is enough for a machine that remembers nothing, is never made less, and is read without trust."""

import dataclasses
import io
import json
import lzma
import random
import shutil
import tarfile
import tempfile
import time

import pandas as pd
import pytest

from sparse_nb.networks.training import Recipe
from sparse_nb.runs import archive
from sparse_nb.runs.archive import ARCHIVE, pack_runs
from sparse_nb.runs.exchange import Taken, export, merge, published_rows
from sparse_nb.runs.files import run_folders, sha256
from sparse_nb.runs.index import RECORD_COLUMNS
from sparse_nb.runs.store import Store
from sparse_nb.runs.verify import leftovers, verify
from sparse_nb.study.experiments import Clean, Experiment, WeightNoise, parent_of
from sparse_nb.study.versions import name_of
from sparse_nb.sweep import sweep
from sparse_nb.sweep.jobs import missing_jobs

ONE, *OTHERS = [Experiment("digits", "mlp", width, 1, 2048, 0, Recipe(epochs=2)) for width in (32, 64, 256)]
PRUNED = dataclasses.replace(OTHERS[0], schedule="magnitude")
NETWORKS = [ONE, *OTHERS, PRUNED]
NOISE, MORE = WeightNoise(sigmas=(0.0, 0.3), draws=2), WeightNoise(sigmas=(0.1,), draws=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A store with five networks, four of them measured; do not change it."""
    store = Store(tmp_path_factory.mktemp("trained"))
    sweep.run(NETWORKS, [Clean(), NOISE], store=store, device="cpu", show=False)
    return store


@pytest.fixture
def published(trained, tmp_path):
    """The folder of an export of that store."""
    export(trained, None, tmp_path / "published")
    return tmp_path / "published"


@pytest.fixture
def empty(tmp_path):
    return Store(tmp_path / "empty")


def contents(root, ending=""):
    """Every file of finished runs, as {name: bytes}."""
    return {
        str(p.relative_to(root)): p.read_bytes()
        for p in root.glob("[0-9a-f]*/**/*")
        if p.is_file() and p.name.endswith(ending)
    }


def bytes_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def table(store):
    return store.table().drop(columns="stamp")


def published_table(folder):
    """The table of what is published in `folder`, by way of a new store."""
    with tempfile.TemporaryDirectory() as fresh:
        store = Store(fresh)
        assert merge(store, folder).problems == ()
        return table(store)


def assert_published(folder, store):
    """What is published in `folder`, archive and CSV files, says what the table of `store` says."""
    pd.testing.assert_frame_equal(published_table(folder), table(store), check_exact=True)
    rows, columns = list(published_rows(folder, "records")), list(RECORD_COLUMNS)
    pd.testing.assert_frame_equal(pd.DataFrame(rows)[columns], store.table()[columns], check_exact=True)
    runs, described = store.runs().drop(columns="stamp"), list(published_rows(folder, "runs"))
    assert [list(row) for row in map(dict.values, described)] == [
        [None if pd.isna(value) else value for value in row] for row in runs.itertuples(index=False)
    ]


def forge(folder, name, content):
    """Give a file of a run other content, and a manifest that proves it."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    (folder / "manifest.json").write_text(json.dumps(manifest | {name: sha256(content)}))


def refused(store, path):
    """What `merge` says when it refuses the archive at `path` as a whole; nothing may be left of it."""
    with pytest.raises(ValueError, match="nothing was taken from it") as caught:
        merge(store, path)
    assert str(path) in str(caught.value) and list(store.root.iterdir()) == []
    return str(caught.value)


@pytest.mark.parametrize("what", ["", ARCHIVE])
def test_a_machine_that_forgets_takes_over_what_is_published(what, trained, published, empty):
    assert merge(empty, published / what) == Taken(5, 8, 0, 0, ())
    assert merge(empty, published / what) == Taken(already_here=5)
    whole = contents(trained.root)
    assert contents(empty.root) == {
        name: content for name, content in whole.items() if not name.endswith(".safetensors")
    }
    pd.testing.assert_frame_equal(table(empty), table(trained), check_exact=True)
    assert_published(published, trained)
    assert (
        verify(empty).problems == () and verify(empty).without_checkpoint == 5 and leftovers(empty, older_than=-1) == []
    )
    assert missing_jobs(NETWORKS, [Clean(), NOISE], empty) == []
    before = bytes_in(published)
    export(empty, None, published)  # from there, without checkpoints, the same is published
    assert bytes_in(published) == before


def test_a_runs_folder_is_taken_before_an_archive_in_it(trained, published, tmp_path):
    other = shutil.copytree(trained.root, tmp_path / "other")
    (other / ARCHIVE).write_bytes(b"nonsense")
    assert merge(Store(tmp_path / "target"), other)[:3] == (5, 8, 5)


def test_every_truncated_or_altered_archive_is_refused(published, empty):
    path, chance = published / ARCHIVE, random.Random(0)
    whole = path.read_bytes()
    bits = [chance.randrange(8 * len(whole)) for _ in range(100)]
    variants = [whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :] for bit in bits]
    for content in [
        *variants,
        *(whole[: chance.randrange(len(whole))] for _ in range(100)),
        whole + b"\0",
        whole + whole,
    ]:
        path.write_bytes(content)
        refused(empty, path)
        assert bytes_in(published).keys() == {ARCHIVE, "runs.csv.gz", "records.csv.gz", "evaluations.csv.gz"}
    path.write_bytes(whole)
    assert merge(empty, path).runs == 5


RUN = "0123456789abcdef"


def sent(path, name, *, kind=tarfile.REGTYPE, link="", headers=None, content=b"x", good=()):
    """Write an archive of the files `good` and one entry more to `path`."""
    with tarfile.open(path, "w:xz", format=tarfile.PAX_FORMAT) as tar:
        for known, bytes_of_it in good:
            entry = tarfile.TarInfo(known)
            entry.size = len(bytes_of_it)
            tar.addfile(entry, io.BytesIO(bytes_of_it))
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname, entry.pax_headers = kind, link, headers or {}
        entry.size = len(content) if kind == tarfile.REGTYPE else 0
        tar.addfile(entry, io.BytesIO(content))


@pytest.mark.parametrize(
    "name, more",
    [
        ("/tmp/escaped/manifest.json", {}),
        ("../manifest.json", {}),
        (f"{RUN}/../../manifest.json", {}),
        (f"{RUN}/../{RUN}/manifest.json", {}),
        (f"./{RUN}/manifest.json", {}),
        (f"{RUN}/manifest.json\n", {}),
        (f"{RUN}/manifest.json\0more", {"headers": {"path": f"{RUN}/manifest.json\0more"}}),
        (f"{RUN}/manifest.json", {"headers": {"path": "/tmp/escaped"}}),
        (f"{RUN.upper()}/manifest.json", {}),
        (f"{RUN}/model.safetensors", {}),
        (f"{RUN}/evaluations/../manifest.json", {}),
        (f"{RUN}/evaluations/{RUN}.jsonl/more", {}),
        (f"{RUN}/notes.txt", {}),
        ("index.sqlite", {}),
        (f".attempts/{RUN}/state", {}),
        (RUN, {"kind": tarfile.DIRTYPE}),
        (f"{RUN}/manifest.json", {"kind": tarfile.SYMTYPE, "link": "/etc/passwd"}),
        (f"{RUN}/manifest.json", {"kind": tarfile.LNKTYPE, "link": f"{RUN}/experiment.json"}),
        (f"{RUN}/manifest.json", {"kind": tarfile.FIFOTYPE}),
        (f"{RUN}/manifest.json", {"kind": tarfile.CHRTYPE}),
        (f"{RUN}/manifest.json", {"kind": tarfile.BLKTYPE}),
        (f"{RUN}/manifest.json", {"kind": b"Z"}),
        (
            f"{RUN}/manifest.json",
            {
                "headers": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "1000000000000"},
                "content": b"0\n".ljust(1024, b"\0"),
            },
        ),
        (f"{RUN}/manifest.json", {"headers": {"size": "-512"}}),
        (f"{RUN}/manifest.json", {"headers": {"size": "1000000000000"}}),
        (f"{RUN}/experiment.json", {}),
    ],
)
def test_an_archive_with_anything_else_in_it_is_refused_as_a_whole(name, more, trained, empty, tmp_path):
    good = [
        *contents(trained.root, "l").items(),
        *contents(trained.root, "n").items(),
        (f"{RUN}/experiment.json", b"{}"),
    ]
    sent(tmp_path / "sent.tar.xz", name, good=good, **more)
    began = time.monotonic()
    refused(empty, tmp_path / "sent.tar.xz")
    assert time.monotonic() - began < 5 and not list(tmp_path.rglob("escaped*"))


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "ends too early"),
        (b"this is no archive", "format"),
        (lzma.compress(b""), "empty"),
        (lzma.compress(bytes(10240)), "no run"),
        (lzma.compress(b"nonsense" * 1000), "truncated|invalid header"),
        (lzma.compress(bytes(3 << 20)), "more than 1,048,576 bytes"),
        (lzma.compress(b"x", preset=0, filters=None, format=lzma.FORMAT_ALONE), "format"),
        (lzma.compress(b"x", filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 29}]), "[Mm]emory"),
    ],
)
def test_what_is_no_archive_and_what_asks_for_too_much_is_refused(content, words, empty, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "_MOST_BYTES", 1 << 20)
    (tmp_path / ARCHIVE).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        merge(empty, tmp_path)
    refused(empty, tmp_path / ARCHIVE)


def test_too_many_files_are_refused(published, empty, monkeypatch):
    monkeypatch.setattr(archive, "_MOST_FILES", 22)
    assert "more than 22 files" in refused(empty, published / ARCHIVE)
    monkeypatch.setattr(archive, "_MOST_FILES", 23)
    assert merge(empty, published).runs == 5


def test_of_an_archive_that_lies_only_what_is_whole_is_taken(trained, empty, tmp_path):
    """Whole as an archive, with files in it that prove nothing."""
    files = {name: content for name, content in contents(trained.root).items() if not name.endswith(".safetensors")}
    lie, records = (
        f"{trained.folder(ONE).name}/history.jsonl",
        str(trained.records_path(OTHERS[1], NOISE).relative_to(trained.root)),
    )
    files |= {lie: files[lie].replace(b"0", b"1"), records: files[records].replace(b'"draw":1', b'"draw":2')}
    last = files.popitem()
    sent(tmp_path / "sent.tar.xz", last[0], content=last[1], good=files.items())
    taken = merge(empty, tmp_path / "sent.tar.xz")
    assert taken[:4] == (4, 5, 0, 0) and len(taken.problems) == 2
    for name in (lie, records):
        assert [
            problem
            for problem in taken.problems
            if f"{tmp_path / 'sent.tar.xz'}/{name}" in problem and ".writing" not in problem
        ]
    assert verify(empty).problems == () and not empty.has_run(ONE) and not empty.has_records(OTHERS[1], NOISE)


def test_an_export_never_makes_what_is_published_less(trained, published, empty, tmp_path):
    before = bytes_in(published)
    export(trained, [ONE], published)
    assert bytes_in(published) == before

    sweep.run([ONE], [Clean(), MORE], store=empty, device="cpu", show=False)
    for wanted in (None, [ONE], []):
        with pytest.raises(
            ValueError, match=f"has 4 runs and 1 record file that the store .* lacks.*`sparse-nb merge {published}`"
        ):
            export(empty, wanted, published)
    assert bytes_in(published) == before
    merge(empty, published)
    export(empty, [ONE], published)
    assert len(published_table(published)) == len(trained.table()) + 4  # and what was measured meanwhile
    with pytest.raises(ValueError, match="has 1 record file that the store"):
        export(trained, None, published)

    damaged = bytes_in(published)[ARCHIVE][:-1]
    (published / ARCHIVE).write_bytes(damaged)
    with pytest.raises(ValueError, match=f"{published / ARCHIVE} is not an intact archive"):
        export(empty, None, published)
    assert (published / ARCHIVE).read_bytes() == damaged


def test_an_export_of_other_weights_is_refused(trained, published, tmp_path):
    other = Store(shutil.copytree(trained.root, tmp_path / "other"))
    forge(other.folder(ONE), "model.safetensors", b"others")
    before = bytes_in(published)
    with pytest.raises(ValueError, match=f"{published / ARCHIVE}/{trained.folder(ONE).name} has other weights"):
        export(other, None, published)
    assert bytes_in(published) == before


def test_results_of_code_in_work_are_not_published(trained, tmp_path):
    other = Store(shutil.copytree(trained.root, tmp_path / "other"))
    about = json.loads((other.folder(ONE) / "experiment.json").read_bytes()) | {"code": "2-dev", "unnamed": ["rule"]}
    shutil.rmtree(other.folder(ONE) / "evaluations")
    (other.folder(ONE) / "evaluations").mkdir()
    new = other.folder(ONE).rename(other.root / name_of("experiment", about))
    forge(new, "experiment.json", json.dumps(about).encode())
    with pytest.raises(ValueError, match="results of version 2-dev.* not published"):
        export(other, None, tmp_path / "published")
    assert not (tmp_path / "published").exists()


def test_runs_of_earlier_code_go_when_the_store_lacks_them_and_that_is_said(trained, published, tmp_path):
    other, told = Store(shutil.copytree(trained.root, tmp_path / "other")), []
    about = json.loads((other.folder(ONE) / "experiment.json").read_bytes()) | {"code": "1"}
    old = other.root / name_of("experiment", about)
    other.folder(ONE).rename(old)
    shutil.rmtree(old / "evaluations")
    (old / "evaluations").mkdir()
    forge(old, "experiment.json", json.dumps(about).encode())
    (published / ARCHIVE).write_bytes(pack_runs(run_folders(other.root)))
    export(trained, None, published, on_outdated=told.append)
    assert told == [{old.name}] and len(published_table(published)) == len(trained.table())
    export(trained, None, published, on_outdated=told.append)
    assert len(told) == 1


@pytest.mark.parametrize("workers", [None, 2])
def test_a_network_without_its_checkpoint_is_made_again_to_be_measured(workers, trained, published, empty, tmp_path):
    merge(empty, published)
    jobs = missing_jobs(NETWORKS, [Clean(), MORE], empty)
    assert {(job.experiment, job.train, job.evaluations) for job in jobs} == {(e, True, (MORE,)) for e in NETWORKS} | {
        (parent_of(PRUNED), True, ())
    }
    done = sweep.run(NETWORKS, [Clean(), MORE], store=empty, device="cpu", workers=workers, show=False)
    assert (done.made, done.measured, done.failed) == (5, 4, ())
    whole = Store(shutil.copytree(trained.root, tmp_path / "whole"))
    sweep.run(NETWORKS, [MORE], store=whole, device="cpu", show=False)
    assert contents(empty.root) == contents(whole.root)  # checkpoints too, to the last bit
    assert sweep.run(NETWORKS, [Clean(), MORE], store=empty, device="cpu", show=False).made == 0


@pytest.mark.parametrize("how", ["another history", "the same history"])
def test_other_weights_get_no_records_and_others_go_on(how, published, empty):
    merge(empty, published)
    for network in (ONE, parent_of(PRUNED)):
        folder = empty.folder(network)
        if how == "another history":
            forge(
                folder,
                "history.jsonl",
                (folder / "history.jsonl").read_bytes().replace(b'"accuracy": 0.', b'"accuracy": 0.1'),
            )
        else:
            manifest = json.loads((folder / "manifest.json").read_bytes())
            (folder / "manifest.json").write_text(json.dumps(manifest | {"model.safetensors": "0" * 64}))
    before = contents(empty.root)
    done = sweep.run(NETWORKS, [MORE], store=empty, device="cpu", show=False)
    assert (done.made, done.measured) == (2, 2)
    (parent, reason), (_, same), (_, after) = sorted(
        done.failed, key=lambda failed: ("dense" not in failed[0], "magnitude" in failed[0])
    )
    assert "its dense network failed" in after
    for said in (reason, same):
        assert (
            "gives other weights here" in said
            and "to which its records do not belong" in said
            and "merge a runs folder that has the checkpoint" in said
        )
    for network in (ONE, PRUNED, parent_of(PRUNED)):
        assert not empty.has_checkpoint(network) and not empty.has_records(network, MORE)
    assert before.items() <= contents(empty.root).items() and verify(empty).problems == ()


def test_new_prunings_of_a_network_without_its_checkpoint(published, empty):
    merge(empty, published)
    more = dataclasses.replace(PRUNED, budget=1024)
    done = sweep.run([PRUNED, more], [Clean()], store=empty, device="cpu", show=False)
    assert (done.made, done.measured) == (2, 1)  # the dense network again, and the new pruning
    assert empty.has_checkpoint(parent_of(PRUNED)) and not empty.has_checkpoint(PRUNED)
