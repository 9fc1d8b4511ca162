"""What the page Tasks shows: questions with their answers, and what decoders reach at equal cost.

Pure functions of cells and samples: no database, no Streamlit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from decodathlon.harness.results import budgets, measured
from decodathlon.harness.results.budgets import Bought
from decodathlon.harness.results.measured import Mark, Number
from decodathlon.harness.results.table import number as written
from decodathlon.leaderboard.findings import listed
from decodathlon.leaderboard.queries import Cell, Column

#: Metrics that only suites of questions have.
OF_TASKS = ("oracle", "answer_tokens", "mc1", "decided")
#: Parts of a sample that are its text; everything else is said of it.
TEXTS = ("response", "responses", "verdict", "verdicts", "log_probs", "labels")
#: Parts that every answer to a question shares, or that are of no use to a reader.
SHARED = ("problem_idx", "ground_truth")
#: The course of a particle method, which is drawn.
PARTICLES = "particles"
#: Parts of a sample that grade it, from 0 to 1, and that of a judge, to 10.
GRADES = ("correct", "score", "acc", "exact_match", "bleu_acc", "grade")
#: The name under which what a budget buys is ranked.
QUALITY = "quality"


def is_task(metrics: Sequence[str]) -> bool:
    """Whether a column with these metrics holds answers to questions."""
    return any(m in OF_TASKS or m.startswith("lm_eval") for m in metrics)


def columns_of_tasks(columns: Mapping[Column, Sequence[str]]) -> list[Column]:
    """The columns that hold answers to questions."""
    return [column for column, metrics in columns.items() if is_task(metrics)]


# --- Questions and answers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One answer, or what was said of one."""

    #: `0` and so on for answers, else what it is: `mc1`, `judge`, `against greedy`.
    name: str
    data: Mapping[str, Any]

    @property
    def grade(self) -> float | None:
        """How good it is, from 0 to 1, where that was said."""
        kind = self.kind
        return None if kind is None else float(self.data[kind]) / (10 if kind == "grade" else 1)

    @property
    def kind(self) -> str | None:
        """How it was graded, if it was."""
        return next((k for k in GRADES if isinstance(self.data.get(k), bool | int | float)), None)

    @property
    def texts(self) -> list[str]:
        """What was said."""
        found: list[str] = []
        for key in ("response", "responses", "verdict", "verdicts"):
            value = self.data.get(key)
            for i, one in enumerate(value if isinstance(value, list) else [value]):
                said = one.get("verdict") or one.get("reason") if isinstance(one, dict) else one
                if said is not None:
                    place = f"(this decoder's answer {'second' if i else 'first'}) " if key == "verdicts" else ""
                    found.append(place + str(said))
        return found

    @property
    def facts(self) -> str:
        """All else that is known of it, in a line."""
        said = []
        for key, value in self.data.items():
            if key in TEXTS or key in SHARED or key == PARTICLES or value in (None, ""):
                continue
            if isinstance(value, Mapping):
                value = ", ".join(f"{k} {_short(v)}" for k, v in value.items())
            said.append(f"{key}: {_short(value)}")
        return " · ".join(said)


def by_question(samples: Mapping[str, Any]) -> dict[str, list[Sample]]:
    """Samples of a cell by the question that they answer; both turns of a talk are one question."""
    found: dict[str, list[Sample]] = {}
    for row, data in samples.items():
        question, _, name = row.rpartition("/")
        question, _, turn = (question or row).partition("#")
        known = data if isinstance(data, dict) else {"value": data}
        found.setdefault(question, []).append(Sample(f"turn {turn}, {name}" if turn else name, known))
    return found


def choices(sample: Sample, texts: Sequence[str] | None) -> list[tuple[str, Any, Any]]:
    """The choices of a question with what they are and their likelihoods, as far as each is known."""
    scores, labels = (list(sample.data.get(key) or []) for key in ("log_probs", "labels"))
    names = list(texts or [])
    return [
        (
            names[i] if i < len(names) else f"choice {i + 1}",
            labels[i] if i < len(labels) else None,
            score if isinstance(score, int | float) else {"-Infinity": -math.inf}.get(str(score)),
        )
        for i, score in enumerate(scores)
    ]


def grade(samples: Sequence[Sample]) -> float | None:
    """The mean grade of the answers to a question; None where nothing was graded.

    Grades of one kind only: a question of TruthfulQA has mc1 and mc2, and what a judge prefers is no grade.
    """
    first = next((s for s in samples if s.kind is not None), None)
    if first is None:
        return None
    alike = [s for s in samples if s.kind == first.kind and (s.name == first.name or first.kind != "score")]
    known = [g for s in alike if (g := s.grade) is not None]
    return sum(known) / len(known)


def kinds(questions: Mapping[str, Sequence[Sample]], *, beside: bool) -> list[str]:
    """The kinds of questions that make sense: what a judge grades from 1 to 10 is neither right nor wrong."""
    graded = {s.kind for samples in questions.values() for s in samples} - {None}
    found = ["all"]
    if graded - {"grade"}:
        found += ["right", "some right", "wrong", "not graded"]
    if any("trouble" in s.data for samples in questions.values() for s in samples):
        found.append("trouble")
    return found + (["better", "worse"] if beside and graded else [])


