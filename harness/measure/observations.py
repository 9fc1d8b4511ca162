"""What a metric was computed from: one number per independent unit (a prompt, a pair of runs, a window of text).

The metric follows from its units, so two results over the same units can be compared unit by unit, long after the run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Literal

import numpy as np

from decodathlon.harness.measure import statistics
from decodathlon.harness.measure.statistics import Array, Estimate

#: Enough for a 95 % interval of a difference; its ends are off by about 0.4 % of probability.
COMPARED_RESAMPLES = 2000


@dataclass(frozen=True)
class Observations:
    """A metric's units and how they become one number.

    Args:
        rows: what each unit is called; the same name in another cell means the same prompt, window or pair.
        sums: per unit, the total over what it counts.
        counts: per unit, how many were counted (tokens of a window); 1 for medians.
        kind: `mean` is total over total with a t interval over units, `median` the median of sums over counts with a
            sign-test interval.
        scale: `exp` where the units are logarithms (nats, log-ratios) and the metric is not.
        share: the metric lies between 0 and 1.
        trials: each unit is a question that is solved or not, or some of whose answers are right; several answers to it
            are no new evidence. Their shares have Wilson's interval and are compared by a test of random signs, which
            is McNemar's where each is solved or not.
    """

    rows: Sequence[str]
    sums: Sequence[float]
    counts: Sequence[float]
    kind: Literal["mean", "median"] = "mean"
    scale: Literal["identity", "exp"] = "identity"
    share: bool = False
    trials: bool = False

    @classmethod
    def each(
        cls, rows: Sequence[str], values: Sequence[float], *, scale: Literal["identity", "exp"] = "identity"
    ) -> Observations:
        """One value per unit, whose median is the metric."""
        return cls(rows, values, [1.0] * len(values), "median", scale)

    @classmethod
    def grouped(cls, rows: Sequence[str], values: Sequence[float], *, share: bool = False) -> Observations:
        """Values of which several may belong to one unit, as both turns of a talk do."""
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        for row, value in zip(rows, values, strict=True):
            sums[row], counts[row] = sums.get(row, 0.0) + value, counts.get(row, 0.0) + 1.0
        return cls(list(sums), list(sums.values()), list(counts.values()), share=share)

    @classmethod
    def questions(cls, rows: Sequence[str], right: Sequence[float], asked: Sequence[float] = ()) -> Observations:
        """Shares of trials: per question how much was right, of how many answers (one where it is not said)."""
        return cls(rows, right, list(asked) or [1.0] * len(rows), share=True, trials=True)

    def estimate(self) -> Estimate:
        """The metric with its interval; n counts what was counted."""
        if self.kind == "median":
            found = statistics.median(self.values())
        elif self.trials and self.all_or_nothing:
            found = statistics.wilson(self._successes, len(self.sums))._replace(n=int(sum(self.counts)))
        elif self.trials and len(self.sums) > 1:
            found = statistics.clustered_share(self.sums, self.counts)
        elif all(map(math.isfinite, self.sums)):
            found = statistics.ratio_of_sums(self.sums, [int(c) for c in self.counts])
        else:  # infinite where a token was cut; what has NaN or minus infinity is no number
            cut = all(s > -math.inf for s in self.sums)  # false for NaN, too
            found = Estimate(math.inf if cut else math.nan, None, None, int(sum(self.counts)))
        if self.scale == "exp":
            found = found._replace(value=_exp(found.value), low=_exp(found.low), high=_exp(found.high))
        if self.share and found.low is not None and found.high is not None:
            found = found._replace(low=max(0.0, found.low), high=min(1.0, found.high))
        return found

    @property
    def value(self) -> float:
        """The metric alone, for whoever asks of very many: most of the time of `estimate` is the interval's."""
        total = sum(map(int, self.counts))
        if self.trials or total == 0 or not all(map(math.isfinite, self.sums)):
            return self.estimate().value
        found = median(self.values()) if self.kind == "median" else sum(self.sums) / total
        return float(_exp(found) if self.scale == "exp" else found)

    def as_json(self) -> dict[str, Any]:
        return {
            "rows": list(self.rows),
            "sums": [float(f"{s:.9g}") for s in self.sums],
            "counts": [int(c) if float(c).is_integer() else float(c) for c in self.counts],
            "kind": self.kind,
            "scale": self.scale,
            "share": self.share,
            **({"trials": True} if self.trials else {}),  # rows from before there were any read as they did
        }

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Observations:
        # infinities travel as words
        return cls(**stored | {"sums": [float(s) for s in stored["sums"]]})

    @property
    def all_or_nothing(self) -> bool:
        """Whether every question was answered equally often, and either always or never rightly."""
        return len(set(self.counts)) == 1 and all(s in (0, c) for s, c in zip(self.sums, self.counts, strict=True))

    @property
    def _successes(self) -> int:
        return sum(s > 0 for s in self.sums)

    def values(self) -> list[float]:
        """The value of each unit."""
        return [s / c for s, c in zip(self.sums, self.counts, strict=True)]

    def _on(self, rows: Sequence[str]) -> Observations:
        at = {row: i for i, row in enumerate(self.rows)}
        picked = [at[row] for row in rows]
        return replace(self, rows=rows, sums=[self.sums[i] for i in picked], counts=[self.counts[i] for i in picked])

    def _influence(self) -> tuple[float, Array]:
        """The metric, and how much each unit moves it, linearised; they sum to zero."""
        s, c = np.asarray(self.sums, dtype=np.float64), np.asarray(self.counts, dtype=np.float64)
        mean = float(s.sum() / c.sum())
        pull = (s - mean * c) / c.sum()
        return (math.exp(mean), math.exp(mean) * pull) if self.scale == "exp" else (mean, pull)


