"""Mathematical problems: asked, answered, graded, and the grading itself proved in every cell."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from decodathlon.harness.measure import accuracy, asking
from decodathlon.harness.measure.accuracy import Graded
from decodathlon.harness.measure.asking import Answer
from decodathlon.harness.measure.grading import TIMEOUT, Grader, Verdict
from decodathlon.harness.measure.statistics import Estimate

if TYPE_CHECKING:
    from decodathlon.harness.suite import Cell

#: What every problem is followed by.
INSTRUCTION = "\n\nReason step by step, and put your final answer within \\boxed{}."


def measure(cell: Cell, problems: Sequence[Mapping[str, Any]]) -> None:
    """Report how many of the problems (id, problem, answer) the cell's decoder solves."""
    with Grader() as grader:
        prove(cell, problems, grader)
        prompts = {p["id"]: asking.prompt(cell.target, [("user", p["problem"] + INSTRUCTION)]) for p in problems}
        by_id = {p["id"]: p for p in problems}
        numbers = {p["id"]: i for i, p in enumerate(problems)}
        graded: list[Graded] = []
        answers: list[Answer] = []
        hung = 0
        sizes = cell.sizes
        for batch in asking.ask(cell, prompts, tokens=sizes["tokens"], samples=sizes["samples"]):
            different: dict[int, tuple[bool, str]] = {}
            for answer in batch:
                problem = by_id[answer.question]
                began = time.perf_counter()
                verdict = grader.grade(problem["answer"], answer.text)
                scoring = time.perf_counter() - began
                hung += verdict.trouble == TIMEOUT
                confidence = None if answer.log_prob is None else answer.log_prob / max(1, answer.tokens)
                says = None if verdict.trouble else _first_like(grader, different, answer.sample, verdict)
                graded.append(Graded(answer.question, verdict.correct, says, confidence))
                answers.append(answer)
                cell.sample(
                    answer.row,
                    problem_idx=numbers[answer.question],
                    ground_truth=problem["answer"],
                    response=answer.text,
                    extracted_answer=verdict.extracted,
                    correct=verdict.correct,
                    trouble=verdict.trouble,
                    says=says,
                    **answer.facts(),
                    timing={"total": answer.seconds + scoring, "generation": answer.seconds, "scoring": scoring},
                )
        for metric, found in accuracy.metrics(graded).items():
            cell.report(metric, found)
    cell.report("grader_timeouts", Estimate(hung, n=len(graded)))
    for metric, found in asking.costs(answers, cell.target).items():
        cell.report(metric, found)


def _first_like(grader: Grader, different: dict[int, tuple[bool, str]], number: int, verdict: Verdict) -> int | None:
    """The number of the first answer to a problem that says the same; `different` holds those that came before.

    math-verify's sameness does not carry over (a list may be a set, which may be a pair), but a right answer and a
    wrong one never say the same.
    """
    if verdict.extracted is None:
        return None
    for first, (correct, text) in different.items():
        alike = text == verdict.extracted or grader.same(text, verdict.extracted).correct
        if correct == verdict.correct and alike:
            return first
    different[number] = (verdict.correct, verdict.extracted)
    return number


def prove(cell: Cell, problems: Sequence[Mapping[str, Any]], grader: Grader) -> None:
    """The right answers, written by the model's tokenizer, must all be right, and empty ones wrong.

    Raises:
        RuntimeError: they are not: then no number of this cell would mean anything.
    """
    target, wrong = cell.target, []
    for problem in problems:
        box = f"\\boxed{{{problem['answer']}}}"
        if not grader.grade(problem["answer"], target.decode(target.encode(box, special=False))).correct:
            wrong.append(problem["id"])
        if grader.grade(problem["answer"], "").correct:
            raise RuntimeError(f"an empty answer to {problem['id']} was graded as right")
    cell.report("oracle", Estimate(1 - len(wrong) / len(problems), n=len(problems)))
    if wrong:
        raise RuntimeError(f"the right answer to {wrong[0]} ({len(wrong)} of {len(problems)}) was graded as wrong")
