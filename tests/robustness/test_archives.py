"""What the chapter on the official archives cannot test in a cell: many damaged files, hostile archives, broken lines,
full disks."""

import hashlib
import io
import json
import os
import pickle
import random
import re
import socket
import stat
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparse_nb import data
from sparse_nb.robustness.corruptions import archives as ca
from sparse_nb.robustness.corruptions import downloads

COUNT = 6  # test images of the small archives


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def saved(array, **how):
    file = io.BytesIO()
    np.save(file, array, **how)
    return file.getvalue()


def contents(folder):
    """Every file below the folder with its content, but for the list of verified files."""
    files = {
        str(path.relative_to(folder)): path
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() or path.is_symlink()
    }
    return {name: path.read_bytes() for name, path in files.items() if path.name != ".verified.json"}


def tar_of(files, *, more=()):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in more:
            tar.addfile(member)
    return packed.getvalue()


def zip_of(files, *, more=()):
    """more: (ZipInfo, content)."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        for member, content in more:
            archive.writestr(member, content)
    return packed.getvalue()


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


CIFAR_LABELS, MNIST_LABELS = np.tile(np.arange(COUNT, dtype=np.uint8), 5), np.arange(COUNT)
FOG = pixels(5 * COUNT, 4, 4, 3)
CIFAR_FILES = {
    "CIFAR-10-C/fog.npy": saved(FOG),
    "CIFAR-10-C/snow.npy": saved(pixels(5 * COUNT, 4, 4, 3, seed=1)),
    "CIFAR-10-C/labels.npy": saved(CIFAR_LABELS),
}
MNIST_FILES = {
    f"mnist_c/{name}/test_{part}.npy": content
    for i, name in enumerate(("fog", "zigzag"))
    for part, content in (("images", saved(pixels(COUNT, 4, 4, 1, seed=i))), ("labels", saved(MNIST_LABELS)))
}
CIFAR_TAR = tar_of({"CIFAR-10-C/README.txt": b"words"} | CIFAR_FILES)
MNIST_ZIP = zip_of({"mnist_c/fog/train_images.npy": b"not needed"} | MNIST_FILES)


def cifar(packed=CIFAR_TAR, **facts):
    """A CIFAR-10-C of six images, whose published facts are those of `packed`."""
    sums = {path: md5(content) for path, content in CIFAR_FILES.items()}
    small = dict(
        bytes=len(packed), md5=md5(packed), names=("snow", "fog"), image_shape=(4, 4, 3), count=COUNT, sums=sums
    )
    return replace(ca.ARCHIVES["cifar10"], **(small | facts))


def mnist(packed=MNIST_ZIP, **facts):
    small = dict(bytes=len(packed), md5=md5(packed), names=("fog", "zigzag"), image_shape=(4, 4, 1), count=COUNT)
    return replace(ca.ARCHIVES["mnist"], **(small | facts))


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty data root in a folder of its own; the archives are small, and nothing may ask the network."""
    monkeypatch.setitem(ca.ARCHIVES, "cifar10", cifar())
    monkeypatch.setitem(ca.ARCHIVES, "mnist", mnist())
    monkeypatch.setattr(downloads, "urlopen", lambda *_, **__: pytest.fail("asked the network"))
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def unpacked(root):
    """That root with both archives, unpacked."""
    (root / "CIFAR-10-C.tar").write_bytes(CIFAR_TAR)
    (root / "mnist_c.zip").write_bytes(MNIST_ZIP)
    downloads.fetch("cifar10", root=root), downloads.fetch("mnist", root=root)
    return root


