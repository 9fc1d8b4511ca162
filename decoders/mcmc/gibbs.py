"""Gibbs sampling: one position after the other takes a token from its exact law given all others."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from decodathlon.harness import law
from decodathlon.harness.chain import Chain, State, by_start
from decodathlon.harness.decoder import decoder
from decodathlon.harness.errors import UnsupportedError
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from decodathlon.harness.targets.base import Target

#: A sweep scores the sequence with every token at every position; beyond this vocabulary nobody would wait for it.
MOST_TOKENS = 1024


@decoder(
    "gibbs",
    claim=by_start,
    bounds={"steps": "[1, 1000000]"},
    needs=["energy"],
    paper="Geman and Geman 1984, Stochastic Relaxation, Gibbs Distributions, and the Bayesian Restoration of Images",
)
class Gibbs(Chain):
    """One sweep per step, left to right; every position takes a token from its law given all the others."""

    steps: int = 50
    bos: bool = True

    def check(self, target: Target) -> None:
        super().check(target)
        if target.vocab_size > MOST_TOKENS:
            raise UnsupportedError(
                "a small vocabulary", f"a Gibbs sweep scores all {target.vocab_size} tokens at every position"
            )

    def uniforms(self, length: int) -> int:
        return length

    def step(self, target: Target, state: State, u: Tensor) -> State:
        sequences, (B, L), V = state.sequences, state.sequences.shape, target.vocab_size
        rows, tokens = torch.arange(B, device=sequences.device), torch.arange(V, device=sequences.device)
        for place in range(state.free, L):
            others = sequences[:, None].expand(B, V, L).clone()
            others[:, :, place] = tokens
            scores = target.score(others.view(B * V, L), state.free).view(B, V)
            drawn = law.draw(scores.log_softmax(-1), u[:, place - state.free])
            sequences = others[rows, drawn]
        score = scores.gather(1, drawn[:, None])[:, 0]
        return replace(state, sequences=sequences, score=score, accepted=state.accepted + 1)

    def transitions(self, target: Target, state: State) -> Tensor:
        M, V, N = len(state.score), target.vocab_size, state.tokens.shape[1]
        here, there = torch.arange(M)[:, None], torch.arange(M)
        log_p = torch.zeros(M, M, dtype=torch.float64)
        for place in range(N):
            behind = V ** (N - 1 - place)  # texts that begin alike up to and with this place
            conditional = state.score.view(-1, V, behind).log_softmax(1).flatten()
            log_p += conditional[there // behind * behind + here % behind]
        return log_p.exp()
