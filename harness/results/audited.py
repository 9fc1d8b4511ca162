"""The verdict of an audit: who was shown not to draw from the law that he claims, all decoders of a run taken together.

The view `audited` of a results file says the same in SQL.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from decodathlon.harness.cells import Outcome
from decodathlon.harness.measure import exactness

#: The suite whose cells decide.
SUITE = "audit"
#: weak: nothing was found, but with so few draws only a larger deviation than this would have been.
SEEN = 0.05
Verdict = Literal["pass", "fail", "weak"]


def verdicts(outcomes: Sequence[Outcome]) -> dict[str, Verdict]:
    """By decoder, the verdict of the audits among the outcomes of one run; Holm's correction over all of them."""
    numbers: dict[str, dict[str, float]] = {}
    for outcome in outcomes:
        if outcome.spec.suite == SUITE and outcome.status == "ok":
            found = {m["metric"]: m["value"] for m in outcome.metrics}
            if "goodness_p" in found:
                numbers[f"{outcome.decoder['spec']}\n{outcome.spec.cell_id}"] = found
    rejected = exactness.holm({key: found["goodness_p"] for key, found in numbers.items()})
    verdicts: dict[str, Verdict] = {}
    for key, found in numbers.items():
        decoder = key.partition("\n")[0]
        here: Verdict = "fail" if key in rejected else "pass" if found["visible_tvd"] <= SEEN else "weak"
        worse = sorted([here, verdicts.get(decoder, here)], key=("fail", "weak", "pass").index)
        verdicts[decoder] = worse[0]
    return verdicts
