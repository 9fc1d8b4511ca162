"""The network that drafts a whole block of tokens in one pass (Chen, Liang, Liu 2026, DFlash, arXiv 2602.06036).

It has blocks of the Qwen3 kind with weights of their own; embeddings and output matrix are the target's. What it knows
of the text are hidden states of the target: those behind some layers, side by side, are brought to the model's width by
`fc` and normed once (`Network.context`), and every block takes keys and values from that, with the same matrices that
it uses for its own input. The input is the text's last token and masks behind it. There is no causal mask: each place
of the draft sees the whole context and the whole block, and its output guesses the token of that very place.

Names and shapes of the parameters are those of the released checkpoints.

Dimensions: B rows, T tokens of context, b places of a block, E model width, F hidden states side by side, H query
heads, K key heads, D head width, S slots of a memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decodathlon.decoders.dflash.config import Config
from decodathlon.harness.targets.lean import rotate


class Norm(nn.RMSNorm):
    """In the type of its weight, as one operation: in training that is a wider one than the input's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class Attention(nn.Module):
    """Queries of the block over keys of the context and of the block."""

    def __init__(self, config: Config, number: int) -> None:
        super().__init__()
        E, H, K, D = config.hidden_size, config.heads, config.key_heads, config.head_dim
        self.heads, self.key_heads, self.width = H, K, D
        self.q_proj = nn.Linear(E, H * D, bias=config.attention_bias)
        self.k_proj = nn.Linear(E, K * D, bias=config.attention_bias)
        self.v_proj = nn.Linear(E, K * D, bias=config.attention_bias)
        self.o_proj = nn.Linear(H * D, E, bias=config.attention_bias)
        self.q_norm = Norm(D, eps=config.rms_norm_eps)
        self.k_norm = Norm(D, eps=config.rms_norm_eps)
        self.window, self.causal = config.window(number), config.causal(number)

    def keys_values(self, x: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
        """Keys, turned, and values of (B, T, E), each (B, K, T, D)."""
        B, T, _ = x.shape
        keys = rotate(self.k_norm(self.k_proj(x).view(B, T, self.key_heads, self.width)), *turn)
        values = self.v_proj(x).view(B, T, self.key_heads, self.width)
        return keys.transpose(1, 2), values.transpose(1, 2)

    def queries(self, x: Tensor, turn: Turn) -> Tensor:
        B, b, _ = x.shape
        return rotate(self.q_norm(self.q_proj(x).view(B, b, self.heads, self.width)), *turn).transpose(1, 2)

    def mixed(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """(B, b, E) of queries (B, H, b, D) over keys (B, K, S, D); `mask` is (B or 1, b, S), true where they see."""
        B, _, b, D = queries.shape
        K, G = self.key_heads, self.heads // self.key_heads
        # the heads that share keys are folded into the places, as attention.attend does
        folded = None if mask is None else mask[:, None].repeat(1, 1, G, 1)
        out = F.scaled_dot_product_attention(queries.reshape(B, K, G * b, D), keys, values, attn_mask=folded)
        return self.o_proj(out.reshape(B, self.heads, b, D).transpose(1, 2).reshape(B, b, -1))


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        E, wide = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(E, wide, bias=False)
        self.up_proj = nn.Linear(E, wide, bias=False)
        self.down_proj = nn.Linear(wide, E, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: Config, number: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, number)
        self.mlp = MLP(config)
        self.input_layernorm = Norm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Norm(config.hidden_size, eps=config.rms_norm_eps)


#: Cosines and signed sines of positions, (B, T, 1, D) each.
Turn = tuple[Tensor, Tensor]


class Network(nn.Module):
    """The drafter without a memory; `Memory` is one."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList([Block(config, i) for i in range(config.num_hidden_layers)])
        self.norm = Norm(config.hidden_size, eps=config.rms_norm_eps)
        self.fc = nn.Linear(len(config.target_layer_ids) * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = Norm(config.hidden_size, eps=config.rms_norm_eps)

    @cached_property
    def _rotary(self) -> Any:
        # made late and never registered: a change of type would round its frequencies, and on `meta` there are none
        return self.config.rotary().to(self.norm.weight.device)

    def context(self, states: Tensor) -> Tensor:
        """(B, T, E) what the blocks see of the target's hidden states (B, T, F * E)."""
        return self.hidden_norm(self.fc(states))

    def turn(self, positions: Tensor) -> Turn:
        """For positions (B, T)."""
        cos, sin = self._rotary(self.norm.weight, positions)
        half = sin.shape[-1] // 2
        return cos[:, :, None], torch.cat([-sin[..., :half], sin[..., half:]], -1)[:, :, None]

    def read(self, context: Tensor, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of what `context` (B, T, E) gives, by layer."""
        turn = self.turn(positions)
        return [block.self_attn.keys_values(context, turn) for block in self.layers]

    def block(self, x: Tensor, positions: Tensor, attended: Any) -> Tensor:
        """(B, b, E) normed outputs for the block's embeddings x (B, b, E).

        Args:
            positions: (B, b).
            attended: from a layer's number and the keys and values of the block, each (B, K, b, D), to those of context
                and block, and the mask.
        """
        turn = self.turn(positions)
        x = x * self.config.input_embedding_scale
        for number, layer in enumerate(self.layers):
            normed = layer.input_layernorm(x)
            keys, values, mask = attended(number, *layer.self_attn.keys_values(normed, turn))
            x = x + layer.self_attn.mixed(layer.self_attn.queries(normed, turn), keys, values, mask)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.norm(x)

    def logits(self, outputs: Tensor, head: Any) -> Tensor:
        """Logits by the target's output matrix, scaled and capped as the checkpoint says."""
        found = head(outputs)
        found = found.to(torch.promote_types(found.dtype, torch.float32)) * self.config.output_multiplier
        cap = self.config.final_logit_softcapping
        return torch.tanh(found / cap) * cap if cap else found


class Memory:
    """Keys and values of the tokens that the target has read, by layer; row b holds `lengths[b]` of them.

    A block's own keys stand behind them while it is drafted, and are written over afterwards.
    """

    #: Whether the last block took the time that blocks take; `captured` has those that do not.
    usual = True
    #: What went otherwise than meant.
    trouble = ""

    def __init__(self, network: Network, rows: int, capacity: int) -> None:
        self.network, self.lengths = network, [0] * rows
        self.capacity = capacity
        attention = network.layers[0].self_attn
        like = network.norm.weight
        shape = (rows, attention.key_heads, capacity, attention.width)
        self._keys = [like.new_zeros(shape) for _ in network.layers]
        self._values = [like.new_zeros(shape) for _ in network.layers]

    def append(self, states: Tensor, counts: Sequence[int]) -> None:
        """Take up hidden states (B, T, F * E) of the next tokens; of row b the first counts[b] are meant."""
        T = max(counts, default=0)
        if not T:
            return
        read = self.network.read(self.network.context(states[:, :T].to(self._keys[0].dtype)), self._places(T))
        for number, (keys, values) in enumerate(read):
            self._write(number, keys, values)
        self.lengths = [n + c for n, c in zip(self.lengths, counts, strict=True)]

    def draft(self, x: Tensor) -> Tensor:
        """(B, b, E) normed outputs of a block with embeddings x (B, b, E)."""
        b = x.shape[1]
        end = max(self.lengths) + b

        def attended(number: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
            self._write(number, keys, values)
            attention = self.network.layers[number].self_attn
            return (
                self._keys[number][:, :, :end],
                self._values[number][:, :, :end],
                self._mask(b, end, attention.window, attention.causal),
            )

        return self.network.block(x, self._places(b), attended)

    def select(self, rows: Sequence[int]) -> None:
        self.lengths = [self.lengths[row] for row in rows]
        index = torch.tensor(list(rows), device=self._keys[0].device)
        self._keys = [k.index_select(0, index) for k in self._keys]
        self._values = [v.index_select(0, index) for v in self._values]

    def copied(self, rows: Sequence[int], room: int) -> Memory:
        """A memory with these rows of this one, which may come several times, and room for so many tokens more."""
        other = Memory.__new__(Memory)
        other.network, other.lengths = self.network, list(self.lengths)
        other.capacity = max(self.lengths) + room
        other._keys = [k[:, :, : other.capacity] for k in self._keys]
        other._values = [v[:, :, : other.capacity] for v in self._values]
        other.select(rows)
        return other

    def _places(self, count: int) -> Tensor:
        """(B, count) positions behind each row."""
        return torch.tensor(self.lengths)[:, None].add(torch.arange(count)).to(self._keys[0].device)

    def _write(self, number: int, keys: Tensor, values: Tensor) -> None:
        T = keys.shape[2]
        if max(self.lengths) + T > self.capacity:
            raise ValueError(f"a drafter's memory of {self.capacity} tokens cannot take {T} behind {self.lengths}")
        if len(set(self.lengths)) == 1:
            self._keys[number].narrow(2, self.lengths[0], T).copy_(keys)
            self._values[number].narrow(2, self.lengths[0], T).copy_(values)
            return
        slots = self._places(T)
        row = torch.arange(len(self.lengths), device=slots.device)[:, None]
        self._keys[number][row, :, slots] = keys.transpose(1, 2)
        self._values[number][row, :, slots] = values.transpose(1, 2)

    def _mask(self, b: int, end: int, window: int | None, causal: bool) -> Tensor | None:
        """(B, b, end), true where a place of the block sees a slot; None where all see all."""
        if len(set(self.lengths)) == 1 and not causal and (window is None or end <= window):
            return None
        places = self._places(b)[:, :, None]
        slot = torch.arange(end, device=places.device)
        return seen(places, slot, slot < places[:, :1] + b, window, causal)


def seen(places: Tensor, slots: Tensor, there: Tensor, window: int | None, causal: bool) -> Tensor:
    """Who sees whom: a place (B, b, 1) what is `there`, unless it is too far off or, for a causal layer, behind it."""
    found = there.expand(-1, places.shape[1], -1)
    if causal:
        found = found & (slots <= places)
    if window is not None:
        found = found & (places - slots < window)
        if not causal:
            found = found & (slots - places < window)
    return found
