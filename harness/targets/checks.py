"""What is looked at when a model is loaded: what it is, where its parts are, and how far two forwards are apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from decodathlon.harness.errors import UnsupportedError

LAYER_TYPES = {"full_attention", "sliding_attention"}
#: Largest root-mean-square difference of logits, relative to their spread, between two forwards of one model.
#: Float32 and wider leave room for the order of sums only; a wrong mask or position is off by far more.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
#: Every attention window shrinks to this while forwards are compared, so that short texts exceed it.
SMALL_WINDOW = 6


def refuse_by_name(config: Any, name: str) -> None:
    """
    Raises:
        UnsupportedError: layers whose state cannot be rolled back, or that share it.
    """
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError("a causal LM", f"{name} ({kind}) is an encoder-decoder model")
    strange = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if strange:
        raise UnsupportedError("full or sliding attention", f"{name} ({kind}) has {', '.join(sorted(strange))} layers")
    if getattr(config, "num_kv_shared_layers", 0):
        raise UnsupportedError("a cache per layer", f"{name} ({kind}) shares keys between layers")


def stop_tokens(model: Any, config: Any) -> frozenset[int]:
    """What the generation config and the model's own config call the end of a text."""
    stop: set[int] = set()
    for source in (getattr(model, "generation_config", None), config):
        eos = getattr(source, "eos_token_id", None)
        stop |= set(eos) if isinstance(eos, (list, tuple)) else {eos} if eos is not None else set()
    return frozenset(stop)


def blocks(model: Any, layers: int, name: str) -> Any:
    """The model's list of transformer blocks.

    Raises:
        UnsupportedError: it has none of that length.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == layers:
            return module
    raise UnsupportedError("a list of blocks", f"{name} has none")


@contextmanager
def small_windows(model: Any, config: Any) -> Iterator[None]:
    """Shrink every attention window while the block runs."""
    holders = [m for m in [config, *model.modules()] if isinstance(getattr(m, "sliding_window", 0), int)]
    holders = [m for m in holders if getattr(m, "sliding_window", None)]
    before = [m.sliding_window for m in holders]
    try:
        for holder in holders:
            holder.sliding_window = SMALL_WINDOW
        yield
    finally:
        for holder, window in zip(holders, before, strict=True):
            holder.sliding_window = window


def spread_error(ours: Tensor, truth: Tensor) -> float:
    """Root-mean-square difference relative to the spread of the true logits."""
    ours, truth = ours.double(), truth.double()
    return float((ours - truth).pow(2).mean().sqrt() / truth.std().clamp(min=1e-12))
