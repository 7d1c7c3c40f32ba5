"""Both benchmarks against outputs of their original programs: value for value with the programs' own random draws, and
in their statistics with ours.

The reference is no part of the project. SPARSE_NB_REFERENCE names a folder with cifar10c.npz, mnistc.npz,
statistics.json and frost/frost1_x0.2.png to frost5_x0.2.png; without it these tests are skipped. The programs' draws
are repeated from np.random.RandomState, whose streams are frozen.
"""

import json
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import poisson

from sparse_nb.data import load_images
from sparse_nb.robustness.corruptions import cifar_c, cifar_weather, mnist_c
from sparse_nb.robustness.corruptions.cifar_digital import jpeg_library
from sparse_nb.robustness.corruptions.cifar_weather import _frosted
from sparse_nb.robustness.corruptions.corruptions import corrupt

REFERENCE = os.environ.get("SPARSE_NB_REFERENCE")
pytestmark = pytest.mark.skipif(
    not REFERENCE, reason="needs outputs of the original programs: SPARSE_NB_REFERENCE names no folder"
)

CIFAR, MNIST, PUBLISHED = cifar_c.CORRUPTIONS, mnist_c.CORRUPTIONS, mnist_c.PUBLISHED
# the order of the original, by which the reference counts its seeds
CIFAR_ORDER = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
    "speckle_noise",
    "gaussian_blur",
    "spatter",
    "saturate",
)


@cache
def originals(name):
    with np.load(Path(REFERENCE) / name) as arrays:
        return dict(arrays)


@cache
def textures():
    return [
        torch.from_numpy(np.array(Image.open(Path(REFERENCE) / "frost" / f"frost{k}_x0.2.png").convert("RGB"))).permute(
            2, 0, 1
        )
        for k in range(1, 6)
    ]


def middle(counts, rates):
    """Uniform numbers in the middle of those that give these Poisson counts."""
    return (poisson.cdf(counts - 1, rates) + poisson.cdf(counts, rates)) / 2


# What the original takes from np.random for one image, in its order, under our names ---------------------------------
# (random, image (H, W, …), parameters) -> {name: array}


def channels_first(array):
    return np.ascontiguousarray(array.transpose(2, 0, 1))


def cifar_noise(random, image, parameters):
    return {"noise": channels_first(random.standard_normal((32, 32, 3)))}


def cifar_shot(random, image, photons):
    rates = image / 255.0 * photons
    return {"uniforms": channels_first(middle(random.poisson(rates), rates))}


def cifar_impulses(random, image, amount):
    flipped, salted = random.random_sample((32, 32, 3)) < amount, random.random_sample((32, 32, 3)) < 0.5
    return {"flipped": channels_first(flipped), "salted": channels_first(salted)}


def cifar_glass(random, image, parameters):
    moves = np.zeros((parameters[1], 2, 32, 32), np.int64)
    for turn in range(parameters[1]):
        for row in range(31, 1, -1):
            for column in range(31, 1, -1):
                left, up = -random.randint(-1, 1, size=2)
                moves[turn, :, row, column] = up, left
    return {"moves": moves}


def cifar_elastic(random, image, parameters):
    jitter = parameters[2]
    return {
        "corners": random.uniform(-jitter, jitter, (3, 2)),
        "across": random.uniform(-1, 1, (32, 32)),
        "down": random.uniform(-1, 1, (32, 32)),
    }


def cifar_frost(random, image, parameters):
    texture = textures()[random.randint(5)]
    row, column = random.randint(0, texture.shape[1] - 32), random.randint(0, texture.shape[2] - 32)
    return {"ice": texture[:, row : row + 32, column : column + 32].numpy()}


CIFAR_REPLAY = {
    "gaussian_noise": cifar_noise,
    "shot_noise": cifar_shot,
    "impulse_noise": cifar_impulses,
    "glass_blur": cifar_glass,
    "motion_blur": lambda random, image, parameters: {"angle": random.uniform(-45, 45)},
    "snow": lambda random, image, parameters: {
        "layer": random.standard_normal((32, 32)),
        "angle": random.uniform(-135, -45),
    },
    "frost": cifar_frost,
    "fog": lambda random, image, parameters: {"uniforms": random.uniform(-1, 1, 1023)},
    "elastic_transform": cifar_elastic,
    "speckle_noise": cifar_noise,
    "spatter": lambda random, image, parameters: {"layer": random.standard_normal((32, 32))},
}