def compared(a: Observations, b: Observations, how: Literal["difference", "ratio"]) -> Estimate | None:
    """A minus B, or A over B, over the units that both have; the spread that they share cancels.

    Means are linearised (delta method) and get a t interval over units; medians are those of the units' own differences
    or ratios, with a sign-test interval; differences of shares of trials get that of Agresti and Min where every
    question is solved or not, else a bootstrap over questions, and hold 0 where `p_value` does not exclude that. Means
    that agree in every unit, no unit being like another, are one and the same: their difference is 0 and nothing else.

    Returns:
        n is the number of common units. None where they have none, differ in kind, or are not finite.
    """
    rows = _common(a, b)
    if not rows or (a.kind, a.scale) != (b.kind, b.scale):
        return None
    a, b = a._on(rows), b._on(rows)
    if not all(map(math.isfinite, [*a.sums, *b.sums])):
        return None
    if a.kind == "median":
        return _median_compared(np.asarray(a.values()), np.asarray(b.values()), a.scale, how)
    if a.trials and b.trials and how == "difference":
        return _trials_compared(a, b)
    if _one_and_the_same(a, b):
        exactly = 0.0 if how == "difference" else 1.0
        return Estimate(exactly, exactly, exactly, len(rows))
    (x, pull_x), (y, pull_y) = a._influence(), b._influence()
    if how == "ratio":
        if x <= 0 or y <= 0:
            return None
        return _log_interval(math.log(x / y), pull_x / x - pull_y / y)
    return _t_interval(x - y, pull_x - pull_y)


def p_value(a: Observations, b: Observations) -> float | None:
    """How likely chance alone makes two means differ so over their common units; None for medians and what has none.

    Shares of trials: random signs (McNemar's exact test where each question is solved or not). Other means: t.
    """
    rows = _common(a, b)
    if not rows or (a.kind, a.scale) != (b.kind, b.scale) or a.kind != "mean":
        return None
    a, b = a._on(rows), b._on(rows)
    if not all(map(math.isfinite, [*a.sums, *b.sums])):
        return None
    if a.trials and b.trials:
        if a.all_or_nothing and b.all_or_nothing:
            return statistics.mcnemar(*_discordant(a, b))
        return statistics.sign_flip(_differences(a, b))
    (x, pull_x), (y, pull_y) = a._influence(), b._influence()
    error = _standard_error(pull_x - pull_y)
    return None if error is None else statistics.t_p_value((x - y) / error, len(rows) - 1)


