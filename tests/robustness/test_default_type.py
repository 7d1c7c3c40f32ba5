"""No number depends on PyTorch's default type, which is the user's to set."""

import copy

import pytest
import torch

from sparse_nb import data
from sparse_nb.networks import masks, models, training
from sparse_nb.robustness import attacks, curvature, evaluation, weight_noise
from sparse_nb.robustness.corruptions import corruptions


@pytest.fixture
def default_type():
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


def both(default_type, make):
    found = []
    for kind in (torch.float32, torch.float64):
        default_type(kind)
        found.append(make())
    return found


def network(width=32):
    model = models.build_model("mlp", (1, 28, 28), 10, width=width, depth=1).float()
    masks.initialise(model, masks.random_masks(model, 5000, seed=0), seed=0)
    return model


def test_networks_and_their_training(default_type):
    images = data.load_images("digits", "train").take(range(200))

    def make():
        model = network()
        kept = masks.random_masks(model, 5000, seed=0)
        recipe = training.Recipe(epochs=2, batch_size=32, augment=True)
        training.fit(model, images, recipe, seed=0, masks=kept)
        return torch.cat([part.flatten() for part in model.state_dict().values()])

    one, other = both(default_type, make)
    assert one.dtype == other.dtype == torch.float32 and torch.equal(one, other)


@pytest.mark.parametrize("measure", ["noise", "attacks", "curvature"])
def test_measures(default_type, measure):
    model, images = network(), evaluation.sample(data.load_images("digits", "test"), 60)
    calls = {
        "noise": lambda: weight_noise.evaluate(model, images, sigmas=[0.3], draws=2),
        "attacks": lambda: attacks.evaluate(model, images, attacks=("ffgsm", "pgd", "apgd"), epsilons=(0.1,)),
        "curvature": lambda: curvature.evaluate(model, images, iterations=3),
    }
    one, other = both(default_type, calls[measure])
    assert one == other


@pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
def test_corruptions(default_type, dataset):
    channels, size = (1, 28) if dataset == "mnist" else (3, 32)
    stream = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (4, channels, size, size), generator=stream, dtype=torch.uint8)
    images = data.ImageSet(pixels, torch.arange(4), 10, dataset, "test")
    for name in corruptions.BENCHMARKS[(channels, size, size)]:
        if name == "frost":
            continue  # which needs its photographs
        one, other = both(default_type, lambda name=name: corruptions.corrupt(images, name, 1, seed=0))
        assert torch.equal(one.pixels, other.pixels), name


@pytest.mark.parametrize("function", ["masks", "initialise", "fit"])
def test_a_seed_that_is_text_is_refused(function):
    model = network()
    calls = {
        "masks": lambda: masks.random_masks(model, 5000, seed="0"),
        "initialise": lambda: masks.initialise(model, None, seed="0"),
        "fit": lambda: training.fit(
            model, data.load_images("digits", "train"), training.Recipe(epochs=1, batch_size=32), seed="0"
        ),
    }
    with pytest.raises((TypeError, ValueError), match="seed is '0'"):
        calls[function]()


class Mixed(torch.nn.Module):
    """Layers of the types given, each fed in its own."""

    def __init__(self, *kinds):
        super().__init__()
        sizes = zip(((784, 30), (30, 10)), kinds, strict=True)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(*size).to(kind) for size, kind in sizes)

    def forward(self, images):
        x = images.flatten(1)
        for layer in self.layers:
            x = layer(x.to(layer.weight.dtype)).relu()
        return x


@pytest.mark.parametrize("first", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("second", [torch.bfloat16, torch.float32, torch.float64])
def test_a_network_of_several_types_is_attacked_as_in_float64(first, second):
    torch.manual_seed(0)
    model, images = Mixed(first, second), evaluation.sample(data.load_images("digits", "test"), 50)
    settings = dict(attacks=("fgsm", "pgd", "apgd"), epsilons=(0.1,))
    found = attacks.evaluate(model, images, **settings)
    exact = attacks.evaluate(copy.deepcopy(model).double(), images, **settings)
    for one, other in zip(found, exact, strict=True):
        assert abs(one.value - other.value) <= 0.05, one
