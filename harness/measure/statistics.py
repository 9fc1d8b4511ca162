"""Estimates with intervals. Everything works on raw observations and a fixed seed, so a number can be made again."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
LEVEL = 0.95
#: With fewer independent observations a 95 % interval cannot be had: even the whole range covers less (2 * 0.5 ** n).
FEWEST_FOR_INTERVAL = 6
#: Paired differences up to which all signs are tried.
EXACT_FLIPS = 14
#: Weights of a bootstrap that are held at once.
LARGEST_PART = 2_000_000


class Estimate(NamedTuple):
    """A number, its 95 % interval where one was computed, and how many observations it rests on."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None


def median(values: Sequence[float]) -> Estimate:
    """Median with its sign-test interval, interpolated to 95 % (Hettmansperger and Sheather 1986).

    It assumes nothing of the noise but independence; a bootstrap of the median covers too little at so few.
    """
    x = np.sort(np.asarray(values, dtype=np.float64))
    n = len(x)
    if n == 0:
        raise ValueError("a median needs at least one observation")
    value = float(np.median(x))
    if n < FEWEST_FOR_INTERVAL:
        return Estimate(value, None, None, n)

    # coverage[k]: of the interval from the k-th smallest to the k-th largest, k from 0 (everything) to the middle
    steps = np.log(n - np.arange(n // 2)) - np.log1p(np.arange(n // 2))
    log_binomial = np.concatenate([[0.0], np.cumsum(steps)]) - (n - 1) * math.log(2)
    coverage = np.concatenate([[1.0], 1.0 - np.cumsum(np.exp(log_binomial))])
    k = int(np.flatnonzero(coverage[: n // 2 + 1] >= LEVEL).max())
    excess = float((coverage[k] - LEVEL) / (coverage[k] - coverage[k + 1]))
    share: float = (n - k) * excess / (k + (n - 2 * k) * excess)
    low = (1 - share) * x[k - 1] + share * x[k]
    high = (1 - share) * x[n - k] + share * x[n - k - 1]
    return Estimate(value, float(low), float(high), n)


def quantile(values: Sequence[float], p: float) -> Estimate | None:
    """A quantile of independent values with the exact interval between two of them (order statistics).

    The k-th smallest of n lies below the quantile with the probability that a binomial variable of n and p is at least
    k, so two of them hold it with 95 % whatever the distribution is. There is none where too few values lie beyond it.

    Returns:
        None where fewer than one value is expected beyond the quantile.
    """
    n, order = len(values), sorted(values)
    if n * (1 - p) < 1 or n * p < 1:
        return None
    value = float(np.quantile(np.asarray(order), p, method="hazen"))
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(n + 1)]
    mass = np.cumsum([math.exp(c + k * math.log(p) + (n - k) * math.log1p(-p)) for k, c in enumerate(logs)])
    # the greatest lower and the smallest upper one of which each misses with at most 2.5 %
    low = int(np.searchsorted(mass, 0.025, side="right"))
    high = int(np.searchsorted(mass, 0.975, side="left")) + 1
    if low < 1 or high > n:
        return Estimate(value, None, None, n)
    return Estimate(value, order[low - 1], order[high - 1], n)


def paired_ratio(log_ratios: Sequence[float]) -> Estimate:
    """exp of the median log-ratio over pairs. The median, because one stalled run must not move the result."""
    found = median(log_ratios)
    if found.low is None or found.high is None:
        return Estimate(math.exp(found.value), None, None, found.n)
    return Estimate(math.exp(found.value), math.exp(found.low), math.exp(found.high), found.n)


def ratio_of_sums(sums: Sequence[float], counts: Sequence[int]) -> Estimate:
    """Total over total, with the t interval of a ratio over clusters (Cochran 1977, Sampling Techniques, 6.4).

    The clusters are runs of neighbouring tokens, which depend on one another; n counts the tokens. Where all clusters
    agree exactly there is no interval: that they do says nothing of the next one.
    """
    s, c = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    total, N = float(c.sum()), len(s)
    if total == 0:
        raise ValueError("a ratio needs at least one observation")
    value = float(s.sum()) / total
    spread = float(np.square(s - value * c).sum())
    if N < FEWEST_FOR_INTERVAL or spread == 0:
        return Estimate(value, None, None, int(total))
    error = math.sqrt(N / (N - 1) * spread) / total
    half = t_quantile(0.5 + LEVEL / 2, N - 1) * error
    return Estimate(value, value - half, value + half, int(total))


def share(sums: Sequence[float], counts: Sequence[int]) -> Estimate:
    """A ratio of sums that lies between 0 and 1."""
    found = ratio_of_sums(sums, counts)
    if found.low is None or found.high is None:
        return found
    return found._replace(low=max(0.0, found.low), high=min(1.0, found.high))


def perplexity(nats: Sequence[float], counts: Sequence[int]) -> Estimate:
    """exp(total nats / total tokens), with the interval of the mean carried through."""
    if not all(map(math.isfinite, nats)):
        return Estimate(math.inf, None, None, sum(counts))
    found = ratio_of_sums(nats, counts)
    if found.low is None or found.high is None:
        return found._replace(value=math.exp(found.value))
    return Estimate(math.exp(found.value), math.exp(found.low), math.exp(found.high), found.n)


@functools.cache
def t_quantile(p: float, freedom: int) -> float:
    """Quantile (p > 0.5) of Student's t, by integrating its density."""
    return float(np.interp(p, _t_mass(freedom), _T_GRID))


def t_p_value(t: float, freedom: int) -> float:
    """Two-sided p-value of Student's t; nothing is told apart beyond 60."""
    return float(2 * (1 - np.interp(abs(t), _T_GRID, _t_mass(freedom))))


_T_GRID = np.linspace(0.0, 60.0, 600_001)


@functools.lru_cache(maxsize=16)
def _t_mass(freedom: int) -> Array:
    """The distribution function of Student's t on the grid."""
    x = _T_GRID
    scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    density = np.exp(scale - (freedom + 1) / 2 * np.log1p(x * x / freedom))
    mass: Array = 0.5 + np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2) * (x[1] - x[0])])
    return mass


# --- Bootstrap ---------------------------------------------------------------------------------------------------


def weighted_mean(values: Sequence[float]) -> Callable[[Array], Array]:
    """A statistic for `bootstrap`: the mean of the values under weights (R, n)."""
    x = np.asarray(values, dtype=np.float64)
    return lambda weights: (weights @ x) / weights.sum(-1)


def bootstrap(
    statistic: Callable[[Array], Array],
    clusters: Sequence[Hashable],
    *,
    method: Literal["bca", "percentile"] = "bca",
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """A statistic with its bootstrap interval; whole clusters are drawn, because observations in one depend on another.

    For statistics without a closed form; where there is one (`ratio_of_sums`, `median`, `wilson`) that covers better.
    The percentiles are expanded as Student's t would, because few clusters spread too little (Hesterberg 2015).

    Args:
        statistic: (R, n) weights of the n observations, how often each was drawn, to (R,) values.
        clusters: (n,) the cluster of each observation; all different where they are independent.
        method: `bca` corrects the percentiles for bias and skewness (Efron 1987); `percentile` does not.

    Returns:
        n is the number of observations; there is no interval for fewer than six clusters or a constant statistic.
    """
    names, member = np.unique(np.asarray([str(c) for c in clusters]), return_inverse=True)
    N = len(names)
    if N == 0:
        raise ValueError("a bootstrap needs at least one observation")
    value = float(statistic(np.ones((1, len(member))))[0])
    if N < FEWEST_FOR_INTERVAL:
        return Estimate(value, None, None, len(member))
    found = np.sort(np.concatenate([statistic(drawn[:, member]) for drawn in _drawn(N, len(member), resamples, seed)]))
    if found[0] == found[-1]:
        return Estimate(value, None, None, len(member))
    reach = math.sqrt(N / (N - 1)) * t_quantile(0.5 + LEVEL / 2, N - 1)
    tails = np.array([NormalDist().cdf(-reach), NormalDist().cdf(reach)])
    if method == "bca":
        without = statistic((1.0 - np.eye(N))[:, member])
        tails = _bca_tails(tails, found, value, without)
    low, high = np.quantile(found, tails)
    return Estimate(value, float(low), float(high), len(member))


def _drawn(clusters: int, observations: int, resamples: int, seed: int) -> Iterable[Array]:
    """How often each cluster was drawn in each resample, in parts that fit the memory."""
    if resamples * observations <= LARGEST_PART:  # comparisons of many decoders over the same questions ask again
        return (_one_part(clusters, resamples, seed),)
    each, rng = max(1, LARGEST_PART // observations), np.random.default_rng(seed)
    return (
        rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=min(each, resamples - begin)).astype(np.float64)
        for begin in range(0, resamples, each)
    )


@functools.lru_cache(maxsize=4)
def _one_part(clusters: int, resamples: int, seed: int) -> Array:
    even = np.full(clusters, 1 / clusters)
    return np.random.default_rng(seed).multinomial(clusters, even, size=resamples).astype(np.float64)


def _bca_tails(tails: Array, found: Array, value: float, without: Array) -> Array:
    """Percentiles corrected for bias (z0) and acceleration (a); `without` leaves out one cluster each."""
    normal = NormalDist()
    below = (np.sum(found < value) + 0.5 * np.sum(found == value)) / len(found)
    z0 = normal.inv_cdf(min(max(float(below), 0.5 / len(found)), 1 - 0.5 / len(found)))
    pull = without.mean() - without
    spread = float(np.square(pull).sum())
    a = 0.0 if spread == 0 else float((pull**3).sum()) / (6 * spread**1.5)
    shifted = [z0 + (z0 + normal.inv_cdf(float(t))) / (1 - a * (z0 + normal.inv_cdf(float(t)))) for t in tails]
    return np.array([normal.cdf(z) for z in shifted])


# --- Shares and paired tests ---------------------------------------------------------------------------------------


def wilson(successes: int, n: int) -> Estimate:
    """A share of independent trials with its score interval (Wilson 1927)."""
    if n == 0:
        raise ValueError("a share needs at least one trial")
    p, z = successes / n, NormalDist().inv_cdf(0.5 + LEVEL / 2)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half), n)


