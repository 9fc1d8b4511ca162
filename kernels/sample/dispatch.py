"""Chooses the form of the draw, and registers it as a torch operation, so that graphs and compilers can hold it."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from . import reference

#: Whether the GPU form can be had.
HAS_TRITON = importlib.util.find_spec("triton") is not None


@torch.library.custom_op("decodathlon::sample", mutates_args=())
def sample(logits: Tensor, key: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """(B,) int64 tokens from the processed law of logits (B, V): see reference.py."""
    both = top_k > 0 and top_p < 1.0
    if logits.device.type == "cuda" and HAS_TRITON and not both and logits.dtype != torch.float64:
        from .triton import sample as fused

        return fused(logits.contiguous(), key, temperature, top_k, top_p, min_p)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return reference.sample(wide, key, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)


@sample.register_fake
def _(logits: Tensor, key: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    return torch.empty(len(logits), dtype=torch.long, device=logits.device)
