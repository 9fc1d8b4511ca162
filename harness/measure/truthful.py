"""TruthfulQA through lm-eval: its tasks as they are shipped, the decoder behind them, ties and zeros told apart.

lm-eval takes the first of several equally likely choices, and in this set the first one is right. A law that cuts all
choices would score 100 %; and mc2, whose choices are mostly right ones, rewards even a guess more than a small model's
knowledge. So mc1 and mc2 are worked out here from lm-eval's own likelihoods, over the questions of which the law says
anything; where it always does, and without ties, they are lm-eval's.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import LM
from rouge_score import scoring

from decodathlon.harness.measure import asking, lm_eval_tasks
from decodathlon.harness.measure.lm_eval_model import DecoderLM
from decodathlon.harness.measure.observations import Observations
from decodathlon.harness.measure.statistics import Estimate

if TYPE_CHECKING:
    from decodathlon.harness.suite import Cell

#: What lm-eval ships, by the name that it gets here.
MC1, MC2, GENERATION = "decodathlon_mc1", "decodathlon_mc2", "decodathlon_generation"
FILES = {MC1: "truthfulqa_mc1.yaml", MC2: "truthfulqa_mc2.yaml", GENERATION: "truthfulqa_gen.yaml"}
#: Questions of which true and empty answers prove the scoring.
PROVED = 8
LABELS = {MC1: "mc1_targets", MC2: "mc2_targets"}


class Told(LM):  # type: ignore[misc]
    """A model that was told the answers and says the true ones, or else the false ones and nothing at all."""

    def __init__(self, *, truth: bool) -> None:
        super().__init__()
        self.truth = truth

    def loglikelihood(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        right = [r.doc[LABELS[r.task_name]]["labels"][r.idx] == 1 for r in requests]
        return [(0.0 if r is self.truth else -1000.0, False) for r in right]

    def loglikelihood_rolling(self, requests: list[Any], **kwargs: Any) -> list[float]:
        raise NotImplementedError("no task of TruthfulQA asks for it")

    def generate_until(self, requests: list[Any], **kwargs: Any) -> list[str]:
        return [r.doc["correct_answers"][0] if self.truth else "" for r in requests]


def choices(cell: Cell) -> None:
    """Report mc1 and mc2 of the cell's questions."""
    with _tasks(cell, names := (MC1, MC2)) as folder:
        for truth in (True, False):
            told = lm_eval_tasks.run(Told(truth=truth), names, folder=folder, limit=PROVED)
            _prove(cell, [score for name, result in told.items() for score in _scores(result, name)], truth)
        found = lm_eval_tasks.run(DecoderLM(cell), names, folder=folder)
    for name, metric in ((MC1, "mc1"), (MC2, "mc2")):
        rows = [s["doc"]["id"] for s in found[name].samples]
        scores = dict(zip(rows, _scores(found[name], name), strict=True))
        decided = {row: score for row, score in scores.items() if score is not None}
        if name == MC1:
            cell.report("decided", Observations.questions(rows, [float(row in decided) for row in rows]))
        if decided:
            cell.report(metric, Observations.questions(list(decided), list(decided.values())))
        else:
            cell.note(f"the law gives no choice of any question any probability: there is no {metric}")
        for sample, score in zip(found[name].samples, scores.values(), strict=True):
            cell.sample(
                f"{sample['doc']['id']}/{metric}",
                score=score,
                log_probs=_likelihoods(sample),
                labels=sample["doc"][LABELS[name]]["labels"],
            )
            choices = sample["doc"][LABELS[name]]["choices"]
            cell.lines.keep(f"{sample['doc']['id']}/{metric}", prompt=sample["doc"]["question"], choices=choices)


