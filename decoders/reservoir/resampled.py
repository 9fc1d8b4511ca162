"""Resampled importance sampling, token by token: candidates of another law q, one of them taken by weight.

Talbot, Cline and Egbert 2005: of m candidates x_i of q with weights w_i = p(x_i) / (m q(x_i)) one is taken by weight.
With W = (w_1 + ... + w_m) / p(taken) the mean of f(taken) W is the sum of f over all tokens, for every m; but the law
of the taken token is p only in the limit of many candidates. Decoding needs that law, not the integral, and it has p
itself at hand. So these are here to be measured.

Dimensions: B rows, V vocabulary, m candidates.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from decodathlon.harness import law
from decodathlon.harness.candidates import Candidates, CandidateSampler, same_for_all
from decodathlon.harness.decoder import decoder
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

#: previous: the law of the step before. uniform: every token alike.
Source = Literal["previous", "uniform"]
#: Where a chain begins: at a draw from the source, or at one from the law itself.
Begin = Literal["source", "target"]

_BOUNDS = {"m": "[1, 1024]", "temperature": "[0.01, 100]"}
_PAPER = "Talbot, Cline, Egbert 2005, Importance Resampling for Global Illumination"


class Resampling(CandidateSampler):
    """What these share: the source of the candidates, and the law that they approximate."""

    m: int
    source: Source
    temperature: float

    def shape(self, logits: Tensor) -> Tensor:
        return law.process(logits, temperature=self.temperature)

    def start(self, rows: int) -> Tensor | None:
        """The law before: none."""
        return None

    def laws(self, logits: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The law and that of the source, each (B, V) or (1, V), and the state for the next step."""
        log_p = self.shape(same_for_all(logits))
        if self.source == "uniform":
            return log_p, torch.full_like(log_p, 0.0).log_softmax(1), None
        log_q = log_p if before is None else same_for_all(before)
        return log_p, log_q, log_p.expand(len(logits), -1)


def drawn(log_law: Tensor, u: Tensor) -> Tensor:
    """(B, k) independent tokens from (B, V), or from (1, V) that all rows share, by as many uniforms (B, k)."""
    if len(log_law) == 1:
        return law.draw_several(log_law, u.reshape(1, -1)).view(u.shape)
    return law.draw_several(log_law, u)


def at(log_law: Tensor, tokens: Tensor) -> Tensor:
    """(B, k) log-probabilities of tokens (B, k), in float64."""
    return log_law.expand(len(tokens), -1).gather(1, tokens).double()


@decoder("reservoir-ris", claim="heuristic", bounds=_BOUNDS, sweep={"m": [1, 4, 16, 64, 256]}, paper=_PAPER)
class ReservoirRIS(Resampling):
    """m candidates from the law of the step before; one is taken in proportion to its new probability over its old."""

    m: int = 32
    source: Source = "previous"
    temperature: float = 1.0

    @property
    def uniforms(self) -> int:
        return self.m

    def candidates(self, logits: Tensor, state: Tensor | None, u: Tensor) -> tuple[Candidates, Tensor | None]:
        log_p, log_q, after = self.laws(logits, state)
        tokens = drawn(log_q, u)
        return Candidates(tokens, at(log_p, tokens) - at(log_q, tokens)), after


@decoder(
    "reservoir-mis",
    claim="heuristic",
    bounds=_BOUNDS,
    sweep={"m": [1, 4, 16, 64, 256]},
    paper="Lin, Kettunen, Bitterli, Pantaleoni, Yuksel, Wyman 2022, Generalized Resampled Importance Sampling",
)
class ReservoirMIS(Resampling):
    """m candidates from the law before and one from the law itself, weighed by Veach's and Guibas' balance heuristic.

    w(x) = p(x) / (m q(x) + p(x)), wherever x comes from: the weights of the two ways to draw it sum to one.
    """

    m: int = 32
    source: Source = "previous"
    temperature: float = 1.0

    @property
    def uniforms(self) -> int:
        return self.m + 1

    def candidates(self, logits: Tensor, state: Tensor | None, u: Tensor) -> tuple[Candidates, Tensor | None]:
        log_p, log_q, after = self.laws(logits, state)
        tokens = torch.cat([drawn(log_q, u[:, : self.m]), drawn(log_p, u[:, self.m :])], 1)
        p = at(log_p, tokens)
        return Candidates(tokens, p - torch.logaddexp(at(log_q, tokens) + math.log(self.m), p)), after


@decoder(
    "reservoir-imh",
    claim=lambda self: ("exact" if self.temperature == 1 else "shaped") if self.begin == "target" else "heuristic",
    bounds={**_BOUNDS, "moves": "[1, 64]"},
    sweep={"m": [1, 4, 16, 64], "moves": [1, 4, 16]},
    paper="Andrieu, Doucet, Holenstein 2010, Particle Markov Chain Monte Carlo Methods (iterated resampling)",
)
class ReservoirIMH(Resampling):
    """A chain on the next token: m candidates and the present one, one of them is next, in proportion to p / q.

    A move leaves p as it is. So a chain that begins at a draw from p (`begin=target`) is exact, and of no use; one that
    begins at a candidate nears p with every move.
    """

    m: int = 16
    moves: int = 4
    begin: Begin = "source"
    source: Source = "previous"
    temperature: float = 1.0

    @property
    def uniforms(self) -> int:
        return self.moves * (self.m + 1)

    def candidates(self, logits: Tensor, state: Tensor | None, u: Tensor) -> tuple[Candidates, Tensor | None]:
        log_p, log_q, after = self.laws(logits, state)
        u = u.reshape(-1, self.moves, self.m + 1)
        tokens = drawn(log_q, u.flatten(1)).view_as(u)
        if self.begin == "target":
            tokens[:, 0, :1] = drawn(log_p, u[:, 0, :1])
        weights = (at(log_p, tokens.flatten(1)) - at(log_q, tokens.flatten(1))).view_as(tokens)
        for move in range(1, self.moves):  # the first place belongs to what the move before has taken
            taken = Candidates(tokens[:, move - 1], weights[:, move - 1]).place(u[:, move, 0])
            for of in (tokens, weights):
                of[:, move, :1] = of[:, move - 1].gather(1, taken)
        return Candidates(tokens[:, -1], weights[:, -1]), after
