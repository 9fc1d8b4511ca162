"""Reader of llama2.c checkpoints (legacy layout, version 0) and their tokenizers; `stories-260k` is one.

The file is 7 int32 (dim, hidden, layers, heads, key heads, vocabulary, context) and little-endian float32 tensors.
Queries and keys are stored for interleaved rotary pairs; Hugging Face rotates halves, so their rows are reordered.
"""

from __future__ import annotations

import heapq
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decodathlon.harness.errors import MissingError

CHECKPOINT, TOKENIZER = "stories260K.bin", "tok512.bin"


def load(folder: Path) -> tuple[Any, Llama2cTokenizer]:
    """The model, float32, and its tokenizer.

    Raises:
        MissingError: a file is not there or has the wrong size.
    """
    for name in (CHECKPOINT, TOKENIZER):
        if not (folder / name).is_file():
            raise MissingError(
                f"{folder} has no {name}; fetch stories260K.bin and tok512.bin of karpathy/tinyllamas from the hub "
                f"and write stories-260k[path=FOLDER]"
            )
    return _model(folder / CHECKPOINT), Llama2cTokenizer(folder / TOKENIZER)


def _model(path: Path) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    data = path.read_bytes()
    dim, hidden, layers, heads, key_heads, vocabulary, context = struct.unpack("<7i", data[:28])
    width, kv = dim // heads, dim // heads * key_heads
    shapes = [
        ("embed", (vocabulary, dim)), ("norm_in", (layers, dim)), ("q", (layers, dim, dim)), ("k", (layers, kv, dim)),
        ("v", (layers, kv, dim)), ("o", (layers, dim, dim)), ("norm_mid", (layers, dim)),
        ("gate", (layers, hidden, dim)), ("down", (layers, dim, hidden)), ("up", (layers, hidden, dim)),
        ("norm", (dim,)), ("rope", (2, context, width // 2)),
    ]  # fmt: skip
    flat = torch.frombuffer(bytearray(data[28:]), dtype=torch.float32)
    sizes = [torch.Size(shape).numel() for _, shape in shapes]
    if flat.numel() != sum(sizes):
        raise MissingError(
            f"{path} has {flat.numel()} numbers, its header asks for {sum(sizes)}: not a whole checkpoint"
        )
    t = {name: part.view(shape) for (name, shape), part in zip(shapes, flat.split(sizes), strict=True)}

    def halves(w: Any, n: int) -> Any:
        return w.view(n, width // 2, 2, dim).transpose(1, 2).reshape(n * width, dim)

    state = {"model.embed_tokens.weight": t["embed"], "model.norm.weight": t["norm"], "lm_head.weight": t["embed"]}
    for i in range(layers):
        block = f"model.layers.{i}."
        state |= {
            block + "input_layernorm.weight": t["norm_in"][i],
            block + "post_attention_layernorm.weight": t["norm_mid"][i],
            block + "self_attn.q_proj.weight": halves(t["q"][i], heads),
            block + "self_attn.k_proj.weight": halves(t["k"][i], key_heads),
            block + "self_attn.v_proj.weight": t["v"][i],
            block + "self_attn.o_proj.weight": t["o"][i],
            block + "mlp.gate_proj.weight": t["gate"][i],
            block + "mlp.up_proj.weight": t["up"][i],
            block + "mlp.down_proj.weight": t["down"][i],
        }
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, max_position_embeddings=context,
        rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model


class Llama2cTokenizer:
    """Byte-fallback BPE by scores, as `tokenizer.bin` of llama2.c stores it. Called like a Hugging Face tokenizer."""

    chat_template = None

    def __init__(self, path: Path) -> None:
        data, at = path.read_bytes(), 4
        self.pieces: list[bytes] = []
        self.scores: list[float] = []
        while at < len(data):
            score, size = struct.unpack_from("<fi", data, at)
            self.pieces.append(data[at + 8 : at + 8 + size])
            self.scores.append(score)
            at += 8 + size
        # The first 259 are unk, BOS, EOS and the 256 raw bytes; a merge is looked up among the rest.
        self.index = {piece: i for i, piece in enumerate(self.pieces) if i >= 259}

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        tokens: list[int] = []
        for char in (" " + text) if text else "":
            raw = char.encode()
            tokens += [self.index[raw]] if raw in self.index else [byte + 3 for byte in raw]
        return {"input_ids": ([1] if add_special_tokens else []) + self._merged(tokens)}

    def _merged(self, tokens: list[int]) -> list[int]:
        """Merge the pair of the greatest score, the leftmost of equals, until none is left."""
        after = [*range(1, len(tokens)), -1]
        before = [-1, *range(len(tokens) - 1)]
        heap: list[tuple[float, int, int, int, int]] = []

        def offer(i: int) -> None:
            j = after[i]
            merged = self.index.get(self._bytes(tokens[i]) + self._bytes(tokens[j])) if j >= 0 else None
            if merged is not None:
                heapq.heappush(heap, (-self.scores[merged], i, tokens[i], tokens[j], merged))

        for i in range(len(tokens)):
            offer(i)
        gone = [False] * len(tokens)
        while heap:
            _, i, left, right, merged = heapq.heappop(heap)
            j = after[i]
            # an offer whose tokens have been merged otherwise since is void
            if gone[i] or j < 0 or (tokens[i], tokens[j]) != (left, right):
                continue
            tokens[i], gone[j], after[i] = merged, True, after[j]
            if after[j] >= 0:
                before[after[j]] = i
            offer(i)
            if before[i] >= 0:
                offer(before[i])
        return [t for t, g in zip(tokens, gone, strict=True) if not g]

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        raw = b"".join(self._bytes(t) for t in tokens if t > 2)
        return raw.decode(errors="replace").removeprefix(" ")

    def _bytes(self, token: int) -> bytes:
        return bytes([token - 3]) if 3 <= token < 259 else self.pieces[token]
