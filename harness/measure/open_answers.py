"""Open questions: answers in one turn or two, what the law says of right ones, how they repeat, what a judge says."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from decodathlon.harness import judges
from decodathlon.harness.errors import UnsupportedError
from decodathlon.harness.measure import asking, diversity, perplexity
from decodathlon.harness.measure.asking import Answer, Turn
from decodathlon.harness.measure.observations import Observations
from decodathlon.harness.measure.statistics import Estimate

if TYPE_CHECKING:
    from decodathlon.harness.suite import Cell

Question = Mapping[str, Any]
#: Right and empty answers that a judge grades, so that its grades mean something.
PROVED = 4
#: By how much a judge's grades of right answers must lie above those of empty ones to mean something.
WORTH = 2.0


def measure(cell: Cell, questions: Sequence[Question]) -> None:
    """Report on the decoder's answers to questions (id, turns, category, reference)."""
    references(cell, questions)
    talks, answers = talk(cell, questions)
    for answer in answers:
        cell.sample(answer.row, response=answer.text, seconds=answer.seconds, **answer.facts())
    answers = [replace(a, question=_talk_of(a.question)) for a in answers]  # both turns of a talk are one unit
    for metric, found in {**texts(answers), **asking.costs(answers, cell.target)}.items():
        cell.report(metric, found)
    if cell.judge is not None:
        judge = remembering(cell, cell.judge)
        judged(cell, judge, questions, talks)
        if cell.versus is not None:
            rival = cell.of(cell.versus)
            theirs, _ = talk(rival, questions)
            cell.late = cell.late or rival.late
            preferred(cell, judge, cell.versus.spec, questions, talks, theirs)


def remembering(cell: Cell, judge: judges.Judge) -> judges.Judge:
    """A judge whose verdicts are kept as they come, and not paid for again by a resumed run; abstentions are."""

    def ask(prompt: str) -> judges.Reply:
        row = f"judge {judge.name}: {hashlib.sha256(prompt.encode('utf-8', 'replace')).hexdigest()[:16]}"
        if row in cell.lines.earlier:
            return judges.Reply(str(cell.lines.earlier[row]["text"]))
        reply = judge.ask(prompt)
        if reply.text:
            cell.lines.keep(row, text=reply.text)
        return reply

    return judges.Judge(judge.name, ask)


def talk(cell: Cell, questions: Sequence[Question]) -> tuple[dict[str, list[Turn]], list[Answer]]:
    """The cell's decoder answers all questions, turn by turn; the talks by question, and the answers."""
    talks: dict[str, list[Turn]] = {q["id"]: [] for q in questions}
    answers: list[Answer] = []
    for turn in range(cell.sizes["turns"]):
        for q in questions:
            talks[q["id"]].append(("user", q["turns"][turn]))
        prompts = {f"{q['id']}#{turn + 1}": asking.prompt(cell.target, talks[q["id"]]) for q in questions}
        for (answer,) in asking.ask(cell, prompts, tokens=cell.sizes["tokens"]):
            answers.append(answer)
            talks[_talk_of(answer.question)].append(("assistant", answer.text))
        if cell.late:
            break
    return talks, answers


def _talk_of(row: str) -> str:
    """The question that a turn belongs to."""
    return row.partition("#")[0]


def texts(answers: Sequence[Answer]) -> dict[str, Estimate | Observations]:
    """How the answers repeat, and how many were cut."""
    rows = [a.question for a in answers]
    found: dict[str, Estimate | Observations] = {
        "repetition": Observations.grouped(rows, [diversity.repetition(a.text) for a in answers], share=True),
        "cut_answers": Observations.grouped(rows, [float(a.stop_reason == "length") for a in answers], share=True),
    }
    if len(answers) > 1:
        found["self_bleu"] = Observations.grouped(rows, diversity.self_bleu([a.text for a in answers]), share=True)
    different = diversity.distinct([a.text for a in answers])
    if different is not None:
        found["distinct_2"] = Estimate(different, n=len(answers))
    return found


