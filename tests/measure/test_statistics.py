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


def test_the_median_interval_of_many_is_the_normal_one():
    """Of 100,001 values the ends are 1.96 sqrt(n) / 2 ranks from the middle."""
    found = statistics.median(range(100_001))
    assert found.value == 50_000
    assert found.high - found.low == pytest.approx(2 * 1.96 * math.sqrt(100_001) / 2, rel=0.005)


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


def test_a_bootstrap_of_the_mean_has_the_standard_error_of_the_closed_form():
    """Half its percentile width over 1.96 is s / sqrt(n), within 3 %: a factor of sqrt(resamples) would show."""
    x = np.random.default_rng(3).normal(0, 2, 200)
    found = statistics.bootstrap(statistics.weighted_mean(x), range(200), method="percentile")
    assert found.value == pytest.approx(x.mean())
    assert (found.high - found.low) / 2 / 1.96 == pytest.approx(x.std() / math.sqrt(200), rel=0.03)
    assert found == statistics.bootstrap(statistics.weighted_mean(x), range(200), method="percentile")


@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_bootstrap_intervals_cover_the_truth(method):
    """1,500 runs of 40 observations, of a skewed law for BCa: 95 % intervals cover in 93 to 97 % of them."""
    rng = np.random.default_rng(4)
    covered = []
    for _ in range(1500):
        x = rng.gamma(4.0, 1.0, 40) if method == "bca" else rng.normal(4.0, 1.0, 40)
        found = statistics.bootstrap(statistics.weighted_mean(x), range(40), method=method, resamples=1000)
        covered.append(found.low <= 4.0 <= found.high)
    assert 0.93 < np.mean(covered) < 0.97


def test_bca_moves_a_skewed_interval_to_the_side_of_the_tail():
    x = np.random.default_rng(5).lognormal(0, 1, 40)
    plain = statistics.bootstrap(statistics.weighted_mean(x), range(40), method="percentile")
    moved = statistics.bootstrap(statistics.weighted_mean(x), range(40), method="bca")
    assert moved.low > plain.low
    assert moved.high > plain.high


def test_a_bootstrap_draws_whole_clusters():
    """Ten copies of each observation say no more than one: 1,500 runs cover in 93 to 97 %, without clusters in 50 %."""
    rng = np.random.default_rng(6)
    with_clusters, without = [], []
    for _ in range(1500):
        x = np.repeat(rng.normal(0, 1, 40), 10)
        clusters = np.repeat(np.arange(40), 10)
        for seen, names in ((with_clusters, clusters), (without, range(400))):
            found = statistics.bootstrap(statistics.weighted_mean(x), names, resamples=300, method="percentile")
            seen.append(found.low <= 0 <= found.high)
    assert 0.93 < np.mean(with_clusters) < 0.97
    assert np.mean(without) < 0.6


def test_bootstraps_that_can_say_nothing_have_no_interval():
    assert statistics.bootstrap(statistics.weighted_mean([1.0, 2.0]), range(2)).low is None
    assert statistics.bootstrap(statistics.weighted_mean([1.0] * 9), range(9)).low is None


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"), [(15, 30, 0.3315, 0.6685), (0, 10, 0.0, 0.2775), (81, 263, 0.2553, 0.3662)]
)
def test_wilson_is_that_of_the_tables(successes, n, low, high):
    """Newcombe 1998 has 81 of 263: 0.2553 to 0.3662."""
    assert statistics.wilson(successes, n) == pytest.approx((successes / n, low, high, n), abs=1e-4)


def test_wilson_covers_on_average_over_shares():
    """Exact coverage by enumeration, averaged over shares from 0.05 to 0.95, is 93 to 97 % at n = 30 and 80."""
    for n in (30, 80):
        found = [statistics.wilson(k, n) for k in range(n + 1)]
        coverage = [
            sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1) if found[k].low <= p <= found[k].high)
            for p in np.linspace(0.05, 0.95, 181)
        ]
        assert 0.93 < np.mean(coverage) < 0.97


def test_mcnemar_is_the_exact_binomial():
    assert statistics.mcnemar(5, 0) == pytest.approx(0.0625)
    assert statistics.mcnemar(6, 0) == pytest.approx(0.03125)
    assert statistics.mcnemar(0, 0) == 1.0
    assert statistics.mcnemar(3, 3) == 1.0
    assert statistics.sign_test([1, 2, 3, 0, 4, 5, 6]) == pytest.approx(0.03125)


def test_mcnemar_keeps_its_level_for_every_number_of_discordant_pairs():
    for n in range(1, 60):
        alarms = sum(math.comb(n, k) for k in range(n + 1) if statistics.mcnemar(k, n - k) <= 0.05) / 2**n
        assert alarms <= 0.05


@pytest.mark.parametrize("n", [30, 80, 500])
def test_paired_share_differences_cover_the_truth(n):
    """4,000 pairs of graded answers that agree more than by chance: cover in 93 to 97 %."""
    rng = np.random.default_rng(7)
    law = [0.4, 0.15, 0.1, 0.35]  # both, only A, only B, neither
    found = [statistics.paired_share_difference(*row) for row in rng.multinomial(n, law, size=4000)]
    assert 0.93 < np.mean([f.low <= 0.05 <= f.high for f in found]) < 0.97