def mnist_shot(random, image, peak):
    rates = image / 255 * peak
    return {"uniforms": middle(random.poisson(rates), rates)[None]}


def mnist_glass(random, image, parameters):
    _, reach, rounds = parameters
    steps = np.zeros((rounds * (28 - 2 * reach) ** 2, 2), np.int64)
    for step in steps:
        if random.choice([True, False], 1)[0]:
            step[:] = random.randint(-reach, reach, size=2)
    return {"steps": steps.reshape(rounds, -1, 2)}


MNIST_REPLAY = {
    "shot_noise": mnist_shot,
    "impulse_noise": lambda random, image, parameters: {
        name: random.random_sample((1, 28, 28)) for name in ("struck", "white")
    },
    "glass_blur": mnist_glass,
    "motion_blur": lambda random, image, parameters: {"angle": random.uniform(-45, 45)},
    "shear": lambda random, image, parameters: {"sign": random.choice([-1, 1], 1)[0]},
    "rotate": lambda random, image, parameters: {"sign": random.choice([-1, 1], 1)[0]},
    "translate": lambda random, image, parameters: {"signs": random.choice([-1, 1], 2)},
    "fog": lambda random, image, parameters: {"uniforms": random.uniform(-1, 1, 65535)},
    "spatter": lambda random, image, parameters: {"field": random.standard_normal((1, 28, 28))},
    "dotted_line": lambda random, image, parameters: {"rows": random.randint(0, 27, size=2)},
    "zigzag": lambda random, image, parameters: {"row": random.randint(0, 27), "rise": random.randint(-5, 5)},
}


def replayed(replay, seed, arrays, parameters):
    """The draws that the original made for the reference images; seed: of image 0."""
    if replay is None:
        return {}
    one = [
        replay(np.random.RandomState(seed + int(index)), image, parameters)
        for index, image in zip(arrays["indices"], arrays["clean"], strict=True)
    ]
    return {kind: torch.from_numpy(np.stack([draws[kind] for draws in one])) for kind in one[0]}


def assert_equal(ours, theirs):
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.max() == 0, (
        f"{(difference > 0).sum()} of {difference.size} values differ, by up to {difference.max()}"
    )


# Every value ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize("name", CIFAR)
def test_cifar_values(name, severity):
    """Every value of every image equals the original's."""
    if name == "jpeg_compression" and jpeg_library() != "libjpeg 9d":
        pytest.skip("needs jpeglib, which brings the library of the original")
    arrays, corruption = originals("cifar10c.npz"), CIFAR[name]
    images, parameters = torch.from_numpy(channels_last_to_first(arrays["clean"])), corruption.parameters[severity - 1]
    draws = replayed(CIFAR_REPLAY.get(name), 100_000 * CIFAR_ORDER.index(name) + 10_000 * severity, arrays, parameters)
    ours = (
        _frosted(images, parameters, draws["ice"]) if name == "frost" else corruption.apply(images, parameters, draws)
    )
    assert_equal(ours.permute(0, 2, 3, 1).numpy(), arrays[f"{name}_{severity}"])


@pytest.mark.parametrize("name", MNIST)
def test_mnist_values(name):
    """Every value of every image equals the original's."""
    arrays, parameters = originals("mnistc.npz"), MNIST[name].parameters[PUBLISHED[name] - 1]
    position = ["identity", *MNIST].index(name)  # the order of the original's list is the table's
    draws = replayed(MNIST_REPLAY.get(name), 500_000_000 + 100_000 * position, arrays, parameters)
    ours = MNIST[name].apply(torch.from_numpy(arrays["clean"])[:, None], parameters, draws)
    assert_equal(ours[:, 0].numpy(), arrays[name])


