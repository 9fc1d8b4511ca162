"""What changed between two measurements of the same thing: unit by unit where their units are the same."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from decodathlon.harness.measure.observations import Observations, compared, p_value, visible
from decodathlon.harness.measure.statistics import LEVEL, Estimate
from decodathlon.harness.results.measured import Measured, noise_floor, undecided
from decodathlon.harness.results.table import DASH, number


class Change(NamedTuple):
    #: B over A, or B minus A.
    estimate: Estimate
    how: Literal["ratio", "difference"]
    verdict: str
    #: How likely chance alone does so much, of shares of solved questions.
    p: float | None = None

    @property
    def text(self) -> str:
        """The change as a person writes it."""
        value = self.estimate.value
        if math.isnan(value):
            return DASH
        return ("x " if self.how == "ratio" else "+" if value > 0 else "") + number(value)

    @property
    def interval(self) -> str:
        """Its interval; a dash where there is none."""
        low, high = self.estimate.low, self.estimate.high
        return DASH if low is None else f"[{number(low, 3)}, {number(high, 3)}]"


def change_of(name: str, a: Measured, b: Measured) -> Change:
    """B against A in one metric: a ratio for what is positive and multiplies, else a difference."""
    x, y = a.metrics[name], b.metrics[name]
    timed = x.unit in ("s", "1/s", "B")
    how: Literal["ratio", "difference"] = "ratio" if timed or name.startswith("ratio_to_") else "difference"
    paired = compared(y.units, x.units, how) if x.units and y.units else None
    if paired is None:
        value = _plain(x.estimate.value, y.estimate.value, how)
        return Change(Estimate(value), how, "not paired")
    if timed:
        return Change(paired._replace(low=None, high=None), how, "two visits of the machine: not ranked")
    if x.units and y.units and x.units.trials and y.units.trials and how == "difference":
        return _of_questions(paired, x.units, y.units, x.better)
    return Change(paired, how, _verdict(paired, how, x.better, max(noise_floor(name, a), noise_floor(name, b))))


def _of_questions(found: Estimate, a: Observations, b: Observations, better: str) -> Change:
    """Shares of solved questions: by the test of random signs."""
    p = p_value(b, a)
    if p is None or p >= 1 - LEVEL:
        same = list(a.sums) == list(b.sums) and list(a.counts) == list(b.counts)
        return Change(found, "difference", ("the same here; " if same else "") + undecided(*visible(b, a)), p)
    word = (
        "changed" if better == "none" else "B is better" if (found.value > 0) == (better == "higher") else "B is worse"
    )
    return Change(found, "difference", f"{word} (p = {number(p, 2)})", p)


def _verdict(found: Estimate, how: str, better: str, floor: float) -> str:
    if found.low is None or found.high is None:
        same = found.value == (1.0 if how == "ratio" else 0.0)
        return "the same" if same else "too few units"
    low, high, nothing = found.low, found.high, 1.0 if how == "ratio" else 0.0
    if how == "ratio":
        low, high = min(low, found.value * math.exp(-floor)), max(high, found.value * math.exp(floor))
    if low <= nothing <= high:
        return "no change seen"
    if better == "none":
        return "changed"
    return "B is better" if (found.value > nothing) == (better == "higher") else "B is worse"


def _plain(x: float, y: float, how: str) -> float:
    if how == "difference":
        return y - x if math.isfinite(x) and math.isfinite(y) else math.nan
    return y / x if x else math.nan