def visible(a: Observations, b: Observations) -> tuple[float, int]:
    """The smallest difference of two shares that their common questions could have shown, and how many those are."""
    rows = _common(a, b)
    step = 1 / max(1.0, *a.counts, *b.counts)
    return statistics.visible_difference(_differences(a._on(rows), b._on(rows)), step), len(rows)


def _common(a: Observations, b: Observations) -> list[str]:
    theirs = set(b.rows)
    return [row for row in a.rows if row in theirs]


def _one_and_the_same(a: Observations, b: Observations) -> bool:
    """Whether A and B agree in every one of enough units, while no unit is like another: then they do not differ."""
    same = (a.sums, a.counts) == (b.sums, b.counts)
    return same and len(a.rows) >= statistics.FEWEST_FOR_INTERVAL and len(set(a.values())) == len(a.rows)


def _differences(a: Observations, b: Observations) -> list[float]:
    return [x - y for x, y in zip(a.values(), b.values(), strict=True)]


def _discordant(a: Observations, b: Observations) -> tuple[int, int]:
    """How many questions A alone solved, and B alone."""
    pairs = list(zip(a.sums, b.sums, strict=True))
    return sum(x > 0 == y for x, y in pairs), sum(y > 0 == x for x, y in pairs)


def _trials_compared(a: Observations, b: Observations) -> Estimate:
    """The difference with an interval; it holds 0 wherever the test does not exclude that."""
    if a.all_or_nothing and b.all_or_nothing:
        only_a, only_b = _discordant(a, b)
        both = sum(x > 0 < y for x, y in zip(a.sums, b.sums, strict=True))
        found = statistics.paired_share_difference(both, only_a, only_b, len(a.rows) - both - only_a - only_b)
    else:
        (s, c), (t, d) = ((np.asarray(o.sums, float), np.asarray(o.counts, float)) for o in (a, b))
        found = statistics.bootstrap(
            lambda weights: (weights @ s) / (weights @ c) - (weights @ t) / (weights @ d),
            a.rows,
            resamples=COMPARED_RESAMPLES,
        )
    p = p_value(a, b)
    if p is None or p < 1 - statistics.LEVEL or found.low is None or found.high is None:
        return found
    return found._replace(low=min(found.low, 0.0), high=max(found.high, 0.0))


def _median_compared(x: Array, y: Array, scale: str, how: str) -> Estimate | None:
    if how == "difference":
        return statistics.median(list(np.exp(x) - np.exp(y) if scale == "exp" else x - y))
    if scale == "identity":
        if min(x.min(), y.min()) <= 0:
            return None
        x, y = np.log(x), np.log(y)
    return statistics.paired_ratio(list(x - y))


def _t_interval(value: float, pull: Array) -> Estimate:
    N, error = len(pull), _standard_error(pull)
    if error is None:
        return Estimate(value, None, None, N)
    half = statistics.t_quantile(0.5 + statistics.LEVEL / 2, N - 1) * error
    return Estimate(value, value - half, value + half, N)


def _standard_error(pull: Array) -> float | None:
    """Of what units move so; None where they are too few, or all agree."""
    N, spread = len(pull), float(np.square(pull).sum())
    return None if N < statistics.FEWEST_FOR_INTERVAL or spread == 0 else math.sqrt(N / (N - 1) * spread)


def _log_interval(value: float, pull: Array) -> Estimate:
    found = _t_interval(value, pull)
    return found._replace(value=math.exp(value), low=_exp(found.low), high=_exp(found.high))


def _exp(value: Any) -> Any:
    return None if value is None else math.exp(value) if value < 709 else math.inf
