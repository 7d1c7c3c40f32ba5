"""Networks from the zoo are those that were trained, to the last bit, and anything else is refused."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

from sparse_nb.data import load_images
from sparse_nb.networks.training import Recipe
from sparse_nb.runs import zoo
from sparse_nb.runs.store import Store, load_run
from sparse_nb.study.experiments import Clean, Experiment, WeightNoise
from sparse_nb.sweep import sweep

PUBLISHED = Path(__file__).parents[2] / "results/zoo"
DENSE = Experiment("digits", "mlp", 32, 1, 2368, 0, Recipe(epochs=1))
NETWORKS = {
    "digits/mlp/dense": DENSE,
    "digits/mlp/w64": Experiment("digits", "mlp", 64, 1, 2048, 3, Recipe(epochs=1)),
    "digits/mlp/erk": Experiment("digits", "mlp", 64, 2, 2048, 1, Recipe(epochs=1), rule="erk"),
    "digits/mlp/pruned": Experiment("digits", "mlp", 64, 1, 2048, 3, Recipe(epochs=1), schedule="magnitude"),
    "digits/vgg/w8": Experiment("digits", "vgg", 8, 11, 30_000, 0, Recipe(epochs=1), rule="proportional"),
    "digits/resnet/w8": Experiment("digits", "resnet", 8, 18, 30_000, 2, Recipe(epochs=1)),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("trained") / "runs")
    sweep.run(list(NETWORKS.values()), [Clean()], store=store, device="cpu", show=False)
    return store


@pytest.fixture
def folder(trained, tmp_path):
    for name, network in NETWORKS.items():
        zoo.add(trained, network, name, tmp_path / "zoo")
    return tmp_path / "zoo"


def test_what_is_loaded_is_what_was_trained_and_as_accurate(trained, folder):
    found, test = zoo.list_networks(folder).set_index("name"), load_images("digits", "test")
    assert list(found.index) == sorted(NETWORKS)
    for name, network in NETWORKS.items():
        loaded, expected = zoo.load(name, folder), load_run(trained, network)
        assert str(loaded) == str(expected) and not loaded.training
        assert loaded.state_dict().keys() == expected.state_dict().keys()
        for key, value in expected.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value) and loaded.state_dict()[key].dtype == value.dtype
        smaller = (folder / f"{name}.safetensors").stat().st_size
        smaller /= (trained.folder(network) / "model.safetensors").stat().st_size
        assert (smaller < 0.75) == (network.schedule == "static" and network.density < 1)
        wrong = round((1 - found.accuracy[name]) * len(test.labels))  # counted by hand, from the outputs
        with torch.no_grad():
            outputs = loaded(test.pixels.float() / 255)
        assert int((outputs.argmax(1) != test.labels).sum()) == wrong
        assert zoo.measure_again(name, test, folder) == (found.accuracy[name],) * 2


def test_a_run_without_a_clean_accuracy_is_refused(tmp_path):
    store, network = Store(tmp_path / "runs"), dataclasses.replace(DENSE, seed=8)
    sweep.run([network], [WeightNoise(sigmas=(0.1,), draws=1)], store=store, device="cpu", show=False)
    with pytest.raises(ValueError, match="measure it first"):
        zoo.add(store, network, "digits/mlp", tmp_path / "zoo")
    assert not (tmp_path / "zoo").exists()


def test_too_large_a_zoo_is_refused_and_stays_as_it_is(trained, folder, monkeypatch):
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    monkeypatch.setattr(zoo, "_MOST_BYTES", sum(zoo.list_networks(folder).bytes) + 10)
    with pytest.raises(ValueError, match="accepted: at most"):
        zoo.add(trained, DENSE, "digits/more", folder)
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before
    zoo.add(trained, DENSE, "digits/mlp/dense", folder)  # the same again is not one more


@pytest.mark.parametrize(
    "change",
    [
        {"accuracy": 7.0},
        {"accuracy": "<b>"},
        {"bytes": 10**40},
        {"sha256": "0"},
        {"about": {}},
        {"checkpoint": None},
        {"test_images": 0},
    ],
)
def test_an_odd_zoo_is_named(change, folder):
    path = folder / "zoo.json"
    found = json.loads(path.read_bytes())
    found["digits/mlp/w64"] |= change
    path.write_text(json.dumps(found))
    for read in (zoo.list_networks, lambda place: zoo.load("digits/mlp/w64", place)):
        with pytest.raises(ValueError, match=f"{path} does not describe a zoo"):
            read(folder)


def test_missing_and_foreign_files_are_named(folder, tmp_path):
    path = folder / "digits/mlp/w64.safetensors"
    path.unlink()
    with pytest.raises(ValueError, match=f"{path} does not hold the network"):
        zoo.load("digits/mlp/w64", folder)
    os.mkfifo(path)
    with pytest.raises(ValueError, match="it is not a file"):
        zoo.load("digits/mlp/w64", folder)
    (folder / "zoo.json").write_text('{"../escaped": {}}')
    with pytest.raises(ValueError, match="does not name networks"):
        zoo.load("../escaped", folder)
    assert len(zoo.list_networks(tmp_path / "nowhere")) == 0 and not (tmp_path / "nowhere").exists()
    with pytest.raises(ValueError, match="accepted: none yet"):
        zoo.load("digits/mlp/w64", tmp_path / "nowhere")


@pytest.mark.data
@pytest.mark.parametrize("name", list(zoo.list_networks(PUBLISHED).name))
def test_a_published_network_is_as_accurate_as_it_says(name):
    dataset = zoo.list_networks(PUBLISHED).set_index("name").dataset[name]
    recorded, now = zoo.measure_again(name, load_images(dataset, "test"), PUBLISHED)
    assert abs(recorded - now) <= 0.001  # another kind of machine may see a few images differently


def test_the_published_zoo_is_small():
    assert sum(path.stat().st_size for path in PUBLISHED.rglob("*.safetensors")) <= 15_000_000
