"""How the bytes of one tensor are kept: split into planes, each of which a scheme names, and put together again.

A tensor is looked at twice, in parts, so that nothing larger than its planes is ever held. What cannot gain stays as it
is: small tensors, whole numbers, and types that have no exponent to speak of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from decodathlon.decoders.jit_delta.q4 import Base

#: What `--scheme` may be.
SCHEMES = ("nested", "fixed12", "int4-delta")
#: How many first bits of a weight may be read alone, by scheme; the first of them unless another is asked for.
FIRST_BITS: dict[str, tuple[int, ...]] = {"nested": (5, 4, 6), "fixed12": (), "int4-delta": (4,)}
#: BF16 tensors of fewer weights stay as they are.
SMALL = 4096
#: Weights that are encoded at once: whole spans of `kernels.delta`.
PART = 1 << 18
#: Planes that are worth compressing on disk: those of exponents. Signs and mantissas are noise.
COMPRESSED = {"code", "escapes", "before", "spans", "escape_at", "scales"}
#: Planes that count weights.
PLACES = {"escape_at", "patch_at"}
#: Bytes of a number, of the types that are packed; all but BF16 are split into planes of bytes.
WIDTH = {"BF16": 2, "F16": 2, "F32": 4}


@dataclass
class Packed:
    """One tensor in planes."""

    #: A scheme, `bytes` (planes of the bytes of each number) or `raw`.
    form: str
    planes: dict[str, Tensor]
    #: What else is needed to put it together.
    facts: dict[str, Any] = field(default_factory=dict)
    #: Bits of each number that no code without context could do without: the entropy of its pattern; None where it was
    #: not looked at.
    floor: float | None = None
    #: The planes as the kernels take them, once they were asked for.
    ready: Any = None


def form_of(dtype: str, count: int, scheme: str) -> str:
    """What becomes of a tensor of a type that safetensors calls so."""
    if dtype == "BF16":
        # places of weights are 32 bits wide; what `nested` counts with has 64
        return "raw" if count < SMALL else scheme if count < 2**31 else "nested"
    return "bytes" if dtype in WIDTH and count >= SMALL else "raw"


def encode(
    data: Tensor, dtype: str, scheme: str, each: Callable[[Tensor], None] = lambda part: None, base: Base | None = None
) -> Packed:
    """Pack the bytes of a tensor.

    Args:
        data: (bytes,) uint8, which may lie in a file that is mapped.
        dtype: as safetensors calls it.
        each: is shown every part of the bytes once, in order.
        base: of `int4-delta`, where there is one already.
    """
    form = form_of(dtype, _count(data, dtype), scheme)
    if form == "raw":
        each(data)
        return Packed("raw", {"raw": data})
    if form == "bytes":
        return _bytes(data, WIDTH[dtype], each)
    return _weights(data, form, each, base)


def decode(packed: Packed, out: Tensor, bits: int = 0) -> str:
    """The bytes again, into `out` (bytes,) uint8. Returns what did it, as `kernels.delta.dispatch.rebuild` does.

    Args:
        bits: what so many first bits of each weight say, in BF16, where the scheme has such. 0: the weight.
    """
    from decodathlon.kernels.delta.dispatch import draft, rebuild

    if packed.form == "raw":
        out.copy_(packed.planes["raw"])
        return "copy"
    if packed.form == "bytes":
        numbers = out.view(-1, len(packed.planes))
        for name, plane in packed.planes.items():
            numbers[:, int(name.removeprefix("byte"))] = plane
        return "copy"
    if drafts(packed.form, bits):
        return draft(kernel_planes(packed), bits, out.view(torch.bfloat16))
    return rebuild(kernel_planes(packed), out.view(torch.int16))


def rows(packed: Packed, which: Tensor, columns: int, dtype: torch.dtype, bits: int = 0) -> Tensor:
    """(n, columns) numbers of `dtype`, which is the tensor's: these rows (n,) of it, put together from their blocks
    alone."""
    from decodathlon.kernels.delta import reference

    spread = torch.arange(columns, device=which.device)
    if packed.form in ("raw", "bytes"):
        wide = dtype.itemsize if packed.form == "raw" else 1
        at = (which[:, None] * columns + spread).flatten()
        some = {name: plane.view(-1, wide)[at].flatten() for name, plane in packed.planes.items()}
        found = torch.empty(len(at) * dtype.itemsize, dtype=torch.uint8, device=which.device)
        decode(Packed(packed.form, some), found)
        return found.view(dtype).view(-1, columns)
    begin = which * columns
    many = (columns + 2 * reference.BLOCK - 2) // reference.BLOCK  # blocks that a row may lie in
    blocks = (begin // reference.BLOCK)[:, None] + torch.arange(many, device=which.device)
    last = len(packed.planes["code"]) - 1
    whole = _of_blocks(packed, blocks.clamp(max=last).flatten(), dtype, bits).view(len(which), -1)
    return whole.gather(1, (begin % reference.BLOCK)[:, None] + spread)


def stretch(packed: Packed, begin: int, count: int, dtype: torch.dtype, bits: int = 0) -> Tensor:
    """(count,) numbers of `dtype`, which is the tensor's: those from number `begin` on."""
    from decodathlon.kernels.delta import reference

    if packed.form in ("raw", "bytes"):
        device = next(iter(packed.planes.values())).device
        return rows(packed, torch.arange(begin, begin + count, device=device), 1, dtype)[:, 0]
    first, last = begin // reference.BLOCK, (begin + count - 1) // reference.BLOCK
    blocks = torch.arange(first, last + 1, device=packed.planes["code"].device)
    at = begin - first * reference.BLOCK
    return _of_blocks(packed, blocks, dtype, bits)[at : at + count]


