"""A short forward for the Llama family (Llama, Mistral, Qwen2, Qwen3): the same arithmetic in fewer, larger operations.

Queries, keys and values come from one matrix product, gate and up from another; rotations are looked up. The Hugging
Face modules are left holding views of the fused weights, so nothing is stored twice and `generate` still runs.

A linear module that keeps its weight in a form of its own has a class method `joined`, which makes one product of
several such modules; a table of embeddings of that kind is indexed like a tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from decodathlon.harness.targets.attention import Layout, RowCache, attend

FAMILY = {"llama", "mistral", "qwen2", "qwen3"}
#: A matrix product with a weight, in whatever form that is kept: (..., in) to (..., out).
Linear = Callable[[Tensor], Tensor]
#: Rotations that depend on the position alone, so that a table holds them.
STATIC_ROPE = {"default", "linear", "llama3", "yarn"}


class LeanForward:
    """Callable with the signature of `TransformersTarget.forward`, on the weights of `model`."""

    def __init__(self, model: Any) -> None:
        config, body = model.config, model.model
        self.heads = config.num_attention_heads
        self.key_heads = config.num_key_value_heads
        self.width = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.eps = config.rms_norm_eps
        table = body.embed_tokens
        self.embedding: Any = table.weight if type(table) is torch.nn.Embedding else table
        self.head: Linear = _product(model.lm_head)
        self.final_norm = body.norm.weight
        self.layers = [_layer(block) for block in body.layers]
        self.scale = body.layers[0].self_attn.scaling
        self._rotary = body.rotary_emb
        self._rotations: dict[int, tuple[Tensor, Tensor]] = {}
        self.read_windows(model)

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether `model` is one whose arithmetic this forward repeats."""
        config = model.config
        rope = getattr(config, "rope_parameters", None) or {}
        return (
            config.model_type in FAMILY
            and getattr(config, "hidden_act", "") == "silu"
            and not getattr(config, "mlp_bias", False)
            and rope.get("rope_type", "default") in STATIC_ROPE
            and not getattr(config, "pretraining_tp", 1) > 1
            and len(kinds := {type(m) for m in _projections(model)}) == 1
            and all(kind is torch.nn.Linear or hasattr(kind, "joined") for kind in kinds)
        )

    def read_windows(self, model: Any) -> None:
        """Take the windows from the modules as they are now."""
        common = getattr(model.config, "sliding_window", None) if model.config.model_type == "mistral" else None
        self.windows = [getattr(b.self_attn, "sliding_window", None) or common for b in model.model.layers]

    def __call__(
        self, tokens: Tensor, layout: Layout, cache: RowCache, hidden: Sequence[int], logits_at: Tensor | None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        states: dict[int, Tensor] = {}
        cos, sin = self._rotation(layout, cache.capacity)
        x = F.embedding(tokens, self.embedding) if isinstance(self.embedding, Tensor) else self.embedding[tokens]
        for number, layer in enumerate(self.layers):
            if number in hidden:
                states[number] = x
            x = x if layer.attention is None else x + self._mixed(x, number, layer.attention, layout, cache, cos, sin)
            if layer.mlp is not None:
                gate, up = layer.mlp.gate_up(rms_norm(x, layer.mlp.norm, self.eps)).chunk(2, dim=-1)
                x = x + layer.mlp.down(F.silu(gate).mul_(up))
        if len(self.layers) in hidden:
            states[len(self.layers)] = x
        if len(self.layers) + 1 in hidden:
            states[len(self.layers) + 1] = rms_norm(x, self.final_norm, self.eps)
        if logits_at is not None:
            x = x[:, logits_at]
        return self.head(rms_norm(x, self.final_norm, self.eps)), states

    def _mixed(
        self, x: Tensor, number: int, layer: Attention, layout: Layout, cache: RowCache, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """What the attention of a block adds to the residual stream (B, Q, E)."""
        B, Q = x.shape[:2]
        H, K, D = layer.heads or self.heads, layer.key_heads or self.key_heads, self.width
        qkv = layer.qkv(rms_norm(x, layer.norm, self.eps)).view(B, Q, H + 2 * K, D)
        if layer.q_norm is None or layer.k_norm is None:
            turned, value = qkv.split((H + K, K), dim=2)
            query, key = rotate(turned, cos, sin).split((H, K), dim=2)
        else:
            query, key, value = qkv.split((H, K, K), dim=2)
            query = rotate(rms_norm(query, layer.q_norm, self.eps), cos, sin)
            key = rotate(rms_norm(key, layer.k_norm, self.eps), cos, sin)
        keys, values = cache.layers[number].update(key.transpose(1, 2), value.transpose(1, 2))
        mixed = attend(query.transpose(1, 2), keys, values, layout, scale=self.scale, window=self.windows[number])
        return layer.out(mixed.reshape(B, Q, H * D))

    def replaced(self, layers: Sequence[Layer], head: Linear | None = None, embedding: Any = None) -> LeanForward:
        """The same model with other blocks, which may be smaller or lack parts, and perhaps another head or table of
        embeddings.

        It reads and writes the same places of a cache, and stands in for the model only as a drafter.
        """
        if len(layers) != len(self.layers):
            raise ValueError(f"{len(layers)} blocks for a model of {len(self.layers)}")
        other = copy.copy(self)
        other.layers, other.head = list(layers), head if head is not None else self.head
        other.embedding = embedding if embedding is not None else self.embedding
        return other

    def _rotation(self, layout: Layout, capacity: int) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines (B, Q, 1, D) at the positions of the step."""
        size = 1 << (capacity - 1).bit_length()
        if size not in self._rotations:  # kept for good: a captured graph reads from it
            positions = torch.arange(size, device=self.embedding.device)[None]
            cos, sin = self._rotary(self.embedding[:1], positions)
            half = sin.shape[-1] // 2
            self._rotations[size] = cos[0], torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)[0]
        cos, sin = self._rotations[size]
        if layout.start is not None and layout.tree is None:
            new = slice(layout.start, layout.start + layout.Q)
            return cos[new][None, :, None], sin[new][None, :, None]
        return cos[layout.positions][:, :, None], sin[layout.positions][:, :, None]


class Dense:
    """A weight as the checkpoint has it."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class Attention:
    """The attention of a block; queries, keys and values in one product."""

    norm: Tensor
    qkv: Linear
    out: Linear
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    #: Query and key heads, where they are fewer than the model's.
    heads: int | None = None
    key_heads: int | None = None


@dataclass(frozen=True)
class MLP:
    """The gated layer of a block; gate and up in one product."""

    norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class Layer:
    """A block; a part that is None is passed by."""

    attention: Attention | None
    mlp: MLP | None

    def mapped(self, make: Callable[[Any], Linear]) -> Layer:
        """The block with every matrix as `make` makes it."""
        a, m = self.attention, self.mlp
        return Layer(
            None if a is None else replace(a, qkv=make(a.qkv), out=make(a.out)),
            None if m is None else replace(m, gate_up=make(m.gate_up), down=make(m.down)),
        )


def _layer(block: Any) -> Layer:
    """The weights of one block, fused; the block's own modules are pointed at views of them."""
    attention, mlp = block.self_attn, block.mlp
    qkv = _product(attention.q_proj, attention.k_proj, attention.v_proj)
    q_norm = attention.q_norm.weight if hasattr(attention, "q_norm") else None
    k_norm = attention.k_norm.weight if hasattr(attention, "k_norm") else None
    return Layer(
        Attention(block.input_layernorm.weight, qkv, _product(attention.o_proj), q_norm, k_norm),
        MLP(block.post_attention_layernorm.weight, _product(mlp.gate_proj, mlp.up_proj), _product(mlp.down_proj)),
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, in float32 inside whatever the input, as transformers has it."""
    wide = x.float()
    # sum and division are what mean does, at half the dispatch; a decode step has two norms per layer
    scale = wide.square().sum(-1, keepdim=True).div_(x.shape[-1]).add_(eps).rsqrt_()
    return weight * (wide * scale).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotary position embedding of (B, Q, heads, D), halves convention."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos).add_(torch.cat((second, first), dim=-1).mul_(signed_sin))


def _projections(model: Any) -> list[Any]:
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    found = [m for name, m in model.named_modules() if name.rpartition(".")[2] in names]
    biased = [m for m in found if getattr(m, "bias", None) is not None]
    inputs = {id(getattr(b.self_attn, n)) for b in model.model.layers for n in ("q_proj", "k_proj", "v_proj")}
    # A bias elsewhere than on queries, keys and values is not repeated here.
    return [*found, model.lm_head, *[None for m in biased if id(m) not in inputs]]


def _product(*modules: Any) -> Linear:
    """One product with the weights of these modules, one above the other; they share their input."""
    if type(modules[0]) is not torch.nn.Linear:
        made: Linear = type(modules[0]).joined(modules)
        return made
    return Dense(modules[0].weight) if len(modules) == 1 else Dense(*_fuse(*modules))


@torch.no_grad()
def _fuse(*parts: Any) -> tuple[Tensor, Tensor | None]:
    weight = torch.cat([p.weight for p in parts])
    bias = torch.cat([p.bias for p in parts]) if parts[0].bias is not None else None
    row = 0
    for part in parts:
        rows = part.weight.shape[0]
        part.weight = torch.nn.Parameter(weight[row : row + rows], requires_grad=False)
        if bias is not None:
            part.bias = torch.nn.Parameter(bias[row : row + rows], requires_grad=False)
        row += rows
    return weight, bias
