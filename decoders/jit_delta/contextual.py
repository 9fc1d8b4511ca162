"""Contextual sparsity: of an MLP's delta, only what the draft's activations say that matters for this token.

The first bits of all weights are read. They give each channel of an MLP an activation; its magnitude, times what an
error of that channel costs by unit of it (measured once, on texts that the model writes), is the channel's load score.
Chunks of channels with the greatest scores are read exactly, the others stay as the first bits have them. Channels that
are active together share a chunk, so that what is read together is needed together (Deja Vu, arXiv 2310.17157, and
PowerInfer, arXiv 2312.12456, choose neurons so; the founding note scores deltas).

It is another model than the exact one. As a target it says so; as a drafter its errors are repaired.

Dimensions: T tokens, E width of the model, F channels of an MLP, G chunks of C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from decodathlon.decoders.speculative.layers import LENGTH, TEXTS, written
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

#: Channels that are read together.
CHUNK = 32


@dataclass
class Parts:
    """The two products of an MLP, in one form of its weights."""

    gate_up: Callable[[Tensor], Tensor]
    down: Callable[[Tensor], Tensor]

    def activations(self, x: Tensor) -> Tensor:
        """(..., F) what goes into the second product."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up


@dataclass
class Chunks:
    """Of one MLP."""

    #: (G, C) channels; the last chunk may name some twice.
    groups: Tensor
    #: (F,) error of the output, in norm, by unit of the draft's activation.
    sensitivity: Tensor


class Mixed:
    """An MLP whose chunks with the greatest load scores are exact, the others drafted; as two products of a layer
    (targets/lean.py), of which the second knows what the first has chosen."""

    def __init__(self, exact: Parts, draft: Parts, chunks: Chunks, share: float) -> None:
        self.exact, self.draft, self.chunks = exact, draft, chunks
        self.count = math.ceil(share * len(chunks.groups))
        #: Chunks that were read, of those that there were; of several tokens those that any of them asked for.
        self.read = self.there = 0

    def gate_up(self, x: Tensor) -> Tensor:
        drafted = self.draft.gate_up(x)
        gate, up = drafted.chunk(2, dim=-1)
        self._chosen = self.chosen(torch.nn.functional.silu(gate) * up)
        if self.count == 0:
            return drafted
        return torch.where(self._chosen.repeat(*[1] * (x.dim() - 1), 2), self.exact.gate_up(x), drafted)

    def down(self, hidden: Tensor) -> Tensor:
        rest = self.draft.down(hidden.masked_fill(self._chosen, 0.0)) if self.count < len(self.chunks.groups) else 0.0
        own = self.exact.down(hidden.masked_fill(~self._chosen, 0.0)) if self.count else 0.0
        return own + rest  # type: ignore[no-any-return]

    def chosen(self, activations: Tensor) -> Tensor:
        """(..., F) whether a channel is read exactly."""
        scores = (activations.abs().float() * self.chunks.sensitivity)[..., self.chunks.groups].sum(-1)
        best = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(self.count, -1).indices, True)
        self.read += int(best.flatten(0, -2).any(0).sum())
        self.there += len(self.chunks.groups)
        found = torch.zeros_like(activations, dtype=torch.uint8)
        places = self.chunks.groups.flatten().expand(*activations.shape[:-1], -1)
        # a channel that fills the last chunk up is read if either of its places is
        read = best.repeat_interleave(self.chunks.groups.shape[1], -1).to(torch.uint8)
        return found.scatter_add(-1, places, read) > 0


def mixed(
    forward: Any, drafted: Callable[[Any], Any], chunks: Sequence[Chunks], share: float, *, attention: bool
) -> tuple[Any, list[Mixed]]:
    """A forward (targets/lean.py) of this kind, and its MLPs.

    Args:
        drafted: of a product, the same with the first bits of its weights.
        attention: whether attention and head are of the first bits, too, or exact.
    """
    layers, parts = [], []
    for layer, own in zip(forward.layers, chunks, strict=True):
        exact = Parts(layer.mlp.gate_up, layer.mlp.down)
        one = Mixed(exact, Parts(drafted(layer.mlp.gate_up), drafted(layer.mlp.down)), own, share)
        changed = layer.mapped(drafted) if attention else layer
        layers.append(replace(changed, mlp=replace(layer.mlp, gate_up=one.gate_up, down=one.down)))
        parts.append(one)
    return forward.replaced(layers, drafted(forward.head) if attention else forward.head), parts


