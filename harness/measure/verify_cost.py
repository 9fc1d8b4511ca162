"""What it costs the target to read q tokens at once, against one: what a drafter must make up for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from decodathlon.harness.measure import speed
from decodathlon.harness.measure.observations import Observations

if TYPE_CHECKING:
    from decodathlon.harness.targets.base import Target

#: Tokens read at once.
WIDTHS = (1, 2, 4, 8, 16, 32, 48, 64)


def rounds(target: Target, context_tokens: int, count: int, seed: int) -> Iterator[dict[int, float]]:
    """Seconds by width, once forth and once back in every round; behind a random text, which stays as it is.

    The whole pass counts, with its logits and the likeliest token behind each, as a verifier needs them.
    """
    generator = torch.Generator().manual_seed(seed)
    most = min(context_tokens, target.context_length - max(WIDTHS))
    text = torch.randint(0, target.vocab_size, (most + max(WIDTHS),), generator=generator)
    context = target.open([text[:most].tolist()], capacity=most + max(WIDTHS))

    def work(width: int) -> Any:
        return context.extend(text[None, most : most + width]).logits.argmax(-1).tolist()

    for width in WIDTHS:  # warm
        work(width)
    for number in range(count):
        turn = number % len(WIDTHS)
        forth = [*WIDTHS[turn:], *WIDTHS[:turn]]
        seconds = dict.fromkeys(WIDTHS, 0.0)
        for width in [*forth, *reversed(forth)]:
            seconds[width] += speed.timed(target, partial(work, width))[0] / 2
        yield seconds


def ratios(found: Sequence[dict[int, float]]) -> dict[int, Observations]:
    """By width, its seconds over those of one token: medians over rounds."""

    names = [f"round-{i}" for i in range(len(found))]
    return {
        width: Observations.each(names, [math.log(r[width] / r[1]) for r in found], scale="exp") for width in WIDTHS[1:]
    }
