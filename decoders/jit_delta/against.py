"""A model as what it differs in from another one: a fine-tune from its base, a checkpoint from the one before.

Numbers are compared by bit pattern (XOR), or by how many numbers of the type lie between them (ordinal difference,
with its sign in the last bit), whichever compresses better; the bytes of the result lie in planes, of which the high
ones are all but empty where models are near to one another. Tensors that are equal take nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from decodathlon.decoders.jit_delta.schemes import WIDTH, Packed
from decodathlon.harness.errors import MissingError
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

#: Numbers that are looked at at once, and those by which the better way of comparing is chosen.
PART, JUDGED = 1 << 20, 1 << 20


def difference(data: Tensor, base: Tensor, dtype: str, each: Callable[[Tensor], None] = lambda part: None) -> Packed:
    """What a tensor has that the base's tensor of the same type and shape has not.

    Args:
        data, base: (bytes,) uint8, which may lie in files that are mapped.
        each: is shown every part of `data` once, in order.
    """
    width = WIDTH[dtype]
    kind = {2: torch.int16, 4: torch.int32}[width]
    own, other = data.view(kind), base.view(kind)
    way = min(("xor", "ordinal"), key=lambda w: _compressed(_compare(own[:JUDGED], other[:JUDGED], w)))
    planes = {f"byte{i}": torch.empty(len(own), dtype=torch.uint8) for i in range(width)}
    digest, same = hashlib.sha256(), True
    for at in range(0, len(own), PART):
        mine, theirs = own[at : at + PART], other[at : at + PART]
        each(mine.view(torch.uint8))
        digest.update(theirs.view(torch.uint8).numpy())
        found = _compare(mine, theirs, way)
        same = same and not bool(found.any())
        for i, plane in enumerate(planes.values()):
            plane[at : at + PART] = found.view(torch.uint8).view(-1, width)[:, i]
    return Packed("against", {} if same else planes, {"way": way, "count": len(own), "base": digest.hexdigest()})


def applied(packed: Packed, base: Tensor, out: Tensor, what: str) -> None:
    """The bytes of the tensor into out (bytes,) uint8, given those of the base's.

    Raises:
        MissingError: the base is another one than it was packed against.
    """
    if hashlib.sha256(base.numpy()).hexdigest() != packed.facts["base"]:
        raise MissingError(f"{what}: the base is not the one that it was packed against")
    if not packed.planes:
        out.copy_(base)
        return
    found = joined(packed)
    out.view(found.dtype).copy_(changed(base.view(found.dtype), found, packed.facts["way"]))


def joined(packed: Packed) -> Tensor:
    """(N,) int16 or int32: the difference by number, out of its planes."""
    width = len(packed.planes)
    whole = torch.empty(packed.facts["count"], width, dtype=torch.uint8)
    for i in range(width):
        whole[:, i] = packed.planes[f"byte{i}"]
    return whole.view({2: torch.int16, 4: torch.int32}[width])[:, 0]


def changed(base: Tensor, difference: Tensor, way: str) -> Tensor:
    """(N,) int16 or int32: the patterns that differ from `base` so."""
    return base ^ difference if way == "xor" else _ordinal(_ordinal(base) + _steps(difference))


def undone(own: Tensor, difference: Tensor, way: str) -> Tensor:
    """The base again."""
    return own ^ difference if way == "xor" else _ordinal(_ordinal(own) - _steps(difference))


def _steps(difference: Tensor) -> Tensor:
    """What has its sign in the last bit, with it in the first."""
    return (difference >> 1 & torch.iinfo(difference.dtype).max) ^ -(difference & 1)


def _compare(own: Tensor, other: Tensor, way: str) -> Tensor:
    if way == "xor":
        return own ^ other
    steps = _ordinal(own) - _ordinal(other)  # wraps, and so does its way back
    return steps << 1 ^ steps >> torch.iinfo(steps.dtype).bits - 1


def _ordinal(patterns: Tensor) -> Tensor:
    """Of bit patterns their number in the order of the values, so that neighbours differ by 1; its own inverse."""
    return torch.where(patterns >= 0, patterns, torch.iinfo(patterns.dtype).min - 1 - patterns)


def _compressed(found: Tensor) -> int:
    """Bytes that it takes in planes."""
    import zstandard

    flat, width = found.contiguous().view(torch.uint8).view(-1, found.element_size()), found.element_size()
    compressor = zstandard.ZstdCompressor(level=1)
    return sum(len(compressor.compress(flat[:, i].contiguous().numpy().tobytes())) for i in range(width))
