"""Estimates with intervals. Everything works on raw observations and a fixed seed, so a number can be made again."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
#: With fewer independent observations a 95 % interval cannot be had: even the whole range covers less (2 * 0.5 ** n).
FEWEST_FOR_INTERVAL = 6


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

    def coverage(k: int) -> float:
        """Of the interval from the k-th smallest to the k-th largest."""
        return 1.0 - sum(math.comb(n, i) for i in range(k)) / 2.0 ** (n - 1)

    k = max(k for k in range(1, n // 2 + 1) if coverage(k) >= LEVEL)
    excess = (coverage(k) - LEVEL) / (coverage(k) - coverage(k + 1))
    share: float = (n - k) * excess / (k + (n - 2 * k) * excess)
    low = (1 - share) * x[k - 1] + share * x[k]
    high = (1 - share) * x[n - k] + share * x[n - k - 1]
    return Estimate(value, float(low), float(high), n)


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
    x = np.linspace(0.0, 60.0, 600_001)
    scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    density = np.exp(scale - (freedom + 1) / 2 * np.log1p(x * x / freedom))
    mass = 0.5 + np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2) * (x[1] - x[0])])
    return float(np.interp(p, mass, x))
