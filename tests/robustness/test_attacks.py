"""What no cell can test of the attacks: figure 3 as a whole process, any linear model, interruptions, the GPU, the
names of measurements."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparse_nb import data
from sparse_nb.networks.masks import initialise, random_masks
from sparse_nb.networks.models import build_model
from sparse_nb.robustness import attacks, evaluation
from sparse_nb.runs.store import Store, load_run
from sparse_nb.study.experiments import Attack, evaluation_hash
from sparse_nb.study.plans import plan
from sparse_nb.study.studies import narrow

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SMALL = dict(families=("mlp",), epochs=2, widths=(32, 128))
EVERY = (*attacks.PAPER_ATTACKS, "longer_pgd")


def network(family="mlp", width=32, depth=1, device="cpu"):
    model = build_model(family, (1, 28, 28), 10, width=width, depth=depth)
    initialise(model, random_masks(model, 10_000, seed=0), seed=0)
    return model.to(device)


@pytest.fixture(scope="module")
def digits():
    return data.load_images("digits", "test").take(slice(40))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder with `runs` and `out` of one real command that draws figure 3."""
    folder = tmp_path_factory.mktemp("drawn")
    flags = [
        word
        for name, value in SMALL.items()
        for word in (f"--{name}", *map(str, value if isinstance(value, tuple) else [value]))
    ]
    asked = [BIN / "sparse-nb", "figures", "fig03", *flags, "--runs", folder / "runs", "--out", folder / "out"]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder


def test_both_views_are_published(drawn):
    names = {path.name for path in (drawn / "out/smoke").iterdir()}
    both = {f"{view}.{ending}" for view in ("fig03", "fig03_epsilon") for ending in ("csv", "html", "png", "svg")}
    assert names == both | {"fig03.ipynb", "plotly.min.js"}
    text = re.sub(
        r"</tspan><tspan[^>]*>", " ", (drawn / "out/smoke/fig03.svg").read_text(encoding="utf-8")
    )  # a line ends where it is full
    words = [
        "clean",
        "FGSM",
        "FFGSM",
        "BIM",
        "PGD",
        "APGD",
        "Attacks of 4 of 10 steps",
        "32 of 1,000 attacked images",
        "Signs of gradient masking",
    ]
    assert [word for word in words if word not in text] == []


def test_csv_holds_what_fgsm_does_to_the_stored_networks(drawn):
    curves, store, right = pd.read_csv(drawn / "out/smoke/fig03.csv"), Store(drawn / "runs"), {}
    images = evaluation.sample(data.load_images("digits", "test"), 32)
    inputs = images.pixels.float() / 255
    for point in plan("fig03", narrow("smoke", **SMALL)):
        model = load_run(store, point.experiment, torch.device("cpu")).eval()
        watched = inputs.clone().requires_grad_()
        F.cross_entropy(model(watched), images.labels).backward()
        attacked = (inputs + 0.1 * watched.grad.sign()).clamp(0, 1)
        both = (model(inputs).argmax(1) == images.labels) & (model(attacked).argmax(1) == images.labels)
        right.setdefault(point.experiment.width, []).append(float(both.float().mean()))
    for width, shares in right.items():
        row = curves.query(f"width == {width} and quantity == 'accuracy' and name == 'fgsm' and strength == 0.1")
        assert abs(row["mean"].item() - sum(shares) / len(shares)) < 1e-9


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.001, 0.5), st.sampled_from(["fgsm", "bim", "pgd", "longer_pgd"]))
def test_any_linear_model_is_brought_to_its_worst_margin(seed, epsilon, attack):
    numbers = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(2, 9, generator=numbers))
    images, labels = torch.rand(5, 1, 3, 3, generator=numbers), torch.randint(2, (5,), generator=numbers)
    found = attacks.perturb(model, images, labels, attack=attack, epsilon=epsilon, seed=seed).flatten(1)
    v = (model[1].weight[labels] - model[1].weight[1 - labels]).detach()
    corner = (images.flatten(1) - epsilon * v.sign()).clamp(0, 1)
    assert torch.allclose((v * found).sum(1), (v * corner).sum(1), atol=1e-4)


