"""Twists: what an answer so far is worth, for each token that it may go on with.

A twist takes particles, the logs of their present twists (G,) and the laws of their next tokens (G, V), and gives the
logs of the next twists (G, V).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from decodathlon.decoders.particles import Particle, Particles
from decodathlon.harness.decoder import Limits
from decodathlon.harness.errors import UnsupportedError
from decodathlon.harness.lazy import torch
from decodathlon.harness.rewards import Answer, Tilted

if TYPE_CHECKING:
    from torch import Tensor

    from decodathlon.harness.targets.base import Target

Twist = Callable[[Particles, Sequence[Particle], "Tensor", "Tensor"], "Tensor"]


def valued(decoder: Tilted, candidates: int) -> Twist:
    """The reward of what there would be, with each of the likeliest next tokens; with all others what there is now.

    The reward `log-power` is known from the laws, for all tokens.
    """
    closed = decoder.reward == "log-power"

    def twist(found: Particles, some: Sequence[Particle], now: Tensor, log_law: Tensor) -> Tensor:
        if closed:
            so_far = torch.tensor([one.log_prob for one in some], dtype=torch.float64, device=log_law.device)
            scale = decoder.log_tilt([Answer([], [0], 1.0, found.target)]).item()  # of one nat
            return torch.where(log_law > -math.inf, scale * (so_far[:, None] + log_law), 0.0)
        k = min(candidates, log_law.shape[1])
        best = log_law.topk(k, dim=-1)
        possible = best.values > -math.inf  # what cannot be drawn is not valued
        longer = [
            Answer(list(found.prompts[one.prompt]), [*one.tokens, token], one.log_prob + p, found.target)
            for one, tokens, terms in zip(some, best.indices.tolist(), best.values.tolist(), strict=True)
            for token, p in zip(tokens, terms, strict=True)
            if p > -math.inf
        ]
        worth = torch.zeros_like(best.values, dtype=torch.float64)
        worth[possible] = decoder.log_tilt(longer).to(log_law.device)
        return now.to(log_law.device)[:, None].expand_as(log_law).scatter(1, best.indices, worth)

    return twist


def optimal(decoder: Tilted, target: Target, prompts: Sequence[Sequence[int]], limits: Limits) -> Twist:
    """log E[exp(tilt(y)) | answer so far], by enumeration of all answers.

    Raises:
        UnsupportedError: there are too many of them.
    """
    from decodathlon.harness.targets import toy

    if (limits.ignore_eos and target.stop_tokens) or target.vocab_size**limits.max_new_tokens > toy.MOST_OUTCOMES:
        raise UnsupportedError(
            "a law that can be enumerated",
            f"twist=optimal goes through all answers of {limits.max_new_tokens} of {target.vocab_size} tokens",
        )
    tables: dict[tuple[int, ...], dict[tuple[int, ...], float]] = {}
    for prompt in prompts:
        head = tuple(prompt)
        if head not in tables:
            tables[head] = _table(decoder, target, head, limits.max_new_tokens)

    def twist(found: Particles, some: Sequence[Particle], now: Tensor, log_law: Tensor) -> Tensor:
        rows = []
        for one in some:
            table, so_far = tables[tuple(found.prompts[one.prompt])], tuple(one.tokens)
            rows.append([table.get((*so_far, token), 0.0) for token in range(log_law.shape[1])])
        return torch.tensor(rows, dtype=torch.float64, device=log_law.device)

    return twist


def _table(decoder: Tilted, target: Target, head: tuple[int, ...], length: int) -> dict[tuple[int, ...], float]:
    """By beginning the log of the expected exp(tilt) behind it."""
    from decodathlon.harness.targets import toy

    law = {text: p for text, p in toy.law_of(target, list(head), length, decoder.shape).items() if p > 0}
    tilts = decoder.log_tilt([Answer(list(head), text, math.log(p), target) for text, p in law.items()]).tolist()
    mass: dict[tuple[int, ...], float] = {}
    worth: dict[tuple[int, ...], float] = {}
    for (text, p), tilt in zip(law.items(), tilts, strict=True):
        for end in range(1, len(text) + 1):
            mass[text[:end]] = mass.get(text[:end], 0.0) + p
            worth[text[:end]] = _log_sum(worth.get(text[:end], -math.inf), math.log(p) + tilt)
    return {beginning: worth[beginning] - math.log(mass[beginning]) for beginning in mass}


def _log_sum(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    return max(a, b) + math.log1p(math.exp(-abs(a - b)))
