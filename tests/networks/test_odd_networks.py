"""Networks of the user's own that training and measures once got wrong without a word, or met with PyTorch's words."""

import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from sparse_nb.data import ImageSet
from sparse_nb.networks import dense_first, dynamic, masks
from sparse_nb.networks.models import build_model, counted_weights
from sparse_nb.networks.sparse_layers import sparse_network
from sparse_nb.networks.training import Recipe, fit
from sparse_nb.robustness import attacks, calibration, curvature, evaluation, weight_noise

RECIPE = Recipe(epochs=2, batch_size=16, learning_rate=0.05)


@pytest.fixture(scope="module")
def images():
    stream = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    pixels = torch.randint(0, 80, (60, 1, 6, 6), dtype=torch.uint8, generator=stream)
    pixels[torch.arange(60), 0, 0, labels] = 255
    return ImageSet(pixels, labels, 3, "any", "train")


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 20), nn.ReLU(), nn.Linear(20, 3))


def values(model):
    return torch.cat([value.detach().flatten() for value in model.parameters()])


def test_a_weight_that_is_a_slice_is_trained_like_its_copy(images):
    """Fused SGD walked through the memory of such a weight, and wrote into what lies between its rows."""
    large = torch.rand(20, 100, generator=torch.Generator().manual_seed(1)) / 10
    before, sliced, copied = large.clone(), small(), small()
    sliced[1].weight = nn.Parameter(large[:, :36])
    copied[1].weight = nn.Parameter(large[:, :36].clone())
    kept = masks.random_masks(copied, 300, seed=0)
    for model in (sliced, copied):
        fit(model, images, RECIPE, seed=0, masks=kept)
    assert torch.equal(large[:, 36:], before[:, 36:])
    assert torch.allclose(values(sliced), values(copied), atol=1e-5)
    assert not sliced[1].weight[~kept["1.weight"]].any()


def test_masks_hold_after_a_dense_state_is_resumed(images):
    states, dense = [], small()
    fit(dense, images, RECIPE, seed=0, keep=states.append)
    kept = masks.magnitude_masks(dense, 200)
    fit(dense, images, Recipe(epochs=4, batch_size=16), seed=0, masks=kept, resume=states[-1])
    for name, weight in counted_weights(dense).items():
        assert not weight[~kept[name]].any() and weight[kept[name]].any()


def test_frozen_layers_stay(images):
    network = sparse_network(small(), masks.random_masks(small(), 300, seed=0))
    for value in network[1].parameters():
        value.requires_grad_(False)
    for method in dynamic.METHODS:
        before = {name: value.clone() for name, value in network[1].state_dict().items()}
        dynamic.fit_dynamic(network, images, RECIPE, method=method, seed=0, every=2)
        assert all(torch.equal(value, before[name]) for name, value in network[1].state_dict().items())
    model = small()
    model[1].weight.requires_grad_(False)
    before = model[1].weight.clone()
    dense_first._shrink(model, rate=0.1, l1=1.0, beta=50)
    assert torch.equal(model[1].weight, before) and not model[3].weight.any()


def test_connections_move_in_sparse_networks_only(images):
    with pytest.raises(ValueError, match="no sparse layer; make it with sparse_layers.sparse_network"):
        dynamic.fit_dynamic(small(), images, RECIPE, method="set", seed=0)


def test_a_sparse_layer_without_a_gradient(images):
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = small(), nn.Linear(9, 9)

        def forward(self, inputs):
            return self.used(inputs)

    network = sparse_network(Unused(), masks.random_masks(Unused(), 330, seed=0))
    assert dynamic.fit_dynamic(network, images, RECIPE, method="rigl", seed=0, every=2).status == "epochs"


def test_an_infinite_buffer_is_no_divergence(images):
    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small()
            self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))

        def get_extra_state(self):
            return {"notes": "none"}

        def set_extra_state(self, state):
            pass

        def forward(self, inputs):
            return self.net(inputs)

    history = fit(Causal(), images, RECIPE, seed=0)
    assert history.status == "epochs" and history.diverged_at is None


