"""What no cell can test of the claims: the published verdicts, recomputed by other means."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sparse_nb.claims.claims import CLAIMS
from sparse_nb.claims.exchange_rate import RULE, best_widths, common_width, table_of_store
from sparse_nb.claims.verdicts import claims_table, overall
from sparse_nb.runs.exchange import merge
from sparse_nb.runs.store import Store
from sparse_nb.study.figures import FIGURES
from sparse_nb.study.studies import PRESETS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def published():
    return pd.read_csv(ROOT / "figures/rendered/laptop/claims.csv", dtype={"claim": str}, keep_default_na=True)


def test_claims_are_found_by_their_numbers():
    assert list(CLAIMS) == ["1", "2", "3", "4", "5", "6", "7", "8a", "8b", "9", "10", "11", "12", "13"]
    assert all(claim.number == number and set(claim.figures) <= set(FIGURES) for number, claim in CLAIMS.items())


def rejected(p_values, alpha):
    """Which p-values Holm's procedure rejects: the smallest is held against alpha / m, the next one
    against alpha / (m - 1).
    """
    left, found = {i: p for i, p in enumerate(p_values) if not math.isnan(p)}, set()
    count = len(p_values)
    while left and min(left.values()) <= alpha / count:
        smallest = min(left, key=left.get)
        found.add(smallest)
        del left[smallest]
        count -= 1
    return found


def test_published_verdicts_follow_from_their_p_values(published):
    for _, panels in published.groupby("claim"):
        supported, refuted = (rejected(panels[side], 0.05) for side in ("p_for", "p_against"))
        for i, verdict in enumerate(panels.verdict):
            if verdict == "unfinished":
                assert math.isnan(panels.p_for.iloc[i])
            else:
                expected = "supported" if i in supported else "refuted" if i in refuted else "undecided"
                assert verdict == expected


def test_one_refuted_panel_refutes_a_published_claim(published):
    verdicts = overall(published).set_index("claim").verdict
    for number, panels in published.groupby("claim"):
        assert (verdicts[number] == "refuted") == (panels.verdict == "refuted").any()
        if verdicts[number] == "supported":
            assert (panels.p_for <= 0.05).all()
    assert len(claims_table(published)) == len(CLAIMS)
    few = claims_table(published, [CLAIMS["8b"], CLAIMS["1"]])
    assert list(few.claim) == ["8b", "1"] and set(few["the paper says"]) == {
        CLAIMS["8b"].sentence,
        CLAIMS["1"].sentence,
    }


def test_published_panels_are_those_of_the_claims(published):
    assert set(published.claim) <= set(CLAIMS)
    assert not published.duplicated(["claim", "dataset", "rule", "family", "growth"]).any()
    assert np.isfinite(published.seeds).all() and set(published.verdict) <= {
        "supported",
        "refuted",
        "undecided",
        "unfinished",
    }


@pytest.mark.slow
def test_the_rule_for_the_best_width_is_what_the_published_first_edition_gives(tmp_path):
    store = Store(tmp_path / "runs")
    for family in ("mnist-mlp", "cifar10-mlp", "cifar100-mlp"):
        merge(store, ROOT / "results/laptop" / family)
    rule = common_width(best_widths(table_of_store("fig01", PRESETS["laptop"], store)[0]))
    pd.testing.assert_frame_equal(
        rule.rename(columns={"mean": "predicted"})[list(RULE)].round(), RULE, check_dtype=False
    )
