"""Small computations whose bits must be the same on every x86-64 processor and for any number of threads, as SHA-256.

    python tests/golden/portable.py [digits] [mnist]

prints {case: hash}, with trainings on digits, and on 12,000 images of MNIST below SPARSE_NB_DATA, where asked for.

The environment decides what kind of machine this is: see `AVX2`. `tests/networks/test_portable.py` runs it as several.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from torch import nn

import cases
from sparse_nb import data
from sparse_nb.networks import sparse_layers
from sparse_nb.networks.cross_entropy import cross_entropy
from sparse_nb.networks.dense_kernels import linear
from sparse_nb.networks.masks import initialise, random_positions
from sparse_nb.networks.models import build_model
from sparse_nb.networks.training import Recipe, fit

BITS = Path(__file__).with_name("portable.json")
BUDGET = 101_632  # the weights of an MLP with 128 hidden units
AVX2 = {  # an AVX2 processor on any newer one, for PyTorch, oneDNN, MKL and numba
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+sse4.2,+bmi,+bmi2,+f16c,+popcnt,+lzcnt,+movbe",
}


def bits(*tensors):
    """16 hexadecimal digits for the bits of some tensors."""
    return hashlib.sha256(b"".join(t.detach().contiguous().numpy().tobytes() for t in tensors)).hexdigest()[:16]


def fractions(*shape, seed=0):
    """Numbers between -1 and 1 that are exact in single precision."""
    stream = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**15), 2**15, shape, generator=stream).float().div(2**15).requires_grad_()


def with_gradients(y, *of):
    """The bits of y and of its gradients."""
    return bits(y, *torch.autograd.grad(y, of, fractions(*y.shape, seed=9).detach()))


def loss_and_gradient(reduction):
    logits = fractions(1000, 10).mul(12)
    return with_gradients(cross_entropy(logits, torch.arange(1000) % 10, reduction), logits)


def dense_layer(batch, inputs, outputs):
    given = fractions(batch, inputs), fractions(outputs, inputs, seed=1), fractions(outputs, seed=2)
    return with_gradients(linear(*given), *given)


def network(width, rule, depth=1, seed=0, shape=(1, 28, 28), budget=BUDGET):
    """A sparse MLP, dense where nothing is lost."""
    bare = build_model("mlp", shape, 10, width=width, depth=depth, weightless=True)
    made = sparse_layers.sparse_network(bare, random_positions(bare, budget, rule=rule, seed=seed))
    initialise(made, None, seed=seed)
    return made


def walked(width, rule, of_images, depth=1):
    model, images = network(width, rule, depth), fractions(200, 1, 28, 28).abs()
    images = images.detach().requires_grad_(of_images)
    return with_gradients(model(images), *model.parameters(), *([images] if of_images else []))


def updates(**how):
    """Fused SGD, at sizes that leave a rest in any register."""
    tensors = [nn.Parameter(fractions(n, seed=n)) for n in (1, 10, 17, 1001, 101_637)]
    optimiser = torch.optim.SGD(tensors, lr=0.0137, fused=True, **how)
    for step in range(10):
        for t in tensors:
            t.grad = fractions(len(t), seed=step + 100).detach() / 8
        optimiser.step()
    return bits(*tensors)


def trained(dataset, images, epochs, width, rule, depth=1, weight_decay=0.0):
    """The bits of a network and of its losses after a short training."""
    model, train = network(width, rule, depth), data.load_images(dataset, "train")
    recipe = Recipe(epochs=epochs, learning_rate=0.05, weight_decay=weight_decay)
    history = fit(model, train.take(torch.arange(min(images, len(train.labels)))), recipe, seed=0)
    losses = torch.tensor([epoch.loss for epoch in history.epochs], dtype=torch.float64)
    return bits(losses, *model.state_dict().values())


def golden(name):
    """A case of `cases.py`: a training as a sweep makes it, or a measure's records."""
    return cases.compute(name, torch.get_num_threads())["bits"]


NETWORKS = {
    "dense 128": (128, "water_filling"),
    "512, water-filling": (512, "water_filling"),
    "512, proportional": (512, "proportional"),
    "2048, water-filling": (2048, "water_filling"),
    "2048, proportional": (2048, "proportional"),
    "three layers of 600, proportional": (600, "proportional", 3),
}
CASES = {
    **{name: (golden, name) for name in cases.NAMES if cases.kind_for(name) == cases.EVERY_MACHINE},
    **{f"loss, {reduction}": (loss_and_gradient, reduction) for reduction in ("mean", "sum", "none")},
    **{f"dense layer {sizes}": (dense_layer, *sizes) for sizes in ((128, 784, 128), (45, 1021, 77), (1, 300, 10))},
    **{
        f"gradients{' with images' * of_images}, {name}": (walked, *settings[:2], of_images, *settings[2:])
        for name, settings in NETWORKS.items()
        for of_images in (False, True)
        if name != "dense 128"
    },
    "SGD": (updates,),
    **{f"digits, {name}": (trained, "digits", 1500, 3, *settings) for name, settings in NETWORKS.items()},
    "digits, weight decay": (trained, "digits", 1500, 3, 512, "water_filling", 1, 1e-3),
    **{f"mnist, {name}": (trained, "mnist", 12_000, 2, *settings) for name, settings in NETWORKS.items()},
}


def listed():
    """{case: its bits} as they should be everywhere."""
    golden = {name: case["bits"][cases.EVERY_MACHINE] for name, case in cases.listed().items() if name in CASES}
    return golden | json.loads(BITS.read_text(encoding="utf-8"))


def compute(datasets=()):
    """{case: its bits}, trainings only on those datasets."""
    left_out = tuple(f"{name}," for name in {"digits", "mnist"} - set(datasets))
    found = {
        name: function(*arguments) for name, (function, *arguments) in CASES.items() if not name.startswith(left_out)
    }
    found |= {
        f"SGD, {how}": updates(**how)
        for how in ({"momentum": 0.9}, {"weight_decay": 0.01}, {"momentum": 0.9, "weight_decay": 1e-3})
    }
    return found


if __name__ == "__main__":
    print(json.dumps(compute(sys.argv[1:]), indent=1))
