"""Sparse networks under use that the chapters do not show: wrong inputs, loaded states, hooks, parts of networks."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_nb.networks import masks
from sparse_nb.networks.models import build_model, counted_weights
from sparse_nb.networks.portable import portable
from sparse_nb.networks.sparse_layers import SparseLinear, dense_network, sparse_network


def mlp(hidden=(64, 32)):
    sizes = (784, *hidden, 10)
    layers = [nn.Flatten()]
    for inputs, outputs in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def pruned(model, budget, seed=0):
    """(`model` with weights removed at random, its masks)."""
    kept = masks.random_masks(model, budget, seed=seed)
    masks.initialise(model, kept, seed=seed)
    return model, kept


def sparse(model, budget, seed=0):
    return sparse_network(*pruned(model, budget, seed))


IMAGES = torch.rand(7, 1, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("budget", [200, 1000, 45_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_images_of_another_size_are_refused(budget, dtype):
    network = sparse(mlp(), budget).to(dtype)
    assert network(IMAGES.to(dtype)).shape == (7, 10)
    for side in (20, 32):
        with pytest.raises(ValueError, match=f"{side * side} features.*takes 784"):
            network(torch.rand(5, 1, side, side).to(dtype))


@pytest.mark.parametrize("density", [0.05, 0.5])
def test_other_channels_are_refused(density):
    layer = nn.Conv2d(3, 16, 3)
    kept = {"weight": torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(0)) < density}
    network = sparse_network(layer, kept)
    for shape in ((1, 20, 20), (7, 20, 20), (3, 2, 2)):
        with pytest.raises((ValueError, RuntimeError), match="channels|takes|Kernel size"):
            network(torch.rand(2, *shape))


def copied(network):
    return copy.deepcopy(network)


def stored(network):
    buffer = io.BytesIO()
    torch.save(network, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("again", [copied, stored])
@pytest.mark.parametrize("budget", [200, 1000])
def test_a_loaded_state_brings_its_own_pattern(budget, again):
    first, second = sparse(mlp(), budget, seed=0), sparse(mlp(), budget, seed=1)
    first(IMAGES)
    first = again(first)
    assert first.state_dict().keys() == second.state_dict().keys()
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(IMAGES), second(IMAGES))
    plans = dict(first[1].plans)
    first.load_state_dict(second.state_dict())
    assert first[1].plans == plans  # the same positions: what a recorded step uses remains


def test_a_portable_network_loads_another_pattern():
    first, second = (portable(sparse(build_model("vgg", (1, 28, 28), 10, width=4, depth=11), 2000, s)) for s in (0, 1))
    assert not torch.equal(first.conv2_1.positions, second.conv2_1.positions)
    first.eval()(IMAGES)
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(IMAGES), second.eval()(IMAGES))


def test_the_state_of_a_larger_layer_is_refused():
    layer = SparseLinear(10, 4, torch.arange(5))
    with pytest.raises(ValueError, match="positions lie outside"):
        layer.load_state_dict(layer.state_dict() | {"positions": torch.tensor([0, 1, 2, 3, 40])})


def test_frozen_parameters_stay_frozen():
    model, kept = pruned(mlp(), 2000)
    model[1].weight.requires_grad_(False), model[3].bias.requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    network = sparse_network(model, kept)
    assert {name: p.requires_grad for name, p in network.named_parameters()} == wanted
    assert {name: p.requires_grad for name, p in dense_network(network)[0].named_parameters()} == wanted


def test_what_would_be_replaced_by_something_else_is_refused():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2)

    model, kept = pruned(Attention(), 30)
    with pytest.raises(ValueError, match=r"attention.out_proj is a NonDynamicallyQuantizableLinear.*accepted: Conv2d"):
        sparse_network(model, kept)
    model, kept = pruned(mlp(), 2000)
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="the network has _forward_hooks"):
        sparse_network(model, kept)
    assert type(model[1]) is nn.Linear
    with pytest.raises(ValueError, match="is a SparseLinear"):
        sparse_network(sparse(mlp(), 2000), masks.random_masks(sparse(mlp(), 2000), 1000, seed=0))


def test_a_hook_on_a_dense_copy_is_not_called_by_the_original():
    network, calls = sparse(mlp(), 500), []
    dense_network(network)[0][2].register_forward_hook(lambda *_: calls.append(1))
    network(IMAGES)
    assert not calls


class Viewed(nn.Module):
    """Convolutions whose output is seen through `view`."""

    def __init__(self, wrapped):
        super().__init__()
        layers = nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3)
        self.features = nn.Sequential(*layers) if wrapped else layers[0]
        self.classifier = nn.Linear(8 * (11 if wrapped else 13) ** 2, 10)

    def forward(self, x):
        x = self.features(x).relu()
        return self.classifier(x.view(x.size(0), -1))


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("density", [0.08, 0.5])
def test_the_output_of_convolutions_can_be_viewed(wrapped, density):
    model, stream = Viewed(wrapped), torch.Generator().manual_seed(0)
    kept = {name: torch.rand(w.shape, generator=stream) < density for name, w in counted_weights(model).items()}
    masks.initialise(model, kept, seed=0)
    wanted = model(IMAGES)
    torch.testing.assert_close(sparse_network(model, kept)(IMAGES), wanted)


class InParts(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = mlp()

    def forward(self, x):
        first, second = self.layers[:3](x), x
        for layer in self.layers:
            second = F.normalize(layer(second), dim=-1)
        return second + self.layers[3:](F.normalize(first)) + first.mean()


@pytest.mark.parametrize("budget", [200, 400])
def test_a_network_used_in_parts_has_all_its_units(budget):
    model, kept = pruned(InParts(), budget)
    wanted = model(IMAGES)
    network = sparse_network(model, kept)
    assert len(network.layers[1].executed_outputs) < 64
    torch.testing.assert_close(network(IMAGES), wanted)
    network.layers[3] = nn.Linear(64, 32)
    whole = dense_network(network)[0]
    torch.testing.assert_close(network.layers(IMAGES), whole.layers(IMAGES))
