"""The Pareto front of two metrics, and how sure it is that a decoder is on it.

A decoder is on the front if no other is at least as good in both metrics and better in one. Which ones are depends on
noise, so membership comes as a probability: the share of bootstrap resamples in which the decoder is on the front.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from decodathlon.harness.measure import statistics
from decodathlon.harness.measure.observations import Observations
from decodathlon.harness.results.measured import Number

Array = np.ndarray[Any, Any]
RESAMPLES = 2000


@dataclass(frozen=True)
class Contestant:
    """One decoder in two metrics.

    Args:
        x, y: its numbers.
        own: for each of the two its speed against itself (the A/A row) where that metric is a time; None elsewhere.
    """

    x: Number
    y: Number
    own: tuple[Number | None, Number | None] = (None, None)


def on_front(x: Array, y: Array, x_better: str, y_better: str) -> Array:
    """Which points no other point dominates.

    Args:
        x, y: (R, n) values of n points in R worlds; infinities are values like others.
        x_better, y_better: `higher` or `lower`.

    Returns:
        (R, n) booleans.
    """
    u = np.where(x_better == "higher", x, -x)[:, :, None]
    v = np.where(y_better == "higher", y, -y)[:, :, None]
    u_other, v_other = u.swapaxes(1, 2), v.swapaxes(1, 2)
    dominated = (u_other >= u) & (v_other >= v) & ((u_other > u) | (v_other > v))
    free: Array = ~dominated.any(-1) & ~np.isnan(x) & ~np.isnan(y)
    return free


def members(contestants: Sequence[Contestant]) -> list[bool]:
    """Who is on the front by the values alone."""
    if not contestants:
        return []
    x, y = (np.array([[getattr(c, axis).estimate.value for c in contestants]]) for axis in "xy")
    return [bool(m) for m in on_front(x, y, contestants[0].x.better, contestants[0].y.better)[0]]


def probabilities(
    contestants: Sequence[Contestant], *, resamples: int = RESAMPLES, seed: int = 0
) -> list[float | None]:
    """The share of bootstrap resamples in which each contestant is on the front.

    Units (windows, prompts, pairs of runs) that contestants share are drawn together, so that what makes a text hard
    for all moves nobody past another. A time also carries the decoder's own error, its speed against itself, with a
    random sign. What holds by definition (a baseline's 1) does not vary.

    Returns:
        None for a contestant that no resample can speak of: it, or its speed against itself, has too few units for an
        interval, or none (a peak of memory is one reading).
    """
    if not contestants:
        return []
    weights: dict[tuple[str, ...], Array] = {}
    rng = np.random.default_rng(seed)

    def drawn(rows: Sequence[str]) -> Array:
        key = tuple(rows)
        if key not in weights:
            weights[key] = rng.multinomial(len(key), [1 / len(key)] * len(key), size=resamples)
        return weights[key]

    def world(number: Number, own: Number | None) -> Array:
        value = number.estimate.value
        if number.units is None or not math.isfinite(value) or not _enough(number.units):
            values = np.full(resamples, value)
        else:
            values = _recomputed(number.units, drawn(number.units.rows))
        if own is not None and own.units is not None and _enough(own.units):
            error = np.log(_recomputed(own.units, rng.multinomial(*_flat(own.units), size=resamples)))
            values = values * np.exp(error * rng.choice([-1.0, 1.0], resamples))
        return values

    x = np.stack([world(c.x, c.own[0]) for c in contestants], 1)
    y = np.stack([world(c.y, c.own[1]) for c in contestants], 1)
    share = np.zeros(len(contestants))
    for part in np.array_split(np.arange(resamples), max(1, resamples * len(contestants) ** 2 // 20_000_000)):
        share += on_front(x[part], y[part], contestants[0].x.better, contestants[0].y.better).sum(0) / resamples
    numbers = [[n for n in (c.x, c.y, *c.own) if n is not None] for c in contestants]
    spoken = [all(_by_definition(n) or (n.units is not None and _enough(n.units)) for n in own) for own in numbers]
    return [float(p) if known else None for p, known in zip(share, spoken, strict=True)]


def _by_definition(number: Number) -> bool:
    return number.units is None and number.estimate.n is None


def _enough(units: Observations) -> bool:
    return len(units.rows) >= statistics.FEWEST_FOR_INTERVAL


def _flat(units: Observations) -> tuple[int, list[float]]:
    return len(units.rows), [1 / len(units.rows)] * len(units.rows)


def _recomputed(units: Observations, weights: Array) -> Array:
    """The metric (R,) under weights (R, n), how often each unit was drawn."""
    sums, counts = np.asarray(units.sums, dtype=np.float64), np.asarray(units.counts, dtype=np.float64)
    if units.kind == "mean":
        values = (weights @ sums) / (weights @ counts)
    else:
        # the sorted values, each as often as it was drawn: the middle one, or the mean of the two in the middle
        order = np.argsort(sums / counts)
        ordered, upto = (sums / counts)[order], weights[:, order].cumsum(-1)
        n = len(ordered)
        low, high = ((upto > k).argmax(-1) for k in ((n - 1) // 2, n // 2))
        values = (ordered[low] + ordered[high]) / 2
    return np.exp(values) if units.scale == "exp" else values
