"""Sets of answers to one prompt whose law is known: how well a set covers the law, against independent draws.

Everything is a ratio to what as many independent draws have, which is worked out from the law and not drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from decodathlon.harness import decoder as decoders
from decodathlon.harness.chain import Chain
from decodathlon.harness.decoder import Completion, Decoder, Limits, Sampler
from decodathlon.harness.errors import UnsupportedError
from decodathlon.harness.measure import draws
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.targets import toy

if TYPE_CHECKING:
    from decodathlon.harness.targets.base import Target

Array = np.ndarray[Any, Any]
#: Random functions, and random choices of what is right.
FUNCTIONS = 64


@dataclass(frozen=True)
class Known:
    """A law, and what independent draws of so many rows make of it."""

    outcomes: Sequence[tuple[int, ...]]
    #: (K,)
    p: Array
    rows: int
    #: (FUNCTIONS, K) functions of an outcome, with mean 0 and variance 1 under the law; and who is right (0 or 1).
    functions: Array
    right: Array

    @cached_property
    def floor(self) -> float:
        """Mean total variation distance of independent draws, by de Moivre's mean deviation of a binomial number."""
        k = np.floor(self.rows * self.p) + 1
        choose = np.array([math.comb(self.rows, int(x)) if x <= self.rows else 0 for x in k], dtype=float)
        deviations = 2 * k * choose * self.p**k * (1 - self.p) ** np.maximum(self.rows - k + 1, 0)
        return float(deviations.sum()) / (2 * self.rows)

    @cached_property
    def least(self) -> float:
        """The same of the best set whose rows are exact draws.

        An integer with mean m strays from it by no less than 2 f (1 - f) on average, f being the fraction of m.
        """
        fraction = np.mod(self.rows * self.p, 1.0)
        return float((fraction * (1 - fraction)).sum()) / self.rows

    @cached_property
    def distinct(self) -> float:
        """How many different outcomes independent draws have on average."""
        return float((1 - (1 - self.p) ** self.rows).sum())

    @cached_property
    def hits(self) -> Array:
        """(FUNCTIONS,) how often independent draws hold a right one."""
        found: Array = 1 - (1 - self.right @ self.p) ** self.rows
        return found


class Found(NamedTuple):
    """What one set makes of the law, each over what independent draws have."""

    tvd: float
    squared_error: float
    #: With weights that pay for the chance to be drawn, where independent draws had none.
    weighted_error: float
    distinct: float
    hits: float


def known(decoder: Decoder, target: Target, rows: int) -> Known:
    """The law that the decoder's answers should cover, and functions of them.

    Raises:
        UnsupportedError: its answers are not drawn from a law, or one after the other.
    """
    if isinstance(decoder, Chain) or decoder.claim not in ("exact", "shaped", "heuristic"):
        raise UnsupportedError("a set of answers drawn from a law", f"{decoder.spec} claims to be {decoder.claim}")
    length = target.context_length if not target.stop_tokens else LENGTH
    # what claims nothing approximates the target's law, at its temperature if it has one
    temperature = getattr(decoder, "temperature", 1.0) if decoder.claim == "heuristic" else 1.0
    named = decoders.build(f"temperature[temperature={temperature}]") if temperature != 1.0 else decoder
    law: Mapping[tuple[int, ...], float]
    if named.claim == "shaped" and isinstance(named, Sampler):
        law = draws.claimed_law(named, target, length)
    else:
        law = toy.law_of(target, draws.beginning(target), length)
    outcomes, p = list(law), np.array(list(law.values()))
    if p.max() > 1 - 1e-9:
        raise UnsupportedError("a law of several answers", f"{decoder.spec} always gives the same one here")
    rng = np.random.default_rng(0)
    functions = rng.standard_normal((FUNCTIONS, len(p)))
    functions -= (functions @ p)[:, None]
    functions /= np.sqrt(np.square(functions) @ p)[:, None]
    right = np.zeros_like(functions)
    for row in right:
        order = rng.permutation(len(p))
        row[order[: 1 + int(np.searchsorted(p[order].cumsum(), 1 / rows))]] = 1.0
    return Known(outcomes, p, rows, functions, right)


#: Tokens of an answer where something ends it.
LENGTH = 3


def drawn(decoder: Decoder, target: Target, law: Known, number: int, seed: int) -> list[Completion]:
    """One set of answers to the empty prompt."""
    head, length = draws.beginning(target), max(map(len, law.outcomes))
    rng = RowRandom(seed, [f"set-{number}-{i}" for i in range(law.rows)])
    return decoder.generate(target, [head] * law.rows, Limits(length), rng)


def judged(answers: Sequence[Completion], law: Known) -> Found:
    """What a set of answers is worth; an answer's importance weight is in its trace where it has one."""
    place = {outcome: i for i, outcome in enumerate(law.outcomes)}
    strange = [a.tokens for a in answers if tuple(a.tokens) not in place]
    if strange:
        raise ValueError(f"{strange[0]} is no answer that the law knows: it was drawn from another one")
    at = [place[tuple(a.tokens)] for a in answers]
    weights = np.array([next((e["importance"] for e in a.trace if "importance" in e), 1.0) for a in answers])
    share = np.bincount(at, weights / weights.sum(), minlength=len(law.p))
    counted = np.bincount([i for i, w in zip(at, weights, strict=True) if w > 0], minlength=len(law.p)) > 0
    paid = np.where(counted, law.p / (1 - (1 - law.p) ** law.rows), 0.0)
    return Found(
        tvd=float(0.5 * np.abs(share - law.p).sum()) / law.floor,
        squared_error=float(np.square(law.functions @ share).mean()) * law.rows,
        weighted_error=float(np.square(law.functions @ (paid / paid.sum())).mean()) * law.rows,
        distinct=float(counted.sum()) / law.distinct,
        hits=float((law.right @ counted > 0).sum() / law.hits.sum()),
    )
