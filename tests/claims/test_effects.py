"""The published effects, computed again from the published records by other means."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, stats

from sparse_nb.claims import pooling
from sparse_nb.claims.contrasts import CONTRASTS, LIVE, contrasts_hash
from sparse_nb.claims.effects import pooled_effects
from sparse_nb.robustness.correct_images import unpack_bits
from sparse_nb.runs.exchange import merge
from sparse_nb.runs.store import Store

ROOT = Path(__file__).parents[2]
INNER = [256, 512, 1024]  # widths of MLPs with 1/2, 1/4 and 1/8 of their weights


def published(preset):
    return pd.read_csv(ROOT / f"figures/rendered/{preset}/effects.csv")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Every record of the MLPs on MNIST at the paper's own size."""
    store = Store(tmp_path_factory.mktemp("paper") / "runs")
    for part in sorted((ROOT / "results/paper").glob("mnist-mlp-seed?")):
        merge(store, part)
    table = store.table(dataset=["mnist"], family=["mlp"], schedule=["static"])
    return table.assign(rule=table.rule.fillna("water_filling").mask(table.density == 1, "both"))


@pytest.mark.parametrize("preset", ["laptop", "paper"])
def test_published_effects_are_of_the_contrasts_as_they_are_defined(preset):
    found = published(preset)
    assert set(found.contrasts) == {contrasts_hash()} and set(found.contrast) <= set(CONTRASTS)
    assert not found.duplicated(["contrast", "disturbance", "rule", "dataset", "family"]).any()


def test_published_effects_pool_to_what_another_estimator_says():
    """Paule and Mandel's variance by minimisation, Hartung and Knapp's interval by weighted least squares."""
    found = published("laptop")
    for row in pooled_effects(found).itertuples():
        part = found[(found.contrast == row.contrast) & (found.disturbance == row.disturbance)]
        part = part[(part.rule == row.rule) & (part.error > 0)]
        y, v, k = part.effect.to_numpy(), part.error.to_numpy() ** 2, len(part)

        def surplus(tau, y=y, v=v, k=k):
            w = 1 / (v + tau**2)
            return abs((w * (y - (w * y).sum() / w.sum()) ** 2).sum() - (k - 1))

        tried = np.concatenate([[0], np.geomspace(1e-4, 10 * np.ptp(y) + 1, 4000)])
        best = int(np.argmin([surplus(tau) for tau in tried]))
        tau = tried[best]
        if 0 < best < len(tried) - 1:
            bounds = tried[best - 1], tried[best + 1]
            tau = optimize.minimize_scalar(surplus, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
        root = np.sqrt(1 / (v + tau**2))
        (mean,), (rest,), *_ = np.linalg.lstsq(root[:, None], root * y)
        half = stats.t.ppf(0.975, k - 1) * math.sqrt(max(1, rest / (k - 1)) / (root**2).sum())
        expected = [mean, mean - half, mean + half]
        np.testing.assert_allclose([row.mean, row.low, row.high], expected, rtol=2e-4, atol=2e-4)


def inner_minus_base(scores, rule):
    """Per seed, in points. scores: (rule, width, seed) -> share."""
    base = scores["both", 128]
    return 100 * (sum(scores[rule, width] for width in INNER) / len(INNER) - base)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["water_filling", "proportional"])
def test_published_effects_at_the_papers_own_size_follow_from_the_records(records, rule):
    noise = records[(records.measure == "weight_noise") & (records.quantity == "accuracy") & (records.strength > 0)]
    noise = noise[noise.groupby("evaluation").draw.transform("nunique") == 5]
    attack = records[(records.measure == "attack") & (records.quantity == "accuracy") & (records.strength > 0)]
    attack = attack[attack.groupby("evaluation").strength.transform("max") == 0.5]
    attack = attack[attack.name.isin(["fgsm", "ffgsm", "bim", "pgd", "apgd"])]
    wide = attack[attack.width >= 128]
    live = [radius for radius, rows in wide.groupby("strength") if rows.value.mean() >= LIVE]
    assert noise.evaluation.nunique() == attack.evaluation.nunique() == 1 and 0 < len(live) < wide.strength.nunique()
    effects = published("paper").set_index(["contrast", "disturbance", "rule"])
    for disturbance, rows in (("noise", noise), ("attack", attack[attack.strength.isin(live)])):
        scores = {
            key: part.groupby("seed").value.mean() for key, part in rows.groupby(["rule", "width"])
        }  # every strength, name and draw once for each network
        values = inner_minus_base(scores, rule)
        row = effects.loc[("gain", disturbance, rule)]
        assert len(values) == row.seeds == 5 and values.mean() == pytest.approx(row.effect, abs=1e-6)
        means = [scores[key].mean() for key in (("both", 128), *((rule, w) for w in sorted(set(wide.width) - {128})))]
        binomial = sum(p * (1 - p) for p in (means[0], np.mean(means))) / (10_000 if disturbance == "noise" else 1_000)
        own, total = stats.sem(values) ** 2, stats.sem(values) ** 2 + pooling.SHARED * 100**2 * binomial
        assert row.error == pytest.approx(math.sqrt(total), rel=1e-6)
        low, high = stats.t.interval(0.95, 4 * (total / own) ** 2, values.mean(), math.sqrt(total))  # Satterthwaite
        assert [low, high] == pytest.approx([row.low, row.high], abs=1e-6)


@pytest.mark.slow
def test_seeds_share_as_little_of_the_images_as_is_assumed(tmp_path):
    store = Store(tmp_path / "runs")
    for part in sorted((ROOT / "results/laptop2").glob("mnist-mlp-seed?")):
        merge(store, part)
    table = store.table(measure=["correct_images"], dataset=["mnist"], family=["mlp"], schedule=["static"])
    right = {
        (row.strength, row.rule if row.density < 1 else "both", row.width, row.seed): unpack_bits(
            row.source, 10_000
        ).numpy()
        for row in table.itertuples()
    }
    for strength in (0.0, 0.3):
        for rule in ("water_filling", "proportional"):
            for widths, limit in ((INNER, pooling.SHARED), ([4096], pooling.SHARED_AT_THE_END)):
                base = np.array([right[strength, "both", 128, seed] for seed in range(5)], float)
                other = np.array(
                    [np.mean([right[strength, rule, w, seed] for w in widths], axis=0) for seed in range(5)]
                )
                binomial = 100**2 * sum(p * (1 - p) for p in (base.mean(), other.mean())) / 10_000
                assert pooling.shared_variance(other - base) <= limit * binomial
