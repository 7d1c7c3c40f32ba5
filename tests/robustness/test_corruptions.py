"""What the chapters on corruptions cannot test in a cell: other threads, processes and devices, a memory shared by
networks, missing libraries, no network."""

import hashlib
import io
import multiprocessing
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from sparse_nb.data import IMAGE_SHAPES, ImageSet, load_images
from sparse_nb.networks.models import build_model
from sparse_nb.robustness.corruptions import cifar_weather, corruptions, downloads
from sparse_nb.robustness.corruptions.batches import CorruptionKind, apply, draw_all
from sparse_nb.robustness.corruptions.corruptions import benchmark, corrupt, evaluate, names
from sparse_nb.robustness.evaluation import sample

ALL = [(dataset, name) for dataset in ("mnist", "cifar10") for name in names(dataset)]
ICE, FROST_TEXTURES = cifar_weather._grown_ice(), cifar_weather.frost_textures


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Grown ice, and nobody asks the network."""
    monkeypatch.setattr(cifar_weather, "frost_textures", lambda root=None: (ICE, "grown ice"))
    monkeypatch.setattr(downloads, "urlopen", lambda *_, **__: pytest.fail("asked the network"))


def pictures(dataset, count=8):
    """Random pictures, smooth ones among them, of the shape of a dataset's."""
    shape = IMAGE_SHAPES[dataset]
    rough = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ramp = torch.linspace(0, 255, shape[2]).expand(shape).to(torch.uint8)
    images = torch.where(torch.arange(count)[:, None, None, None] % 2 == 0, rough, ramp)
    return ImageSet(images, torch.arange(count) % 10, 10, "pictures", "test")


def severities(dataset, name):
    return range(1, len(benchmark(IMAGE_SHAPES[dataset])[name].parameters) + 1)


# Whatever the threads and processes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset, name", ALL)
def test_global_state_and_threads_do_not_matter(dataset, name, monkeypatch):
    images, severity = pictures(dataset, 200 if dataset == "cifar10" else 20), severities(dataset, name)[-1]
    corruption = benchmark(images.shape)[name]
    if dataset == "mnist":  # blocks of a few, so that there is something to share out
        monkeypatch.setitem(benchmark(images.shape), name, replace(corruption, block=3))
    outcomes, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(threads)
            np.random.seed(threads)
            state = torch.get_rng_state()
            outcomes.append(corrupt(images, name, severity).pixels)
            assert torch.equal(torch.get_rng_state(), state)
            with ThreadPoolExecutor(1) as other:
                assert torch.get_num_threads() == other.submit(torch.get_num_threads).result() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(outcome, outcomes[0]) for outcome in outcomes)


def test_an_error_in_a_block_comes_out_and_the_threads_stay():
    calls = []

    def breaks(images, parameters, draws):
        calls.append(len(images))
        if len(calls) == 3:
            raise RuntimeError("third block")
        return images

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError, match="third block"):
            apply(CorruptionKind(breaks, (1,), block=2), 1, pictures("cifar10").pixels)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def checksum(task):
    dataset, name, severity = task
    cifar_weather.frost_textures = lambda root=None: (ICE, "grown ice")
    return hashlib.md5(corrupt(pictures(dataset), name, severity, seed=3).pixels.numpy().tobytes()).hexdigest()


def test_processes_in_any_order():
    """Two other processes, which share nothing with this one, make the same images in another order."""
    tasks = [(dataset, name, severity) for dataset, name in ALL for severity in severities(dataset, name)[-2:]]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as processes:
        there = dict(zip(tasks[::-1], processes.map(checksum, tasks[::-1]), strict=True))
    assert there == {task: checksum(task) for task in tasks}


