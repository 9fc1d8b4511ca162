"""Intervals against closed forms and by coverage."""

import math

import numpy as np
import pytest

from decodathlon.harness.measure import statistics


@pytest.mark.parametrize(
    ("p", "freedom", "table"), [(0.975, 5, 2.5706), (0.975, 15, 2.1314), (0.975, 1000, 1.9623), (0.95, 8, 1.8595)]
)
def test_t_quantiles_are_those_of_the_tables(p, freedom, table):
    assert statistics.t_quantile(p, freedom) == pytest.approx(table, abs=2e-4)


def test_a_ratio_over_clusters_of_one_size_is_a_mean_with_its_t_interval():
    x = np.random.default_rng(0).normal(3, 2, size=12)
    found = statistics.ratio_of_sums(10 * x, [10] * 12)
    half = statistics.t_quantile(0.975, 11) * x.std(ddof=1) / math.sqrt(12)
    assert found == pytest.approx((x.mean(), x.mean() - half, x.mean() + half, 120))


def test_clusters_that_agree_exactly_have_no_interval():
    assert statistics.share([5.0] * 20, [5] * 20) == (1.0, None, None, 100)
    found = statistics.share([5.0] * 19 + [4.0], [5] * 20)
    assert found.low < found.value < found.high <= 1.0


def test_few_observations_have_no_interval_and_none_is_an_error():
    assert statistics.paired_ratio([0.1] * 5)[1:3] == (None, None)
    assert statistics.paired_ratio([0.1] * 6).low == pytest.approx(math.exp(0.1))
    with pytest.raises(ValueError, match="at least one"):
        statistics.median([])
    with pytest.raises(ValueError, match="at least one"):
        statistics.ratio_of_sums([], [])


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


@pytest.mark.parametrize("n", [6, 8, 15, 30])
def test_intervals_of_a_clustered_ratio_cover_the_truth(n):
    """4,000 runs of n clusters of unequal size: 95 % intervals cover in 92.5 to 97 % of them."""
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(4000):
        counts = rng.integers(300, 512, n)
        nats = counts * (3 + rng.normal(0, 0.3, n))
        found = statistics.perplexity(nats, counts)
        covered += found.low <= math.exp(3) <= found.high
    assert 0.925 < covered / 4000 < 0.97


def test_one_stalled_pair_does_not_move_the_ratio():
    calm = [math.log(1.3)] * 9
    assert statistics.paired_ratio([*calm, math.log(0.1)]).value == pytest.approx(1.3)


def test_perplexity_weighs_tokens_not_windows():
    found = statistics.perplexity([10.0, 1.0], [10, 1])
    assert found.value == pytest.approx(math.e)
    assert statistics.perplexity([10.0, 5.0], [10, 1]).value == pytest.approx(math.exp(15 / 11))
    assert found.n == 11
