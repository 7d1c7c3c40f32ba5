"""What all measures have in common: which networks, images and options they take, and what they refuse before any
work."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchattacks
from torch import nn

from sparse_nb.data import ImageSet, load_images
from sparse_nb.networks.masks import initialise, random_masks
from sparse_nb.networks.models import build_model
from sparse_nb.networks.training import Recipe, fit
from sparse_nb.robustness import attacks, class_recall, evaluation, weight_noise
from sparse_nb.robustness.corruptions import corruptions

MEASURES = {
    "clean": evaluation.evaluate,
    "weight_noise": partial(weight_noise.evaluate, sigmas=(0.0, 0.3), draws=2),
    "corruption": partial(corruptions.evaluate, names=("stripe", "shear"), draws=2),
    "attack": partial(attacks.evaluate, attacks=("fgsm", "pgd", "apgd"), epsilons=(0.0, 0.05)),
    "class_recall": class_recall.evaluate,
}
TYPES = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}  # and their digits


class Untouchable(nn.Module):
    def forward(self, images):
        pytest.fail("the network was asked")


@pytest.fixture(scope="module")
def digits():
    return load_images("digits", "test").take(slice(100))


@pytest.fixture(scope="module")
def networks():
    """A plain network and one of ours with batch norm, trained, in float32."""
    train = load_images("digits", "train")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))
    vgg = build_model("vgg", (1, 28, 28), 10, width=4, depth=11)
    for model in (plain, vgg):
        masks = random_masks(model, 10_000, seed=0)
        initialise(model, masks, seed=0)
        fit(model, train, Recipe(epochs=6, batch_size=32), seed=0, masks=masks)
    return {"plain": plain.eval(), "vgg": vgg}


def numbers(model, pixels, labels):
    """(accuracy, loss) of a network in float64 on float64 images in [0, 1], by the definition."""
    with torch.no_grad():
        log_p = model(pixels).log_softmax(1)
    right = (log_p.argmax(1) == labels).double().mean()
    return float(right), float(-log_p[range(len(labels)), labels].mean())


def found(records, **which):
    return [r.value for r in records if all(getattr(r, field) == value for field, value in which.items())]


# Types ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("plain", "vgg"))
@pytest.mark.parametrize("kind", TYPES)
def test_every_measure_takes_networks_of_every_type(name, kind, networks, digits):
    """Each number is that of a float64 network with the same weights, but for the rounding of the type."""
    model = copy.deepcopy(networks[name]).to(kind)
    exact, labels = copy.deepcopy(model).double().eval(), digits.labels
    before = {key: value.clone() for key, value in model.state_dict().items()}
    records = {measure: evaluate(model, digits) for measure, evaluate in MEASURES.items()}
    assert all(
        torch.equal(value, before[key]) and value.dtype == before[key].dtype
        for key, value in model.state_dict().items()
    )

    rounding = max(8 * 2.0 ** -TYPES[kind], 1e-5)

    def close(measure, right, **which):
        (accuracy,), (loss,) = (
            found(records[measure], quantity=quantity, **which) for quantity in ("accuracy", "loss")
        )
        assert abs(accuracy - right[0]) <= (0.02 if TYPES[kind] < 20 else 0.0)
        assert abs(loss - right[1]) <= rounding * max(1, right[1])

    pixels = digits.pixels.double() / 255
    clean = numbers(exact, pixels, labels)
    close("clean", clean)
    for draw in range(2):
        xi = weight_noise.draw_noise({n: p for n, p in exact.named_parameters() if p.ndim > 1}, seed=0, draw=draw)
        noisy = copy.deepcopy(exact)
        with torch.no_grad():
            for key, parameter in noisy.named_parameters():
                parameter.mul_(1 + 0.3 * xi[key]) if key in xi else None
        accuracy, loss = numbers(noisy, pixels, labels)
        which = dict(strength=0.3, draw=draw)
        assert abs(found(records["weight_noise"], quantity="accuracy", **which)[0] - accuracy) <= 0.02
        increase = found(records["weight_noise"], quantity="loss_increase", **which)[0]
        assert abs(increase - (loss - clean[1])) <= 2 * rounding * max(1, loss)
    assert found(records["weight_noise"], quantity="loss_increase", strength=0.0) == [0.0, 0.0]
    for corruption, severity in (("stripe", 1), ("shear", 2)):
        pictures = corruptions.corrupt(digits, corruption, severity, draw=0).pixels
        close("corruption", numbers(exact, pictures.double() / 255, labels), name=corruption, draw=0)
    close("attack", clean, name="pgd", strength=0.0)
    watched = pixels.clone().requires_grad_()
    F.cross_entropy(exact(watched), labels).backward()
    fgsm = numbers(exact, (pixels + 0.05 * watched.grad.sign()).clamp(0, 1), labels)
    assert (
        abs(found(records["attack"], name="fgsm", strength=0.05, quantity="loss")[0] - fgsm[1])
        <= 2 * rounding * fgsm[1]
    )
    for attack in ("fgsm", "pgd", "apgd"):
        assert found(records["attack"], name=attack, strength=0.05, quantity="largest_perturbation")[0] <= 0.05 + 1e-6
        assert found(records["attack"], name=attack, strength=0.05, quantity="accuracy")[0] < clean[0]
    with torch.no_grad():
        right = exact(pixels).argmax(1) == labels
    for digit, recall in enumerate(found(records["class_recall"], quantity="recall")):
        share = right[labels == digit].double().mean()
        assert abs(recall - share) <= (0.12 if TYPES[kind] < 20 else 0)  # 10 images each


@pytest.mark.parametrize("kind", (torch.float64, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("attack", attacks.ATTACKS)
def test_perturb_takes_networks_and_images_of_every_type(kind, attack, networks, digits):
    few, model = digits.take(slice(4)), copy.deepcopy(networks["plain"]).to(kind)
    for images in (few.pixels.float() / 255, (few.pixels.double() / 255).to(kind)):
        moved = attacks.perturb(model, images, few.labels, attack=attack, epsilon=0.1, steps=3)
        assert moved.dtype == images.dtype and moved.shape == images.shape and 0 <= moved.min() <= moved.max() <= 1
        rounding = 2.0 ** -TYPES[images.dtype]
        assert 0 < (moved.double() - images.double()).abs().max() <= 0.1 + max(1e-6, rounding)
    assert all(parameter.dtype == kind and parameter.requires_grad for parameter in model.parameters())


def test_half_precision_does_not_look_robust(networks, digits):
    """A confident network's gradients vanish in float16: an attack that follows them does less harm than ours, which
    follows the float32 twin's."""
    confident = copy.deepcopy(networks["plain"])
    with torch.no_grad():
        for parameter in confident[3].parameters():
            parameter.mul_(4)
    half = copy.deepcopy(confident).half()
    images, labels = digits.pixels.half() / 255, digits.labels
    watched = images.clone().requires_grad_()
    F.cross_entropy(half(watched), labels).backward()
    without = (watched.grad == 0).flatten(1).all(1)
    assert without.float().mean() > 0.2, "the trouble is there"
    naive = torchattacks.FGSM(half, eps=0.1)(images, labels)
    left = float((half(naive).argmax(1) == labels).float().mean())
    asked = dict(attacks=("fgsm",), epsilons=(0.1,))
    ours, single = (found(attacks.evaluate(m, digits, **asked), quantity="accuracy")[0] for m in (half, confident))
    assert ours < left - 0.1 and abs(ours - single) <= 0.02


