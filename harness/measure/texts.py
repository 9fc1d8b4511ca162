"""From the rows of a data set to tokens, with the row ids that a result must state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from decodathlon.harness.errors import MissingError

if TYPE_CHECKING:
    from decodathlon.harness.datasets import Text
    from decodathlon.harness.targets.base import Target

#: Tokens read beyond those wanted, so that the cut does not change how the last of them was split.
MARGIN = 64
#: What the authors of DFlash put behind a problem.
BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."


class Head(NamedTuple):
    tokens: list[int]
    #: The rows that were read are 0 to rows - 1.
    rows: int


class Prompts(NamedTuple):
    #: One batch of token lists per pair.
    batches: list[list[list[int]]]
    #: Per batch, the row that each prompt begins, and a hash of that row's text.
    rows: list[list[int]]
    hashes: list[list[str]]


def asked(text: Text, target: Target, *, kind: str, pairs: int, tokens: int) -> Prompts:
    """The first `pairs` questions of a set, one by one, in the model's chat template where it has one; those that leave
    no room for `tokens` more are passed over. Of Spec-Bench the first turns of a kind (spec_bench.py), of problems
    these with the words that drafters are measured with (Chen et al. 2026, arXiv 2602.06036), thinking off.

    Raises:
        MissingError: there are none.
    """
    found: list[tuple[int, list[int]]] = []
    for number, turn, thinking in _turns(text, kind):
        prompt = target.chat([{"role": "user", "content": turn}], thinking=thinking)
        prompt = prompt or target.encode(f"Question: {turn}\nAnswer:")
        if len(prompt) + tokens <= target.context_length:
            found.append((number, prompt))
        if len(found) == pairs:
            break
    if not found:
        raise MissingError(f"{text.name} has no question of kind {kind} that leaves room for {tokens} tokens")
    return Prompts([[t] for _, t in found], [[n] for n, _ in found], [[text.row_hash(n)] for n, _ in found])


def _turns(text: Text, kind: str) -> Iterator[tuple[int, str, bool]]:
    """Row number, what is asked, and whether the model may think first."""
    from decodathlon.harness.datasets import questions, spec_bench

    for number, question in enumerate(questions.read(text)):
        if "problem" in question:
            yield number, question["problem"] + BOXED, False
        elif spec_bench.kind(question["category"]) == kind:
            yield number, question["turns"][0], True


def head(text: Text, target: Target, tokens: int | None) -> Head:
    """The first `tokens` tokens of the joined text (all of them for None).

    Raises:
        MissingError: the text is shorter.
    """
    total = len(text.rows)
    rows = total if tokens is None else min(total, 16)
    while True:
        found = target.encode(text.joint.join(text.rows[:rows]))
        if tokens is None:
            return Head(found, rows)
        if len(found) >= tokens + MARGIN or (rows == total and len(found) >= tokens):
            return Head(found[:tokens], rows)
        if rows == total:
            raise MissingError(f"{text.name} ({text.split}) has {len(found)} tokens, {tokens} are needed")
        rows = min(total, 2 * rows)


def prompts(text: Text, target: Target, *, pairs: int, rows: int, length: int) -> Prompts:
    """`pairs` batches of `rows` prompts of exactly `length` tokens: the beginnings of rows, none used twice.

    Raises:
        MissingError: the text has too few rows of that length.
    """
    found: list[tuple[int, list[int]]] = []
    for number, row in enumerate(text.rows):
        # A token is at least one character, so shorter rows cannot do.
        if len(row) < length:
            continue
        tokens = target.encode(row.strip())
        if len(tokens) >= length:
            found.append((number, tokens[:length]))
        if len(found) == pairs * rows:
            cuts = range(0, len(found), rows)
            return Prompts(
                [[t for _, t in found[i : i + rows]] for i in cuts],
                [[n for n, _ in found[i : i + rows]] for i in cuts],
                [[text.row_hash(n) for n, _ in found[i : i + rows]] for i in cuts],
            )
    raise MissingError(
        f"{text.name} ({text.split}) has {len(found)} rows of {length} tokens, {pairs * rows} are needed"
    )