class Bomb:
    """A pickle that leaves a mark where it is opened."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


# What is read ---------------------------------------------------------------------------------------------------------


def test_every_row_comes_out_where_it_belongs(unpacked):
    assert ca.available("cifar10", root=unpacked) == ("snow", "fog") and ca.available("mnist", root=unpacked) == (
        "fog",
        "zigzag",
    )
    for severity in range(1, 6):
        images = ca.load_official("cifar10", "fog", severity, root=unpacked)
        assert images.dtype == torch.uint8 and images.shape == (COUNT, 3, 4, 4) and images.is_contiguous()
        for i in range(COUNT):
            assert np.array_equal(images[i].permute(1, 2, 0).numpy(), FOG[(severity - 1) * COUNT + i])
    images = ca.load_official("mnist", "zigzag", None, root=unpacked)
    assert images.shape == (COUNT, 1, 4, 4) and np.array_equal(
        images[:, 0].numpy(), pixels(COUNT, 4, 4, 1, seed=1)[..., 0]
    )
    images.zero_()  # a copy: the file is not written to
    assert ca.load_official("mnist", "zigzag", None, root=unpacked).any()
    assert contents(unpacked) == CIFAR_FILES | MNIST_FILES | {"CIFAR-10-C.tar": CIFAR_TAR, "mnist_c.zip": MNIST_ZIP}


def test_each_array_stands_alone(root):
    (root / "CIFAR-10-C").mkdir()
    (root / "CIFAR-10-C" / "fog.npy").write_bytes(CIFAR_FILES["CIFAR-10-C/fog.npy"])
    assert ca.available("cifar10", root=root) == ("fog",)
    assert len(ca.load_official("cifar10", "fog", 3, root=root)) == COUNT
    with pytest.raises(FileNotFoundError) as caught:
        ca.load_official("cifar10", "snow", 3, root=root)
    for fact in (str(root / "CIFAR-10-C" / "snow.npy"), "there: fog", "fetch('cifar10')", "SPARSE_NB_DATA"):
        assert fact in str(caught.value)
    assert downloads.verify("cifar10", root=root) == {"CIFAR-10-C/fog.npy": "md5"}


@pytest.mark.parametrize(
    "dataset, name, severity, said",
    [
        ("digits", "fog", 1, "'digits'"),
        ("cifar-10", "fog", 1, "cifar10, cifar100, mnist"),
        ("cifar10", "zigzag", 1, "snow, fog"),
        ("cifar10", "fog", 0, "1 or 2 or 3 or 4 or 5"),
        ("cifar10", "fog", 6, "severity is 6"),
        ("cifar10", "fog", None, "severity is None"),
        ("cifar10", "fog", 1.5, "severity is 1.5"),
        ("cifar10", "../fog", 1, "'../fog'"),
        ("mnist", "fog", 1, "must be None"),
    ],
)
def test_wrong_arguments(unpacked, dataset, name, severity, said):
    with pytest.raises(ValueError, match=said):
        ca.load_official(dataset, name, severity, root=unpacked)


def test_names_of_sets():
    assert ca.available("digits") == ()
    for function in (ca.available, downloads.fetch, downloads.verify):
        with pytest.raises(ValueError, match="cifar10, cifar100, mnist"):
            function("minst")
    assert set(ca.ARCHIVES) == set(data.DATASETS) - {"digits"}


def test_the_order_is_compared_with_the_clean_test_set(unpacked, monkeypatch):
    monkeypatch.setattr(ca, "published", lambda dataset: {})
    labels = {"cifar10": torch.arange(COUNT), "mnist": torch.arange(COUNT)}
    monkeypatch.setattr(ca, "_clean_labels", lambda dataset, root: labels[dataset])
    assert (
        len(ca.load_official("cifar10", "fog", 5, root=unpacked))
        == len(ca.load_official("mnist", "fog", None, root=unpacked))
        == COUNT
    )
    labels["cifar10"] = labels["mnist"] = torch.tensor([0, 1, 2, 4, 3, 5])
    for dataset, severity, file in (
        ("cifar10", 5, "CIFAR-10-C/labels.npy"),
        ("mnist", None, "mnist_c/fog/test_labels.npy"),
    ):
        with pytest.raises(ValueError) as caught:
            ca.load_official(dataset, "fog", severity, root=unpacked)
        for fact in (str(unpacked / file), "2 labels differ", "image 3", "is 3 and must be 4"):
            assert fact in str(caught.value)


# Damage ---------------------------------------------------------------------------------------------------------------


def damages(content, number, seed):
    """`number` truncations and `number` single flipped bits of `content`, half of them in the first 200 bytes."""
    draw = random.Random(seed)
    for i in range(number):
        end = min(200, len(content)) if i % 2 else len(content)
        yield content[: draw.randrange(end)]
        bit, flipped = draw.randrange(8 * end), bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bytes(flipped)


@pytest.mark.parametrize("path", [*CIFAR_FILES, *MNIST_FILES])
def test_damaged_arrays_are_refused_by_name(unpacked, path, report):
    dataset, name, severity = ("cifar10", "fog", 2) if path in CIFAR_FILES else ("mnist", path.split("/")[1], None)
    file = unpacked / path
    for damaged in damages((CIFAR_FILES | MNIST_FILES)[path], 25, path):
        file.write_bytes(damaged)
        attempts = [lambda: downloads.verify(dataset, root=unpacked), lambda: downloads.fetch(dataset, root=unpacked)]
        if path.endswith((f"{name}.npy", "images.npy")):
            attempts.append(lambda: ca.load_official(dataset, name, severity, root=unpacked))
        for attempt in attempts:
            with pytest.raises(ValueError) as caught:
                attempt()
            assert str(file) in str(caught.value)
        assert file.read_bytes() == damaged, "a wrong file was changed"
    report(f"array {path}", "50 of 50 truncations and flipped bits refused by name")


@pytest.mark.parametrize("dataset, good", [("cifar10", CIFAR_TAR), ("mnist", MNIST_ZIP)])
def test_damaged_archives_are_refused_by_name_and_nothing_is_written(root, dataset, good, report):
    path = root / ca.ARCHIVES[dataset].file
    for damaged in [*damages(good, 50, dataset), good + b"\0", b""]:
        path.write_bytes(damaged)
        with pytest.raises(ValueError) as caught:
            downloads.fetch(dataset, root=root)
        assert (
            str(path) in str(caught.value) and contents(root) == {path.name: damaged} and list(root.iterdir()) == [path]
        )
        with pytest.raises(ValueError, match=path.name):
            downloads.verify(dataset, root=root)
    report(
        f"archive {path.name}",
        "102 of 102 truncations, flipped bits and other lengths refused by name, nothing written",
    )


@pytest.mark.parametrize(
    "dataset, good, files", [("cifar10", CIFAR_TAR, CIFAR_FILES), ("mnist", MNIST_ZIP, MNIST_FILES)]
)
def test_a_damaged_archive_with_a_forged_sum_gives_whole_arrays_or_its_name(root, monkeypatch, dataset, good, files):
    """The second line of defence: each array is checked again.

    What a zip lets pass (its own sum guards the content) has the right form.
    """
    make = cifar if dataset == "cifar10" else mnist
    path = root / ca.ARCHIVES[dataset].file
    for damaged in damages(good, 50, "forged"):
        path.write_bytes(damaged)
        monkeypatch.setitem(ca.ARCHIVES, dataset, make(damaged))
        try:
            downloads.fetch(dataset, root=root)
        except ValueError as error:
            assert str(path) in str(error)
        found = contents(root)
        assert found.pop(path.name) == damaged and all(files[name] == content for name, content in found.items())
        for name in found:
            (root / name).unlink()


@pytest.mark.parametrize(
    "content",
    [
        saved(FOG[:-1]),
        saved(FOG.astype(np.int8)),
        saved(FOG.astype(np.float32)),
        saved(np.asfortranarray(FOG)),
        saved(FOG[..., :1]),
        saved(FOG.reshape(-1)),
        saved(FOG) + b"\0",
        saved(FOG.reshape(1, *FOG.shape)),
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x09\x00" + bytes(200),
        b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535,
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 500,
        zip_of({"fog.npy": saved(FOG)}),
        saved(FOG).replace(b"(30, 4, 4, 3)", b"(-30,4, 4, 3)"),
        saved(FOG).replace(b"'descr'", b"'other'"),
        saved(FOG.astype("V1")),
    ],
)
def test_wrong_forms_are_refused_even_without_a_sum(root, monkeypatch, content):
    monkeypatch.setitem(ca.ARCHIVES, "cifar10", cifar(sums={}))
    file = root / "CIFAR-10-C" / "fog.npy"
    file.parent.mkdir()
    file.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        ca.load_official("cifar10", "fog", 1, root=root)
    assert str(file) in str(caught.value) and "uint8 (30, 4, 4, 3)" in str(caught.value)
    assert ca.available("cifar10", root=root) == ("fog",)


@pytest.mark.parametrize("path", [*list(CIFAR_FILES)[::2], *list(MNIST_FILES)[:2]])
def test_a_malicious_pickle_is_never_opened(root, tmp_path, monkeypatch, path, report):
    """Not as a bare pickle, not as an array of objects; neither from a file put there by hand nor from an archive with
    a forged sum."""
    mark = tmp_path / "it ran"
    pickle.loads(pickle.dumps(Bomb(mark))).close()
    assert mark.exists(), "the bomb works"
    mark.unlink()
    dataset, make, pack, files = (
        ("cifar10", cifar, tar_of, CIFAR_FILES) if path in CIFAR_FILES else ("mnist", mnist, zip_of, MNIST_FILES)
    )
    for bomb in (pickle.dumps(Bomb(mark)), saved(np.array([Bomb(mark)] * 30), allow_pickle=True)):
        packed = pack(files | {path: bomb})
        archive = make(packed, sums={})
        monkeypatch.setitem(ca.ARCHIVES, dataset, archive)
        (root / archive.file).write_bytes(packed)
        with pytest.raises(ValueError, match=archive.file):
            downloads.fetch(dataset, root=root)
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(bomb)
        with pytest.raises(ValueError, match=Path(path).name):
            downloads.verify(dataset, root=root)
        (root / path).unlink()
    assert not mark.exists()
    report(f"pickles as {path}", "4 offered, 0 executed")


# What is remembered ---------------------------------------------------------------------------------------------------


@pytest.fixture
def sums_taken(monkeypatch):
    """The files whose sums were taken, in a world that is three seconds ahead of the files."""
    taken, take, now = [], ca.md5_sum, time.time_ns
    for module in (ca, downloads):
        monkeypatch.setattr(module, "md5_sum", lambda path: taken.append(Path(path).name) or take(path))
    monkeypatch.setattr(time, "time_ns", lambda: now() + 3 * 10**9)
    return taken


def test_a_sum_is_taken_once(unpacked, sums_taken):
    for _ in range(3):
        ca.load_official("cifar10", "fog", 1, root=unpacked)
        ca.load_official("mnist", "fog", None, root=unpacked)
    assert sums_taken == ["fog.npy", "test_images.npy"]
    downloads.verify("cifar10", root=unpacked)
    assert sorted(sums_taken[2:]) == ["CIFAR-10-C.tar", "fog.npy", "labels.npy", "snow.npy"]


@pytest.mark.parametrize("change", ["content", "content with the old times", "times only", "copied"])
def test_the_first_read_after_a_change_finds_it(unpacked, sums_taken, change):
    file = unpacked / "CIFAR-10-C" / "fog.npy"
    good, times = file.read_bytes(), file.stat()
    ca.load_official("cifar10", "fog", 1, root=unpacked)
    sums_taken.clear()
    if change.startswith("content"):
        file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        if change != "content":
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(ValueError, match="fog.npy is altered"):
            ca.load_official("cifar10", "fog", 1, root=unpacked)
    else:
        file.rename(file.with_name("old"))
        file.write_bytes(good)
        if change == "times only":
            os.utime(file, ns=(1, 1))
        ca.load_official("cifar10", "fog", 1, root=unpacked)
    assert sums_taken == ["fog.npy"]


def test_a_change_within_one_tick_of_the_clock(unpacked, monkeypatch):
    """Nothing is remembered of a file that was just written: it might change again and, by a coarse clock, keep its
    times."""
    now = time.time_ns()
    monkeypatch.setattr(ca, "_file_state", lambda path: [path.stat().st_size, now, now])
    file = unpacked / "mnist_c" / "fog" / "test_images.npy"
    ca.load_official("mnist", "fog", None, root=unpacked)
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ValueError, match="altered"):
        ca.load_official("mnist", "fog", None, root=unpacked)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"7", b'{"a": 1}', b'{"a": {"md5": 1, "state": []}}', b"\xff\xfe", b"[" * 100_000]
)
def test_a_damaged_memory_is_refused_by_name(unpacked, content):
    file = unpacked / "CIFAR-10-C" / ".verified.json"
    file.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        ca.load_official("cifar10", "fog", 1, root=unpacked)
    assert str(file) in str(caught.value) and "delete it" in str(caught.value)
    file.unlink()
    assert len(ca.load_official("cifar10", "fog", 1, root=unpacked)) == COUNT


def test_a_forged_memory_does_not_help_a_wrong_file(unpacked, sums_taken):
    """For CIFAR the published sum decides, not the noted one."""
    file = unpacked / "CIFAR-10-C" / "fog.npy"
    file.write_bytes(saved(FOG ^ 1))
    entry = {"CIFAR-10-C/fog.npy": {"md5": md5(file.read_bytes()), "state": ca._file_state(file)}}
    (unpacked / "CIFAR-10-C" / ".verified.json").write_text(json.dumps(entry))
    with pytest.raises(ValueError, match="fog.npy is altered"):
        ca.load_official("cifar10", "fog", 1, root=unpacked)


def test_a_folder_that_cannot_be_written_to_is_read(unpacked, sums_taken, monkeypatch):
    def refuse(folder, verified):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(ca, "write_sums", refuse)
    for _ in range(2):
        assert len(ca.load_official("cifar10", "fog", 1, root=unpacked)) == COUNT
    assert sums_taken == ["fog.npy", "fog.npy"]


def test_mnist_copied_by_hand_is_checked_for_its_form(unpacked):
    (unpacked / "mnist_c.zip").unlink()
    (unpacked / "mnist_c" / ".verified.json").unlink()
    assert set(downloads.verify("mnist", root=unpacked).values()) == {"form"}
    assert len(ca.load_official("mnist", "fog", None, root=unpacked)) == COUNT


# Hostile archives -----------------------------------------------------------------------------------------------------


def special(name, kind, target=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def entry(name, mode=stat.S_IFREG | 0o644):
    member = zipfile.ZipInfo(name)
    member.create_system, member.external_attr = 3, mode << 16
    return member


TARS = {
    "dots": tar_of(CIFAR_FILES | {"CIFAR-10-C/../../outside/dots": b"!"}),
    "dots first": tar_of({"../outside/dots": b"!"} | CIFAR_FILES),
    "backslashes": tar_of(CIFAR_FILES | {"CIFAR-10-C\\..\\..\\outside": b"!"}),
    "drive": tar_of(CIFAR_FILES | {"C:/outside": b"!"}),
    "symlink in place of the folder": tar_of({}, more=[special("CIFAR-10-C", tarfile.SYMTYPE, "../outside")])[:512]
    + tar_of(CIFAR_FILES),
    "symlink in place of an array": tar_of(
        CIFAR_FILES, more=[special("CIFAR-10-C/fog.npy", tarfile.SYMTYPE, "/etc/passwd")]
    ),
    "hard link": tar_of(CIFAR_FILES, more=[special("CIFAR-10-C/fog.npy", tarfile.LNKTYPE, "../../outside/kept")]),
    "character device": tar_of(CIFAR_FILES, more=[special("CIFAR-10-C/zero", tarfile.CHRTYPE)]),
    "block device": tar_of(CIFAR_FILES, more=[special("CIFAR-10-C/disk", tarfile.BLKTYPE)]),
    "pipe": tar_of(CIFAR_FILES, more=[special("CIFAR-10-C/pipe", tarfile.FIFOTYPE)]),
    "folder with dots": tar_of(CIFAR_FILES, more=[special("../outside/folder", tarfile.DIRTYPE)]),
}
ZIPS = {
    "dots": zip_of(MNIST_FILES, more=[(entry("mnist_c/../../outside/dots"), b"!")]),
    "backslashes": zip_of(MNIST_FILES, more=[(entry("mnist_c\\..\\..\\outside"), b"!")]),
    "drive": zip_of(MNIST_FILES, more=[(entry("C:\\outside"), b"!")]),
    "symlink": zip_of(MNIST_FILES, more=[(entry("mnist_c/link", stat.S_IFLNK | 0o777), b"../../outside")]),
    "symlink named like a folder": zip_of(
        MNIST_FILES, more=[(entry("mnist_c/link/", stat.S_IFLNK | 0o777), b"../../outside")]
    ),
    "device": zip_of(MNIST_FILES, more=[(entry("mnist_c/zero", stat.S_IFCHR | 0o666), b"")]),
    "pipe": zip_of(MNIST_FILES, more=[(entry("mnist_c/pipe", stat.S_IFIFO | 0o666), b"")]),
}


@pytest.mark.parametrize(
    "dataset, kind",
    [
        ("cifar10", "absolute"),
        *(("cifar10", kind) for kind in TARS),
        ("mnist", "absolute"),
        *(("mnist", kind) for kind in ZIPS),
    ],
)
def test_a_hostile_archive_is_named_and_writes_nothing(root, tmp_path, monkeypatch, dataset, kind):
    """Even with the published sum, which cannot be."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_bytes(b"before")
    made, pack, files, make = (
        (TARS, tar_of, CIFAR_FILES, cifar) if dataset == "cifar10" else (ZIPS, zip_of, MNIST_FILES, mnist)
    )
    packed = pack(files | {f"{outside}/absolute": b"!"}) if kind == "absolute" else made[kind]
    archive = make(packed)
    monkeypatch.setitem(ca.ARCHIVES, dataset, archive)
    (root / archive.file).write_bytes(packed)
    with pytest.raises(ValueError) as caught:
        downloads.fetch(dataset, root=root)
    for fact in (str(root / archive.file), "its member '", "Nothing was written"):
        assert fact in str(caught.value)
    assert contents(tmp_path) == {f"root/{archive.file}": packed, "outside/kept": b"before"}
    assert list(root.iterdir()) == [root / archive.file]