def calibrated(target: Any, drafted: Callable[[Any], Any]) -> list[Chunks]:
    """Chunks of every MLP of the target, by texts that it draws itself."""
    texts, forward = written(target, TEXTS, LENGTH, drawn=True)[0], target.lean
    seen: list[Tensor] = []
    layers = [replace(la, mlp=replace(la.mlp, gate_up=_Seeing(la.mlp.gate_up, seen))) for la in forward.layers]
    context = target.open([row[:1].tolist() for row in texts], capacity=texts.shape[1])
    context.lent(forward.replaced(layers)).extend(texts[:, 1:], logits_at=torch.tensor([0]))
    return [
        _chunks(x, Parts(la.mlp.gate_up, la.mlp.down), Parts(drafted(la.mlp.gate_up), drafted(la.mlp.down)),
                la.mlp.down.weight, drafted(la.mlp.down).weight)
        for x, la in zip(seen, forward.layers, strict=True)
    ]  # fmt: skip


class _Seeing:
    """A product that keeps what goes into it."""

    def __init__(self, product: Any, seen: list[Tensor]) -> None:
        self.product, self.seen = product, seen

    def __call__(self, x: Tensor) -> Tensor:
        self.seen.append(x.flatten(0, -2))
        found: Tensor = self.product(x)
        return found


def _chunks(x: Tensor, exact: Parts, draft: Parts, weight: Tensor, base: Tensor) -> Chunks:
    """Of an MLP that was seen with the inputs x (T, E), its second matrix `weight` (E, F) drafted as `base`."""
    own, other = exact.activations(x).float(), draft.activations(x).float()
    w, b = weight.float(), base.float()
    # the squared norm of own * w_j - other * b_j, for each token and channel
    error = own.square() * w.square().sum(0) - 2 * own * other * (w * b).sum(0) + other.square() * b.square().sum(0)
    error = error.clamp(min=0.0).sqrt()
    sensitivity = error.mean(0) / other.abs().mean(0).clamp(min=1e-12)
    return Chunks(together(other.abs() * sensitivity), sensitivity)


def together(scores: Tensor, size: int = CHUNK) -> Tensor:
    """(G, size) channels by chunk, of scores (T, F): those that are high for the same tokens share one.

    Halves of halves: each time the channels are sorted along the direction in which their scores, taken as shares of
    their channel, differ most.
    """
    shape = scores / scores.norm(dim=0).clamp(min=1e-12)
    count = shape.shape[1]
    missing = -count % size

    def halves(channels: Tensor) -> list[Tensor]:
        if len(channels) <= size:
            return [channels]
        some = shape[:, channels]
        centred = some - some.mean(1, keepdim=True)
        direction = _principal(centred)
        ordered = channels[(centred.T @ direction).argsort(stable=True)]
        middle = (len(channels) // size + 1) // 2 * size
        return [*halves(ordered[:middle]), *halves(ordered[middle:])]

    found = torch.cat(halves(torch.arange(count, device=scores.device)))
    return torch.cat([found, found[torch.arange(missing, device=found.device) % count]]).view(-1, size)


def _principal(centred: Tensor) -> Tensor:
    """(T,) the direction of the greatest variance of (T, F) columns, its sign fixed."""
    gram = (centred @ centred.T).double()
    direction = torch.linalg.eigh(gram).eigenvectors[:, -1]
    return (direction * torch.sign(direction[direction.abs().argmax()])).to(centred.dtype)


def of_first_bits(storage: Any, bits: int) -> Callable[[Any], Any]:
    """Of a packed product, the same with its first bits."""
    return lambda product: _First(product, storage, bits)


class _First:
    def __init__(self, product: Any, storage: Any, bits: int) -> None:
        self._product, self._drafting = product, lambda: storage.drafting(bits)

    def __call__(self, x: Tensor) -> Tensor:
        with self._drafting():
            found: Tensor = self._product(x)
        return found

    @property
    def weight(self) -> Tensor:
        with self._drafting():
            found: Tensor = self._product.weight
        return found
