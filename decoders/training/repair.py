"""Self-distillation of drafters that are made of the target's own matrices: what was taken away stays away, and the
rest learns what the target says in texts of its own (SD2, arXiv 2504.08838, for pruned weights).

The drafter is trained as a model that reads its own keys and values, and looked at as such: `agreement` counts the
target's tokens that it would guess behind a text which it has read itself. Where it drafts in the target's memory it
meets those of the target too, which it was not trained with, so `draft_acceptance` of a run may say something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decodathlon.decoders.speculative.matrices import GROUP, Int4, Int8, int4
from decodathlon.decoders.training.features import Seen
from decodathlon.decoders.training.trainer import Recipe, Trainer
from decodathlon.harness.targets.lean import Dense


class Masked(nn.Module):
    """A weight of which what is zero stays zero."""

    def __init__(self, dense: Dense) -> None:
        super().__init__()
        self.weight = nn.Parameter(dense.weight.detach().to(torch.float32, copy=True))
        self.bias = None if dense.bias is None else nn.Parameter(dense.bias.detach().to(torch.float32, copy=True))
        self.register_buffer("mask", dense.weight.detach() != 0)  # kept: it may turn out otherwise another time

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)

    def settled(self, dtype: torch.dtype) -> Dense:
        bias = None if self.bias is None else self.bias.detach().to(dtype)
        return Dense((self.weight * self.mask).detach().to(dtype), bias)


class Scaled(nn.Module):
    """Whole numbers that stay, of a matrix whose scales (and zeros, where it has some) may change: in parts of
    themselves, for which one learning rate suits all."""

    def __init__(self, matrix: Int4 | Int8, own: Dense) -> None:
        super().__init__()
        self.matrix, self.bias = matrix, matrix.bias
        if isinstance(matrix, Int8):
            q, scale, zero = matrix.weight[:, None], matrix.scale[:, None], None
        else:
            scale, zero = (matrix.scales[..., part].T for part in (0, 1))
            zero = zero if bool(zero.any()) else None
            q = int4(own.weight, zero is not None)[0].unflatten(1, (-1, GROUP)) - 8
        self.register_buffer("q", q.to(torch.int8))
        self.register_buffer("begun", scale.float())
        self.register_buffer("begun_zero", None if zero is None else zero.float())
        self.longer = nn.Parameter(torch.zeros(scale.shape, device=scale.device))
        self.shift = None if zero is None else nn.Parameter(torch.zeros(scale.shape, device=scale.device))

    @property
    def scale(self) -> Tensor:
        return self.begun * (1 + self.longer)

    @property
    def zero(self) -> Tensor | None:
        return None if self.shift is None else self.begun_zero + self.begun * self.shift

    @property
    def weight(self) -> Tensor:
        """(out, in)"""
        found, zero = self.q * self.scale[..., None], self.zero
        return (found if zero is None else found + zero[..., None]).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, None if self.bias is None else self.bias.float())

    def settled(self, dtype: torch.dtype) -> Int4 | Int8:
        found = type(self.matrix).__new__(type(self.matrix))  # its constructor would round anew
        found.bias = self.bias
        scale, zero = self.scale.detach(), self.zero
        if isinstance(self.matrix, Int8):
            found.weight, found.scale = self.matrix.weight, scale[:, 0].to(dtype)
        else:
            zero = torch.zeros_like(scale) if zero is None else zero.detach()
            found.packed = self.matrix.packed
            found.scales = torch.stack([scale, zero], -1).transpose(0, 1).contiguous().to(dtype)
        return found


class Repairable(nn.Module):
    """A drafter's forward with those of its matrices free that are not the target's own.

    Raises:
        ValueError: none is, or one has a form of which it is not known what may change.
    """

    def __init__(self, made: Any, own: Any, *, rounded: bool) -> None:
        super().__init__()
        self.free = nn.ModuleList()
        theirs = (_matrices(layer) for layer in own.layers)

        def change(matrix: Any) -> Any:
            original = next(originals)
            if matrix is original:
                return matrix
            if isinstance(matrix, Int4 | Int8):
                self.free.append(Scaled(matrix, original))
            elif type(matrix) is Dense and not rounded:
                self.free.append(Masked(matrix))
            else:
                raise ValueError("its weights are rounded, and have no scales on this device that could be trained")
            return self.free[-1]

        layers = []
        for layer, original_layer in zip(made.layers, theirs, strict=True):
            originals = iter(original_layer)
            layers.append(layer.mapped(change))
        if not self.free:
            raise ValueError("all its matrices are the target's own, and there is nothing to train")
        self.reading = made.replaced(layers)

    def settled(self, dtype: torch.dtype) -> Iterator[Any]:
        """Its layers as drafters have them."""
        for layer in self.reading.layers:
            yield layer.mapped(lambda m: m.settled(dtype) if isinstance(m, Masked | Scaled) else m)


def _matrices(layer: Any) -> list[Any]:
    """In the order of `Layer.mapped`."""
    found: list[Any] = []
    layer.mapped(found.append)
    return found


class Repair(Trainer):
    """One self-distillation of a drafter for `target`."""

    watched = "agreement", "of the model's tokens are the drafter's likeliest"

    def __init__(
        self, drafter: Repairable, target: Any, folder: Path, shards: Sequence[int], held_out: Sequence[Seen],
        recipe: Recipe, identity: Mapping[str, Any],
    ) -> None:  # fmt: skip
        head = target.model.get_output_embeddings().weight
        super().__init__(drafter.train(), head, folder, shards, held_out, recipe, identity)
        self.drafter, self.target = drafter, target

    def outputs(self, texts: Sequence[Seen]) -> list[Tensor]:
        """By text (A, E), the drafter's states from which it would guess each token of the answer. Through the keys and
        values of the first token of a text, which `open` reads, no gradient flows."""
        width = max(len(s.tokens) for s in texts)
        tokens = torch.stack([F.pad(s.tokens, (0, width - len(s.tokens))) for s in texts]).to(self.device)
        last = len(self.drafter.reading.layers) + 1
        with torch.no_grad():
            first = [s.tokens[:1].tolist() for s in texts]
            context = self.target.open(first, capacity=width, forward=self.drafter.reading)
        step = context.extend(tokens[:, 1:], hidden=[last], logits_at=torch.tensor([0]))
        # what lies at i was read from token i + 1, and guesses the one behind it
        return [step.hidden[last][b, s.begin - 2 : len(s.tokens) - 2] for b, s in enumerate(texts)]

    def loss(self, texts: Sequence[Seen], generator: torch.Generator) -> Tensor:
        outputs = torch.cat(self.outputs(texts))
        last = torch.cat([s.last[s.begin - 1 : -1] for s in texts]).to(self.device)
        tokens = torch.cat([s.tokens[s.begin :] for s in texts]).to(self.device)
        return self.errors(outputs, last, tokens, generator).mean()

    def look(self) -> float:
        right = total = 0
        for text in self.held_out:
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                found = F.linear(self.outputs([text])[0], self.head).argmax(-1).cpu()
            right += int((found == text.tokens[text.begin :]).sum())
            total += len(found)
        return right / max(1, total)
