"""How often answers are right, where every question got several: means, pass@k, majority and best of k, by question.

Chen et al. 2021 for the unbiased pass@k; Wang et al. 2022 for the majority (self-consistency).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from decodathlon.harness.measure.observations import Observations
from decodathlon.harness.measure.statistics import Estimate


@dataclass(frozen=True)
class Graded:
    """An answer and what a grader made of it."""

    question: str
    correct: bool
    #: Which of the answers to its question says the same first, by number; None where nothing could be read.
    says: int | None
    #: Natural-log probability per token under the model, where it is known.
    confidence: float | None = None


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that k of n answers, drawn without replacement, hold a right one, if `correct` of the n are right."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority(answers: Sequence[Graded]) -> float:
    """1 if the answer that most gave is right; where several are equally frequent, the share of them that are."""
    right: dict[int, bool] = {}
    votes: dict[int, int] = {}
    for one in answers:
        if one.says is not None:
            right.setdefault(one.says, one.correct)
            votes[one.says] = votes.get(one.says, 0) + 1
    if not votes:
        return 0.0
    leading = [right[answer] for answer, count in votes.items() if count == max(votes.values())]
    return sum(leading) / len(leading)


def best(answers: Sequence[Graded]) -> float | None:
    """1 if the answer that the model itself finds likeliest per token is right; None where it cannot be asked.

    Of equally likely ones the share that is.
    """
    known = [(a.confidence, a.correct) for a in answers if a.confidence is not None and not math.isnan(a.confidence)]
    if len(known) < len(answers):
        return None
    most = max(confidence for confidence, _ in known)
    leading = [correct for confidence, correct in known if confidence == most]
    return sum(leading) / len(leading)


def metrics(graded: Sequence[Graded]) -> dict[str, Estimate | Observations]:
    """Every metric of a set of questions, with intervals over questions: several answers to one are no new evidence."""
    answers: dict[str, list[Graded]] = {}
    for one in graded:
        answers.setdefault(one.question, []).append(one)
    names = list(answers)
    right = [float(sum(a.correct for a in answers[n])) for n in names]
    counts = [len(answers[n]) for n in names]
    readable = [float(sum(a.says is not None for a in answers[n])) for n in names]
    found: dict[str, Estimate | Observations] = {
        "pass_at_1": Observations.questions(names, right, counts),
        "answered": Observations.questions(names, readable, counts),
        "samples": Estimate(min(counts), n=len(names)),
    }
    k = min(counts)
    if k > 1:
        some = [pass_at_k(len(answers[n]), int(r), k) for n, r in zip(names, right, strict=True)]
        found["pass_at_k"] = Observations.questions(names, some)
        agreed = [majority(answers[n]) for n in names]
        found["maj_at_k"] = Observations.questions(names, agreed)
        chosen = [best(answers[n]) for n in names]
        if all(c is not None for c in chosen):
            found["best_of_k"] = Observations.questions(names, [c or 0.0 for c in chosen])
    return found
