"""What a report promises for networks of every kind, checked against SciPy and PyTorch."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, ttest_rel
from torch import nn
from torch.nn.utils import prune

from sparse_nb.data import as_float, load_images
from sparse_nb.networks.masks import apply_masks, initialise, random_masks
from sparse_nb.networks.models import build_model, counted_weights
from sparse_nb.networks.sparse_layers import sparse_network
from sparse_nb.networks.training import Recipe, fit
from sparse_nb.robustness.report import report


@pytest.fixture(scope="module")
def digits():
    return load_images("digits", "test")


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]


def network(width=16, epochs=8):
    model = build_model("mlp", (1, 28, 28), 10, width=width, depth=1)
    initialise(model, None, seed=0)
    fit(model, load_images("digits", "train"), Recipe(epochs=epochs, batch_size=32), seed=0)
    return model


@pytest.fixture(scope="module")
def four_kinds():
    """The same sparse network in four forms: masks of `prune`, zeros, sparse layers, frozen zeros."""
    pruned = network()
    for layer in layers_of(pruned):
        prune.l1_unstructured(layer, "weight", amount=0.5)
    zeros = build_model("mlp", (1, 28, 28), 10, width=16, depth=1)
    with torch.no_grad():
        for own, other in zip(layers_of(zeros), layers_of(pruned), strict=True):
            own.weight.copy_(other.weight)
            own.bias.copy_(other.bias)
    masks = {name: weight != 0 for name, weight in counted_weights(zeros).items()}
    apply_masks(zeros, masks)
    frozen = copy.deepcopy(zeros).requires_grad_(False)
    return {"pruned": pruned, "zeros": zeros, "stored": sparse_network(copy.deepcopy(zeros), masks), "frozen": frozen}


def values(found, network, column="value"):
    rows = found.table[found.table.network == network]
    return dict(zip(rows.measure, rows[column], strict=True))


def test_four_forms_of_one_network_have_one_report(four_kinds, digits):
    found = report(four_kinds, digits, quick=True)
    expected = values(found, "pruned")
    for name in four_kinds:
        own = values(found, name)
        assert own.keys() == expected.keys()
        assert all(math.isclose(own[measure], expected[measure], abs_tol=0.006) for measure in own)
        assert own["kept weights"] == expected["kept weights"] and own["density"] == expected["density"]
    assert found.warnings == () and any("the same capacity" in note for note in found.notes)


@pytest.mark.parametrize("kind", (torch.float64, torch.float16, torch.bfloat16))
def test_any_floating_point_type(kind, digits):
    model = network()
    found = report({"float32": model, "other": copy.deepcopy(model).to(kind)}, digits, quick=True)
    one, other = values(found, "float32"), values(found, "other")
    assert all(abs(one[measure] - other[measure]) < 0.03 for measure in one)


def everything_about(model):
    """What must be the same before and after a report."""
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "wanted": [p.requires_grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [
            (list(m._forward_pre_hooks), list(m._forward_hooks), list(m._backward_hooks)) for m in model.modules()
        ],
        "identity": [id(p) for p in model.parameters()],
        "devices": [p.device for p in model.parameters()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
    }


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def test_nothing_is_written_to_the_networks_or_the_random_state(four_kinds, digits):
    model = four_kinds["pruned"]
    loss = model(as_float(digits.pixels[:8])).square().sum()
    loss.backward()
    batch_norm = build_model("vgg", (1, 28, 28), 10, width=4, depth=11).train()
    batch_norm[3].eval()
    next(batch_norm.parameters()).requires_grad_(False)
    networks = {"pruned": model.train(), "stored": four_kinds["stored"], "batch norm": batch_norm}
    before = {name: everything_about(network) for name, network in networks.items()}
    state, few = torch.get_rng_state(), digits.take(slice(0, 360, 3))
    report(networks, few, quick=True)
    for name, network in networks.items():
        after = everything_about(network)
        assert [part for part in after if not equal(before[name][part], after[part])] == [], name
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match="epsilon is 8"):
        report(networks, few, epsilon=8)
    assert all(equal(before[name], everything_about(network)) for name, network in networks.items())


def test_the_same_call_gives_the_same_report_whatever_else_is_in_it(four_kinds, digits):
    model, other = four_kinds["zeros"], network(8)
    alone = report({"zeros": model}, digits, quick=True)
    together = report({"other": other, "zeros": model}, digits, quick=True)
    assert values(alone, "zeros") == values(together, "zeros")
    assert np.array_equal(*([*values(found, "zeros", "low").values()] for found in (alone, together)), equal_nan=True)
    assert values(alone, "zeros") != values(report({"zeros": model}, digits, quick=True, seed=1), "zeros")


def test_intervals_are_those_of_scipy(four_kinds, digits):
    small = network(4, epochs=2)
    found = report({"first": four_kinds["zeros"], "small": small}, digits, quick=True)
    with torch.no_grad():
        answers = [
            model(as_float(digits.pixels)).argmax(1) == digits.labels
            for model in (four_kinds["zeros"].eval(), small.eval())
        ]
    for name, right in zip(("first", "small"), answers, strict=True):
        exact = binomtest(int(right.sum()), 360).proportion_ci(0.95, method="wilson")
        assert values(found, name)["clean accuracy"] == float(right.double().mean())
        assert math.isclose(values(found, name, "low")["clean accuracy"], exact.low, abs_tol=1e-9)
        assert math.isclose(values(found, name, "high")["clean accuracy"], exact.high, abs_tol=1e-9)
    gaps = (answers[1].int() - answers[0].int()).numpy()
    assert math.isclose(values(found, "small", "difference")["clean accuracy"], gaps.mean())
    plain = ttest_rel(answers[1].int().numpy(), answers[0].int().numpy()).confidence_interval(0.95)
    for column, end in (("difference_low", plain.low), ("difference_high", plain.high)):
        assert abs(values(found, "small", column)["clean accuracy"] - end) < 0.006  # two pseudo-images of 362
    assert np.isnan(found.table[found.table.network == "first"].difference).all()
    shares = found.table[found.table.low.notna()]
    assert ((shares.low <= shares.value) & (shares.value <= shares.high) & (shares.low < shares.high)).all()
    paired = found.table[found.table.difference.notna()]
    assert (paired.difference_low <= paired.difference).all() and (paired.difference <= paired.difference_high).all()


class Awkward(nn.Module):
    """A network without gradients for its images, and with an activation that is not zero at zero."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(784, 10)
        self.two = nn.Linear(10, 10)

    def forward(self, images):
        rounded = (images.flatten(1) * 3).round()
        return self.two(torch.sigmoid(self.one(rounded)))


