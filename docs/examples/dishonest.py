"""Decoders with one bug each that claim to have none: what the audit is there to catch.

    pytest suites/ --benchmark --suite audit --decoder-file docs/examples/dishonest.py

They are mistakes that are easily made. None is registered unless this file is named.
"""

import math
from dataclasses import replace

from decodathlon import Completion, Sampler, decoder, draw, process, torch
from decodathlon.decoders.baselines import Greedy, TopP
from decodathlon.decoders.mcmc.gradient import DULA, PNCG
from decodathlon.decoders.mcmc.proposals import drawn
from decodathlon.decoders.mcmc.suffix import QAlign, Quest
from decodathlon.decoders.search import Beam


@decoder("dishonest-top-p", claim="shaped")
class OffByOne(TopP):
    """Top-p that leaves out the token which reaches p."""

    p: float = 0.7

    def shape(self, logits):
        ranked, order = logits.softmax(-1).sort(-1, descending=True)
        kept = ranked.cumsum(-1) < self.p
        kept[:, 0] = True
        mask = torch.zeros_like(kept).scatter(-1, order, kept)
        return logits.masked_fill(~mask, -math.inf).log_softmax(-1)


@decoder("dishonest-random-number", claim="exact")
class Reused(Sampler):
    """Every token of a text is drawn with the same random number: each alone is right, together they are not."""

    def shape(self, logits):
        return logits.log_softmax(-1)

    def choose(self, logits, state, u):
        first = u if state is None else state
        return draw(self.shape(logits), first[:, 0]), first


@decoder("dishonest-speculation", claim="exact")
class Residual(Sampler):
    """Speculative sampling of one token from a flatter draft; the residual law is not renormalised.

    With `renormalise=true` it is right.
    """

    uniforms = 2
    temperature: float = 2.0
    renormalise: bool = False

    def choose(self, logits, state, u):
        p, q = process(logits).exp().double(), process(logits, temperature=self.temperature).exp().double()
        token = draw(q.log(), u[:, 0])
        rows = torch.arange(len(token))
        accept = u[:, 1] * q[rows, token] < p[rows, token]
        residual = (p - q).clamp(min=0)
        total = residual.sum(-1, keepdim=True) if self.renormalise else 1.0
        other = torch.searchsorted((residual / total).cumsum(-1), u[:, 2:].contiguous(), right=True)
        return torch.where(accept, token, other.clamp(max=p.shape[-1] - 1)[:, 0]), state


@decoder("dishonest-beam", claim="exact")
class Claiming(Beam):
    """A beam search that claims to draw from the model's law."""


@decoder("dishonest-greedy", claim="greedy-exact")
class Second(Greedy):
    """Greedy search that takes another first token in one answer of each batch."""

    def generate(self, target, prompts, limits, rng):
        found = super().generate(target, prompts, limits, rng)
        return [*found[:-1], Completion([(found[-1].tokens[0] + 1) % target.vocab_size], "stop")]


@decoder("dishonest-chain", claim="exact")
class Unadjusted(DULA):
    """A gradient chain without its Metropolis test."""

    alpha: float = 64.0
    steps: int = 60


@decoder("dishonest-positions", claim="exact")
class PerPosition(PNCG):
    """p-NCG that takes or leaves each position by the ratio of the whole."""

    alpha: float = 64.0
    steps: int = 60

    def uniforms(self, length):
        return 2 * length

    def step(self, target, state, u):
        table, N = self.log_proposal(state), state.tokens.shape[1]
        proposed = self.at(target, state, drawn(table, u[:, :N]))
        accept = u[:, N:].log() < self.log_ratio(state, table, proposed)[:, None]
        mixed = torch.where(accept, proposed.tokens, state.tokens)
        return replace(self.at(target, state, mixed), accepted=state.accepted)


@decoder("dishonest-quest", claim="sharpened")
class Mean(Quest):
    """QUEST with the mean of the suffix's log-probabilities in place of their sum."""

    steps: int = 40

    def log_weight(self, state, cut):
        terms, lengths = state.pages.terms, state.pages.lengths
        behind = torch.arange(terms.shape[1], device=cut.device) >= cut[:, None]
        mean = (terms * behind).sum(-1) / (lengths - cut)
        return state.score - mean - lengths.double().log()


@decoder("dishonest-lengths", claim="sharpened")
class NoLengths(QAlign):
    """QAlign without the factor of the lengths: the place to cut is drawn among more of them in a longer answer."""

    steps: int = 40

    def log_weight(self, state, cut):
        return super().log_weight(state, cut) + state.pages.lengths.double().log()