def test_holm_steps_down():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([]) == []
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]


def test_holm_keeps_the_familys_level():
    """20,000 families of 10 true hypotheses: any alarm in 4.5 to 5.5 %; without the correction in 40 %."""
    p = np.random.default_rng(8).random((20_000, 10))
    assert 0.045 < np.mean([min(statistics.holm(row)) <= 0.05 for row in p]) < 0.055
    assert np.mean(p.min(axis=1) <= 0.05) > 0.39


def test_a_geometric_mean_ratio_counts_every_pair():
    found = statistics.geometric_mean_ratio([math.log(2)] * 9 + [math.log(4)])
    assert found.value == pytest.approx(2**1.1)
    assert found.low < found.value < found.high


def test_a_standardised_difference_is_unbiased():
    """Over 20,000 samples of 8 pairs its mean is the true 0.5 within 1 %; without the correction it is 0.56."""
    rng = np.random.default_rng(9)
    found = [statistics.standardised_difference(row) for row in rng.normal(0.5, 1, (20_000, 8))]
    assert np.mean(found) == pytest.approx(0.5, rel=0.015)
    assert statistics.standardised_difference([2.0, 2.0]) == math.inf


@pytest.mark.parametrize("n", [8, 20, 60])
def test_the_detectable_difference_is_seen_as_often_as_it_says(n):
    """A difference of that size is found by the t interval in 77 to 84 % of 4,000 runs."""
    rng = np.random.default_rng(n)
    reach = statistics.t_quantile(0.975, n - 1) + statistics.t_quantile(0.8, n - 1)
    effect = reach / math.sqrt(n)  # what detectable_difference gives for a spread of exactly one
    seen = 0
    for row in rng.normal(effect, 1, (4000, n)):
        seen += statistics.ratio_of_sums(row, [1] * n).low > 0
    assert 0.77 < seen / 4000 < 0.84
    unit = rng.normal(0, 1, n)
    unit = (unit - unit.mean()) / unit.std(ddof=1)
    assert statistics.detectable_difference(unit) == pytest.approx(effect)


def test_the_detectable_share_matches_the_known_sample_sizes():
    assert statistics.detectable_share(500) == pytest.approx(0.0626, abs=1e-4)
    assert statistics.detectable_share(30) == pytest.approx(0.2557, abs=1e-4)


@pytest.mark.parametrize(("a", "b"), [(6, 0), (5, 0), (9, 3), (1, 1), (7, 8), (20, 8)])
def test_random_signs_of_whole_questions_are_mcnemar(a, b):
    found = statistics.sign_flip([1.0] * a + [-1.0] * b + [0.0] * 10)
    assert found == pytest.approx(statistics.mcnemar(a, b), abs=0.0 if a + b <= 14 else 0.01)


def test_random_signs_keep_their_level():
    rng = np.random.default_rng(2)
    small = [statistics.sign_flip(rng.normal(size=9) ** 3) <= 0.05 for _ in range(600)]
    assert np.mean(small) == pytest.approx(0.05, abs=0.03)
    assert statistics.sign_flip([0.0, 0.0]) == 1.0
    assert statistics.sign_flip([0.25] * 5) == 2 * 0.5**5


@pytest.mark.parametrize("ease", [(0.05, 2.0), (0.5, 0.5), (3.0, 3.0)])
def test_shares_over_questions_cover_the_truth(ease):
    """Forty questions with four answers each, from hardly ever solved to all alike; 400 worlds."""
    rng, covered = np.random.default_rng(7), 0
    truth = ease[0] / sum(ease)
    for _ in range(400):
        right = rng.binomial(4, rng.beta(*ease, 40))
        found = statistics.clustered_share(list(right), [4] * 40)
        covered += found.low <= truth <= found.high
    assert covered / 400 > 0.92


def test_shares_of_probabilities_have_the_interval_of_their_mean():
    """Values that are no yes or no are known better than as many throws of a coin."""
    x = list(np.random.default_rng(3).normal(0.4, 0.05, 40))
    found, plain = statistics.clustered_share(x, [1] * 40), statistics.ratio_of_sums(x, [1] * 40)
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high), abs=1e-3)
    assert found.high - found.low < 0.3 * (statistics.wilson(16, 40).high - statistics.wilson(16, 40).low)


@pytest.mark.parametrize(("t", "freedom", "p"), [(2.262, 9, 0.05), (0.0, 5, 1.0), (12.706, 1, 0.05), (3.25, 9, 0.01)])
def test_p_values_of_t_are_those_of_the_tables(t, freedom, p):
    assert statistics.t_p_value(t, freedom) == pytest.approx(p, abs=2e-4 if freedom > 1 else 6e-3)
    assert statistics.t_p_value(-t, freedom) == statistics.t_p_value(t, freedom)