@pytest.mark.parametrize(
    "dataset, name", [(dataset, name) for dataset, name in ALL if benchmark(IMAGE_SHAPES[dataset])[name].draw]
)
def test_draws_depend_on_their_name_alone(dataset, name):
    """An image's numbers are the same in any company and order; the seed, the severity, the draw and the index each
    change them."""
    corruption, shape, own = (
        benchmark(IMAGE_SHAPES[dataset])[name],
        IMAGE_SHAPES[dataset],
        (0, "corruption", name, 1, 0),
    )

    def drawn(key, indices):
        return draw_all(corruption, corruption.parameters[0], key, indices, shape, "cpu")

    whole, some = drawn(own, range(200, 300)), [299, 200, 231, 200]
    for kind, values in drawn(own, some).items():
        assert values.shape[0] == 4 and torch.equal(values, whole[kind][[index - 200 for index in some]])
    assert all(not torch.equal(values[:50], values[50:]) for values in whole.values())
    for other in ((1, *own[1:]), (*own[:3], 2, 0), (*own[:4], 1)):
        assert all(not torch.equal(values, whole[kind]) for kind, values in drawn(other, range(200, 300)).items())


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(monkeypatch):
    """An empty memory, and the list of the corruptions that were made since."""
    calls, make = [], corruptions.apply

    def apply_and_note(corruption, *rest):
        calls.append(corruption)
        return make(corruption, *rest)

    monkeypatch.setattr(corruptions, "_MEMORY", corruptions._Memory(2**30))
    monkeypatch.setattr(corruptions, "apply", apply_and_note)
    return calls


def test_a_second_network_meets_remembered_images(made):
    digits = load_images("digits", "test")
    networks = [build_model("mlp", digits.shape, 10, width=width, depth=1) for width in (8, 16)]
    for network in networks:  # the sample is taken again, as another object
        evaluate(network, sample(digits, 40), names=("shear", "stripe"), draws=3)
    assert len(made) == len(corruptions._MEMORY) == 4  # three draws and one
    evaluate(networks[0], sample(load_images("digits", "test"), 40), names=("shear",), draws=3, seed=1)
    assert len(made) == 7


def test_what_is_remembered_is_of_these_images(made):
    """Neither a name nor a place in the test set makes two images equal: changed pixels are corrupted themselves, and
    records are those without memory."""
    images = sample(load_images("digits", "test"), 40)
    network = build_model("mlp", images.shape, 10, width=8, depth=1)
    others = [
        images,
        replace(images, pixels=255 - images.pixels),
        replace(images, index=images.index + 1),
        replace(images, labels=images.labels.flip(0)),
        images.take(torch.arange(39, -1, -1)),
    ]
    found = [evaluate(network, other, names=("shear", "stripe"), draws=1) for other in others]
    for other, records in zip(others, found, strict=True):
        for record in (r for r in records if r.name and r.quantity in ("accuracy", "loss")):
            pixels = corrupt(other, record.name, record.strength).pixels
            outputs = network(pixels.float() / 255)
            right = (outputs.argmax(1) == other.labels).double().mean()
            assert record.quantity != "accuracy" or record.value == right
    assert len(made) - len(found) * 4 == 4 * 2  # labels have no part in it; besides, four here for each set


def test_what_does_not_fit_is_not_kept(made, monkeypatch):
    images = pictures("cifar10", 1400)  # 4.3 MB, and two severities
    network = build_model("mlp", images.shape, 10, width=4, depth=1)
    monkeypatch.setattr(corruptions._MEMORY, "limit", 12 * 10**6)
    evaluate(network, images, names=("contrast",))
    assert len(corruptions._MEMORY) == 0
    evaluate(network, images.take(slice(1000)), names=("contrast",))
    assert len(corruptions._MEMORY) == 2 and corruptions._MEMORY.used == 2 * 1000 * 3072
    evaluate(network, images.take(slice(1000, 1400)), names=("contrast", "pixelate"))
    assert corruptions._MEMORY.used <= 12 * 10**6