def channels_last_to_first(images):
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def test_nothing_is_left_out():
    """What has draws of its own is replayed, and the tables hold what the reference holds."""
    assert sorted(CIFAR_REPLAY) == sorted(name for name in CIFAR if CIFAR[name].draw) and sorted(CIFAR) == sorted(
        CIFAR_ORDER
    )
    assert sorted(MNIST_REPLAY) == sorted(name for name in MNIST if MNIST[name].draw)
    assert {f"{name}_{severity}" for name in CIFAR for severity in range(1, 6)} == set(originals("cifar10c.npz")) - {
        "clean",
        "labels",
        "indices",
    }
    assert list(MNIST) == [
        name for name in originals("mnistc.npz") if name not in ("clean", "labels", "indices", "identity")
    ]


# Statistics -----------------------------------------------------------------------------------------------------------


def statistics(clean, ours):
    """The statistics of the reference, those of each channel as an array; clean and ours float64 (N, C, H, W), 0 to
    255."""
    change = ours - clean
    absolute, squared = np.abs(change).mean((1, 2, 3)), (change**2).mean((1, 2, 3))
    psnr = 10 * np.log10(255**2 / squared[squared > 0])
    return {
        "mad_mean": absolute.mean(),
        "psnr_mean": psnr.mean(),
        "mse_mean": squared.mean(),
        "bias_mean": change.mean(),
        "channel_mean": ours.mean((0, 2, 3)),
        "channel_std": ours.std((0, 2, 3)),
        "frac_0": (ours == 0).mean(),
        "frac_255": (ours == 255).mean(),
        "frac_saturated": ((ours == 0) | (ours == 255)).mean(),
        "frac_unchanged": (change == 0).mean(),
        "grad_h": np.abs(np.diff(ours, axis=3)).mean(),
        "grad_v": np.abs(np.diff(ours, axis=2)).mean(),
    }  # the reference has some more, without a standard error


def assert_close(dataset, key, name, severity, monkeypatch):
    """The first 1,000 test images under our draws of seed 0: each statistic within 4.5 standard errors of the
    original's mean over three seeds.

    A new run and a mean of three differ with the deviation se·√(1 + 1/3). Two allowances come on top: a unit in the
    last of the six digits that are stored, and for shares of values 10 values more or less, since counts of rare values
    are not normal. Deterministic corruptions have nothing but these.
    """
    monkeypatch.setattr(cifar_weather, "frost_textures", lambda root=None: (textures(), "photographs"))
    entry = json.loads((Path(REFERENCE) / "statistics.json").read_text())[
        "cifar10c" if dataset == "cifar10" else "mnistc"
    ]["corruptions"][key]
    images = load_images(dataset, "test").take(slice(1000))
    ours = corrupt(images, name, severity, seed=0).pixels
    assert entry["deterministic"] == ((CIFAR if dataset == "cifar10" else MNIST)[name].draw is None)
    shares = {}
    for kind, value in statistics(images.pixels.double().numpy(), ours.double().numpy()).items():
        mean = np.array(entry["summary"][kind]["mean"])
        error = 0 if entry["deterministic"] else np.array(entry["summary"][kind]["se_one_run"])
        allowed = (
            4.5 * error * (4 / 3) ** 0.5
            + 1e-5 * np.maximum(1, np.abs(mean))
            + (10 / ours.numel() if kind.startswith("frac_") else 0)
        )
        shares[kind] = float((np.abs(value - mean) / allowed).max())
    worst = max(shares, key=shares.get)
    print(f"{name} {severity}: worst of {len(shares)} is {worst}, {shares[worst]:.2f} of what is allowed")
    assert len(shares) == 12 and {kind: share for kind, share in shares.items() if share > 1} == {}


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("severity", (1, 3, 5))
@pytest.mark.parametrize("name", CIFAR)
def test_cifar_statistics(name, severity, monkeypatch):
    if name == "jpeg_compression" and jpeg_library() != "libjpeg 9d":
        pytest.skip("needs jpeglib, which brings the library of the original")
    assert_close("cifar10", f"{name}_{severity}", name, severity, monkeypatch)


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("name", MNIST)
def test_mnist_statistics(name, monkeypatch):
    assert_close("mnist", name, name, PUBLISHED[name], monkeypatch)
