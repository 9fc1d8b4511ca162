"""Quality at equal cost: what a decoder reaches when each question may cost so many tokens, calls, operations, seconds.

A decoder that is cheap may answer a question more often and choose among its answers; one that is dear may not. From
the answers that a cell keeps this says what each reaches with as many as a budget buys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from decodathlon.harness.measure import accuracy
from decodathlon.harness.measure.accuracy import Graded
from decodathlon.harness.measure.observations import Observations
from decodathlon.harness.results.measured import Measured

#: What an answer may cost, by the metric that says how much on average.
COSTS = {
    # first what counts everything that a method reads: particles that were not given cost, too
    "answer_positions": "token positions read",
    "answer_calls": "forward passes",
    "answer_tokens": "new tokens of the answers given",
    "answer_flops": "floating-point operations",
    "answer_seconds": "seconds",
}
#: How one of several answers is chosen, by the metric of which it is the special case at all answers.
CHOICES = {
    "maj_at_k": "the most frequent answer (needs no one who knows better)",
    "best_of_k": "the answer that the model finds likeliest per token",
    "pass_at_k": "any right answer (needs somebody who knows it)",
}


@dataclass(frozen=True)
class Bought:
    """What one decoder reaches within a budget."""

    #: Answers per question.
    answers: int
    #: What they cost per question, on average.
    cost: float
    quality: Observations
    #: Whether the budget would buy more answers than were drawn.
    more: bool


def graded(samples: Mapping[str, Any]) -> dict[str, list[Graded]]:
    """By question the graded answers among the samples of a cell; nothing where answers are not right or wrong."""
    found: dict[str, list[Graded]] = {}
    for row, data in samples.items():
        question, _, number = row.rpartition("/")
        if not question or not number.isdigit() or not isinstance(data, dict) or "correct" not in data:
            continue
        log_prob, tokens = data.get("log_prob"), data.get("tokens")
        confidence = None
        if isinstance(log_prob, int | float) and isinstance(tokens, int) and math.isfinite(log_prob):
            confidence = log_prob / max(1, tokens)
        found.setdefault(question, []).append(Graded(question, bool(data["correct"]), data.get("says"), confidence))
    return found


def answers_of(questions: Mapping[str, Sequence[Graded]]) -> int:
    """How many answers every question has."""
    return min(map(len, questions.values()), default=0)


def quality(questions: Mapping[str, Sequence[Graded]], k: int, choice: str) -> Observations | None:
    """How many questions are solved by k answers each; None where the choice cannot be made.

    Any right answer: the unbiased estimate from all answers (Chen et al. 2021). Else the mean over as many disjoint
    groups of k as there are.
    """
    values = []
    for answers in questions.values():
        if choice == "pass_at_k":
            values.append(accuracy.pass_at_k(len(answers), sum(a.correct for a in answers), k))
            continue
        groups = [answers[i : i + k] for i in range(0, len(answers) - k + 1, k)]
        chosen = [accuracy.majority(g) if choice == "maj_at_k" else accuracy.best(g) for g in groups]
        known = [c for c in chosen if c is not None]
        if len(known) < len(chosen):
            return None
        values.append(sum(known) / len(known))
    return Observations.questions(list(questions), values) if values else None


def price(cell: Measured, cost: str) -> float | None:
    """What one answer costs on average; None where the decoder does not tell."""
    number = cell.metrics.get(cost)
    return number.estimate.value if number is not None and number.estimate.value > 0 else None


def within(
    cell: Measured, questions: Mapping[str, Sequence[Graded]], cost: str, budget: float, choice: str
) -> Bought | None:
    """What a decoder reaches where each question may cost `budget`; None where that does not buy one answer, or where
    its samples are not those of all the questions that its cell reports."""
    each, drawn, reported = price(cell, cost), answers_of(questions), cell.metrics.get("pass_at_1")
    if each is None or not drawn:
        return None
    if reported is None or reported.units is None or set(reported.units.rows) != set(questions):
        return None
    affordable = math.floor(budget / each * (1 + 1e-9))
    k = min(affordable, drawn)
    found = quality(questions, k, choice) if k else None
    # Greedy search gives the same answer again: more money buys nothing.
    return None if found is None else Bought(k, k * each, found, affordable > drawn > 1)


def budgets(prices: Sequence[float], most: int) -> list[float]:
    """Budgets per question that are worth a look: what one answer of the dearest costs, then twice that, four times.

    Args:
        prices: of one answer, by decoder.
        most: the most answers that any decoder has.
    """
    dearest, cheapest = max(prices, default=0.0), min(prices, default=0.0)
    found: list[float] = []
    budget = dearest
    while dearest and (not found or budget <= most * cheapest * (1 + 1e-9)) and len(found) < 12:
        found.append(budget)
        budget *= 2
    if found and found[-1] < most * dearest:
        found.append(most * dearest)
    return found