def _of_blocks(packed: Packed, blocks: Tensor, dtype: torch.dtype, bits: int) -> Tensor:
    """(256 n,) numbers: those of these blocks (n,) of weights, one behind the other."""
    from decodathlon.kernels.delta import reference

    few = reference.gathered(kernel_planes(packed), blocks)
    found = torch.empty(few.count * 2, dtype=torch.uint8, device=blocks.device)
    decode(Packed(packed.form, {}, ready=few), found, bits)
    return found.view(torch.bfloat16 if drafts(packed.form, bits) else dtype)


def drafts(form: str, bits: int) -> bool:
    """Whether a tensor of this form is read by so many first bits."""
    return bool(bits) and bits in FIRST_BITS.get(form, ())


def kernel_planes(packed: Packed) -> Any:
    """The planes as the kernels take them; those that were not read, of which a draft does without, are empty."""
    if packed.ready is None:
        kind, code = _forms()[packed.form][0], packed.planes["code"]
        known = packed.planes | packed.facts
        without = code.new_empty(len(code), 0)
        packed.ready = kind(**{name: known.get(name, without) for name in kind._fields})
    return packed.ready


def _forms() -> dict[str, tuple[Any, Callable[..., Any]]]:
    """Of each scheme, what its planes are and who makes them of bit patterns, given the plan of the whole and a base of
    them."""
    from decodathlon.kernels.delta import int4, reference

    return {
        "nested": (reference.Nested, lambda bits, known, base: reference.nested(bits, known)),
        "fixed12": (reference.Fixed12, lambda bits, known, base: reference.fixed12(bits, known)),
        "int4-delta": (int4.Int4Delta, lambda bits, known, base: int4.int4_delta(bits, base)),
    }


def _weights(data: Tensor, form: str, each: Callable[[Tensor], None], base: Base | None) -> Packed:
    from decodathlon.kernels.delta import reference

    bits = data.view(torch.int16)
    counts = torch.zeros(65536, dtype=torch.long)
    for part in bits.split(PART):
        each(part.view(torch.uint8))
        counts += reference.patterns(part)
    known = reference.plan(counts)
    make, blocks = _forms()[form][1], -(-len(bits) // reference.BLOCK)
    parts = ((at, bits[at : at + PART]) for at in range(0, len(bits), PART))
    bases = lambda at, part: base and base(at, -(-len(part) // reference.BLOCK))  # noqa: E731
    planes = _joined((make(part, known, bases(at, part))._asdict() for at, part in parts), blocks)
    if form == "nested":
        planes["means"] = known.means
    start = {"nested": known.nested, "fixed12": known.fixed12}.get(form)
    facts = {"count": len(bits)} | ({} if start is None else {"start": start})
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
        for places in PLACES & tensors.keys():
            tensors[places] = tensors[places] + at
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
    return len(data) // WIDTH.get(dtype, 1)
