"""What a drafter is trained on: tokens of texts, with the hidden states that the target has behind each of them.

Of those that the drafter sees, and of the last one, from which the target's output matrix makes its law. A shard of
texts makes a shard of states, in a file of its own; it is not made again where it is there.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decodathlon.decoders.training.corpus import Say, Written
from decodathlon.harness import progress

#: Texts that are read side by side.
ROWS = 8


@dataclass(frozen=True)
class Seen:
    """A text with the target's hidden states."""

    #: (T,) of prompt and answer.
    tokens: Tensor
    #: (T, F * E), those behind each token, side by side.
    states: Tensor
    #: (T, E), the normed state that the output matrix is applied to.
    last: Tensor
    #: Where the answer begins.
    begin: int


def make(
    target: Any, ids: Sequence[int], shards: Sequence[Sequence[Written]], folder: Path, say: Say,
    until: float = math.inf,
) -> bool:  # fmt: skip
    """Write the states of every shard of texts; `ids` are hidden states as `Context.extend` numbers them. False where
    `until`, a time of the clock `time.monotonic`, came before all were there. States of other texts are made anew."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    missing = [number for number, texts in enumerate(shards) if _texts_of(folder, number) != hash_of(texts)]
    for number in progress.told(missing, "hidden states: shards", say):
        if time.monotonic() > until:
            return False
        seen = [
            one
            for at in range(0, len(shards[number]), ROWS)
            for one in _read(target, ids, shards[number][at : at + ROWS])
        ]
        empty = torch.zeros(0, target.config.hidden_size, dtype=torch.bfloat16)
        tensors = {
            "tokens": torch.cat([torch.zeros(0, dtype=torch.long), *(s.tokens for s in seen)]),
            "states": torch.cat([empty.repeat(1, len(ids)), *(s.states.bfloat16() for s in seen)]),
            "last": torch.cat([empty, *(s.last.bfloat16() for s in seen)]),
            "lengths": torch.tensor([len(s.tokens) for s in seen], dtype=torch.long),
            "begins": torch.tensor([s.begin for s in seen], dtype=torch.long),
        }
        work = path(folder, number).with_suffix(".part")
        save_file(tensors, str(work), metadata={"texts": hash_of(shards[number])})
        os.replace(work, path(folder, number))
    return True


def size(target: Any, ids: Sequence[int], shards: Sequence[Sequence[Written]]) -> int:
    """Bytes that the states of these texts take on disk."""
    tokens = sum(len(w.prompt) + len(w.answer) for texts in shards for w in texts)
    return tokens * (2 * target.config.hidden_size * (len(ids) + 1) + 8)


def hash_of(texts: Sequence[Written]) -> str:
    """Of a shard."""
    return hashlib.sha256(json.dumps([[w.prompt, w.answer] for w in texts]).encode()).hexdigest()


def _texts_of(folder: Path, number: int) -> str | None:
    """The hash of the texts that a shard of states is of, if there is one."""
    from safetensors import safe_open

    if not path(folder, number).exists():
        return None
    with safe_open(str(path(folder, number)), "pt") as file:
        return (file.metadata() or {}).get("texts")


def path(folder: Path, number: int) -> Path:
    return folder / f"states-{number:04}.safetensors"


def load(folder: Path, number: int) -> list[Seen]:
    from safetensors.torch import load_file

    found = load_file(str(path(folder, number)))
    lengths = found["lengths"].tolist()
    parts = (found[name].split(lengths) for name in ("tokens", "states", "last"))
    return [Seen(*one) for one in zip(*parts, found["begins"].tolist(), strict=True)]


def long_enough(folder: Path, number: int) -> list[int]:
    """Those texts of a shard whose answer has two tokens or more."""
    from safetensors import safe_open

    with safe_open(str(path(folder, number)), "pt") as file:
        lengths, begins = file.get_tensor("lengths").tolist(), file.get_tensor("begins").tolist()
    return [i for i, (length, begin) in enumerate(zip(lengths, begins, strict=True)) if length - begin >= 2]


@torch.no_grad()
def _read(target: Any, ids: Sequence[int], texts: Sequence[Written]) -> list[Seen]:
    whole = [[*w.prompt, *w.answer] for w in texts]
    last = target.config.num_hidden_layers + 1
    hidden = target.open(whole, capacity=max(map(len, whole)), hidden=[*ids, last]).prompt_hidden
    beside = torch.cat([hidden[last][..., :0], *(hidden[i] for i in ids)], -1)
    return [
        Seen(torch.tensor(tokens), beside[b, : len(tokens)].cpu(), hidden[last][b, : len(tokens)].cpu(), len(w.prompt))
        for b, (tokens, w) in enumerate(zip(whole, texts, strict=True))
    ]
