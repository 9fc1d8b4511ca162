"""Samplers whose law, given their state and random numbers, lies on a few tokens: they name those and their weights."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

from decodathlon.harness.decoder import Sampler
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class Candidates(NamedTuple):
    """The law of one token of B rows, on C tokens each."""

    #: (B, C) int64; a token may stand there more than once, and any may where the weight is -inf.
    tokens: Tensor
    #: (B, C) log of weights that need not sum to one.
    log_weights: Tensor

    def law(self, vocabulary: int) -> Tensor:
        """(B, vocabulary) log-probabilities."""
        p = self.log_weights.double().softmax(1)
        dense = torch.zeros(len(p), vocabulary, dtype=torch.float64, device=p.device)
        return dense.scatter_add_(1, self.tokens, p).log()

    def pick(self, u: Tensor) -> Tensor:
        """(B,) tokens by inversion in the order of the candidates; `u` is (B,) in [0, 1)."""
        return self.tokens.gather(1, self.place(u))[:, 0]

    def place(self, u: Tensor) -> Tensor:
        """(B, 1) places of what `pick` takes."""
        cumulative = self.log_weights.double().softmax(1).cumsum(1)
        above = cumulative > u.to(cumulative)[:, None] * cumulative[:, -1:]
        return above.int().argmax(1, keepdim=True)


class CandidateSampler(Sampler):
    """A sampler that draws each token from a few candidates, which may themselves be random.

    A subclass defines `candidates`, and `start` and `advance` where it has a state. Its `shape`, if it defines one, is
    the law that the candidates approximate, which an audit of a heuristic measures its distance from.
    """

    @abstractmethod
    def candidates(self, logits: Tensor, state: Any, u: Tensor) -> tuple[Candidates, Any]:
        """The law of the next token and the state; `u` is (B, uniforms).

        `logits` (B, V) may be one row that is expanded to B: see `same_for_all`.
        """

    def next_law(self, logits: Tensor, state: Any, u: Tensor) -> tuple[Tensor, Any]:
        found, state = self.candidates(logits, state, u)
        return found.law(logits.shape[1]), state

    def choose(self, logits: Tensor, state: Any, u: Tensor) -> tuple[Tensor, Any]:
        found, state = self.candidates(logits, state, u[:, 1:])
        tokens = found.pick(u[:, 0])
        return tokens, self.advance(state, tokens)


def same_for_all(logits: Tensor) -> Tensor:
    """(1, V) where the rows of (B, V) are one and the same in memory, so that it is worked out once; else as it is."""
    return logits[:1] if logits.stride(0) == 0 else logits