# Options --------------------------------------------------------------------------------------------------------------


def forms(values):
    """The same numbers in every form that people have them in."""
    yield from (
        list(values),
        iter(values),
        np.array(values),
        np.array(values, np.float32),
        np.array(values, np.float16),
    )
    yield from (torch.tensor(values), torch.tensor(values, dtype=torch.float64), [np.float32(v) for v in values])
    yield [torch.tensor(v) for v in values]


def test_arrays_and_tensors_as_options(networks, digits):
    model, few = networks["plain"], digits.take(slice(20))
    right = weight_noise.evaluate(model, few, sigmas=(0.0, 0.1), draws=2, seed=3)
    for sigmas in forms((0.0, 0.1)):
        assert weight_noise.evaluate(model, few, sigmas=sigmas, draws=np.int64(2), seed=np.uint8(3)) == right
    right = attacks.evaluate(model, few, attacks=("bim",), epsilons=(0.0, 0.1), seed=3, steps=2)
    for epsilons in forms((0.0, 0.1)):
        options = dict(epsilons=epsilons, seed=torch.tensor(3), steps=np.int32(2), step_size=np.float32(0.25))
        assert attacks.evaluate(model, few, attacks=np.array(["bim"]), **options, batch_size=np.int64(200)) == right
    right = corruptions.evaluate(model, few, names=("fog",), severities=(2, 3), draws=1, seed=3)
    for severities in ([2, 3], np.array([2, 3]), torch.tensor([2, 3]), range(2, 4)):
        options = dict(names=["fog"], severities=severities, draws=torch.tensor(1), seed=np.int16(3))
        assert corruptions.evaluate(model, few, **options) == right
    assert all(type(r.strength) in (int, float) and type(r.name) is str for r in right)
    assert torch.equal(
        evaluation.sample(digits, torch.tensor(9), seed=np.int64(1)).index, evaluation.sample(digits, 9, seed=1).index
    )


@pytest.mark.parametrize("measure", MEASURES)
def test_an_empty_set_is_refused(measure, digits):
    with pytest.raises(ValueError, match="there are no images to measure on in this set \\(digits, test\\)"):
        MEASURES[measure](Untouchable(), digits.take([]))