@torch.no_grad()
def references(cell: Cell, questions: Sequence[Question]) -> None:
    """Report how likely right answers are under the decoder's own law, where it has one and there are some."""
    known = [q for q in questions if q["reference"]]
    if len(known) < 2:
        cell.note(f"{len(known)} of the questions have a reference answer: nothing is said of their likelihood")
        return
    try:
        perplexity.judge_of(cell.decoder)
    except UnsupportedError as error:
        cell.note(f"no likelihood of reference answers: {error}")
        return
    parts = []
    for number, q in enumerate(known):
        head = asking.prompt(cell.target, [("user", q["turns"][0])])
        tokens = [*head, *cell.target.encode(" " + q["reference"][0].strip(), special=False)]
        tokens = tokens[: cell.target.context_length]
        if len(tokens) == len(head):
            continue
        at = torch.arange(len(head) - 1, len(tokens) - 1)
        logits = cell.target.logits(torch.tensor([tokens[:-1]]), at)[0]
        real = torch.tensor(tokens[len(head) :], device=logits.device)
        parts.append((*perplexity.judge_of(cell.decoder)(logits, real), np.full(len(real), number)))
    own, model, concentration, cluster = (np.concatenate(part) for part in zip(*parts, strict=True))
    scores = perplexity.Scores(own, model, concentration, cluster, cell.target.vocab_size)
    names = [q["id"] for q in known]
    for metric, found in perplexity.cross_fitted(scores, names).items():
        cell.report(metric, found)


def judged(cell: Cell, judge: judges.Judge, questions: Sequence[Question], talks: Mapping[str, Sequence[Turn]]) -> None:
    """Report the grades of a judge, how often it abstained, and what it makes of right and of empty answers."""
    grades: dict[str, float] = {}
    abstained, asked = 0, 0
    for q in cell.until_late(questions):
        for turn in range(len(talks[q["id"]]) // 2):
            row = f"{q['id']}#{turn + 1}"
            guide = q["reference"][: turn + 1] if q["category"] in judges.GUIDED else []
            reply = judge.ask(judges.single(talks[q["id"]][: 2 * turn + 2], guide))
            grade, asked = judges.grade(reply.text), asked + 1
            abstained += grade is None
            if grade is not None:
                grades[row] = grade
            cell.sample(f"{row}/judge", judge=judge.name, grade=grade, verdict=reply.text, reason=reply.reason)
    cell.report("judge_abstentions", Estimate(abstained / max(1, asked), n=asked))
    if grades:
        cell.report("judge_score", Observations.grouped([_talk_of(row) for row in grades], list(grades.values())))
    known = [q for q in questions if q["reference"]][:PROVED]
    worth: dict[str, float] = {}
    for metric, text in (("judge_of_right", None), ("judge_of_empty", "")):
        said = [
            judges.grade(
                judge.ask(
                    judges.single(
                        [("user", q["turns"][0]), ("assistant", q["reference"][0] if text is None else text)],
                        q["reference"][:1],
                    )
                ).text
            )
            for q in known
        ]
        stated = [s for s in said if s is not None]
        if stated:
            worth[metric] = sum(stated) / len(stated)
            cell.report(metric, Estimate(worth[metric], n=len(stated)))
    if len(worth) == 2 and worth["judge_of_right"] - worth["judge_of_empty"] < WORTH:
        right, empty = worth["judge_of_right"], worth["judge_of_empty"]
        cell.note(f"the judge gives right answers {right:.3g} and empty ones {empty:.3g}: its grades say nothing")


def preferred(
    cell: Cell,
    judge: judges.Judge,
    rival: str,
    questions: Sequence[Question],
    mine: Mapping[str, Sequence[Turn]],
    theirs: Mapping[str, Sequence[Turn]],
) -> None:
    """Report how often a judge prefers the decoder's talks to a rival's, asked in both orders."""
    points: dict[str, float] = {}
    by_place, asked = 0, 0
    for q in cell.until_late(questions):
        turns = len(q["turns"][: len(mine[q["id"]]) // 2])
        if not turns or len(theirs[q["id"]]) < 2 * turns:
            continue
        guide = q["reference"][:turns] if q["category"] in judges.GUIDED else []
        own, other = (_answers(talks[q["id"]][: 2 * turns]) for talks in (mine, theirs))
        found = judges.compared(judge, q["turns"][:turns], own, other, guide)
        asked, by_place = asked + 1, by_place + found.by_place
        if found.points is not None:
            points[q["id"]] = found.points
        verdicts = [{"verdict": reply.text, "reason": reply.reason} for reply in found.replies]
        cell.sample(f"{q['id']}/against {rival}", judge=judge.name, points=found.points, verdicts=verdicts)
    if asked:
        cell.report("judge_pair_abstentions", Estimate(1 - len(points) / asked, n=asked))
        cell.report("judge_by_place", Estimate(by_place / asked, n=asked))
        if by_place > asked / 2:
            cell.note(f"the judge preferred a place and no answer in {by_place} of {asked} pairs: it does not read")
    if points:
        cell.report(f"judge_win_rate({rival})", Observations.questions(list(points), list(points.values())))


def _answers(talk: Sequence[Turn]) -> str:
    """The answers of a talk; of several each under its number."""
    said = [text for who, text in talk if who == "assistant"]
    if len(said) == 1:
        return said[0]
    return "\n\n".join(f"(to question {i + 1}) {text}" for i, text in enumerate(said))
