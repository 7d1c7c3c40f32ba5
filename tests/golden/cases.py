"""Tiny networks of every kind, and what they come to: weights and records as SHA-256, losses as numbers.

Golden bits prove nothing about a number being right. They tell whether a change of code, or another machine, changes
it.

    python tests/golden/cases.py

prints {case: what it comes to}.
"""

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import torch

from sparse_nb import data
from sparse_nb.networks import models, portable, sparse_layers
from sparse_nb.networks.training import Recipe
from sparse_nb.study import experiments
from sparse_nb.study.experiments import (
    Attack,
    Calibration,
    ClassRecall,
    Clean,
    CorrectImages,
    Corruption,
    Curvature,
    Experiment,
    Quantisation,
    WeightNoise,
)
from sparse_nb.study.versions import canonical
from sparse_nb.sweep import jobs

BITS = Path(__file__).with_name("bits.json")
TOLERANCE = 1e-5  # of losses, on a machine whose bits are not listed


def machine():
    """What decides bits: the release of PyTorch, the processor's maker and its instructions."""
    about = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    maker = next((line.split(":")[1].strip() for line in about.splitlines() if line.startswith("vendor_id")), "unknown")
    return f"torch {torch.__version__.partition('+')[0]}, {maker}, {torch.backends.cpu.get_cpu_capability()}"


EVERY_MACHINE = "x86-64"  # on which an MLP's bits are the same


def kind_for(name):
    """What decides the bits of a case: `machine`, or nothing for an MLP and for a portable network."""
    return EVERY_MACHINE if name.startswith("mlp") or ", mlp, " in name or "portable" in name else machine()


def _experiment(family, width, depth, budget, rule="water_filling", schedule="static", images=160, epochs=2, **more):
    settings = {
        name: more.pop(name) for name in list(more) if name in {field.name for field in dataclasses.fields(Recipe)}
    }
    recipe = Recipe(**{"epochs": epochs, "batch_size": 32, "learning_rate": 0.05, **settings})
    return Experiment("digits", family, width, depth, budget, 3, recipe, rule, schedule, train_images=images, **more)


TRAININGS = {
    "mlp dense": _experiment("mlp", 32, 1, experiments.counted_total("digits", "mlp", 32, 1)),
    "mlp walked, water-filling": _experiment("mlp", 256, 1, 4000),
    "mlp walked, proportional": _experiment("mlp", 512, 1, 3000, "proportional"),
    "mlp walked, ERK": _experiment("mlp", 256, 1, 3000, "erk"),
    "mlp of three layers": _experiment("mlp", 256, 3, 3000, batch_size=40),
    "mlp, dense matrices": _experiment("mlp", 24, 2, 1500, initial_scale="dense"),
    "mlp pruned by layer": _experiment("mlp", 64, 1, 1000, schedule="magnitude"),
    "mlp pruned globally": _experiment("mlp", 64, 1, 1000, None, "magnitude", pruning="global"),
    "mlp augmented, cosine, weight decay": _experiment(
        "mlp", 64, 1, 2000, augment=True, decay="cosine", weight_decay=1e-3
    ),
    "mlp that converges": _experiment("mlp", 64, 1, 2000, epochs=9, stop_loss=2.0, momentum=0.0),
    "mlp, SET": _experiment("mlp", 128, 1, 2000, schedule="set", update_every=3),
    "mlp, RigL": _experiment("mlp", 128, 1, 2000, schedule="rigl", update_every=3),
    "mlp, iterative pruning": _experiment("mlp", 64, 1, 10_000, schedule="imp"),
    "mlp, β-Lasso": _experiment("mlp", 64, 1, 3000, schedule="beta_lasso", epochs=3, update_until=2),
    "vgg dense": _experiment("vgg", 4, 11, experiments.counted_total("digits", "vgg", 4, 11), images=64),
    "vgg walked, water-filling": _experiment("vgg", 16, 11, 12_000, images=64, epochs=1),
    "vgg walked, proportional, CSR at the end": _experiment(
        "vgg", 16, 11, 12_000, "proportional", images=64, decay="cosine"
    ),
    "vgg without batch norm": _experiment("vgg", 8, 13, 9000, "erk", images=64, batch_norm=False),
    "vgg pruned by layer": _experiment("vgg", 6, 11, 9000, schedule="magnitude", images=64, epochs=1),
    "resnet dense": _experiment(
        "resnet", 8, 18, experiments.counted_total("digits", "resnet", 8, 18), images=64, epochs=1
    ),
    "resnet walked, water-filling": _experiment("resnet", 12, 18, 12_000, images=64, epochs=1),
    "resnet walked, proportional": _experiment("resnet", 16, 18, 12_000, "proportional", images=64, epochs=1),
    "resnet50 repeated": _experiment("resnet", 8, 50, 12_000, images=32, epochs=1, repeat=2),
    "portable vgg dense": _experiment(
        "vgg", 4, 11, experiments.counted_total("digits", "vgg", 4, 11), images=64, bits="portable"
    ),
    "portable vgg, proportional": _experiment("vgg", 11, 11, 12_000, "proportional", images=72, bits="portable"),
    "portable vgg pruned by layer": _experiment(
        "vgg", 6, 11, 9000, "water_filling", "magnitude", 64, 1, bits="portable"
    ),
    "portable resnet, water-filling": _experiment("resnet", 12, 18, 12_000, images=40, epochs=1, bits="portable"),
    "portable vgg, RigL": _experiment(
        "vgg", 11, 11, 12_000, "proportional", "rigl", 72, bits="portable", update_every=2
    ),
    "portable resnet50": _experiment("resnet", 8, 50, 12_000, images=32, epochs=1, bits="portable"),
}
MEASUREMENTS = {
    "clean": Clean(),
    "weight noise": WeightNoise(sigmas=(0.0, 0.2), draws=2),
    "weight noise in parts": WeightNoise(sigmas=(0.0, 0.3), draws=3, parts=True),
    "weight noise on all parameters": WeightNoise(sigmas=(0.3,), draws=1, scope="all"),
    "class recall": ClassRecall(),
    "quantisation": Quantisation(integer_bits=(4,), float_bits=(2,)),
    "calibration": Calibration(),
    "curvature": Curvature(iterations=3),
    "correct images": CorrectImages(),
    "corruption": Corruption(draws=1, source="generated"),
    "attack": Attack(attacks=("fgsm", "ffgsm", "bim", "pgd", "apgd", "longer_pgd"), epsilons=(0, 0.02), steps=3),
}