def test_rights_are_not_taken_from_the_archive(root, monkeypatch):
    """No set-user bit, nothing that others may write to."""
    member = tarfile.TarInfo("CIFAR-10-C/fog.npy")
    member.mode, member.size = 0o6777, len(CIFAR_FILES[member.name])
    packed = io.BytesIO(tar_of(CIFAR_FILES))
    with tarfile.open(fileobj=packed, mode="a") as tar:
        tar.addfile(member, io.BytesIO(CIFAR_FILES[member.name]))
    monkeypatch.setitem(ca.ARCHIVES, "cifar10", cifar(packed.getvalue()))
    (root / "CIFAR-10-C.tar").write_bytes(packed.getvalue())
    downloads.fetch("cifar10", root=root)
    assert (root / member.name).stat().st_mode & 0o6022 == 0


@pytest.mark.parametrize(
    "packed, said",
    [
        (tar_of({"CIFAR-10-C/fog.npy": CIFAR_FILES["CIFAR-10-C/fog.npy"]}), "no array"),
        (tar_of(CIFAR_FILES | {"CIFAR-10-C/fog.npy": bytes(200_000)}), "no array CIFAR-10-C/fog.npy of at most"),
        (tar_of(CIFAR_FILES | {"CIFAR-10-C/fog.npy": saved(FOG[:5])}), "holds uint8"),
        (tar_of(CIFAR_FILES | {"CIFAR-10-C/fog.npy": saved(FOG ^ 1)}), "md5"),
        (b"", ""),
        (bytes(4000), ""),
        (MNIST_ZIP, ""),
    ],
)
def test_archives_with_other_content(root, monkeypatch, packed, said):
    monkeypatch.setitem(ca.ARCHIVES, "cifar10", cifar(packed))
    (root / "CIFAR-10-C.tar").write_bytes(packed)
    with pytest.raises(ValueError) as caught:
        downloads.fetch("cifar10", root=root)
    assert str(root / "CIFAR-10-C.tar") in str(caught.value) and said in str(caught.value)
    assert not (root / "CIFAR-10-C" / "fog.npy").exists() and not list(root.rglob(".unpack-*"))


