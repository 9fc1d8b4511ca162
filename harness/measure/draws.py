"""Outcomes of a decoder on a target whose law is known: which law it claims, and what it drew, trial by trial."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from decodathlon.harness.decoder import Chain, Decoder, Limits, Sampler
from decodathlon.harness.errors import UnsupportedError
from decodathlon.harness.lazy import torch
from decodathlon.harness.measure import exactness
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.targets import toy

if TYPE_CHECKING:
    from decodathlon.harness.targets.base import Target


class Trial(NamedTuple):
    """What one trial drew."""

    #: (K + 1,) how often each outcome came; the last cell is what the law does not know.
    counts: exactness.Array
    #: Share of accepted moves, of a chain.
    accepted: float | None


def claimed_law(decoder: Decoder, target: Target, length: int) -> Mapping[tuple[int, ...], float]:
    """The exact law over whole texts that a decoder claims on this target.

    Raises:
        UnsupportedError: it claims one answer, or a law that cannot be enumerated from what it states.
    """
    if decoder.claim == "shaped" and isinstance(decoder, Sampler) and decoder.stateless:
        return toy.law_of(target, [], length, decoder.shape)
    if decoder.claim == "exact" or isinstance(decoder, Chain):
        return toy.law_of(target, [], length)
    raise UnsupportedError("a law that can be enumerated", f"it claims to be {decoder.claim}")


def trials(
    decoder: Decoder, target: Target, law: Mapping[tuple[int, ...], float], count: int, draws: int, seed: int
) -> Iterator[Trial]:
    """So many trials of so many draws each; a chain draws one state after the other, all others answer by answer."""
    length = max(map(len, law))
    if isinstance(decoder, Chain):
        yield from _walked(decoder, target, law, count, draws, seed, length)
        return
    for trial in range(count):
        rng = RowRandom(seed, [f"trial-{trial}-{i}" for i in range(draws)])
        answers = decoder.generate(target, [[] for _ in range(draws)], Limits(length), rng)
        yield Trial(exactness.counted([tuple(a.tokens) for a in answers], law)[0], None)


def _walked(
    chain: Chain,
    target: Target,
    law: Mapping[tuple[int, ...], float],
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
        walk = chain.walk(target, [[]] * count, length, rng, range(count))
        for i, state in enumerate(itertools.islice(walk, 1, draws + 1)):
            codes[i] = (state.tokens.cpu() * place).sum(1)
        accepted = (state.accepted / draws).tolist()
    order = [int(sum(t * int(p) for t, p in zip(text, place, strict=True))) for text in law]
    for trial in range(count):
        counts = np.bincount(codes[:, trial].numpy(), minlength=target.vocab_size**length)[order]
        yield Trial(np.append(counts, 0).astype(np.float64), accepted[trial])
