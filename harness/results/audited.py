"""The verdict of an audit: who was shown not to draw from the law that he claims, all decoders of a run taken together.

The view `audited` of a results file says the same in SQL.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from decodathlon.harness.cells import Outcome
from decodathlon.harness.measure import exactness, statistics

#: The suite whose cells decide.
SUITE = "audit"
#: weak: nothing was found, but with so few draws only a larger deviation than this would have been.
SEEN = 0.05
#: How far a shaped law may lie from its definition: rounding.
GAP = 1e-6
#: self: nothing was found, but it was held against the law that it computes itself.
Verdict = Literal["pass", "fail", "weak", "self"]
ORDER: tuple[Verdict, ...] = ("fail", "weak", "self", "pass")


def verdicts(outcomes: Sequence[Outcome]) -> dict[str, Verdict]:
    """By decoder, the verdict of the audits among the outcomes of one run; Holm's correction over all of them."""
    numbers: dict[str, dict[str, float]] = {}
    for outcome in outcomes:
        if outcome.spec.suite == SUITE and outcome.status == "ok":
            found = {m["metric"]: m["value"] for m in outcome.metrics}
            if "goodness_p" in found:
                numbers[f"{outcome.decoder['spec']}\n{outcome.spec.cell_id}"] = found
    adjusted = statistics.holm([found["goodness_p"] for found in numbers.values()])
    rejected = {key for key, p in zip(numbers, adjusted, strict=True) if p <= exactness.ALPHA}
    verdicts: dict[str, Verdict] = {}
    for key, found in numbers.items():
        decoder = key.partition("\n")[0]
        here = _verdict(key in rejected or found.get("definition_gap", 0.0) > GAP, found)
        verdicts[decoder] = min(here, verdicts.get(decoder, here), key=ORDER.index)
    return verdicts


def _verdict(rejected: bool, found: dict[str, float]) -> Verdict:
    if rejected:
        return "fail"
    if found["visible_tvd"] > SEEN:
        return "weak"
    return "self" if found.get("own_law") else "pass"