# Folders --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_winters(tmp_path, monkeypatch):
    """Two folders with photographs of frost, all of one colour in each, and the colours."""
    files, colours = {}, {}
    for number, name in enumerate(downloads._FROST_MD5):
        file = io.BytesIO()
        Image.new("RGB", (400, 300), (10, 20, 30)).save(file, "png")
        files[name] = file.getvalue() + bytes(number)  # each with a sum of its own
    for folder, colour in (("mild", (10, 20, 30)), ("hard", (200, 210, 250))):
        colours[tmp_path / folder] = colour
        (tmp_path / folder / "frost").mkdir(parents=True)
        for name in files:
            Image.new("RGB", (400, 300), colour).save(tmp_path / folder / "frost" / name, "png")
    monkeypatch.setattr(cifar_weather, "frost_textures", FROST_TEXTURES)
    monkeypatch.setattr(downloads, "checked_bytes", lambda path, md5: path.read_bytes())
    monkeypatch.setattr(downloads, "download_file", lambda path, *_: refuse(path))
    return colours


def refuse(path):
    raise FileNotFoundError(f"{path}: no network")


def right_shares(*what, **how):
    return [record for record in evaluate(*what, **how) if record.quantity == "accuracy"]


def test_frost_is_of_the_folder_that_its_record_names(two_winters, tmp_path, monkeypatch):
    """Photographs of one colour: what frost must give is known for every pixel, in each folder, whatever the default
    folder is."""
    images = pictures("cifar10")
    network = build_model("mlp", images.shape, 10, width=8, depth=1)
    monkeypatch.setenv("SPARSE_NB_DATA", str(tmp_path / "nothing"))
    for root, colour in two_winters.items():
        ice = np.array(colour, np.float64)[:, None, None]
        right = np.uint8(np.clip(images.pixels.numpy() * 0.9 + ice * 0.4, 0, 255))
        assert corruptions._source_of("cifar10", "frost", 3, root=root) == "generated, photographs"
        for given, how in ((images, {"root": root}), (images, {"root": str(root)}), (replace(images, root=root), {})):
            assert np.array_equal(corrupt(given, "frost", 3, **how).pixels.numpy(), right)
            clean, frosty = right_shares(network, given, names=("frost",), severities=(3,), draws=1, **how)
            answers = network(torch.from_numpy(right).float() / 255).argmax(1)
            assert frosty.source == "generated, photographs"
            assert frosty.value == float((answers == images.labels).double().mean())
    default = right_shares(network, images, names=("frost",), severities=(3,), draws=1)
    assert default[1].source == "generated, grown ice"
    monkeypatch.setenv("SPARSE_NB_DATA", str(root))  # no memory of the folder before
    assert np.array_equal(corrupt(images, "frost", 3).pixels.numpy(), right)
    assert (
        right_shares(network, images, names=("frost",), severities=(3,), draws=1)[1].source == "generated, photographs"
    )


def test_another_root_than_that_of_the_images(tmp_path):
    """An official array is taken from the folder that is asked for, before that of the images."""
    digits = load_images("digits", "test").take(slice(20))
    for folder, level in (("one", 1), ("other", 2)):
        (tmp_path / folder / "mnist_c" / "stripe").mkdir(parents=True)
        array = np.full((10_000, 28, 28, 1), level, np.uint8)
        np.save(tmp_path / folder / "mnist_c" / "stripe" / "test_images.npy", array)
    images = replace(digits, name="mnist", root=tmp_path / "one")
    assert corrupt(images, "stripe", 1, source="auto").pixels.unique().tolist() == [1]
    assert corrupt(images, "stripe", 1, source="auto", root=tmp_path / "other").pixels.unique().tolist() == [2]
    network = build_model("mlp", images.shape, 10, width=8, depth=1)
    for root, level in ((None, 1), (tmp_path / "other", 2), (tmp_path / "nothing", 0)):
        records = evaluate(network, images, names=("stripe",), root=root)
        (record,) = (record for record in records if record.name and record.quantity == "loss")
        pixels = torch.full((20, 1, 28, 28), level / 255) if level else corrupt(images, "stripe", 1).pixels / 255
        right = torch.nn.functional.cross_entropy(network(pixels), images.labels)
        assert record.source == ("official" if level else "generated") and record.value == pytest.approx(right.item())


