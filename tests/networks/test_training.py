"""Recorded steps as `fit` uses them on a GPU, tried with a stand-in on a CPU; other types; mistakes."""

import pytest
import torch
from torch import nn

from sparse_nb import data
from sparse_nb.networks import training
from sparse_nb.networks.masks import initialise, random_masks
from sparse_nb.networks.models import build_model
from sparse_nb.networks.training import Recipe, fit


@pytest.fixture
def digits():
    return data.load_images("digits", "train").take(slice(300))


def network(seed=0):
    model = build_model("mlp", (1, 28, 28), 10, width=32, depth=1)
    masks = random_masks(model, 5000, seed=seed)
    initialise(model, masks, seed=seed)
    return model, masks


@pytest.fixture
def recorder(monkeypatch):
    """`captured` replaced by one that notes the shapes it replays, and images that seem to be on a GPU."""
    seen = {"examples": [], "replayed": []}

    def captured(model, example):
        plain = model.forward
        seen["examples"].append((tuple(example.shape), example.dtype))

        def forward(inputs):
            if inputs.shape == example.shape:
                seen["replayed"].append(len(inputs))
            return plain(inputs)

        model.forward = forward
        return model

    monkeypatch.setattr(training, "captured", captured)
    monkeypatch.setattr(training, "_on_gpu", lambda images: True)
    return seen


def test_full_batches_are_replayed_and_nothing_is_left_behind(recorder, digits, monkeypatch):
    (model, masks), (plain, _) = network(), network()
    history = fit(model, digits, Recipe(epochs=2), seed=0, masks=masks)
    assert recorder["examples"] == [((128, 1, 28, 28), torch.float32)]
    assert recorder["replayed"] == [128, 128] * 2 and len(history.epochs) == 2  # and 44 images, as they are
    assert "forward" not in vars(model) and not model.training

    monkeypatch.setattr(training, "_on_gpu", lambda images: False)
    fit(plain, digits, Recipe(epochs=2), seed=0, masks=masks)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_an_interrupted_training_leaves_nothing_behind_either(recorder, digits):
    model, masks = network()

    def interrupt(epoch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, digits, Recipe(epochs=2), seed=0, masks=masks, on_epoch=interrupt)
    assert recorder["replayed"] == [128, 128] and "forward" not in vars(model)


def test_the_example_has_the_type_of_the_network(recorder, digits):
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).double()
    assert fit(model, digits, Recipe(epochs=1), seed=0).status == "epochs"
    assert recorder["examples"] == [((128, 1, 28, 28), torch.float64)]


class Own(nn.Module):
    def forward(self, x):
        return x.flatten(1)


def test_networks_of_foreign_modules_or_with_hooks_are_not_recorded(recorder, digits):
    hooked = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    calls = []
    hooked[1].register_forward_hook(lambda *_: calls.append(1))
    for model in (nn.Sequential(Own(), nn.Linear(784, 10)), hooked):
        fit(model, digits, Recipe(epochs=1), seed=0)
    assert recorder["examples"] == [] and len(calls) == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_plain_network_of_another_type_trains(dtype, digits):
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).to(dtype)
    before = [p.clone() for p in model.parameters()]
    history = fit(model, digits, Recipe(epochs=2), seed=0, masks=random_masks(model, 2000, seed=0))
    assert history.status == "epochs" and history.epochs[1].loss < history.epochs[0].loss < 2.5
    assert all(p.dtype == dtype and not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_mistakes_are_refused_before_anything_changes(digits):
    model, masks = network()
    before = [p.clone() for p in model.parameters()]
    for images, recipe in ((digits.take([]), Recipe()), (digits.take(digits.labels > 20), Recipe())):
        with pytest.raises(ValueError, match="there are no images to train on"):
            fit(model, images, recipe, seed=0, masks={name: torch.zeros_like(mask) for name, mask in masks.items()})
    normed = nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.BatchNorm1d(8))
    frozen = nn.Sequential(nn.Flatten(), nn.Linear(784, 8)).requires_grad_(False)
    for other, count, recipe, said in (
        (normed, 300, Recipe(batch_size=1), "batch_size is 1"),
        (normed, 257, Recipe(batch_size=64), "257 images in batches of 64 end with a batch of one"),
        (normed, 1, Recipe(), "1 images in batches of 128 end with a batch of one"),
        (frozen, 300, Recipe(), "all parameters are frozen"),
    ):
        with pytest.raises(ValueError, match=said):
            fit(other, digits.take(slice(count)), recipe, seed=0)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
