"""Counts of outcomes against a law that is known exactly: how far, how far by chance, what the test could have seen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from decodathlon.harness.lazy import torch

Array = np.ndarray[Any, Any]
#: How often a test may call an honest decoder dishonest.
ALPHA = 1e-3
#: How often it must see a deviation of the size that it states.
POWER = 0.9
#: Cells that expect fewer counts are put together: below that Pearson's statistic is not chi-square.
FEWEST_EXPECTED = 5.0


class Floor(NamedTuple):
    """The total variation distance of so many independent exact draws, by simulation."""

    mean: float
    spread: float


def tvd(counts: Array, law: Array) -> float:
    """Total variation distance between counts (K,) and a law (K,)."""
    return float(0.5 * np.abs(counts / counts.sum() - law).sum())


def floor(law: Array, draws: int, *, repeats: int = 1000, seed: int = 0) -> Floor:
    """What an exact sampler would measure: a distance is never zero, and at few draws it says nothing else."""
    rng = np.random.default_rng(seed)
    found = 0.5 * np.abs(rng.multinomial(draws, law, size=repeats) / draws - law).sum(-1)
    return Floor(float(found.mean()), float(found.std(ddof=1)))


def p_value(counts: Array, law: Array) -> float:
    """Pearson's goodness of fit; 0 where something was drawn that the law gives no probability."""
    if bool((counts[law <= 0] > 0).any()):
        return 0.0
    observed, expected = _pooled(counts, law)
    if len(expected) < 2:
        return 1.0
    statistic = float((np.square(observed - expected) / expected).sum())
    return _above(statistic, len(expected) - 1)


def visible_tvd(law: Array, draws: int, *, alpha: float = ALPHA, power: float = POWER) -> float:
    """The smallest distance that the test sees with this power, whatever direction it has.

    Of all deviations of one total variation distance t the one in proportion to the law is hardest to see: its
    noncentrality is 4 t^2 per draw. Exact for Pearson's statistic in its limit, a noncentral chi-square. What is moved
    among the rare outcomes that the test puts together it does not see, so their probability is added.
    """
    freedom = len(_pooled(law * draws, law)[1]) - 1
    rare = float(law[law * draws < FEWEST_EXPECTED].sum())
    if freedom < 1:  # one right answer: any other is seen as soon as it comes
        return float(1.0 - (1.0 - power) ** (1.0 / draws))
    critical = _bisected(lambda x: _above(x, freedom) - alpha, 0.0, 10.0 * freedom + 200.0)
    noncentral = _bisected(lambda x: power - _above_noncentral(critical, freedom, x), 0.0, 20.0 * freedom + 400.0)
    return min(1.0, math.sqrt(noncentral / (4 * draws)) + rare)


def holm(p_values: Mapping[str, float], alpha: float = ALPHA) -> set[str]:
    """Who is rejected when all are tested together; the chance of any false alarm stays below alpha (Holm 1979)."""
    rejected: set[str] = set()
    ordered = sorted(p_values, key=lambda name: p_values[name])
    for place, name in enumerate(ordered):
        if p_values[name] > alpha / (len(ordered) - place):
            break
        rejected.add(name)
    return rejected


def counted(outcomes: Sequence[tuple[int, ...]], law: Mapping[tuple[int, ...], float]) -> tuple[Array, Array]:
    """Counts and probabilities of every outcome of a law; what the law does not know is counted in a last cell of 0."""
    place = {outcome: i for i, outcome in enumerate(law)}
    counts = np.zeros(len(law) + 1)
    for outcome in outcomes:
        counts[place.get(tuple(outcome), len(law))] += 1
    return counts, np.array([*law.values(), 0.0])


def _pooled(counts: Array, law: Array) -> tuple[Array, Array]:
    """Observed and expected counts, rare cells put together."""
    expected = law * counts.sum()
    rare = expected < FEWEST_EXPECTED
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if len(expected) > 1 and 0 < expected[-1] < FEWEST_EXPECTED:  # all of them together are still rare
        least = int(expected[:-1].argmin())
        observed[least] += observed[-1]
        expected[least] += expected[-1]
        observed, expected = observed[:-1], expected[:-1]
    kept = expected > 0
    return observed[kept], expected[kept]


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
