"""Prompts for speed measurements: the beginnings of paragraphs, all of one length, none used twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

from decodathlon.harness.errors import MissingError

if TYPE_CHECKING:
    from decodathlon.harness.datasets import Text
    from decodathlon.harness.targets.base import Target


def batches(text: Text, target: Target, *, pairs: int, rows: int, length: int) -> list[list[list[int]]]:
    """`pairs` batches of `rows` prompts of exactly `length` tokens, in the order of the text.

    Raises:
        MissingError: the text has too few paragraphs of that length.
    """
    prompts: list[list[int]] = []
    for paragraph in text.rows:
        # A token is at least one character, so shorter paragraphs cannot do.
        if len(paragraph) < length:
            continue
        tokens = target.encode(paragraph.strip())
        if len(tokens) >= length:
            prompts.append(tokens[:length])
        if len(prompts) == pairs * rows:
            return [prompts[i : i + rows] for i in range(0, len(prompts), rows)]
    raise MissingError(
        f"{text.name} ({text.split}) has {len(prompts)} paragraphs of {length} tokens, {pairs * rows} are needed"
    )