def test_only_test_images_are_official(tmp_path):
    """The archive has no training images: a record of those does not say so, and to insist on it is an error."""
    (tmp_path / "mnist_c" / "stripe").mkdir(parents=True)
    np.save(tmp_path / "mnist_c" / "stripe" / "test_images.npy", np.zeros((10_000, 28, 28, 1), np.uint8))
    images = replace(load_images("digits", "train").take(slice(20)), name="mnist", root=tmp_path)
    network = build_model("mlp", images.shape, 10, width=8, depth=1)
    assert torch.equal(corrupt(images, "stripe", 1, source="auto").pixels, corrupt(images, "stripe", 1).pixels)
    assert {r.source for r in evaluate(network, images, names=("stripe",)) if r.name} == {"generated"}
    for function in (lambda **how: corrupt(images, "stripe", 1, **how), lambda **how: evaluate(network, images, **how)):
        with pytest.raises(FileNotFoundError, match="for mnist's train images is not there"):
            function(source="official")


# What is not there ----------------------------------------------------------------------------------------------------

WITHOUT = """
    import importlib.util, io, socket, sys
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "jpeglib" else find(name, *rest)
    sys.modules["jpeglib"] = None
    def refused(*_, **__):
        raise OSError("asked the network")
    socket.getaddrinfo = socket.socket.connect = refused
    import numpy as np, torch
    from PIL import Image
    from sparse_nb.robustness.corruptions import cifar_c, corruptions
    from sparse_nb.data import ImageSet, load_images
"""


def run(program, **environment):
    """What a fresh process says; it has no jpeglib, and a network that refuses."""
    command = [sys.executable, "-c", textwrap.dedent(WITHOUT) + textwrap.dedent(program)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


def test_jpeg_falls_back_to_pillow(tmp_path):
    said = run(
        """
        images = torch.arange(5 * 3072).view(5, 3, 32, 32).remainder(251).to(torch.uint8)
        images_set = ImageSet(images, torch.zeros(5, dtype=torch.long), 1, "cifar10", "test")
        ours = corruptions.corrupt(images_set, "jpeg_compression", 3).pixels
        for image, our in zip(images, ours):
            with io.BytesIO() as file:
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=58)
                assert np.array_equal(np.asarray(Image.open(file)), our.permute(1, 2, 0).numpy())
        print(corruptions._source_of("cifar10", "jpeg_compression", 3))
    """,
        SPARSE_NB_DATA=str(tmp_path),
    )
    assert said[0].startswith("generated, libjpeg") and "9d" not in said[0]


def test_frost_is_grown_where_the_network_refuses(tmp_path):
    said = run(
        """
        black, labels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2, dtype=torch.long)
        images = ImageSet(black, labels, 1, "cifar10", "test")
        print(corruptions._source_of("cifar10", "frost", 2), corruptions.corrupt(images, "frost", 2).pixels.amax() > 0)
    """,
        SPARSE_NB_DATA=str(tmp_path),
    )
    assert (
        said == ["generated, grown ice tensor(True)"] and [path for path in tmp_path.rglob("*") if path.is_file()] == []
    )


def test_digits_ask_no_network(tmp_path):
    said = run(
        """
        asked = []
        def refused(*whom, **_):
            asked.append(whom)
            raise OSError
        socket.getaddrinfo = socket.socket.connect = refused
        images = load_images("digits", "test").take(slice(3))
        for name in corruptions.names("digits"):
            corruptions.corrupt(images, name, 1)
        corruptions.origins("digits")
        print(asked)
    """,
        SPARSE_NB_DATA=str(tmp_path),
    )
    assert said == ["[]"] and list(tmp_path.iterdir()) == []


# Devices --------------------------------------------------------------------------------------------------------------

ELSEWHERE = "lazy"  # a device that needs no driver to be named


class There(torch.Tensor):
    """A tensor that says it is on another device; its numbers are in `here`, on the CPU."""

    @staticmethod
    def __new__(cls, here):
        return torch.Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), dtype=here.dtype, device=ELSEWHERE
        )

    def __init__(self, here):
        self.here = here

    def tolist(self):
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} outside of TwoDevices")


