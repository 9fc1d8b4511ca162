"""A short forward for the Llama family (Llama, Mistral, Qwen2, Qwen3): the same arithmetic in fewer, larger operations.

Queries, keys and values come from one matrix product, gate and up from another; rotations are looked up. The Hugging
Face modules are left holding views of the fused weights, so nothing is stored twice and `generate` still runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from decodathlon.harness.targets.attention import Layout, RowCache, attend

FAMILY = {"llama", "mistral", "qwen2", "qwen3"}
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
        self.embedding = body.embed_tokens.weight
        self.head = model.lm_head.weight
        self.final_norm = body.norm.weight
        self.layers = [_Layer(block) for block in body.layers]
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
            and all(type(m) is torch.nn.Linear for m in _projections(model))
        )

    def read_windows(self, model: Any) -> None:
        """Take the windows from the modules as they are now."""
        common = getattr(model.config, "sliding_window", None) if model.config.model_type == "mistral" else None
        self.windows = [getattr(b.self_attn, "sliding_window", None) or common for b in model.model.layers]

    def __call__(
        self, tokens: Tensor, layout: Layout, cache: RowCache, hidden: Sequence[int], logits_at: Tensor | None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        B, Q = tokens.shape
        H, K, D = self.heads, self.key_heads, self.width
        states: dict[int, Tensor] = {}
        cos, sin = self._rotation(layout, cache.capacity)
        x = F.embedding(tokens, self.embedding)
        for number, layer in enumerate(self.layers):
            if number in hidden:
                states[number] = x
            qkv = F.linear(rms_norm(x, layer.norm_in, self.eps), layer.qkv, layer.qkv_bias).view(B, Q, H + 2 * K, D)
            if layer.q_norm is None or layer.k_norm is None:
                turned, value = qkv.split((H + K, K), dim=2)
                query, key = rotate(turned, cos, sin).split((H, K), dim=2)
            else:
                query, key, value = qkv.split((H, K, K), dim=2)
                query = rotate(rms_norm(query, layer.q_norm, self.eps), cos, sin)
                key = rotate(rms_norm(key, layer.k_norm, self.eps), cos, sin)
            keys, values = cache.layers[number].update(key.transpose(1, 2), value.transpose(1, 2))
            mixed = attend(query.transpose(1, 2), keys, values, layout, scale=self.scale, window=self.windows[number])
            x = x + F.linear(mixed.reshape(B, Q, H * D), layer.out)
            gate, up = F.linear(rms_norm(x, layer.norm_mid, self.eps), layer.gate_up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate).mul_(up), layer.down)
        if len(self.layers) in hidden:
            states[len(self.layers)] = x
        if len(self.layers) + 1 in hidden:
            states[len(self.layers) + 1] = rms_norm(x, self.final_norm, self.eps)
        if logits_at is not None:
            x = x[:, logits_at]
        return F.linear(rms_norm(x, self.final_norm, self.eps), self.head), states

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


class _Layer:
    """The weights of one block, fused; the block's own modules are pointed at views of them."""

    def __init__(self, block: Any) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.qkv, self.qkv_bias = _fuse(attention.q_proj, attention.k_proj, attention.v_proj)
        self.gate_up, _ = _fuse(mlp.gate_proj, mlp.up_proj)
        self.out, self.down = attention.o_proj.weight, mlp.down_proj.weight
        self.norm_in, self.norm_mid = block.input_layernorm.weight, block.post_attention_layernorm.weight
        self.q_norm = attention.q_norm.weight if hasattr(attention, "q_norm") else None
        self.k_norm = attention.k_norm.weight if hasattr(attention, "k_norm") else None


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