def test_removed_weights_that_are_not_finite_become_zero():
    model = small()
    kept = masks.random_masks(model, 300, seed=0)
    with torch.no_grad():
        model[1].weight.masked_fill_(~kept["1.weight"], torch.nan)
    masks.apply_masks(model, kept)
    assert not model[1].weight[~kept["1.weight"]].any()


def test_a_network_that_is_random_in_eval_mode(images):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small()

        def forward(self, inputs):
            return self.net(inputs + 0.3 * torch.randn_like(inputs))

    model, x = Noisy().eval(), images.pixels / 255
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert len({tuple(record.value for record in evaluation.evaluate(model, images)) for _ in range(3)}) == 1
    for attack in ("fgsm", "bim", "pgd", "ffgsm"):
        one, two = (attacks.perturb(model, x, images.labels, attack=attack, epsilon=0.1, seed=1) for _ in range(2))
        assert torch.equal(one, two), attack
    assert torch.equal(torch.rand(3), expected)


def test_threads_may_share_a_network(images):
    model, found, errors = small().train(), [], []

    def measure(number):
        try:
            if number % 2:
                found.append(attacks.evaluate(model, images, epsilons=(0.0, 0.1), attacks=("fgsm",)))
            else:
                weight_noise.evaluate(model, images, sigmas=(0.0, 0.3), draws=2)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=measure, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and all(each == found[0] for each in found)
    assert model.training and all(value.requires_grad for value in model.parameters())


def in_inference_mode():
    with torch.inference_mode():
        return small()


class Ungraded(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small()

    @torch.no_grad()
    def forward(self, inputs):
        return self.net(inputs)


def with_computed_bias():
    model = small()
    prune.random_unstructured(model[1], "bias", 0.5)
    return model


LAZY = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
META = build_model("mlp", (1, 6, 6), 3, width=4, depth=1, weightless=True)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda images: evaluation.evaluate(LAZY, images), "1.weight belongs to a lazy layer"),
        (lambda images: masks.random_masks(LAZY, 3, seed=0), "1.weight belongs to a lazy layer"),
        (lambda images: fit(LAZY, images, RECIPE, seed=0), "1.weight belongs to a lazy layer"),
        (lambda images: evaluation.evaluate(META, images), "is on the meta device and has no values"),
        (lambda images: fit(META, images, RECIPE, seed=0), "is on the meta device and has no values"),
        (lambda images: fit(in_inference_mode(), images, RECIPE, seed=0), "1.weight was made in torch.inference_mode"),
        (
            lambda images: attacks.evaluate(in_inference_mode(), images, epsilons=(0.1,)),
            "1.weight was made in torch.inference_mode",
        ),
        (
            lambda images: masks.initialise(with_computed_bias(), None, seed=0),
            "1.bias is computed from other tensors, not a Parameter; it cannot be sampled",
        ),
        (lambda images: curvature.evaluate(Ungraded(), images), "no gradient with respect to its weights"),
        (lambda images: masks.apply_masks(small(), {"1.weight": [[True]], "3.weight": 1}), "is a list; the weight"),
        (lambda images: calibration.calibration_error(torch.zeros(0, 3), torch.zeros(0).long()), "there are no labels"),
        (
            lambda images: evaluation.logits(torch.jit.script(small()), images, parameters={"1.bias": torch.zeros(20)}),
            "compiled by torch.jit, so its weights cannot be replaced",
        ),
    ],
)
def test_it_is_said_in_our_words(act, words, images):
    with pytest.raises((ValueError, TypeError), match=words):
        act(images)


def test_a_compiled_network_is_measured(images):
    model = small().eval()
    expected = evaluation.evaluate(model, images)
    assert evaluation.evaluate(torch.jit.script(model), images) == expected
    assert evaluation.evaluate(torch.jit.trace(model, torch.rand(2, 1, 6, 6)), images) == expected


def test_numbers_of_numpy_in_a_recipe():
    recipe = Recipe(epochs=np.int64(3), learning_rate=np.float32(0.1), augment=np.bool_(True))
    assert recipe == Recipe(epochs=3, learning_rate=0.1, augment=True)
    assert [type(value) for value in (recipe.epochs, recipe.learning_rate, recipe.augment)] == [int, float, bool]
