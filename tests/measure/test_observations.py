"""A metric follows from its units; two results over the same units are compared unit by unit."""

import math

import numpy as np
import pytest

from decodathlon.harness.measure import statistics
from decodathlon.harness.measure.observations import Observations, compared


def rows(n):
    return [f"unit-{i}" for i in range(n)]


def test_estimates_are_those_of_the_statistics():
    rng = np.random.default_rng(0)
    nats, counts = rng.normal(300, 20, 12), rng.integers(90, 110, 12)
    assert Observations(rows(12), nats, counts, scale="exp").estimate() == pytest.approx(
        statistics.perplexity(nats, counts)
    )
    logs = list(rng.normal(0.3, 0.1, 9))
    assert Observations.each(rows(9), logs, scale="exp").estimate() == pytest.approx(statistics.paired_ratio(logs))
    shares = Observations(rows(8), [10, 10, 10, 10, 10, 10, 10, 9], [10] * 8, share=True).estimate()
    assert shares.value == pytest.approx(79 / 80)
    assert shares.high == 1.0


def test_a_cut_token_makes_the_metric_infinite_and_survives_the_store():
    found = Observations(rows(2), [math.inf, 3.0], [2, 2], scale="exp")
    assert found.estimate() == (math.inf, None, None, 4)
    stored = {**found.as_json(), "sums": ["Infinity", 3.0]}
    assert Observations.from_json(stored) == Observations.from_json(found.as_json())
    assert compared(found, found, "difference") is None
    assert math.isnan(Observations(rows(2), [math.nan, 3.0], [2, 2]).estimate().value)
    assert math.isnan(Observations(rows(2), [-math.inf, 3.0], [2, 2]).estimate().value)


def test_the_difference_of_means_is_the_paired_t_interval():
    rng = np.random.default_rng(1)
    x, y = rng.normal(5, 1, 10), rng.normal(4, 1, 10)
    d = x - y
    half = statistics.t_quantile(0.975, 9) * d.std(ddof=1) / math.sqrt(10)
    found = compared(Observations(rows(10), x, [1] * 10), Observations(rows(10), y, [1] * 10), "difference")
    assert found == pytest.approx((d.mean(), d.mean() - half, d.mean() + half, 10))


def test_what_both_share_cancels():
    """Windows that are hard for both: the paired interval is a hundred times shorter than the intervals themselves."""
    rng = np.random.default_rng(2)
    hard = rng.normal(3, 0.5, 30)
    a = Observations(rows(30), 100 * hard, [100] * 30, scale="exp")
    b = Observations(rows(30), 100 * (hard + 0.01 + rng.normal(0, 0.003, 30)), [100] * 30, scale="exp")
    ratio = compared(b, a, "ratio")
    assert ratio.low < math.exp(0.01) < ratio.high
    assert ratio.high - ratio.low < 0.01 * (a.estimate().high / a.estimate().low - 1)


@pytest.mark.parametrize("how", ["difference", "ratio"])
def test_paired_intervals_cover_the_truth(how):
    """2,000 runs of 12 windows of unequal size: 95 % intervals of the comparison cover in 93 to 97 % of them."""
    rng = np.random.default_rng(3)
    # large windows hold the truth: exp of the expected nats per token
    truth = math.exp(3.05) - math.exp(3.0) if how == "difference" else math.exp(0.05)
    covered = 0
    for _ in range(2000):
        counts = rng.integers(300, 512, 12)
        base = rng.normal(0, 0.05, 12)
        a = Observations(rows(12), counts * (3.05 + base + rng.normal(0, 0.02, 12)), counts, scale="exp")
        b = Observations(rows(12), counts * (3.0 + base + rng.normal(0, 0.02, 12)), counts, scale="exp")
        found = compared(a, b, how)
        covered += found.low <= truth <= found.high
    assert 0.93 < covered / 2000 < 0.97


def test_only_common_units_count_and_other_kinds_do_not_compare():
    a = Observations(rows(8), [1.0] * 8, [1] * 8)
    b = Observations(rows(10)[2:], [2.0] * 8, [1] * 8)
    assert compared(a, b, "difference").n == 6
    assert compared(a, Observations(["other"], [1.0], [1]), "difference") is None
    assert compared(a, Observations.each(rows(8), [1.0] * 8), "difference") is None


def test_medians_compare_by_the_median_of_the_units_own_differences():
    a = Observations.each(rows(7), [math.log(x) for x in (2, 2, 2, 2, 2, 2, 50)], scale="exp")
    b = Observations.each(rows(7), [0.0] * 7, scale="exp")
    assert compared(a, b, "ratio").value == pytest.approx(2)
    assert compared(a, b, "difference").value == pytest.approx(1)
    assert compared(Observations.each(rows(7), [4.0] * 7), Observations.each(rows(7), [2.0] * 7), "ratio").value == 2


def test_what_agrees_in_every_unit_does_not_differ():
    """Two laws that gave each of the same windows the same nats; but equal ones and zeros are no evidence."""
    found = Observations(rows(8), [3.0 + i for i in range(8)], [10] * 8, scale="exp")
    assert compared(found, found, "difference") == (0.0, 0.0, 0.0, 8)
    assert compared(found, found, "ratio") == (1.0, 1.0, 1.0, 8)
    nothing = Observations(rows(8), [0.0] * 8, [10] * 8)
    assert compared(nothing, nothing, "difference") == (0.0, None, None, 8)
    few = Observations(rows(5), [3.0 + i for i in range(5)], [10] * 5)
    assert compared(few, few, "difference").low is None


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("scale", ["identity", "exp"])
@pytest.mark.parametrize("kind", ["mean", "median"])
@pytest.mark.parametrize(
    "sums", [[1.0], [0.25, 0.5], [0.5, 0.125, 0.25, 1, 0, 0.5, 0.75], [0.5, math.inf], [800.0, 900]]
)
def test_the_number_alone_is_that_of_the_estimate(sums, kind, scale, share):
    for counts in ([1.0] * len(sums), [2.5] * len(sums)):
        for trials in (False, True) if share and max(sums) <= 1 else (False,):
            one = Observations(rows(len(sums)), sums, counts, kind, scale, share, trials)
            assert one.value == pytest.approx(one.estimate().value, rel=1e-12)
