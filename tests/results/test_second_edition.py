"""What docs/answer.md says of the second edition and of figure 17 holds for the published numbers."""

from pathlib import Path

import pandas as pd

RENDERED = Path(__file__).resolve().parents[2] / "figures/rendered/laptop2"


def panels(dataset, family):
    """{rule: points} of figure 17 for a panel with at least three seeds."""
    curves = pd.read_csv(RENDERED / "fig17.csv")
    panel = curves[(curves.dataset == dataset) & (curves.family == family)]
    assert panel.seeds.min() >= 3 and set(panel.rule) == {"water_filling", "proportional"}
    return dict(iter(panel.groupby("rule")))


def points(panel, quantity):
    """(the densest, the one nearest to a sixteenth, the sparsest) point of a curve."""
    found = panel[panel.quantity == quantity].set_index("density").sort_index()
    return found.iloc[-1], found.iloc[abs(found.index - 1 / 16).argmin()], found.iloc[0]


def test_mlps_on_mnist():
    for rule, panel in panels("mnist", "mlp").items():
        dense, _, sparsest = points(panel, "corrupted_calibration_error")
        assert sparsest.low > dense.high
        dense, sixteenth, sparsest = points(panel, "largest_eigenvalue")
        assert sixteenth["mean"] < 0.5 * dense["mean"] and sixteenth.high < dense.low
        assert (sparsest.high < dense.low) == (rule == "proportional")


def test_vggs_on_cifar10():
    for rule, panel in panels("cifar10", "vgg").items():
        dense, sparse, _ = points(panel, "calibration_error")
        assert sparse.high < dense.low if rule == "water_filling" else sparse.low > dense.high
        dense, sparse, _ = points(panel, "corrupted_calibration_error")
        assert sparse.low > dense.high or rule == "water_filling"
        dense, sparse, _ = points(panel, "largest_eigenvalue")
        assert sparse.low < dense.high and dense.low < sparse.high


def test_gains_of_the_second_edition():
    effects = pd.read_csv(RENDERED / "effects.csv")
    vgg = effects[(effects.dataset == "cifar10") & (effects.family == "vgg")].set_index(
        ["contrast", "rule", "disturbance"]
    )
    four = ["clean", "noise", "corruption", "attack"]
    assert (vgg.loc["gain", "water_filling"].loc[four].low > 0).all()
    assert (vgg.loc["gain", "proportional"].loc[["noise", "attack"]].high < 0).all()
    layout, gains = (
        vgg.loc["layout", "water_filling"].loc[four].effect,
        vgg.loc["gain"].effect.unstack("rule").loc[four],
    )
    assert (layout > gains.abs().max(axis=1)).all()