REFUSED = [
    (weight_noise, dict(sigmas=()), r"sigmas are \(\); at least one"),
    (weight_noise, dict(sigmas=np.array([])), r"sigmas are \(\); at least one"),
    (weight_noise, dict(sigmas=0.1), "sigmas is 0.1; it must be a sequence"),
    (weight_noise, dict(sigmas=("a",)), "sigmas has 'a' in it"),
    (weight_noise, dict(sigmas=torch.tensor([0.1, 0.1])), "each only once"),
    (weight_noise, dict(sigmas=np.array([np.nan])), "sigma is nan"),
    (weight_noise, dict(draws=1.5), "draws is 1.5; it must be a whole number, at least 1"),
    (weight_noise, dict(draws=True), "draws is True"),
    (weight_noise, dict(seed=1.0), "seed is 1.0; it must be a whole number"),
    (corruptions, dict(names=()), r"names are \(\); at least one"),
    (corruptions, dict(names="fog"), "names is 'fog'; it must be a sequence"),
    (corruptions, dict(names=("fog", "fog")), "each only once"),
    (corruptions, dict(severities=[]), r"severities are \(\); at least one"),
    (corruptions, dict(severities=(2.5,)), "severities is 2.5; it must be a whole number"),
    (corruptions, dict(severities=(9,)), "severity is 9"),
    (corruptions, dict(draws=0), "draws is 0"),
    (corruptions, dict(seed="0"), "seed is '0'"),
    (corruptions, dict(source="web"), "source is 'web'"),
    (attacks, dict(attacks=()), r"attacks are \(\); at least one"),
    (attacks, dict(attacks="fgsm"), "attacks is 'fgsm'; it must be a sequence"),
    (attacks, dict(epsilons=np.array([])), r"epsilons are \(\); at least one"),
    (attacks, dict(epsilons=torch.tensor(0.1)), "it must be a sequence"),
    (attacks, dict(epsilons=(8,)), "8/255, not 8"),
    (attacks, dict(batch_size=0), "batch_size is 0; it must be a whole number, at least 1"),
    (attacks, dict(batch_size=-1), "batch_size is -1"),
    (attacks, dict(steps=2.0), "steps is 2.0"),
    (attacks, dict(step_size=0), "step_size is 0"),
    (attacks, dict(seed=None), "seed is None"),
]


@pytest.mark.parametrize("module, options, said", REFUSED)
def test_what_cannot_be_measured_is_refused_before_the_network_is_asked(module, options, said, digits):
    with pytest.raises(ValueError, match=said):
        module.evaluate(Untouchable(), digits, **options)


@pytest.mark.parametrize("channels", (2, 4))
def test_channels_that_have_no_corruptions_and_no_radii_are_named(channels):
    images = ImageSet(torch.zeros(6, channels, 32, 32, dtype=torch.uint8), torch.arange(6), 6, "odd", "test")
    with pytest.raises(ValueError, match=f"images are \\({channels}, 32, 32\\); corruptions are defined for"):
        corruptions.evaluate(Untouchable(), images)
    with pytest.raises(ValueError, match=f"images have {channels} channels; default epsilons exist for 1 and 3"):
        attacks.evaluate(Untouchable(), images)
    model = nn.Sequential(nn.Flatten(), nn.Linear(channels * 1024, 6))
    records = attacks.evaluate(
        model, images, attacks=("pgd",), epsilons=(0.1,)
    )  # where they are given there is no reason
    assert found(records, quantity="largest_perturbation")[0] == pytest.approx(0.1)


@pytest.mark.parametrize("classes", (2, 3, 4))
def test_autoattack_by_the_number_of_classes(classes):
    images = ImageSet(
        torch.arange(8 * 9).view(8, 1, 3, 3).byte() * 3, torch.arange(8) % classes, classes, "few", "test"
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, classes))
    asked = dict(attacks=("fgsm", "autoattack"), epsilons=(0.1,))
    inputs = images.pixels.float() / 255
    if classes >= 4:
        right = found(attacks.evaluate(model, images, **asked), name="autoattack", quantity="accuracy")[0]
        with torch.no_grad():  # no point of the ball does better than the attack's, so no random one either
            moves = (torch.rand(2000, *inputs.shape) * 2 - 1) * 0.1
            alone = torch.stack([model((inputs + move).clamp(0, 1)).argmax(1) == images.labels for move in moves])
        assert right <= float(alone.all(0).float().mean())
        return
    with pytest.raises(ValueError, match=f"autoattack needs at least 4 classes, and there are {classes}"):
        attacks.evaluate(Untouchable(), images, **asked)
    with pytest.raises(ValueError, match=f"autoattack needs at least 4 classes, and there are {classes}"):
        attacks.perturb(model, inputs, images.labels, attack="autoattack", epsilon=0.1)


def test_a_network_with_fewer_outputs_than_classes_is_named(digits):
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 5))
    for evaluate in (evaluation.evaluate, MEASURES["weight_noise"], MEASURES["corruption"], MEASURES["attack"]):
        with pytest.raises(ValueError, match="labels go up to 9, but the network has 5 outputs"):
            evaluate(model, digits)
