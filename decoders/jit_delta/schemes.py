"""How the bytes of one tensor are kept: split into planes, each of which a scheme names, and put together again.

A tensor is looked at twice, in parts, so that nothing larger than its planes is ever held. What cannot gain stays as it
is: small tensors, whole numbers, and types that have no exponent to speak of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

#: What `--scheme` may be.
SCHEMES = ("nested", "fixed12")
#: BF16 tensors of fewer weights stay as they are.
SMALL = 4096
#: Weights that are encoded at once: whole spans of `kernels.delta`.
PART = 1 << 18
#: Planes that are worth compressing on disk: those of exponents. Signs and mantissas are noise.
COMPRESSED = {"code", "escapes", "before", "spans", "escape_at", "high"}
#: Bytes of a number, of the types that are split into planes of bytes.
SPLIT = {"F16": 2, "F32": 4}


@dataclass
class Packed:
    """One tensor in planes."""

    #: `nested`, `fixed12`, `bytes` (planes of the bytes of each number) or `raw`.
    form: str
    planes: dict[str, Tensor]
    #: What else is needed to put it together.
    facts: dict[str, Any] = field(default_factory=dict)
    #: Bits of each number that no code without context could do without: the entropy of its pattern; None where it was
    #: not looked at.
    floor: float | None = None


def form_of(dtype: str, count: int, scheme: str) -> str:
    """What becomes of a tensor of a type that safetensors calls so."""
    if dtype == "BF16":
        return scheme if count >= SMALL else "raw"
    return "bytes" if dtype in SPLIT and count >= SMALL else "raw"


def encode(data: Tensor, dtype: str, scheme: str, each: Callable[[Tensor], None] = lambda part: None) -> Packed:
    """Pack the bytes of a tensor.

    Args:
        data: (bytes,) uint8, which may lie in a file that is mapped.
        dtype: as safetensors calls it.
        each: is shown every part of the bytes once, in order.
    """
    form = form_of(dtype, _count(data, dtype), scheme)
    if form == "raw":
        each(data)
        return Packed("raw", {"raw": data})
    if form == "bytes":
        return _bytes(data, SPLIT[dtype], each)
    return _weights(data, form, each)


def decode(packed: Packed, out: Tensor) -> None:
    """The bytes again, into `out` (bytes,) uint8."""
    from decodathlon.kernels.delta.dispatch import rebuild

    if packed.form == "raw":
        out.copy_(packed.planes["raw"])
    elif packed.form == "bytes":
        numbers = out.view(-1, len(packed.planes))
        for name, plane in packed.planes.items():
            numbers[:, int(name.removeprefix("byte"))] = plane
    else:
        rebuild(kernel_planes(packed), out.view(torch.int16))


def kernel_planes(packed: Packed) -> Any:
    """The planes as the kernels take them."""
    from decodathlon.kernels.delta import reference

    kind = {"nested": reference.Nested, "fixed12": reference.Fixed12}[packed.form]
    known = packed.planes | {"start": packed.facts["start"], "count": packed.facts["count"]}
    return kind(**{name: known[name] for name in kind._fields})


def _weights(data: Tensor, form: str, each: Callable[[Tensor], None]) -> Packed:
    from decodathlon.kernels.delta import reference

    bits = data.view(torch.int16)
    counts = torch.zeros(65536, dtype=torch.long)
    for part in bits.split(PART):
        each(part.view(torch.uint8))
        counts += reference.patterns(part)
    known = reference.plan(counts)
    make: Callable[..., Any] = {"nested": reference.nested, "fixed12": reference.fixed12}[form]
    planes = _joined((make(part, known)._asdict() for part in bits.split(PART)), -(-len(bits) // reference.BLOCK))
    if form == "nested":
        planes["means"] = known.means
    facts = {"start": known.nested if form == "nested" else known.fixed12, "count": len(bits)}
    return Packed(form, planes, facts, entropy(counts))


def _joined(parts: Iterable[dict[str, Any]], blocks: int) -> dict[str, Tensor]:
    """Planes of parts, one behind the other; what counts escapes or places goes on where the part before ended.

    Those that have a row per block are large, and are written where they will stay.
    """
    whole: dict[str, Tensor] = {}
    found: dict[str, list[Tensor]] = {}
    escapes = at = begin = 0
    for part in parts:
        tensors = {name: value for name, value in part.items() if isinstance(value, torch.Tensor) and name != "means"}
        if "spans" in tensors:
            tensors["spans"] = tensors["spans"] + escapes
        if "escape_at" in tensors:
            tensors["escape_at"] = tensors["escape_at"] + at
        rows = len(tensors["code"])
        for name, tensor in tensors.items():
            if tensor.dim() == 2:
                if name not in whole:
                    whole[name] = tensor.new_empty(blocks, tensor.shape[1])
                whole[name][begin : begin + rows] = tensor
            else:
                found.setdefault(name, []).append(tensor)
        escapes, at, begin = escapes + len(tensors["escapes"]), at + part["count"], begin + rows
    return whole | {name: torch.cat(tensors) for name, tensors in found.items()}


def _bytes(data: Tensor, width: int, each: Callable[[Tensor], None]) -> Packed:
    """The first bytes of all numbers, then the second ones, and so on: that of the exponent alone repeats itself."""
    each(data)
    numbers = data.view(-1, width)
    return Packed("bytes", {f"byte{i}": numbers[:, i].contiguous() for i in range(width)})


def entropy(counts: Tensor) -> float:
    """Bits per number, of counts by pattern."""
    shares = counts[counts > 0].double() / counts.sum()
    return float(-(shares * shares.log2()).sum()) if len(shares) else 0.0


def _count(data: Tensor, dtype: str) -> int:
    return math.floor(len(data) / {"BF16": 2, "F16": 2, "F32": 4}.get(dtype, 1))