def chosen(
    questions: Mapping[str, Sequence[Sample]], which: str, other: Mapping[str, Sequence[Sample]] | None
) -> list[str]:
    """Questions of a kind: `all`, `right`, `wrong`, `some right`, `not graded`, `trouble`, `better` or
    `worse` than another's."""
    found = []
    for question, samples in questions.items():
        mine = grade(samples)
        theirs = grade(other[question]) if other and question in other else None
        is_one = {
            "all": True,
            "right": mine == 1,
            "wrong": mine == 0,
            "not graded": mine is None,
            "some right": mine is not None and 0 < mine < 1,
            "trouble": any(s.data.get("trouble") for s in samples),
            "better": mine is not None and theirs is not None and mine > theirs,
            "worse": mine is not None and theirs is not None and mine < theirs,
        }
        if is_one[which]:
            found.append(question)
    return found


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- Equal cost --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Offer:
    """What one decoder reaches within a budget, and its place among the others."""

    cell: Cell
    bought: Bought
    better: str
    mark: Mark | None = None

    @property
    def number(self) -> Number:
        return Number(self.bought.quality.estimate(), "1", self.better, self.bought.quality)

    @property
    def counts(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.cell.doubts and not self.cell.beside and self.cell.measured.status == "ok"

    @property
    def order(self) -> tuple[float, float]:
        """Best first, of equals the cheapest."""
        value = self.number.estimate.value
        return (-value if self.better == "higher" else value, self.bought.cost)


def at_budget(
    cells: Sequence[Cell],
    samples: Mapping[tuple[str, str], Mapping[str, Any]],
    cost: str,
    budget: float,
    choice: str,
) -> list[Offer]:
    """What each decoder reaches where a question may cost so much; ranked by the same rules as every other column.

    Args:
        samples: by `Cell.key`.
        choice: one of `budgets.CHOICES` where answers were graded, else a metric of one answer.
    """
    offers = []
    for cell in cells:
        bought = _bought(cell, samples.get(cell.key, {}), cost, budget, choice)
        if bought is not None:
            own = cell.number(choice)
            offers.append(Offer(cell, bought, own.better if own and choice not in budgets.CHOICES else "higher"))
    sound = [replace(o.cell.measured, metrics={QUALITY: o.number}) for o in offers if o.counts]
    marks = measured.marks(QUALITY, sound)
    return sorted(
        (replace(o, mark=marks.get(o.cell.measured.cell_id) if o.counts else None) for o in offers),
        key=lambda o: o.order,
    )


def remark(offers: Sequence[Offer], cells: Sequence[Cell], cost: str, budget: float) -> str:
    """What a reader of such a table must know: what is equal, what cannot be told, and who is not in it."""
    said = [f"Equal is {cost}: at most {written(budget)} {budgets.COSTS[cost]} per question, on average."]
    if cost == "answer_seconds":
        said.append("Seconds of two cells also hold the noise of the machine.")
    cannot = "" if any(o.mark for o in offers) else measured.cannot_rank([o.number for o in offers if o.counts])
    if cannot:
        said.append(f"{cannot[0].upper()}{cannot[1:]}.")
    present = {o.cell.decoder for o in offers}
    absent = list(dict.fromkeys(c.decoder for c in cells if c.decoder not in present))
    if absent:
        said.append(f"Dearer, or silent about its cost, its likelihoods or some questions: {listed(absent)}.")
    unlike = [o.cell.decoder for o in offers if o.mark == "unlike"]
    if unlike:
        said.append(f"On other questions than the others, so not ranked: {listed(unlike)}.")
    return " ".join(said)


def _bought(cell: Cell, samples: Mapping[str, Any], cost: str, budget: float, choice: str) -> Bought | None:
    if choice in budgets.CHOICES:
        return budgets.within(cell.measured, budgets.graded(samples), cost, budget, choice)
    number, each = cell.number(choice), budgets.price(cell.measured, cost)
    if number is None or number.units is None or each is None or each > budget * (1 + 1e-9):
        return None
    return Bought(1, each, number.units, False)


def curve(
    cells: Sequence[Cell], samples: Mapping[tuple[str, str], Mapping[str, Any]], cost: str, choice: str
) -> list[dict[str, Any]]:
    """Rows of a chart: the quality of each decoder with one answer, with two, and so on."""
    rows = []
    for cell in cells:
        each = budgets.price(cell.measured, cost)
        questions = budgets.graded(samples.get(cell.key, {})) if choice in budgets.CHOICES else {}
        for k in range(1, max(1, budgets.answers_of(questions)) + 1):
            bought = each and _bought(cell, samples.get(cell.key, {}), cost, k * each, choice)
            if bought:
                value, low, high, _ = bought.quality.estimate()
                rows.append(
                    {
                        "decoder": cell.decoder, "family": cell.family, "answers": k, "cost": bought.cost,
                        "value": value, "low": low, "high": high, "pale": bool(cell.doubts),
                    }
                )  # fmt: skip
    return rows


def dearest(
    cells: Sequence[Cell], samples: Mapping[tuple[str, str], Mapping[str, Any]], cost: str, choice: str
) -> list[float]:
    """Budgets worth a look in one unit of cost."""
    prices = [p for c in cells if (p := budgets.price(c.measured, cost)) is not None]
    graded = choice in budgets.CHOICES
    most = [budgets.answers_of(budgets.graded(samples.get(c.key, {}))) for c in cells] if graded else [1]
    return budgets.budgets(prices, max(most, default=1) or 1)
