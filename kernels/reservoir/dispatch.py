"""Chooses the form of the reservoir step, and registers it as a torch operation, so that graphs can hold it."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from . import reference
from .reference import Fresh, Reservoirs

#: Likeliest tokens up to which the GPU form is compiled and tested; more take registers that no program has.
MOST_FUSED = 128
#: Whether the GPU form can be had.
HAS_TRITON = importlib.util.find_spec("triton") is not None


def step(
    logits: Tensor,
    state: Reservoirs,
    u: Tensor,
    *,
    temperature: float,
    top_k: int,
    every: int,
    cross: bool,
    fresh: Fresh,
) -> tuple[Tensor, Reservoirs]:
    """(B,) drawn tokens and the new state of B rows.

    Args:
        logits: (B, V).
        u: (B, 1 + R) uniforms in float64: the draw's, then one per slot.
    """
    drawn, *new = _step(logits, *state, u, temperature, top_k, every, cross, fresh)
    return drawn, Reservoirs(*new)


@torch.library.custom_op("decodathlon::reservoir_step", mutates_args=())
def _step(
    logits: Tensor, tokens: Tensor, log_before: Tensor, log_weight: Tensor, log_greatest: Tensor, age: Tensor,
    u: Tensor, temperature: float, top_k: int, every: int, cross: bool, fresh: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    state = Reservoirs(tokens, log_before, log_weight, log_greatest, age)
    if logits.device.type == "cuda" and HAS_TRITON and logits.dtype != torch.float64 and top_k <= MOST_FUSED:
        from .triton import step as fused

        drawn, new = fused(
            logits.contiguous(), state, u, temperature, top_k=top_k, every=every, cross=cross, fresh=fresh
        )
    else:
        kind: Fresh = "one" if fresh == "one" else "probability"
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        new = reference.step(scores, state, u[:, 1:], top_k=top_k, every=every, cross=cross, fresh=kind)
        drawn = reference.pick(new, u[:, 0])
        # an operation gives back nothing that it was given, nor a view of anything
        new = Reservoirs(*(part.clone() for part in new))
    return drawn, *new


@_step.register_fake
def _(logits, tokens, log_before, log_weight, log_greatest, age, u, temperature, top_k, every, cross, fresh):  # type: ignore[no-untyped-def]
    drawn = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    return drawn, *(torch.empty_like(x) for x in (tokens, log_before, log_weight, log_greatest, age))
