"""What the chapter on data cannot test in a cell: hostile and broken files, no network, read-only folders."""

import gzip
import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100, MNIST

from sparse_nb import data

RED = (200, 30, 20)


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def idx(tensor):
    header = b"\0\0\x08" + bytes([tensor.ndim]) + b"".join(size.to_bytes(4, "big") for size in tensor.shape)
    return header + tensor.to(torch.uint8).numpy().tobytes()


def contents(folder):
    """Every file below the folder with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()
    }


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    """A root with an MNIST of 12 training and 5 test images, whose sums torchvision's table now holds."""
    digits = torch.randint(256, (17, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(17) % 10
    files = {
        "train-images-idx3-ubyte.gz": idx(digits[:12]),
        "train-labels-idx1-ubyte.gz": idx(labels[:12]),
        "t10k-images-idx3-ubyte.gz": idx(digits[12:]),
        "t10k-labels-idx1-ubyte.gz": idx(labels[12:]),
    }
    raw = tmp_path / "root" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in files.items():
        (raw / name).write_bytes(gzip.compress(content))
    monkeypatch.setattr(MNIST, "resources", [(name, md5((raw / name).read_bytes())) for name in files])
    monkeypatch.setitem(data._SHA256, "mnist", data._sha256_of(data._sums("mnist")))
    return tmp_path / "root"


def small_cifar(reader):
    """The files of a CIFAR with ten red training images and ten black test images, by path below the root."""
    pixels = torch.tensor(RED, dtype=torch.uint8)[:, None].expand(3, 1024).reshape(1, -1).repeat(10, 1).numpy()
    key = "fine_labels" if reader is CIFAR100 else "labels"
    files = {name: {"data": pixels, key: list(range(10))} for name, _ in reader.train_list}
    files |= {name: {"data": pixels * 0, key: list(range(10))[::-1]} for name, _ in reader.test_list}
    files[reader.meta["filename"]] = {
        reader.meta["key"]: [f"kind {i}" for i in range(100 if reader is CIFAR100 else 10)]
    }
    return {f"{reader.base_folder}/{name}": pickle.dumps(content) for name, content in files.items()}


def archive(files):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            else:  # a link
                member.type, member.linkname = tarfile.SYMTYPE, str(content)
                tar.addfile(member)
    return packed.getvalue()


def publish(monkeypatch, reader, files, packed):
    """Make torchvision's tables name these files."""
    sums = {path.split("/")[1]: md5(content) for path, content in files.items()}
    monkeypatch.setattr(reader, "train_list", [[name, sums[name]] for name, _ in reader.train_list])
    monkeypatch.setattr(reader, "test_list", [[name, sums[name]] for name, _ in reader.test_list])
    monkeypatch.setattr(reader, "meta", reader.meta | {"md5": sums[reader.meta["filename"]]})
    monkeypatch.setattr(reader, "tgz_md5", md5(packed))
    name = reader.__name__.lower()
    monkeypatch.setitem(data._SHA256, name, data._sha256_of(data._sums(name)))


@pytest.fixture(params=[CIFAR10, CIFAR100], ids=["cifar10", "cifar100"])
def cifar(request, tmp_path, monkeypatch):
    """A root that holds a small CIFAR's archive and nothing else; with the dataset's name, its reader and its files."""
    reader, root = request.param, tmp_path / "root"
    files = small_cifar(reader)
    packed = archive(files)
    publish(monkeypatch, reader, files, packed)
    root.mkdir(exist_ok=True)
    (root / reader.filename).write_bytes(packed)
    return request.param.__name__.lower(), root, reader, files


@pytest.fixture
def no_network(monkeypatch):
    """A downloader that reaches nothing, and the list of the addresses that it was asked for."""
    asked = []

    def download_url_to_file(url, path):
        asked.append(url)
        Path(path).write_bytes(b"half of a file")
        raise URLError("Temporary failure in name resolution")

    monkeypatch.setattr("torch.hub.download_url_to_file", download_url_to_file)
    return asked


# MNIST --------------------------------------------------------------------------------------------------------------


def test_mnist_is_read_as_it_was_written(mnist):
    train, test = (data.load_images("mnist", split, root=mnist) for split in data.SPLITS)
    assert train.shape == test.shape == (1, 28, 28) and (len(train), len(test)) == (12, 5)
    assert train.pixels.dtype == torch.uint8 and train.labels.dtype == torch.int64
    everything = torch.randint(256, (17, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.cat([train.pixels, test.pixels])[:, 0], everything)
    assert (
        test.labels.tolist() == [2, 3, 4, 5, 6] and test.name == "mnist" and test.split == "test" and test.classes == 10
    )


@pytest.mark.parametrize("damage", ["truncated", "empty", "one bit", "longer", "not gzip"])
@pytest.mark.parametrize("part", ["images-idx3", "labels-idx1"])
def test_a_damaged_mnist_file_is_refused_by_name_and_left_alone(mnist, no_network, damage, part):
    path = mnist / "MNIST" / "raw" / f"t10k-{part}-ubyte.gz"
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0b0001_0000
    bad = {
        "truncated": good[: len(good) // 2],
        "empty": b"",
        "one bit": bytes(flipped),
        "longer": good + b"\0",
        "not gzip": b"x" * 99,
    }[damage]
    path.write_bytes(bad)
    before = contents(mnist)
    with pytest.raises(ValueError) as caught:
        data.load_images("mnist", "test", root=mnist)
    for fact in (str(path), md5(good), md5(bad), f"{len(bad):,} bytes", "Delete it", "SPARSE_NB_DATA"):
        assert fact in str(caught.value)
    assert contents(mnist) == before and no_network == []
    assert len(data.load_images("mnist", "train", root=mnist)) == 12


def test_decompressed_copies_beside_the_originals_are_not_read(mnist):
    for name, _ in MNIST.resources:
        (mnist / "MNIST" / "raw" / name.removesuffix(".gz")).write_bytes(b"anything")
    assert len(data.load_images("mnist", "test", root=mnist)) == 5


def decompress(mnist, monkeypatch):
    """Replace the files of an MNIST by what they decompress to; the sums of that are then the accepted ones."""
    for path in list((mnist / "MNIST" / "raw").glob("*.gz")):
        content = gzip.decompress(path.read_bytes())
        path.with_suffix("").write_bytes(content)
        path.unlink()
        monkeypatch.setitem(data._DECOMPRESSED_MD5, path.stem, md5(content))


def test_decompressed_files_alone_are_read_without_a_network(mnist, no_network, monkeypatch):
    wanted = [data.load_images("mnist", split, root=mnist) for split in data.SPLITS]
    decompress(mnist, monkeypatch)
    before = contents(mnist)
    for split, images in zip(data.SPLITS, wanted, strict=True):
        found = data.load_images("mnist", split, root=mnist)
        assert torch.equal(found.pixels, images.pixels) and torch.equal(found.labels, images.labels)
    assert contents(mnist) == before and no_network == []


@pytest.mark.parametrize("damage", ["truncated", "empty", "one bit"])
def test_a_damaged_decompressed_file_is_refused_by_name_and_left_alone(mnist, no_network, monkeypatch, damage):
    decompress(mnist, monkeypatch)
    path = mnist / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    good = path.read_bytes()
    bad = {"truncated": good[:-1], "empty": b"", "one bit": good[:-1] + bytes([good[-1] ^ 1])}[damage]
    path.write_bytes(bad)
    with pytest.raises(ValueError, match="is not the published file") as caught:
        data.load_images("mnist", "test", root=mnist)
    assert all(fact in str(caught.value) for fact in (str(path), md5(good), md5(bad)))
    assert path.read_bytes() == bad and no_network == []


def test_a_missing_mnist_file_without_network(mnist, no_network):
    path = mnist / "MNIST" / "raw" / "train-labels-idx1-ubyte.gz"
    expected = md5(path.read_bytes())
    path.unlink()
    before = contents(mnist)
    with pytest.raises(FileNotFoundError) as caught:
        data.load_images("mnist", "train", root=mnist)
    for fact in (str(path), expected, "name resolution", "Check the network", "SPARSE_NB_DATA", *no_network):
        assert fact in str(caught.value)
    assert no_network == [mirror + path.name for mirror in MNIST.mirrors]
    assert contents(mnist) == before, "half a download was left behind"


def test_what_is_missing_is_downloaded_once_and_nothing_else(mnist, monkeypatch):
    source = contents(mnist / "MNIST" / "raw")
    asked = []

    def download_url_to_file(url, path):
        asked.append(url)
        wrong = b"a damaged file" if url.startswith(MNIST.mirrors[0]) else b""
        Path(path).write_bytes(wrong or source[Path(path).name])

    monkeypatch.setattr("torch.hub.download_url_to_file", download_url_to_file)
    (mnist / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz").unlink()
    for _ in range(2):
        assert len(data.load_images("mnist", "test", root=mnist)) == 5
    assert asked == [mirror + "t10k-images-idx3-ubyte.gz" for mirror in MNIST.mirrors]
    assert contents(mnist / "MNIST" / "raw") == source


def test_a_first_download_makes_its_own_folders(tmp_path, mnist, monkeypatch):
    source = contents(mnist / "MNIST" / "raw")
    monkeypatch.setattr(
        "torch.hub.download_url_to_file", lambda url, path: Path(path).write_bytes(source[Path(path).name])
    )
    monkeypatch.setenv("SPARSE_NB_DATA", str(tmp_path / "new" / "place"))
    assert len(data.load_images("mnist", "test")) == 5
    assert sorted(contents(tmp_path / "new")) == [
        f"place/MNIST/raw/t10k-{part}-ubyte.gz" for part in ("images-idx3", "labels-idx1")
    ]


# CIFAR --------------------------------------------------------------------------------------------------------------


def test_cifar_comes_out_of_its_archive(cifar, no_network):
    name, root, reader, files = cifar
    train, test = (data.load_images(name, split, root=root) for split in data.SPLITS)
    assert (
        len(train) == 10 * len(reader.train_list)
        and len(test) == 10
        and train.classes == (100 if reader is CIFAR100 else 10)
    )
    assert (
        train.shape == (3, 32, 32) and train.pixels.is_contiguous() and train.pixels[0, :, 5, 7].tolist() == list(RED)
    )
    assert train.labels[:10].tolist() == list(range(10)) and test.labels.tolist() == list(range(10))[::-1]
    assert test.class_names[2] == "kind 2" and no_network == []
    assert contents(root) == files | {reader.filename: (root / reader.filename).read_bytes()}


def test_only_missing_batches_are_unpacked(cifar):
    name, root, reader, files = cifar
    data.load_images(name, "test", root=root)
    kept, gone = (root / reader.base_folder / entry[0][0] for entry in (reader.test_list, reader.train_list))
    old = kept.stat().st_mtime_ns
    gone.unlink()
    assert len(data.load_images(name, "train", root=root)) and kept.stat().st_mtime_ns == old
    (root / reader.filename).unlink()
    assert len(data.load_images(name, "train", root=root)), "whole batches need no archive"


def test_a_flipped_bit_in_a_batch_or_the_archive(cifar, no_network):
    name, root, reader, files = cifar
    data.load_images(name, "test", root=root)
    for path in [root / relative for relative in files]:
        good = path.read_bytes()
        bad = bytearray(good)
        bad[len(bad) // 3] ^= 1
        path.write_bytes(bad)
        with pytest.raises(ValueError) as caught:
            data.load_images(name, "test", root=root)
        for fact in (str(path), md5(good), md5(bad), "Delete it"):
            assert fact in str(caught.value)
        assert path.read_bytes() == bad
        path.unlink()
        data.load_images(name, "test", root=root)  # what the message advises: delete it, call again
    packed = root / reader.filename
    packed.write_bytes(packed.read_bytes()[:-1])
    path.unlink()
    with pytest.raises(ValueError, match=reader.filename):
        data.load_images(name, "test", root=root)
    assert no_network == []


class Bomb:
    """A pickle that leaves a mark where it is opened."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


def test_a_malicious_pickle_is_never_opened(cifar, tmp_path, no_network, report):
    name, root, reader, files = cifar
    data.load_images(name, "test", root=root)
    mark = tmp_path / "it ran"
    pickle.loads(pickle.dumps(Bomb(mark))).close()
    assert mark.exists(), "the bomb works"
    mark.unlink()
    for relative, content in files.items():
        (root / relative).write_bytes(pickle.dumps(Bomb(mark)))
        for split in data.SPLITS:
            with pytest.raises(ValueError, match=relative.split("/")[1]):
                data.load_images(name, split, root=root)
        (root / relative).write_bytes(content)
    assert not mark.exists()
    assert len(data.load_images(name, "test", root=root)) == 10
    report(f"pickles as {name} batches", f"{2 * len(files)} offered, 0 executed")


def test_a_hostile_archive_writes_nothing_outside(tmp_path, monkeypatch):
    """Even one with the published sum, which cannot be: only the known files leave it, to the known places."""
    files = small_cifar(CIFAR10)
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir(), outside.mkdir()
    packed = archive(
        {
            str(outside / "absolute"): b"!",
            "../outside/dots": b"!",
            "cifar-10-batches-py/../../outside/inner": b"!",
            "cifar-10-batches-py/link": outside,
            "cifar-10-batches-py/link/through": b"!",
            "more": b"!",
        }
        | files
    )
    publish(monkeypatch, CIFAR10, files, packed)
    (root / CIFAR10.filename).write_bytes(packed)
    assert len(data.load_images("cifar10", "test", root=root)) == 10
    assert list(outside.iterdir()) == [] and sorted(tmp_path.iterdir()) == [outside, root]
    assert contents(root) == files | {CIFAR10.filename: packed}


def test_an_archive_whose_batch_is_wrong_leaves_no_batch(tmp_path, monkeypatch):
    files = small_cifar(CIFAR10)
    mark = tmp_path / "it ran"
    packed = archive(files | {"cifar-10-batches-py/test_batch": pickle.dumps(Bomb(mark))})
    publish(monkeypatch, CIFAR10, files, packed)
    (tmp_path / CIFAR10.filename).write_bytes(packed)
    with pytest.raises(ValueError):
        data.load_images("cifar10", "test", root=tmp_path)
    assert not mark.exists() and not (tmp_path / "cifar-10-batches-py" / "test_batch").exists()


def test_a_missing_cifar_without_network(cifar, no_network):
    name, root, reader, files = cifar
    (root / reader.filename).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        data.load_images(name, "test", root=root)
    for fact in (str(root / reader.filename), reader.tgz_md5, reader.url, "name resolution"):
        assert fact in str(caught.value)
    assert contents(root) == {} and no_network == [reader.url]


# Folders ------------------------------------------------------------------------------------------------------------


def test_the_root_is_the_argument_then_the_variable_then_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("SPARSE_NB_DATA", "~/variable")
    assert data.data_root(str(tmp_path / "argument")) == data.data_root(tmp_path / "argument") == tmp_path / "argument"
    assert data.data_root() == tmp_path / "home" / "variable"
    monkeypatch.setenv("SPARSE_NB_DATA", "")
    assert data.data_root() == tmp_path / "cache" / "sparse-nb"
    monkeypatch.delenv("SPARSE_NB_DATA")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data.data_root() == tmp_path / "home" / ".cache" / "sparse-nb"
    assert list(tmp_path.iterdir()) == []


def test_read_only_roots(mnist, cifar):
    """A complete root is only read. A superuser may write anywhere, so this says nothing then; the next test does."""
    name, root, reader, files = cifar
    assert root == mnist
    data.load_images(name, "test", root=root)
    before = contents(root)
    folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
    for path in folders:
        path.chmod(0o555)
    try:
        if os.access(root, os.W_OK):
            pytest.skip("this user may write into read-only folders (a superuser), so they cannot be tried")
        assert (
            len(data.load_images("mnist", "test", root=root)) == 5
            and len(data.load_images(name, "test", root=root)) == 10
        )
    finally:
        for path in folders:
            path.chmod(0o755)
    assert contents(root) == before


def test_a_complete_root_is_never_written_to(mnist, cifar, monkeypatch):
    """The same for a superuser: no file below the root is opened for writing, made, moved or deleted."""
    name, root, reader, files = cifar
    data.load_images(name, "test", root=root)
    before = {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]}
    for split in data.SPLITS:
        data.load_images("mnist", split, root=root)
        data.load_images(name, split, root=str(root))
    assert {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]} == before


# Without files ------------------------------------------------------------------------------------------------------


def test_importing_is_light():
    """Nothing but the digits needs scikit-learn, which takes a second to import."""
    code = "import sys, sparse_nb.data as d; d.checksum('digits'); d.checksum('mnist'); print('sklearn' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "False"
    )


def test_checksums_never_change():
    """Runs are named by them: a change here would orphan every run on every disk."""
    assert {name: data.checksum(name) for name in data.DATASETS} == {
        "digits": "eaf8f003dea1218f1b399d379705c39cadbe0c47d20182c8ce7b1f2f4ac4b0e2",
        "mnist": "cd31fb6748fdceb4ab80bd6a616c9bb2c8516b951b5d8e347d307ddd706e144a",
        "cifar10": "030ea44caf03cf7f20acfa74d8d265ae7d4637a46ce8eca33e76c36e209f1ce5",
        "cifar100": "218f03adb7efef6be76e56f063ffad0ba55c7685ef5f1601cf2d2bd7c7347c8a",
    }


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_the_same_bits_on_a_gpu():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(data.as_float(levels.cuda()).cpu(), data.as_float(levels))
    digits = data.load_images("digits", "test", device="cuda")
    assert digits.pixels.is_cuda and digits.labels.is_cuda and digits.take([1, 2]).pixels.is_cuda
    assert torch.equal(digits.to("cpu").pixels, data.load_images("digits", "test").pixels)


# The real sets ------------------------------------------------------------------------------------------------------


def real(dataset, split):
    missing = [path for path in data.published(dataset) if not (data.data_root() / path).exists()]
    if missing:
        pytest.skip(f"the real {dataset} is not there: {data.data_root() / missing[0]} is missing (set SPARSE_NB_DATA)")
    return data.load_images(dataset, split)


def test_the_real_mnist_decompressed(tmp_path, no_network):
    packed, plain = real("mnist", "test"), tmp_path / "MNIST" / "raw"
    plain.mkdir(parents=True)
    for path in (data.data_root() / "MNIST" / "raw").glob("*.gz"):
        (plain / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    for split, count in (("test", 10_000), ("train", 60_000)):
        assert len(data.load_images("mnist", split, root=tmp_path)) == count
    assert torch.equal(data.load_images("mnist", "test", root=tmp_path).pixels, packed.pixels) and no_network == []


def test_the_real_mnist():
    train, test = real("mnist", "train"), real("mnist", "test")
    assert train.pixels.shape == (60_000, 1, 28, 28) and test.pixels.shape == (10_000, 1, 28, 28)
    assert train.labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert train.labels[:5].tolist() == [5, 0, 4, 1, 9] and test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert round(data.as_float(train.pixels).mean(dtype=torch.float64).item(), 4) == 0.1307
    assert round(data.as_float(train.pixels).double().std().item(), 4) == 0.3081


def test_the_real_cifar10():
    train, test = real("cifar10", "train"), real("cifar10", "test")
    assert train.pixels.shape == (50_000, 3, 32, 32) and test.pixels.shape == (10_000, 3, 32, 32)
    assert train.labels.bincount().tolist() == [5000] * 10 and test.labels.bincount().tolist() == [1000] * 10
    assert test.class_names == (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )
    means = train.pixels.float().mean((0, 2, 3), dtype=torch.float64) / 255
    assert [round(mean, 4) for mean in means.tolist()] == [0.4914, 0.4822, 0.4465]
    assert train.labels[0] == 6 and train.pixels[0, :, 0, 0].tolist() == [
        59,
        62,
        63,
    ]  # a frog; the first pixel's R, G, B


def test_the_real_cifar100():
    train, test = real("cifar100", "train"), real("cifar100", "test")
    assert train.pixels.shape == (50_000, 3, 32, 32) and test.pixels.shape == (10_000, 3, 32, 32)
    assert train.labels.bincount().tolist() == [500] * 100 and test.labels.bincount().tolist() == [100] * 100
    assert len(test.class_names) == 100 and test.class_names[0] == "apple" and test.class_names[99] == "worm"
    means = train.pixels.float().mean((0, 2, 3), dtype=torch.float64) / 255
    assert [round(mean, 4) for mean in means.tolist()] == [0.5071, 0.4865, 0.4409]


@pytest.mark.timed
@pytest.mark.parametrize("split", data.SPLITS)
@pytest.mark.parametrize("dataset, limit", [("mnist", 1.0), ("cifar10", 2.0), ("cifar100", 2.0)])
def test_loading_is_quick(dataset, limit, split):
    """The best of four, so that neither a cold disk nor a neighbour decides."""
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        real(dataset, split)
        times.append(time.perf_counter() - begin)
        if times[-1] < limit:
            break
    assert min(times) < limit, f"{dataset} {split} takes {min(times):.2f} s"
