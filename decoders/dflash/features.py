"""What a drafter is trained on: tokens of texts, with the hidden states that the target has behind each of them.

A shard of texts makes a shard of states, in a file of its own; it is not made again where it is there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decodathlon.decoders.dflash.corpus import Say, Written
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
    #: Where the answer begins.
    begin: int


def make(target: Any, ids: Sequence[int], shards: Sequence[Sequence[Written]], folder: Path, say: Say) -> None:
    """Write the states of every shard of texts; `ids` are hidden states as `Context.extend` numbers them."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    missing = [number for number in range(len(shards)) if not path(folder, number).exists()]
    for number in progress.told(missing, "hidden states: shards", say):
        seen = [
            one
            for at in range(0, len(shards[number]), ROWS)
            for one in _read(target, ids, shards[number][at : at + ROWS])
        ]
        tensors = {
            "tokens": torch.cat([torch.zeros(0, dtype=torch.long), *(s.tokens for s in seen)]),
            "states": torch.cat(
                [torch.zeros(0, len(ids) * target.config.hidden_size), *(s.states for s in seen)]
            ).bfloat16(),
            "lengths": torch.tensor([len(s.tokens) for s in seen], dtype=torch.long),
            "begins": torch.tensor([s.begin for s in seen], dtype=torch.long),
        }
        work = path(folder, number).with_suffix(".part")
        save_file(tensors, str(work))
        os.replace(work, path(folder, number))


def path(folder: Path, number: int) -> Path:
    return folder / f"states-{number:04}.safetensors"


def load(folder: Path, number: int) -> list[Seen]:
    from safetensors.torch import load_file

    found = load_file(str(path(folder, number)))
    lengths = found["lengths"].tolist()
    parts = zip(found["tokens"].split(lengths), found["states"].split(lengths), found["begins"].tolist(), strict=True)
    return [Seen(tokens, states, begin) for tokens, states, begin in parts]


@torch.no_grad()
def _read(target: Any, ids: Sequence[int], texts: Sequence[Written]) -> list[Seen]:
    whole = [[*w.prompt, *w.answer] for w in texts]
    hidden = target.open(whole, capacity=max(map(len, whole)), hidden=list(ids)).prompt_hidden
    beside = torch.cat([hidden[i] for i in ids], -1)
    return [
        Seen(torch.tensor(tokens), beside[b, : len(tokens)].cpu(), len(w.prompt))
        for b, (tokens, w) in enumerate(zip(whole, texts, strict=True))
    ]
