"""Differences in words: the verdict follows from the interval."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import bootstrap

from clipseg_repro.study.words import compared, judged, paired


def test_paired_interval_is_scipys():
    rng = np.random.default_rng(3)
    first, second = rng.normal(1, 1, 200), rng.normal(0.8, 1, 200)
    mean, low, high = paired(first, second, n=4000)
    theirs = bootstrap((first - second,), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
    assert mean == pytest.approx((first - second).mean())
    assert (low, high) == pytest.approx(theirs, abs=0.02)


def test_samples_of_a_picture_are_drawn_together():
    difference = np.repeat(np.random.default_rng(3).normal(size=30), 20)  # 20 samples alike in each picture
    _, low, high = paired(difference, np.zeros(600), np.repeat(np.arange(30), 20))
    alone = paired(difference[::20], np.zeros(30))
    assert (low, high) == pytest.approx(alone[1:], abs=1e-9)


def test_words():
    ahead = compared("words", "one example", 3.14, 1.2, 5.0, "points")
    assert ahead == "words: 3.1 points over one example (1.2 to 5.0)"
    assert compared("a", "b", -0.5, -0.9, -0.1, digits=2) == "b: 0.50 over a (0.10 to 0.90)"
    assert compared("a", "b", 0.04, -0.1, 0.2) == "a and b: about equal (+0.0, -0.1 to +0.2)"


def test_claims_that_fail_are_told_first():
    claim = {"statement": "a is better", "paper_larger": 43.4, "paper_smaller": 37.7, "carries": "So-so."}

    def figures(*values):
        return dict(zip(("larger", "smaller", "difference", "low", "high"), values))

    rows = [
        claim | {"claim": "C1", "verdict": "cannot be told here"} | figures(*[np.nan] * 5),
        claim | {"claim": "C2", "verdict": "holds"} | figures(6, 5, 1, 0.5, 1.5),
        claim | {"claim": "C3", "verdict": "does not hold"} | figures(5, 6, -1, -1.5, -0.5),
    ]
    first, second, third = judged(pd.DataFrame(rows)).splitlines()
    assert first == (
        "- **C3 does not hold**: a is better. In the paper 43.4 against 37.7; here 5.0 against 6.0, -1.0 (-1.5 to "
        "-0.5). So-so."
    )
    assert second.startswith("- **C1 cannot be told here**") and "here not measured on both sides." in second
    assert third.startswith("- **C2 holds**")