def test_neither_the_global_seed_nor_no_grad_around_it_changes_the_result(digits):
    model, found = network(), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            found.append(attacks.evaluate(model, digits, attacks=EVERY, epsilons=(0.1,)))
    assert found[0] == found[1]


@pytest.mark.parametrize("attack", attacks.ATTACKS)
def test_an_interrupted_attack_leaves_everything_as_it_was(attack, digits):
    class Interrupted(nn.Module):
        calls = 0

        def __init__(self):
            super().__init__()
            self.network = network("vgg", 4, 11)

        def forward(self, images):
            self.calls += 1
            if self.calls > 2:
                raise KeyboardInterrupt
            return self.network(images)

    model = Interrupted()
    model.network.norm1_1.eval()
    model.network.classifier.requires_grad_(False)

    def all_of_it():
        return (
            [m.training for m in model.modules()],
            [p.requires_grad for p in model.parameters()],
            torch.get_rng_state().tolist(),
        )

    before, values = all_of_it(), {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        attacks.evaluate(model, digits, attacks=(attack,), epsilons=(0.1, 0.2))
    assert all_of_it() == before and not model._forward_pre_hooks
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


OTHERS = {
    "attacks": ("pgd",),
    "epsilons": (0.0, 0.1),
    "steps": 9,
    "step_size": 0.5,
    "restarts": 2,
    "seed": 1,
    "test_images": 10,
}


def test_the_name_of_a_measurement_changes_with_every_field():
    assert {field.name for field in dataclasses.fields(Attack)} == {*OTHERS, "version"}
    names = {evaluation_hash(dataclasses.replace(Attack(), **{name: value})) for name, value in OTHERS.items()}
    assert len(names | {evaluation_hash(Attack())}) == len(OTHERS) + 1


@pytest.mark.slow
@pytest.mark.parametrize("family, depth", [("mlp", 1), ("vgg", 11), ("resnet", 18)])
def test_autoattack_keeps_the_promises_on_every_family(family, depth, digits):
    model, few = network(family, 32 if family == "mlp" else 4, depth), digits.take(slice(6))
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    found = {
        (r.quantity, r.strength): r.value
        for r in attacks.evaluate(model, few, attacks=("autoattack",), epsilons=(0.0, 0.01))
    }
    assert found["accuracy", 0.01] <= found["accuracy", 0.0] == evaluation.evaluate(model, few)[0].value
    assert found["largest_perturbation", 0.01] <= 0.01 + 1e-6
    assert torch.equal(state, torch.get_rng_state()) and all(
        torch.equal(value, before[name]) for name, value in model.state_dict().items()
    )


@pytest.mark.gpu
def test_on_a_gpu_the_same_numbers_without_chance_and_its_random_state_as_before(digits):
    torch.rand(1, device="cuda")
    state, there = torch.cuda.get_rng_state(), digits.to("cuda")
    on_gpu = attacks.evaluate(network(device="cuda"), there, attacks=EVERY, epsilons=(0.0, 0.1))
    assert torch.equal(state, torch.cuda.get_rng_state())
    assert on_gpu == attacks.evaluate(network(device="cuda"), there, attacks=EVERY, epsilons=(0.0, 0.1))
    on_cpu = attacks.evaluate(network(), digits, attacks=attacks._WITHOUT_CHANCE, epsilons=(0.0, 0.1))
    for here, its in zip(on_cpu, (r for r in on_gpu if r.name in attacks._WITHOUT_CHANCE), strict=True):
        assert here.value == pytest.approx(its.value, abs=1.5 / 40 if here.quantity == "accuracy" else 1e-3)
