"""What docs/answer.md says of figure 17 holds for the published numbers."""

from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[2]


def test_sentences_about_figure_17():
    curves = pd.read_csv(ROOT / "figures/rendered/laptop2/fig17.csv")
    panels = curves[curves.groupby(["dataset", "family", "rule"]).seeds.transform("min") >= 3]
    assert set(panels.rule) == {"water_filling", "proportional"}
    for (_, _, rule), panel in panels.groupby(["dataset", "family", "rule"]):
        error = panel[panel.quantity == "corrupted_calibration_error"].sort_values("density")
        assert error.low.iloc[0] > error.high.iloc[-1]
        curvature = panel[panel.quantity == "largest_eigenvalue"].set_index("density").sort_index()
        sixteenth = curvature.iloc[abs(curvature.index - 1 / 16).argmin()]
        assert sixteenth["mean"] < 0.5 * curvature["mean"].iloc[-1] and sixteenth.high < curvature.low.iloc[-1]
        flatter = curvature.high.iloc[0] < curvature.low.iloc[-1]
        assert flatter == (rule == "proportional")
