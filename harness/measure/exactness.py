"""Counts of outcomes against a law that is known exactly: how far, how far by chance, what the test could have seen."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from decodathlon.harness.lazy import torch
from decodathlon.harness.measure.statistics import Estimate

Array = np.ndarray[Any, Any]
#: How often a test may call an honest decoder dishonest.
ALPHA = 1e-3
#: How often it must see a deviation of the size that it states.
POWER = 0.9
#: Outcomes that are expected less often are put together: with fewer counts Pearson's statistic is not chi-square so
#: far out as Holm's correction goes, at chances of one in 40,000.
FEWEST_EXPECTED = 25.0


class Floor(NamedTuple):
    """The total variation distance of so many independent exact draws, by simulation."""

    mean: float
    spread: float
    #: Between these lie 95 % of them.
    low: float
    high: float

    def ratio(self, distance: float, draws: int) -> Estimate:
        """A distance over the floor. Of an exact sampler 95 % of the intervals hold 1."""
        low, high = (distance / x if x > 0 else None for x in (self.high, self.low))
        return Estimate(distance / self.mean, low, high, draws)


def tvd(counts: Array, law: Array) -> float:
    """Total variation distance between counts (K,) and a law (K,)."""
    return float(0.5 * np.abs(counts / counts.sum() - law).sum())


def floor(law: Array, draws: int, *, repeats: int = 4000, seed: int = 0) -> Floor:
    """What an exact sampler would measure: a distance is never zero, and at few draws it says nothing else."""
    return _floor(np.ascontiguousarray(law, dtype=np.float64).tobytes(), draws, repeats, seed)


@functools.lru_cache(maxsize=256)
def _floor(of: bytes, draws: int, repeats: int, seed: int) -> Floor:
    """All decoders of a suite are held against the same law."""
    law, rng = np.frombuffer(of), np.random.default_rng(seed)
    found = 0.5 * np.abs(rng.multinomial(draws, law, size=repeats) / draws - law).sum(-1)
    low, high = np.quantile(found, [0.025, 0.975])
    return Floor(float(found.mean()), float(found.std(ddof=1)), float(low), float(high))


def p_value(counts: Array, law: Array) -> float:
    """How rarely an honest sampler fits its law so badly; 0 where something came that the law gives no probability.

    Two tests, each counted twice: Pearson's among the outcomes that are expected often enough for it to be chi-square
    far out in its tail, and the exact binomial one of how many draws fell on all the others together.
    """
    if bool((counts[law <= 0] > 0).any()):
        return 0.0
    often = _often(law, int(counts.sum()))
    found = []
    if often.sum() > 1 and counts[often].sum() > 0:
        expected = law[often] / law[often].sum() * counts[often].sum()
        statistic = float((np.square(counts[often] - expected) / expected).sum())
        found.append(_above(statistic, int(often.sum()) - 1))
    rare = float(law[~often].sum())
    if 0 < rare < 1:
        found.append(_binomial(int(counts[~often].sum()), int(counts.sum()), rare))
    return min(1.0, len(found) * min(found)) if found else 1.0


def visible_tvd(law: Array, draws: int, *, alpha: float = ALPHA, power: float = POWER) -> float:
    """The smallest distance that the test sees with this power, whatever direction it has.

    Of all deviations of one distance t among the frequent outcomes the one in proportion to the law is hardest to see:
    its noncentrality is 4 t^2 per draw. Exact for Pearson's statistic in its limit, a noncentral chi-square. What goes
    to the rare outcomes, or from them, must show in their number. What is moved among them the test does not see, so
    their probability is added.
    """
    often = _often(law, draws)
    rare, freedom = float(law[~often].sum()), int(often.sum()) - 1
    level = alpha / 2 if freedom > 0 and rare > 0 else alpha
    seen = 0.0
    if freedom > 0:
        critical = _bisected(lambda x: _above(x, freedom) - level, 0.0, 10.0 * freedom + 200.0)
        noncentral = _bisected(lambda x: power - _above_noncentral(critical, freedom, x), 0.0, 20.0 * freedom + 400.0)
        seen = math.sqrt(noncentral / (4 * draws))
    # So many rare outcomes are too many; where the law has none, one is.
    too_many = np.flatnonzero(2 * _tail(draws, rare) <= level) if rare > 0 else np.array([1])
    most = int(too_many[0]) if len(too_many) else draws
    more = _bisected(lambda x: power - float(_tail(draws, min(1.0, rare + x))[most]), 0.0, 1.0)
    return min(1.0, max(seen, more) + rare)


def _often(law: Array, draws: int) -> Array:
    """(K,) which outcomes are expected often enough for Pearson's test."""
    often: Array = law * draws >= FEWEST_EXPECTED
    return often


def _binomial(found: int, draws: int, share: float) -> float:
    """Two-sided exact test of so many successes."""
    tail = _tail(draws, share)
    below = 1.0 - float(tail[found + 1]) if found < draws else 1.0
    return min(1.0, 2.0 * min(float(tail[found]), below))


def _tail(draws: int, share: float) -> Array:
    """(draws + 1,) P(successes >= k) for every k."""
    k = torch.arange(draws + 1, dtype=torch.float64)
    n = torch.tensor(float(draws), dtype=torch.float64)
    if share >= 1:
        return np.ones(draws + 1)
    choose = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    log_pmf = choose + k * math.log(share) + (n - k) * math.log1p(-share)
    tail: Array = log_pmf.exp().flip(0).cumsum(0).flip(0).clamp(max=1.0).numpy()
    return tail


def counted(outcomes: Sequence[tuple[int, ...]], law: Mapping[tuple[int, ...], float]) -> tuple[Array, Array]:
    """Counts and probabilities of every outcome of a law; what the law does not know is counted in a last cell of 0."""
    place = {outcome: i for i, outcome in enumerate(law)}
    counts = np.zeros(len(law) + 1)
    for outcome in outcomes:
        counts[place.get(tuple(outcome), len(law))] += 1
    return counts, np.array([*law.values(), 0.0])


def _above(statistic: float, freedom: int) -> float:
    """P(chi-square > statistic)."""
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def _above_noncentral(statistic: float, freedom: int, noncentrality: float) -> float:
    """P(noncentral chi-square > statistic): central ones mixed by a Poisson law."""
    mean = noncentrality / 2
    most = int(mean + 12 * math.sqrt(mean + 1) + 20)
    j = torch.arange(most, dtype=torch.float64)
    weights = (j * math.log(mean) if mean > 0 else torch.where(j == 0, 0.0, -math.inf)) - mean - torch.lgamma(j + 1)
    tails = torch.special.gammaincc(freedom / 2 + j, torch.full_like(j, statistic / 2))
    return float((weights.exp() * tails).sum())


def _bisected(function: Any, low: float, high: float) -> float:
    """Where a falling function crosses zero."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return (low + high) / 2
