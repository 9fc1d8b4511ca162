"""Outcomes of a decoder on a target whose law is known: which law it claims, and what it drew, trial by trial."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from decodathlon.harness import law
from decodathlon.harness.chain import Chain
from decodathlon.harness.decoder import Decoder, Limits, Sampler
from decodathlon.harness.errors import UnsupportedError
from decodathlon.harness.lazy import torch
from decodathlon.harness.measure import exactness
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.targets import toy

if TYPE_CHECKING:
    from torch import Tensor

    from decodathlon.harness.targets.base import Target


class Trial(NamedTuple):
    """What one trial drew."""

    #: (K + 1,) how often each outcome came; the last cell is what the law does not know.
    counts: exactness.Array
    #: Share of accepted moves, of a chain.
    accepted: float | None


def claimed_law(decoder: Decoder, target: Target, length: int) -> Mapping[tuple[int, ...], float]:
    """The exact law over whole texts behind no prompt that a decoder claims on this target.

    What is `shaped` is enumerated by the decoder's definition where it has one, else by its own `shape`.

    Raises:
        UnsupportedError: it claims a law that cannot be enumerated from what it states, or none.
    """
    if decoder.claim == "greedy-exact":
        return toy.law_of(target, beginning(target), length, law.one_hot)
    if decoder.claim == "shaped" and isinstance(decoder, Sampler) and decoder.stateless:
        return toy.law_of(
            target, beginning(target), length, _defined(decoder) if is_defined(decoder) else decoder.shape
        )
    if decoder.claim == "exact" or isinstance(decoder, Chain):
        return toy.law_of(target, beginning(target), length)
    raise UnsupportedError("a law that can be enumerated", f"it claims to be {decoder.claim}")


def is_defined(decoder: Sampler) -> bool:
    """Whether a sampler says what its law is besides computing it."""
    return type(decoder).definition is not Sampler.definition


def _defined(decoder: Sampler) -> Callable[[Tensor], Tensor]:
    def shape(logits: Tensor) -> Tensor:
        rows = torch.tensor([decoder.definition(row) for row in logits.tolist()], dtype=torch.float64)
        return (rows / rows.sum(-1, keepdim=True)).log()

    return shape


def beginning(target: Target) -> list[int]:
    """What stands before the first token of a text."""
    return [] if target.start_token is None else [target.start_token]


def answers(decoder: Decoder, target: Target, draws: int, length: int, seed: int) -> list[tuple[int, ...]]:
    """Independent answers to the empty prompt; of what is spread over equal prompts on purpose one per call."""
    rng, limits = RowRandom(seed, [f"draw-{i}" for i in range(draws)]), Limits(length)
    if decoder.independent:
        found = decoder.generate(target, [beginning(target)] * draws, limits, rng)
        return [tuple(a.tokens) for a in found]
    ones = (RowRandom(seed, [f"draw-{i}"]) for i in range(draws))
    return [tuple(decoder.generate(target, [beginning(target)], limits, one)[0].tokens) for one in ones]


def trials(
    decoder: Decoder, target: Target, known: Mapping[tuple[int, ...], float], count: int, draws: int, seed: int
) -> Iterator[Trial]:
    """So many trials of so many draws each; a chain draws one state after the other, all others answer by answer.

    A chain's target must have no stop tokens: every state is counted as a whole text.
    """
    length = max(map(len, known))
    if isinstance(decoder, Chain):
        yield from _walked(decoder, target, known, count, draws, seed, length)
        return
    for trial in range(count):
        rng = RowRandom(seed, [f"trial-{trial}-{i}" for i in range(draws)])
        found = decoder.generate(target, [beginning(target)] * draws, Limits(length), rng)
        yield Trial(exactness.counted([tuple(a.tokens) for a in found], known)[0], None)


def _walked(
    chain: Chain,
    target: Target,
    known: Mapping[tuple[int, ...], float],
    count: int,
    draws: int,
    seed: int,
    length: int,
) -> Iterator[Trial]:
    """All trials side by side, from starts that are uniform over all texts; the starts themselves are not counted."""
    rng = RowRandom(seed, [f"trial-{i}" for i in range(count)])
    place = target.vocab_size ** torch.arange(length - 1, -1, -1)
    codes = torch.empty(draws, count, dtype=torch.long)
    with torch.inference_mode():
        walk = chain.walk(target, chain.heads(target, [[]] * count), Limits(length), rng, range(count))
        for i, state in enumerate(itertools.islice(walk, 1, draws + 1)):
            codes[i] = (state.tokens.cpu() * place).sum(1)
        accepted = (state.accepted / draws).tolist()
    order = [int(sum(t * int(p) for t, p in zip(text, place, strict=True))) for text in known]
    for trial in range(count):
        counts = np.bincount(codes[:, trial].numpy(), minlength=target.vocab_size**length)[order]
        yield Trial(np.append(counts, 0).astype(np.float64), accepted[trial])