def test_a_python_whose_tarfile_has_no_filter_unpacks_too(root, monkeypatch):
    """3.10.11, 3.11.3 and older ones of these, as in Debian 12."""
    monkeypatch.setitem(ca.ARCHIVES, "cifar10", cifar(CIFAR_TAR))
    (root / "CIFAR-10-C.tar").write_bytes(CIFAR_TAR)
    monkeypatch.delattr(tarfile, "data_filter")
    monkeypatch.setattr(tarfile.TarFile, "extract", None)
    monkeypatch.setattr(tarfile.TarFile, "extractall", None)
    downloads.fetch("cifar10", root=root)
    assert {name: (root / name).read_bytes() for name in CIFAR_FILES} == CIFAR_FILES


# Downloads ------------------------------------------------------------------------------------------------------------


class Site(BaseHTTPRequestHandler):
    """A server after the plan of its owner: `cut` bytes per answer, `ranges` honoured or not, `length` told or not,
    `status` if not 200."""

    def do_GET(self):
        plan, wish = self.server.plan, self.headers.get("Range")
        self.server.log.append(wish)
        start = int(wish[len("bytes=") : -1]) if wish and plan.get("ranges", True) else 0
        start += plan.get("shift", 0) if start else 0
        if plan.get("status"):
            return self.send_error(plan["status"])
        content = plan["content"]
        self.send_response(206 if start else 200)
        if plan.get("length", True):
            self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(content[start:][: plan.get("cut")])
        self.wfile.flush()
        if plan.get("reset"):  # not a polite end: a reset
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.close_connection = True

    def log_message(self, *_):
        pass


