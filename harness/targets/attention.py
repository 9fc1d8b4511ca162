"""Attention over ragged rows and trees: the cache, the layout of one step, and the function that transformers calls.

Hugging Face's forward runs unchanged. It finds our attention under a registered name, our `RowCache` as its cache, and
a `Layout` as one more keyword argument; it builds no mask itself. The lean forward uses the same three pieces.

A slot is where a token's key lies in the cache; a position is how far into its text it stands. On a chain the two are
equal, in a tree they are not: siblings share a position. Windows count positions.

Dimensions: B rows, H query heads, K key heads, G = H / K, Q new tokens, S slots, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

ATTENTION_NAME = "decodathlon"


class Layout:
    """Where the Q new tokens of one step go and what each of them sees.

    Two forms. Eager: `end` is the last slot in use, known to the host. Static (`start=None`): `end` is a bucket, all
    shapes are fixed and `lengths` is read on the device only, so that a step can be captured as a CUDA graph.
    """

    def __init__(self, lengths: Tensor, Q: int, end: int, *, start: int | None, tree: Tensor | None = None) -> None:
        """
        Args:
            lengths: (B,) tokens that each row already holds.
            Q: new tokens per row.
            end: slots that the step looks at.
            start: the common length of all rows where the host knows that they are equal, else None.
            tree: (B, Q, Q) ancestor mask with a true diagonal, or None for a chain.
        """
        self.lengths, self.Q, self.end, self.start, self.tree = lengths, Q, end, start, tree
        B = lengths.shape[0]
        self.rows = torch.arange(B, device=lengths.device)[:, None]
        offset = torch.arange(Q, device=lengths.device)
        self.slots = lengths[:, None] + offset
        depth = offset.expand(B, Q) if tree is None else tree.sum(-1) - 1
        self.positions = lengths[:, None] + depth
        self._masks: dict[tuple[int | None, int], Tensor | None] = {}

    def plain_causal(self, window: int | None) -> bool:
        """Whether the step is the first of all rows and needs no more than the causal triangle."""
        return self.start == 0 and self.Q > 1 and self.tree is None and self.end == self.Q and not self._cuts(window)

    def mask(self, window: int | None, groups: int) -> Tensor | None:
        """(B, 1, G*Q, end) bool, true where a query sees a key; None where every query sees every key."""
        key = (window, groups)
        if key not in self._masks:
            self._masks[key] = self._build(window, groups)
        return self._masks[key]

    def _cuts(self, window: int | None) -> bool:
        return window is not None and self.end > window

    def _build(self, window: int | None, groups: int) -> Tensor | None:
        if self.start is not None and self.Q == 1 and not self._cuts(window):
            return None
        slot = torch.arange(self.end, device=self.lengths.device)
        fresh = slot[None] - self.lengths[:, None]  # (B, end): index among the new tokens, negative for old ones
        old = fresh < 0
        index = fresh.clamp(0, self.Q - 1)
        if self.tree is None:
            ancestor = index[:, None, :] <= torch.arange(self.Q, device=slot.device)[None, :, None]
        else:
            ancestor = self.tree.gather(2, index[:, None, :].expand(-1, self.Q, -1))
        seen = old[:, None] | (((fresh >= 0) & (fresh < self.Q))[:, None] & ancestor)
        if window is not None:
            key_position = torch.where(old, slot[None], self.positions.gather(1, index))
            seen = seen & (self.positions[:, :, None] - key_position[:, None, :] < window)
        return seen[:, None].repeat(1, 1, groups, 1)


class RowLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer, (B, K, S, D), preallocated; row b writes behind its own length."""

    is_sliding = False
    is_compileable = True

    def __init__(self, owner: RowCache) -> None:
        super().__init__()
        self._owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, slots = self._owner.rows, self._owner.capacity
        self.keys = key_states.new_zeros(rows, key_states.shape[1], slots, key_states.shape[3])
        self.values = value_states.new_zeros(rows, value_states.shape[1], slots, value_states.shape[3])
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new keys and values (B, K, Q, D); return all slots that the step looks at."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        layout = self._owner.layout
        if layout.start is not None:
            self.keys.narrow(2, layout.start, layout.Q).copy_(key_states)
            self.values.narrow(2, layout.start, layout.Q).copy_(value_states)
        else:
            self.keys[layout.rows, :, layout.slots] = key_states.transpose(1, 2)
            self.values[layout.rows, :, layout.slots] = value_states.transpose(1, 2)
        return self.keys.narrow(2, 0, layout.end), self.values.narrow(2, 0, layout.end)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._owner.layout.end, 0

    def get_seq_length(self) -> int:
        return 0  # positions are passed by hand; nothing may infer them from here

    def get_max_length(self) -> int:
        return self._owner.capacity

    get_max_cache_shape = get_max_length  # its name before transformers 5.23


class RowCache(Cache):  # type: ignore[misc]
    """Static cache with per-row lengths. Windowed layers hold the whole context, so that trees and rollback work."""

    layout: Layout

    def __init__(self, layers: int, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, capacity
        super().__init__(layers=[RowLayer(self) for _ in range(layers)])

    def clear(self) -> None:
        """Forget what unused slots hold: a NaN that an earlier text left there would reach a masked sum."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys.zero_()
                layer.values.zero_()

    def move(self, source: Tensor, destination: Tensor) -> None:
        """Copy slots (B, P) of every row to other slots (B, P); gathers before it writes, so they may overlap."""
        row = torch.arange(self.rows, device=source.device)[:, None]
        for layer in self.layers:
            layer.keys[row, :, destination] = layer.keys[row, :, source]
            layer.values[row, :, destination] = layer.values[row, :, source]

    def select(self, rows: Tensor) -> None:
        for layer in self.layers:
            layer.keys = layer.keys.index_select(0, rows)
            layer.values = layer.values.index_select(0, rows)
        self.rows = int(rows.shape[0])


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scale: float | None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of (B, H, Q, D) queries over (B, K, end, D) keys, returned as (B, Q, H, D).

    The G query heads that share a key head are folded into the query dimension: on a CPU that is much faster for
    one token than a broadcast, and the result is the same.
    """
    B, H, Q, D = query.shape
    K = key.shape[1]
    groups = H // K
    if softcap is None and sinks is None:
        if layout.plain_causal(window):
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=groups > 1)
            return out.transpose(1, 2)
        out = F.scaled_dot_product_attention(
            query.reshape(B, K, groups * Q, D), key, value, attn_mask=layout.mask(window, groups), scale=scale
        )
        return out.reshape(B, H, Q, -1).transpose(1, 2)
    scores = query.reshape(B, K, groups * Q, D) @ key.transpose(-1, -2) * (D**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    mask = layout.mask(window, groups)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, K, groups, 1, 1).expand(B, K, groups, Q, 1).reshape(B, K, groups * Q, 1)
        weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    out = weights.to(value.dtype) @ value
    return out.reshape(B, H, Q, -1).transpose(1, 2)


def _attention_for_transformers(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    decodathlon: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if decodathlon is None:
        raise RuntimeError(f"{type(module).__name__} did not pass the layout through to its attention")
    # Some models (Qwen2-MoE, Phi-MoE) keep their window to themselves.
    window = sliding_window or getattr(module, "sliding_window", None)
    out = attend(query, key, value, decodathlon, scale=scaling, window=window, softcap=softcap, sinks=s_aux)
    return out, None


AttentionInterface.register(ATTENTION_NAME, _attention_for_transformers)