class TwoDevices(TorchDispatchMode):
    """While it is active, an operation on tensors of both devices is an error, as it is with a GPU; a CPU tensor that
    is a single number is welcome."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        wish = kwargs.get("device")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = any(isinstance(tensor, There) for tensor in tensors)
        if there and function is not torch.ops.aten.copy_.default:
            assert all(isinstance(tensor, There) or not tensor.dim() for tensor in tensors), (
                f"{function} on tensors of two devices"
            )
        if wish is not None:
            there, kwargs["device"] = torch.device(wish).type == ELSEWHERE, torch.device("cpu")
        owners = {id(tensor.here): tensor for tensor in tensors if isinstance(tensor, There)}
        args, kwargs = tree_map_only(There, lambda tensor: tensor.here, (args, kwargs))
        result = function(*args, **kwargs)
        return (
            tree_map_only(
                torch.Tensor, lambda tensor: owners[id(tensor)] if id(tensor) in owners else There(tensor), result
            )
            if there
            else result
        )


@pytest.mark.parametrize("dataset, name", ALL)
def test_no_operation_mixes_devices(dataset, name, monkeypatch):
    """Every tensor that `apply` makes is where its images are."""
    tensor = torch.tensor  # puts numbers on their device out of our sight
    monkeypatch.setattr(torch, "tensor", lambda numbers, *, device="cpu", **kind: tensor(numbers, **kind).to(device))
    images, corruption = pictures(dataset, 3).pixels, benchmark(IMAGE_SHAPES[dataset])[name]
    for severity in severities(dataset, name):
        parameters, key = corruption.parameters[severity - 1], (0, name)
        with TwoDevices():
            there = apply(corruption, parameters, images.to(ELSEWHERE), key, range(3))
            assert there.device.type == ELSEWHERE and there.dtype == torch.uint8
        assert torch.equal(there.here, apply(corruption, parameters, images, key, range(3)))


def test_mixed_devices_would_be_noticed():
    with TwoDevices():
        there = torch.ones(3).to(ELSEWHERE)
        assert (there + 1).sum().item() == 6 and (there + torch.ones((), device="cpu")).cpu().tolist() == [2.0] * 3
        with pytest.raises(AssertionError, match="two devices"):
            there + torch.ones(3)


@pytest.mark.gpu
@pytest.mark.parametrize("dataset, name", ALL)
def test_a_gpu_makes_the_same_images(dataset, name):
    """The order of some sums and fused products are a GPU's own. They may cost one value of a thousand a level; where a
    threshold lies between, in spatter, snow and canny edges, more than a level."""
    images = pictures(dataset, 64)
    for severity in severities(dataset, name):
        here, there = corrupt(images, name, severity).pixels, corrupt(images.to("cuda"), name, severity).pixels
        assert there.device.type == "cuda" and there.dtype == torch.uint8 and there.shape == here.shape
        difference = (there.cpu().int() - here.int()).abs()
        print(
            f"{name} {severity}: {int((difference > 0).sum())} of {difference.numel()} values differ, by up to "
            f"{int(difference.max())}"
        )
        assert (difference > 0).double().mean() <= 0.001
        assert name in ("spatter", "canny_edges", "snow") or difference.max() <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("dataset, name", ALL)
def test_replayed_draws_on_a_gpu(dataset, name):
    """The same draws come to a GPU as to the CPU, and the order of images is kept there."""
    images, corruption = pictures(dataset, 16).pixels, benchmark(IMAGE_SHAPES[dataset])[name]
    key, parameters = (0, name), corruption.parameters[-1]
    here, there = (
        draw_all(corruption, parameters, key, range(16), images.shape[1:], device) for device in ("cpu", "cuda")
    )
    assert {kind: draw.device.type for kind, draw in there.items()} == dict.fromkeys(here, "cuda")
    assert all(torch.equal(there[kind].cpu(), here[kind]) for kind in here)
    whole = apply(corruption, parameters, images.cuda(), key, range(16))
    assert torch.equal(apply(corruption, parameters, images[[9, 2]].cuda(), key, [9, 2]), whole[[9, 2]])
