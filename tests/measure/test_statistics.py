"""Intervals against closed forms and by coverage."""

import math

import numpy as np
import pytest

from decodathlon.harness.measure import statistics


def test_the_bootstrap_of_a_mean_agrees_with_the_closed_form():
    x = np.random.default_rng(0).normal(3, 2, size=400)
    found = statistics.bootstrap(x, lambda d: d.mean(-1))
    error = x.std() / math.sqrt(len(x))
    assert found.value == pytest.approx(x.mean())
    assert found.low == pytest.approx(x.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(x.mean() + 1.96 * error, abs=0.1 * error)


def test_the_same_seed_gives_the_same_interval():
    x = np.arange(20.0)
    assert statistics.median(x) == statistics.median(x)


def test_few_observations_have_no_interval_and_none_is_an_error():
    assert statistics.paired_ratio([0.1] * 5)[1:3] == (None, None)
    assert statistics.paired_ratio([0.1] * 6).low == pytest.approx(math.exp(0.1))
    with pytest.raises(ValueError, match="at least one"):
        statistics.median([])


@pytest.mark.parametrize("n", [6, 8, 9, 20])
def test_intervals_of_a_median_cover_the_truth(n):
    """4,000 runs with heavy-tailed noise (every tenth pair stalls): 95 % intervals cover in 94 to 97.5 % of them."""
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 0.03, (4000, n)) * np.where(rng.random((4000, n)) < 0.1, 10, 1)
    found = [statistics.median(row) for row in 0.2 + noise]
    assert 0.94 < np.mean([f.low <= 0.2 <= f.high for f in found]) < 0.975


def test_the_median_interval_of_six_is_the_closed_form():
    """Coverage 0.96875 of the range and 0.78125 of the middle four give a share of 5 * 0.1 / (1 + 4 * 0.1)."""
    found = statistics.median([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert found == pytest.approx((3.5, 1 + 0.5 / 1.4, 6 - 0.5 / 1.4, 6))


def test_intervals_of_a_clustered_mean_cover_the_truth():
    """1,000 runs of 30 clusters of unequal size: 95 % intervals cover in 91 to 97 % of them."""
    rng = np.random.default_rng(2)
    covered = 0
    for trial in range(1000):
        counts = rng.integers(20, 60, 30)
        sums = counts * (0.5 + rng.normal(0, 0.1, 30)) + rng.normal(0, 1, 30)
        data = np.column_stack([sums, counts])
        found = statistics.bootstrap(data, lambda x: x[..., 0].sum(-1) / x[..., 1].sum(-1), resamples=500, seed=trial)
        covered += found.low <= 0.5 <= found.high
    assert 0.91 < covered / 1000 < 0.97


def test_one_stalled_pair_does_not_move_the_ratio():
    calm = [math.log(1.3)] * 9
    assert statistics.paired_ratio([*calm, math.log(0.1)]).value == pytest.approx(1.3)


def test_perplexity_weighs_tokens_not_windows():
    found = statistics.perplexity([10.0, 1.0], [10, 1])
    assert found.value == pytest.approx(math.e)
    assert statistics.perplexity([10.0, 5.0], [10, 1]).value == pytest.approx(math.exp(15 / 11))
    assert found.n == 11