@contextmanager
def serving(content, **plan):
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        server.plan, server.log, server.url = (
            plan | {"content": content},
            [],
            f"http://127.0.0.1:{server.server_port}/CIFAR-10-C.tar",
        )
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        try:
            yield server
        finally:
            server.shutdown()


@pytest.fixture
def online(tmp_path, monkeypatch):
    """An empty root, and a function that makes CIFAR-10-C live at an address."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "new" / "root", lambda url: monkeypatch.setitem(ca.ARCHIVES, "cifar10", cifar(url=url))


def test_a_download_is_unpacked_once(online, capfd):
    root, publish = online
    with serving(CIFAR_TAR) as server:
        publish(server.url)
        for _ in range(2):
            assert downloads.fetch("cifar10", root=root) == root / "CIFAR-10-C"
    assert server.log == [None] and contents(root) == CIFAR_FILES | {"CIFAR-10-C.tar": CIFAR_TAR}
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "100%" in said, "one bar"
    (root / "CIFAR-10-C.tar").unlink()
    downloads.fetch("cifar10", root=root)  # nothing is missing: nothing is asked for


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("length", [True, False])
def test_a_line_that_breaks_is_taken_up_again(online, capfd, reset, length):
    root, publish = online
    with serving(CIFAR_TAR, cut=7000, reset=reset, length=length) as server:
        publish(server.url)
        downloads.fetch("cifar10", root=root)
    assert contents(root) == CIFAR_FILES | {"CIFAR-10-C.tar": CIFAR_TAR}
    assert (
        server.log[0] is None
        and len(server.log) >= len(CIFAR_TAR) / 7000
        and all(wish.startswith("bytes=") for wish in server.log[1:])
    )
    assert capfd.readouterr().err.count("\n") == 1, "one bar"


def test_a_later_call_continues_what_an_earlier_one_left(online):
    root, publish = online
    with serving(CIFAR_TAR, cut=7000, ranges=False) as server:
        publish(server.url)
        with pytest.raises(FileNotFoundError) as caught:
            downloads.fetch("cifar10", root=root)
    for fact in (str(root / "CIFAR-10-C.tar"), server.url, "7,000 of", "call again to continue", md5(CIFAR_TAR)):
        assert fact in str(caught.value)
    assert contents(root) == {"CIFAR-10-C.tar.part": CIFAR_TAR[:7000]}
    with serving(CIFAR_TAR) as server:
        publish(server.url)
        downloads.fetch("cifar10", root=root)
    assert server.log == ["bytes=7000-"] and contents(root) == CIFAR_FILES | {"CIFAR-10-C.tar": CIFAR_TAR}


@pytest.mark.parametrize("part", [b"", CIFAR_TAR[:9000], CIFAR_TAR])
def test_a_server_that_ignores_range(online, part):
    root, publish = online
    root.mkdir(parents=True)
    (root / "CIFAR-10-C.tar.part").write_bytes(part)
    with serving(CIFAR_TAR, ranges=False) as server:
        publish(server.url)
        downloads.fetch("cifar10", root=root)
    assert len(server.log) == (part != CIFAR_TAR) and contents(root) == CIFAR_FILES | {"CIFAR-10-C.tar": CIFAR_TAR}


@pytest.mark.parametrize(
    "content, plan",
    [
        (CIFAR_TAR[:-1] + b"?", {}),
        (CIFAR_TAR[:-1] + b"?", {"length": False}),
        (CIFAR_TAR + b"?", {"length": False}),
        (CIFAR_TAR[:-512], {}),
        (CIFAR_TAR + bytes(512), {}),
        (b"", {}),
    ],
)
def test_wrong_content_or_length_is_not_kept(online, content, plan):
    root, publish = online
    with serving(content, **plan) as server:
        publish(server.url)
        with pytest.raises(ValueError) as caught:
            downloads.fetch("cifar10", root=root)
    assert server.url in str(caught.value) and f"{len(CIFAR_TAR):,}" in str(caught.value) and contents(root) == {}


def test_a_stream_without_end_is_left_early(online):
    root, publish = online
    with serving(CIFAR_TAR + bytes(3 * 10**6), length=False) as server:
        publish(server.url)
        with pytest.raises(ValueError) as caught:
            downloads.fetch("cifar10", root=root)
    got = int(re.search(r"gave ([\d,]+) bytes", str(caught.value))[1].replace(",", ""))
    assert len(CIFAR_TAR) < got < 10**6 and contents(root) == {}


@pytest.mark.parametrize("part", [CIFAR_TAR[:100] + b"?" + CIFAR_TAR[101:9000], CIFAR_TAR + b"?"])
def test_a_wrong_beginning_is_found_and_the_next_call_starts_anew(online, part):
    root, publish = online
    root.mkdir(parents=True)
    (root / "CIFAR-10-C.tar.part").write_bytes(part)
    with serving(CIFAR_TAR) as server:
        publish(server.url)
        with pytest.raises(ValueError, match="CIFAR-10-C.tar.part was not CIFAR-10-C.tar and was deleted"):
            downloads.fetch("cifar10", root=root)
        assert contents(root) == {}
        downloads.fetch("cifar10", root=root)
    assert contents(root) == CIFAR_FILES | {"CIFAR-10-C.tar": CIFAR_TAR}


@pytest.mark.parametrize("plan", [{"status": 404}, {"status": 503}, {"cut": 0}])
def test_a_server_that_gives_nothing(online, plan):
    root, publish = online
    with serving(CIFAR_TAR, **plan) as server:
        publish(server.url)
        with pytest.raises(FileNotFoundError) as caught:
            downloads.fetch("cifar10", root=root)
    assert (
        str(root / "CIFAR-10-C.tar") in str(caught.value)
        and len(server.log) == 1
        and set(contents(root).values()) <= {b""}
    )


def test_a_server_that_gives_another_stretch(online):
    root, publish = online
    root.mkdir(parents=True)
    (root / "CIFAR-10-C.tar.part").write_bytes(CIFAR_TAR[:9000])
    with serving(CIFAR_TAR, shift=512) as server:
        publish(server.url)
        with pytest.raises(ValueError, match="from 9000 on"):
            downloads.fetch("cifar10", root=root)
    assert contents(root) == {"CIFAR-10-C.tar.part": CIFAR_TAR[:9000]}


def test_no_network(online):
    root, publish = online
    publish("http://127.0.0.1:9/CIFAR-10-C.tar")
    with pytest.raises(FileNotFoundError, match="refused"):
        downloads.fetch("cifar10", root=root)
    assert contents(root) == {}


def test_a_truncated_archive_can_be_continued_as_its_error_says(online):
    root, publish = online
    root.mkdir(parents=True)
    (root / "CIFAR-10-C.tar").write_bytes(CIFAR_TAR[:5000])
    with serving(CIFAR_TAR) as server:
        publish(server.url)
        with pytest.raises(ValueError, match="name it CIFAR-10-C.tar.part"):
            downloads.fetch("cifar10", root=root)
        (root / "CIFAR-10-C.tar").rename(root / "CIFAR-10-C.tar.part")
        downloads.fetch("cifar10", root=root)
    assert server.log == ["bytes=5000-"]


# Full disks -----------------------------------------------------------------------------------------------------------


def test_room_is_asked_for_before_the_first_byte(root, monkeypatch):
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match="CIFAR-10-C.tar and its arrays need") as caught:
        downloads.fetch("cifar10", root=root)
    assert caught.value.filename == str(root) and list(root.iterdir()) == []


FULL = """
    import resource, signal, sys
    import test_archives as small
    from sparse_nb.robustness.corruptions import archives as ca, downloads
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    ca.ARCHIVES["cifar10"] = small.cifar(url=sys.argv[1])
    for root, limit in zip(sys.argv[2::2], sys.argv[3::2]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
        try:
            downloads.fetch("cifar10", root=root)
        except OSError as error:
            print(f"{type(error).__name__}: {error}")
"""


def test_a_full_disk_leaves_no_half_file_under_a_final_name(tmp_path):
    """A limit on the size of files stands for the end of the disk; it strikes once in the download and once in the
    first array."""
    download, array = tmp_path / "download", tmp_path / "array"
    array.mkdir()
    (array / "CIFAR-10-C.tar").write_bytes(CIFAR_TAR)
    with serving(CIFAR_TAR) as server:
        command = [sys.executable, "-c", textwrap.dedent(FULL), server.url, download, "3000", array, "1000"]
        environment = os.environ | {"no_proxy": "127.0.0.1", "PYTHONPATH": str(Path(__file__).parent)}
        run = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True)
    first, second = run.stdout.splitlines()
    assert (
        "File too large" in first
        and str(download / "CIFAR-10-C.tar.part") in first
        and "call again to continue" in first
    )
    assert "File too large" in second and str(array / "CIFAR-10-C.tar") in second
    assert contents(download) == {"CIFAR-10-C.tar.part": CIFAR_TAR[:3000]} and contents(array) == {
        "CIFAR-10-C.tar": CIFAR_TAR
    }


# The frost ------------------------------------------------------------------------------------------------------------


def test_frost_photographs(tmp_path, monkeypatch):
    colours = {name: pixels(5, 7, 3, seed=i) for i, name in enumerate(downloads._FROST_MD5)}
    pictures = {}
    for name, array in colours.items():
        file = io.BytesIO()
        Image.fromarray(array).save(file, "png")
        pictures[name] = file.getvalue()
    monkeypatch.setattr(downloads, "_FROST_MD5", {name: md5(content) for name, content in pictures.items()})
    asked = []

    def download_file(path, expected, urls):
        asked.extend(urls)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pictures[path.name])

    monkeypatch.setattr(downloads, "download_file", download_file)
    assert downloads.frost_photographs(root=tmp_path) is None and list(tmp_path.iterdir()) == []
    six = downloads.frost_photographs(root=tmp_path, download=True)
    assert [np.array_equal(a, b) for a, b in zip(six, colours.values(), strict=True)] == [True] * 6 and six[
        0
    ].dtype == np.uint8
    assert asked == [downloads._FROST_URL + name for name in pictures]
    (tmp_path / "frost" / "frost4.jpg").write_bytes(pictures["frost4.jpg"][:-1])
    with pytest.raises(ValueError, match="frost4.jpg is not the published file"):
        downloads.frost_photographs(root=tmp_path)
    (tmp_path / "frost" / "frost4.jpg").unlink()
    assert downloads.frost_photographs(root=tmp_path) is None