def test_what_cannot_be_measured_of_one_network_is_said_and_the_rest_is_measured(digits):
    found = report({"plain": network(4, epochs=1), "awkward": Awkward()}, digits, quick=True)
    awkward = values(found, "awkward")
    assert math.isnan(awkward["effective density"]) and awkward["kept weights"] == 7840 + 100
    assert any("Effective density of awkward is not known" in note for note in found.notes)
    assert not math.isnan(awkward["clean accuracy"])


class Hidden(nn.Module):
    """Its gradients are not numbers."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        scores = self.model(images)
        return torch.where(scores > 0, scores.sqrt(), 0)


def test_an_attack_that_cannot_work_is_left_out_with_its_reason(digits):
    found = report({"hidden": Hidden(network(4, epochs=1)), "plain": network(4, epochs=1)}, digits, quick=True)
    attacked = [measure for measure in values(found, "hidden") if "PGD" in measure or "FGSM" in measure]
    assert len(attacked) == 2 and all(math.isnan(values(found, "hidden")[measure]) for measure in attacked)
    assert all(not math.isnan(values(found, "plain")[measure]) for measure in attacked)
    assert sum("hidden is left out" in note for note in found.notes) == 2
    assert "nan" not in found.markdown() and "nan" not in found.html()


def test_a_class_without_images_and_names_of_every_kind(digits):
    some = digits.take(digits.labels != 3)
    names = ['<script>alert("1")</script>', "a|b\nc", "ü" * 80]
    found = report({name: network(4, epochs=1) for name in names}, some, quick=True)
    assert "lowest class recall" not in set(found.table.measure)
    assert any("1 of 10 classes have no image" in note for note in found.notes)
    page, table = found.html(), found.markdown()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert {line.replace("\\|", "").count("|") for line in table.splitlines() if line.startswith("|")} == {5}


def test_images_of_another_size_and_more_channels(digits):
    large = replace(digits, pixels=digits.pixels.repeat(1, 4, 2, 2)).take(slice(0, 360, 2))
    model = nn.Sequential(
        nn.Conv2d(4, 4, 5, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 10)
    )
    found = report({"any": model}, large, quick=True, epsilon=0.02)
    measures = set(values(found, "any"))
    assert "accuracy under PGD, ε = 0.02" in measures and not any("corrupted" in measure for measure in measures)
    assert any("Corruptions are left out" in note for note in found.notes)


def test_what_is_wrong_with_a_network_is_found_before_any_measurement(digits, monkeypatch):
    def fail(*args, **options):
        raise AssertionError("a measurement began")

    for name in ("noisy_right", "rounded_right", "corrupted_right", "attacked_right", "bootstrap"):
        monkeypatch.setattr(f"sparse_nb.robustness.report.{name}", fail)
    good, last = network(4, epochs=1), network(4, epochs=1)
    with torch.no_grad():
        last[-1].bias[0] = float("inf")
    cases = {
        "network 'bad': 360 of 360 outputs of the network are not finite": last,
        "network 'bad': .*Conv1d": nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.Conv1d(1, 1, 1)),
        "network 'bad' does not take these images": nn.Linear(5, 10),
        r"answers 2 images with \(2, 3\); images of 10 classes need": nn.Sequential(nn.Flatten(), nn.Linear(784, 3)),
        "network 'bad': it is on the meta device": build_model(
            "mlp", (1, 28, 28), 10, width=4, depth=1, weightless=True
        ),
    }
    for message, bad in cases.items():
        with pytest.raises((ValueError, TypeError), match=message):
            report({"good": good, "bad": bad}, digits)
    with pytest.raises(TypeError, match="names must be text"):
        report({"good": good, " ": last}, digits)


@pytest.mark.gpu
def test_a_gpu_finds_what_a_cpu_finds(four_kinds, digits):
    on_gpu = {name: copy.deepcopy(four_kinds[name]).cuda() for name in ("zeros", "stored")}
    found, expected = (report(on_gpu, digits, quick=True, device=device) for device in ("cuda", "cpu"))
    assert all(p.is_cuda for model in on_gpu.values() for p in model.parameters())
    without_chance = ~found.table.measure.str.contains("PGD")
    assert np.allclose(found.table.value[without_chance], expected.table.value[without_chance], atol=0.006)


@pytest.mark.data
def test_pruned_networks_on_cifar10():
    """Three networks on real images, two of them pruned with PyTorch's tool."""
    train, test = load_images("cifar10", "train").take(slice(2000)), load_images("cifar10", "test").take(slice(300))
    dense = build_model("vgg", (3, 32, 32), 10, width=4, depth=11)
    initialise(dense, None, seed=0)
    fit(dense, train, Recipe(epochs=2, batch_size=50, learning_rate=0.03), seed=0)
    local, together = copy.deepcopy(dense), copy.deepcopy(dense)
    for layer in layers_of(local):
        prune.random_unstructured(layer, "weight", amount=0.3)
        prune.l1_unstructured(layer, "weight", amount=0.3)
    prune.global_unstructured(
        [(layer, "weight") for layer in layers_of(together)], pruning_method=prune.L1Unstructured, amount=0.8
    )
    found = report({"dense": dense, "local": local, "global": together}, test, quick=True)
    for name, model in (("dense", dense), ("local", local), ("global", together)):
        assert values(found, name)["kept weights"] == sum(int(x.weight.count_nonzero()) for x in layers_of(model))
        with torch.no_grad():
            right = int((model.eval()(as_float(test.pixels)).argmax(1) == test.labels).sum())
        exact = binomtest(right, 300).proportion_ci(0.95, method="wilson")
        assert math.isclose(values(found, name)["clean accuracy"], right / 300)
        assert math.isclose(values(found, name, "low")["clean accuracy"], exact.low, abs_tol=1e-9)
    assert len(found.warnings) == 1 and "local keeps" in found.warnings[0] and "global keeps" in found.warnings[0]
    assert {"accuracy under PGD, ε = 2/255 (200 images)", "accuracy under FGSM, ε = 2/255"} & set(found.table.measure)


def test_random_masks_and_report_agree_on_the_budget(digits):
    model = build_model("mlp", (1, 28, 28), 10, width=64, depth=1)
    masks = random_masks(model, 3000, seed=0)
    initialise(model, masks, seed=0)
    found = report({"sparse": model}, digits, quick=True)
    assert values(found, "sparse")["kept weights"] == 3000
    assert math.isclose(values(found, "sparse")["density"], 3000 / (64 * 794))
    assert repr(found) == "Report on sparse: digits test, 360 images"