def train(experiment):
    """(model, losses of the epochs) of an `Experiment`, made as a sweep makes it."""
    model, history = None, None
    with jobs.sound_kernels(experiment, torch.device("cpu")):
        for each in (*reversed(experiments.ancestors(experiment)), experiment):
            if experiments.is_trained(each):
                model, history = experiments.train(each, data.load_images("digits", "train"), parent=model)
            else:
                model = experiments.prune(each, model)
    return model, [epoch.loss for epoch in history.epochs]


def _numbers(size):
    """`size` numbers between -1/2 and 1/2 that no random generator has made."""
    return (torch.arange(size) * 2654435761 % 2**20).double() / 2**20 - 0.5


def network(family, shape):
    """A sparse network for images of `shape` whose weights come from arithmetic alone, so that training's version has
    no part in it."""
    (*bits, family), sizes = family.split(), {"mlp": (96, 1), "vgg": (6, 11)}
    width, depth = sizes[family]
    model = models.build_model(family, shape, 10, width=width, depth=depth)
    kept = {}
    for number, (name, weight) in enumerate(models.counted_weights(model).items()):
        step = 3 if number % 2 else 17
        kept[name] = torch.arange(number % step, weight.numel(), step)
    model = sparse_layers.sparse_network(model, kept)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 6 / math.sqrt(
                max(
                    1,
                    parameter.numel()
                    / len(getattr(model.get_submodule(name.rpartition(".")[0]), "shape", parameter.shape)),
                )
            )
            parameter.copy_((_numbers(parameter.numel()) * scale).view(parameter.shape).to(parameter))
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.fill_(1.0)
    return (portable.portable(model) if bits else model).eval()


def images(name):
    """40 test images of digits, or 12 made-up ones in the shape of CIFAR-10."""
    if name == "digits":
        return data.load_images("digits", "test").take(torch.arange(40))
    pixels = ((_numbers(12 * 3072).view(12, 3, 32, 32) + 0.5).cumsum(3) * 16).to(torch.uint8)
    return data.ImageSet(pixels, torch.arange(12) % 10, 10, "cifar10", "test")


def _sha(content):
    return hashlib.sha256(content).hexdigest()[:16]


def weights_hash(model):
    """16 hexadecimal digits for the whole state of a network: weights, positions, running statistics."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    return _sha(b"".join(name.encode() + value.numpy().tobytes() for name, value in sorted(state.items())))


def _of_training(name):
    model, losses = train(TRAININGS[name])
    return {"version": "training", "losses": losses, "bits": weights_hash(model)}


def _of_measurement(name, family, dataset):
    measurement, found = MEASUREMENTS[name], images(dataset)
    records = measurement.run(network(family, found.shape), found)
    losses = [record.value for record in records if record.quantity in ("loss", "loss_increase")]
    return {"version": measurement.measure, "losses": losses, "bits": _sha(canonical(records).encode())}


_CASES = (
    {name: (_of_training, name) for name in TRAININGS}
    | {
        f"{name}, {family}, {dataset}": (_of_measurement, name, family, dataset)
        for name in MEASUREMENTS
        for family, dataset in (("mlp", "digits"), ("vgg", "cifar10"), ("portable vgg", "cifar10"))
        if name != "corruption" or (family, dataset) == ("vgg", "cifar10")
    }
    | {"corruption, mlp, digits": (_of_measurement, "corruption", "mlp", "digits")}
)


def compute(name, threads=1):
    """What a case comes to here: {"version": "training" or a measure, "losses": list of float, "bits": 16 hexadecimal
    digits}. threads: of PyTorch."""
    function, *arguments = _CASES[name]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return function(*arguments)
    finally:
        torch.set_num_threads(before)


NAMES = tuple(_CASES)


def listed():
    """The golden cases: {case: {"version", "losses", "bits": {machine: hash}}}."""
    return json.loads(BITS.read_text(encoding="utf-8")) if BITS.exists() else {}


def compare(name, found, golden):
    """What differs between a computed case and the golden one, in words; None if nothing does.

    Bits count for an MLP and on a machine that is listed, losses elsewhere.
    """
    if name not in golden:
        return f"{name} is not among the golden cases"
    wanted = golden[name]
    kind = kind_for(name)
    if kind in wanted["bits"]:
        golden_bits = wanted["bits"][kind]
        same = found["bits"] == golden_bits
        return None if same else f"{name}: bits {found['bits']}, golden {golden_bits} ({kind})"
    apart = [abs(a - b) / max(1, abs(b)) for a, b in zip(found["losses"], wanted["losses"], strict=True)]
    return (
        None
        if max(apart, default=0) <= TOLERANCE
        else f"{name}: losses differ by {max(apart):.1e} from golden ones, {TOLERANCE:g} is allowed"
    )


if __name__ == "__main__":
    print(json.dumps({name: compute(name) for name in NAMES}))
