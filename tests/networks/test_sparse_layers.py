"""Sparse execution in use: in sweeps by default, with the records of dense execution, and in little memory."""

import pytest
import torch

import bench
from sparse_nb import data
from sparse_nb.networks import kernels, masks, training, walks
from sparse_nb.networks.models import build_model, counted_weights
from sparse_nb.networks.sparse_layers import SparseConv2d, SparseLinear, dense_network
from sparse_nb.networks.training import Recipe
from sparse_nb.robustness import weight_noise
from sparse_nb.robustness.evaluation import sample
from sparse_nb.runs.store import Store, load_run
from sparse_nb.study.experiments import Experiment, WeightNoise, counted_total, parent_of, train
from sparse_nb.sweep import sweep

NOISE = WeightNoise(sigmas=(0.0, 0.2), draws=2, test_images=300)
CASES = {
    "mlp": Experiment("digits", "mlp", 1500, 1, 12_704, 0, Recipe(epochs=2, batch_size=32), "proportional"),
    "mlp, deep, decay": Experiment(
        "digits", "mlp", 300, 3, 12_704, 1, Recipe(epochs=2, batch_size=32, weight_decay=0.01)
    ),
    "vgg": Experiment(
        "digits", "vgg", 6, 11, 5000, 0, Recipe(epochs=1, batch_size=32), "proportional", train_images=128
    ),
    "resnet": Experiment(
        "digits", "resnet", 6, 18, 5000, 0, Recipe(epochs=1, batch_size=32), "proportional", train_images=128
    ),
}


def trained_densely(experiment, images):
    """The same network, trained with whole matrices and masks, as the chapters on masks and training do it."""
    e = experiment
    model = build_model(e.family, images.shape, images.classes, width=e.width, depth=e.depth).to(
        memory_format=torch.channels_last
    )
    kept = masks.random_masks(model, e.budget, rule=e.rule, seed=e.seed)
    masks.initialise(model, kept, seed=e.seed)
    training.fit(model, sample(images, e.train_images), e.recipe, seed=e.seed, masks=kept)
    return model, kept


@pytest.mark.parametrize("name", CASES)
def test_a_sweep_executes_sparsely_and_records_what_dense_execution_gives(name, tmp_path):
    experiment, store = CASES[name], Store(tmp_path)
    sweep.run([experiment], [NOISE], store=store, device="cpu", show=False)
    network = load_run(store, experiment)
    assert any(isinstance(m, (SparseLinear, SparseConv2d)) for m in network.modules())
    assert sum(w.numel() for w in counted_weights(network).values()) == experiment.budget

    model, kept = trained_densely(experiment, data.load_images("digits", "train"))
    twin, pattern = dense_network(network)
    assert all(torch.equal(kept[layer], mask) for layer, mask in pattern.items())
    rough = (
        1 if experiment.family == "mlp" else 100
    )  # in single precision batch norm makes much of rounding; double precision is in the chapter
    for layer, value in model.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[layer], value, rtol=1e-3 * rough, atol=1e-4 * rough)
    records = weight_noise.evaluate(model, sample(data.load_images("digits", "test"), 300), sigmas=(0.0, 0.2), draws=2)
    wanted = {(r.quantity, r.strength, r.draw): r.value for r in records}
    found = {(r.quantity, r.strength, r.draw): r.value for r in store.table().itertuples()}
    assert found == pytest.approx(wanted, abs=5e-3 * rough**0.5)


def test_the_walks_are_what_a_sweep_runs_on(tmp_path, monkeypatch):
    calls = []
    wanted = {"_forward": walks, "_backward": walks, "_walk_convolution": kernels, "_walk_convolution_back": kernels}
    for walk, module in wanted.items():

        def counted(*args, walk=walk, original=getattr(module, walk)):  # noqa: B008
            calls.append(walk)
            return original(*args)

        monkeypatch.setattr(module, walk, counted)
    sweep.run([CASES["mlp"], CASES["resnet"]], [NOISE], store=Store(tmp_path), device="cpu", show=False)
    assert set(calls) == set(wanted)


def test_a_pruned_network_is_sparse_and_a_dense_one_dense(tmp_path):
    store, budget = Store(tmp_path), 2000
    pruned = Experiment("digits", "mlp", 64, 1, budget, 0, Recipe(epochs=1), schedule="magnitude")
    sweep.run([pruned], [NOISE], store=store, device="cpu", show=False)
    kinds = [
        [type(m).__name__ for m in load_run(store, e) if isinstance(m, torch.nn.Linear)]
        for e in (pruned, parent_of(pruned))
    ]
    assert kinds == [
        ["SparseLinear", "PortableLinear"],
        ["PortableLinear", "PortableLinear"],
    ]  # the classifier's 640 weights are all kept
    assert counted_total("digits", "mlp", 64, 1) == sum(
        w.numel() for w in counted_weights(load_run(store, parent_of(pruned))).values()
    )


def test_the_same_seed_gives_the_same_bits_twice():
    images = data.load_images("digits", "train")
    states = [train(CASES["mlp"], images)[0].state_dict() for _ in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("rule", ["water_filling", "proportional"])
def test_no_dense_matrix_in_the_life_of_a_wide_network(rule):
    wide, base = bench.peak_memory(2**15, rule), bench.peak_memory(2**7, rule)
    assert wide <= 2 * base
    assert wide - base < 100  # MB; its first matrix alone would have 103