def clustered_share(sums: Sequence[float], counts: Sequence[float]) -> Estimate:
    """A share of answers, several to each question, with Wilson's interval on the number that they are worth.

    That number follows from how much questions differ: p (1 - p) over the variance of the mean (the design effect of
    Kish 1965), at least the questions and, where answers are right or wrong, at most these. Student's quantile, because
    it is estimated.
    """
    s, c = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    N, total = len(s), float(c.sum())
    if N < 2:
        raise ValueError("a share over questions needs at least two of them")
    p = float(s.sum()) / total
    spread = N / (N - 1) * float(np.square(s - p * c).sum()) / total**2
    most = total if bool((s == np.round(s)).all()) else math.inf  # a probability says more than a yes or no
    worth = min(most, max(float(N), p * (1 - p) / spread)) if spread > 0 else float(N)
    t = t_quantile(0.5 + LEVEL / 2, N - 1)
    centre = (p + t * t / (2 * worth)) / (1 + t * t / worth)
    half = t / (1 + t * t / worth) * math.sqrt(p * (1 - p) / worth + t * t / (4 * worth * worth))
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half), int(total))


def sign_flip(differences: Sequence[float], *, flips: int = 20_000, seed: int = 0) -> float:
    """Two-sided p-value that paired differences are as likely of either sign (Fisher's randomisation test).

    Exact up to 14 differences that are not zero, else by random signs, which cannot go below 1 / (flips + 1). Of
    differences that are all 1 or -1 it is McNemar's test. Fewer than six that are not zero never reach 5 %.
    """
    d = np.asarray([x for x in differences if x != 0], dtype=np.float64)
    n = len(d)
    if n == 0:
        return 1.0
    reached = abs(float(d.sum())) * (1 - 1e-9)
    if n <= EXACT_FLIPS:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float((np.abs(signs @ d) >= reached).mean())
    signs = 1.0 - 2.0 * np.random.default_rng(seed).integers(0, 2, (flips, n), dtype=np.int8)
    return float(((np.abs(signs @ d) >= reached).sum() + 1) / (flips + 1))


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p-value that two decoders solve equally many of the same problems (McNemar 1947).

    Args:
        only_a: problems that A solved and B did not.
        only_b: the reverse. Problems on which they agree say nothing.
    """
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return float(min(1.0, 2 * tail / 2**n))


def sign_test(differences: Sequence[float]) -> float:
    """Two-sided exact p-value that differences are as often positive as negative; zeros say nothing."""
    return mcnemar(sum(d > 0 for d in differences), sum(d < 0 for d in differences))


def paired_share_difference(both: int, only_a: int, only_b: int, neither: int) -> Estimate:
    """Share solved by A minus share solved by B on the same problems, with the interval of Agresti and Min (2005).

    It is Wald's after half a problem was added to each of the four counts, which keeps its coverage at few problems.
    """
    n = both + only_a + only_b + neither
    if n == 0:
        raise ValueError("a difference of shares needs at least one problem")
    b, c, N = only_a + 0.5, only_b + 0.5, n + 2.0
    half = NormalDist().inv_cdf(0.5 + LEVEL / 2) * math.sqrt(b + c - (b - c) ** 2 / N) / N
    centre = (b - c) / N
    return Estimate((only_a - only_b) / n, max(-1.0, centre - half), min(1.0, centre + half), n)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted so that the chance of any false alarm in the family stays at the level (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = worst
    return adjusted


# --- Size of an effect, and what would have been seen --------------------------------------------------------------


def geometric_mean_ratio(log_ratios: Sequence[float]) -> Estimate:
    """exp of the mean log-ratio over pairs with its t interval. Every pair counts, also a stalled one."""
    found = ratio_of_sums(list(log_ratios), [1] * len(log_ratios))
    if found.low is None or found.high is None:
        return found._replace(value=math.exp(found.value))
    return Estimate(math.exp(found.value), math.exp(found.low), math.exp(found.high), found.n)


def standardised_difference(differences: Sequence[float]) -> float:
    """Mean of paired differences in units of their standard deviation (Cohen's d_z), times Hedges' correction.

    The correction J = 1 - 3 / (4 f - 1), f = n - 1, takes away the bias of a small sample (Hedges 1981). Of two
    pairs it would leave nothing, so there it is left out.
    """
    d = np.asarray(differences, dtype=np.float64)
    if len(d) < 2:
        raise ValueError("a standardised difference needs at least two pairs")
    spread = float(d.std(ddof=1))
    if spread == 0:
        return math.nan if d[0] == 0 else math.copysign(math.inf, d[0])
    correction = 1.0 if len(d) == 2 else 1 - 3 / (4 * (len(d) - 1) - 1)
    return float(d.mean()) / spread * correction


def detectable_difference(differences: Sequence[float], *, power: float = 0.8) -> float:
    """The smallest mean difference that a two-sided paired t test at 5 % would have seen with this power.

    From the spread of the differences that were measured: (t_(0.975) + t_power) s / sqrt(n).
    """
    d = np.asarray(differences, dtype=np.float64)
    if len(d) < 2:
        return math.inf
    reach = t_quantile(0.5 + LEVEL / 2, len(d) - 1) + t_quantile(power, len(d) - 1)
    return float(reach * d.std(ddof=1) / math.sqrt(len(d)))


def visible_difference(differences: Sequence[float], step: float = 1.0) -> float:
    """The smallest difference of shares over these questions that could have been seen.

    Args:
        differences: of two decoders, question by question, each from -1 to 1.
        step: the least by which a question may differ: 1 where it is solved or not, 1 / k of k answers.

    Returns:
        What a paired test would have seen with a power of 80 %, and never less than a step at six questions: of fewer
        that speak for one side alone the exact test does not reach 5 % (2 * 0.5 ** 5 = 0.0625).
    """
    if len(differences) < FEWEST_FOR_INTERVAL:
        return math.inf
    return max(detectable_difference(differences), FEWEST_FOR_INTERVAL * step / len(differences))


def detectable_share(n: int, share: float = 0.5, *, power: float = 0.8) -> float:
    """The smallest change from `share` that n independent trials would have shown at 5 % with this power."""
    if n == 0:
        return math.inf
    reach = NormalDist().inv_cdf(0.5 + LEVEL / 2) + NormalDist().inv_cdf(power)
    return float(reach * math.sqrt(share * (1 - share) / n))