def generation(cell: Cell) -> None:
    """Report how near free answers are to true and to false references."""
    with _tasks(cell, names := (GENERATION,)) as folder, _rouge_once():
        for truth in (True, False):
            # BLEU of a short answer is not 100 even where it is equal, so ROUGE proves the scoring
            told = lm_eval_tasks.run(Told(truth=truth), names, folder=folder, limit=PROVED)[GENERATION]
            _prove(cell, [float(s["rouge1_acc"]) for s in told.samples], truth)
        asked = DecoderLM(cell, cell.sizes["tokens"])
        found = lm_eval_tasks.run(asked, names, folder=folder)[GENERATION]
    rows, ones = [s["doc"]["id"] for s in found.samples], [1.0] * len(found.samples)
    for metric, its in (("bleu_acc",) * 2, ("rouge1_acc",) * 2, ("rouge_l_acc", "rougeL_acc"), ("bleu_diff",) * 2):
        values = [float(s[its]) for s in found.samples]
        is_share = metric.endswith("acc")
        cell.report(metric, Observations.questions(rows, values) if is_share else Observations(rows, values, ones))
    answers = [replace(asked.answer_to(*s["arguments"][0]), question=s["doc"]["id"]) for s in found.samples]
    for sample, answer in zip(found.samples, answers, strict=True):
        row = answer.row
        cell.sample(
            row,
            response=sample["filtered_resps"][0],
            bleu_acc=float(sample["bleu_acc"]),
            rouge1_acc=float(sample["rouge1_acc"]),
            seconds=answer.seconds,
            **answer.facts(),
        )
        cell.lines.keep(row, prompt=sample["doc"]["question"])
    for metric, cost in asking.costs(answers, cell.target).items():
        cell.report(metric, cost)


@contextmanager
def _rouge_once() -> Iterator[None]:
    """lm-eval draws a thousand bootstrap samples of the one value that each ROUGE is; one gives the same value.

    It takes a quarter of a second per answer off, which is more than a GPU needs to write it.
    """
    whole = scoring.BootstrapAggregator
    scoring.BootstrapAggregator = partial(whole, n_samples=1)
    try:
        yield
    finally:
        scoring.BootstrapAggregator = whole


def _likelihoods(sample: Mapping[str, Any]) -> list[float]:
    return [float(reply[0]) for reply in sample["filtered_resps"]]


def _scores(result: lm_eval_tasks.Result, name: str) -> list[float | None]:
    """The score of each question; None where the law gives no choice any probability, and so says nothing."""
    score = mc1 if name == MC1 else mc2
    found = []
    for sample in result.samples:
        said = _likelihoods(sample)
        labels = sample["doc"][LABELS[name]]["labels"]
        found.append(score(said, labels) if max(said) > -math.inf else None)
    return found


def mc1(log_probs: Sequence[float], labels: Sequence[int]) -> float:
    """1 if the likeliest choice is right; of equally likely ones the share that is."""
    best = max(log_probs)
    tied = [label for x, label in zip(log_probs, labels, strict=True) if x == best]
    return sum(tied) / len(tied)


def mc2(log_probs: Sequence[float], labels: Sequence[int]) -> float:
    """What the right choices have of the probability of all."""
    best = max(log_probs)
    masses = [math.exp(x - best) for x in log_probs]
    return sum(m for m, label in zip(masses, labels, strict=True) if label) / sum(masses)


def _prove(cell: Cell, scores: Sequence[float | None], truth: bool) -> None:
    """
    Raises:
        RuntimeError: the true answers do not score 1, or the false ones do not score 0.
    """
    mean = sum(score or 0.0 for score in scores) / len(scores)
    if truth:
        cell.report("oracle", Estimate(mean, n=len(scores)))
    if mean != float(truth):
        raise RuntimeError(f"{'true' if truth else 'false or empty'} answers score {mean:.3f}, not {float(truth):.0f}")


@contextmanager
def _tasks(cell: Cell, names: Sequence[str]) -> Iterator[Path]:
    """A folder with lm-eval's tasks over the cell's questions, which go through a file."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        data = folder / "questions.jsonl"
        rows = cell.text().rows[: cell.sizes["questions"]]
        data.write_text("\n".join(rows) + "\n", encoding="utf-8")
        for name in names:
            lm_eval_tasks.redirect(folder, name, f"truthfulqa/{FILES[name]}", data)
        yield folder
