"""Bit-exact BF16 weights in fewer bits, two ways, in plain torch: the definition of each.

A weight is 16 bits: sign, 8 of exponent, 7 of mantissa. Mantissas and signs of trained weights cannot be compressed,
exponents have about 2.6 bits, because nearly all lie within a few neighbouring binades (a window). What lies outside of
it is an escape.

`Nested`: sign and a 3-bit code of the exponent are a draft of the weight in 4 bits; one or two bits of mantissa make it
5 or 6; all of them make it the weight. So one copy of the bytes is both models, after the bit-sharing of SPEQ (arXiv
2510.18525) and the window of ZipServ (ASPLOS 2026).
`Fixed12`: a 4-bit code of the exponent, and a byte of sign and mantissa. Hardly any escapes, so it is decoded fastest.

All work on bit patterns, int16, so that NaN payloads, infinities, negative zeros and subnormals come back as they were.

Within a block of 256 weights, byte i of a plane of nibbles holds weights i and i + 128, and byte i of a plane of bits
weights i, i + 32, ..., i + 224: what is unpacked with one shift lies side by side.

Dimensions: N weights, B = ceil(N / 256) blocks, E escapes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 256
#: Blocks whose escapes are counted together.
SPAN = 256
#: Planes of places, ascending, and what stands there.
PLACED = {"escape_at": "escapes", "patch_at": "patches"}
#: Codes of the exponent, of which the last says that there is none.
NESTED, FIXED = 7, 15


class Nested(NamedTuple):
    """Planes of `nested`, uint8 unless said otherwise."""

    #: (B, 128) sign and code of the exponent.
    code: Tensor
    #: (B, 32) the first and the second bit of the mantissa.
    first: Tensor
    second: Tensor
    #: (B, 128) the four bits behind them, and (B, 32) the last one.
    middle: Tensor
    last: Tensor
    #: (E,) exponents of the escapes, in their order.
    escapes: Tensor
    #: (B,) int16 that is read unsigned: escapes before a block, within its span; (ceil(B / 256),) int64: before a span.
    before: Tensor
    spans: Tensor
    #: (7,) float32, the 1.mantissa that stands for all with the same first bits in a draft: of none of them, of first
    #: bit 0 and 1, and of the first two bits 00 to 11.
    means: Tensor
    #: Exponent of code 0, and the number of weights.
    start: int
    count: int


class Fixed12(NamedTuple):
    #: (B, 128) uint8 code of the exponent; (B, 256) uint8 sign and mantissa.
    code: Tensor
    rest: Tensor
    #: (E,) int32 places and uint8 exponents of what has no code.
    escape_at: Tensor
    escapes: Tensor
    start: int
    count: int


class Plan(NamedTuple):
    """What an encoder has to know of the whole tensor before it encodes any part of it."""

    #: Exponent of code 0 in each form.
    nested: int
    fixed12: int
    means: Tensor


def patterns(bits: Tensor) -> Tensor:
    """(65536,) int64: how often each bit pattern comes in (N,) int16. Those of several parts may be added up."""
    return torch.bincount(bits.flatten().int() & 0xFFFF, minlength=65536)


def plan(counts: Tensor) -> Plan:
    """From `patterns` of the whole tensor."""
    u = torch.arange(65536)
    exponent, mantissa = u >> 7 & 255, u & 127
    by_exponent = torch.zeros(256, dtype=torch.long).index_add_(0, exponent, counts)
    start = _window(by_exponent, NESTED)
    # a squared error counts by the square of the power of two before it; of what is not finite there is none
    energy = counts * torch.where(exponent < 255, torch.exp2(2.0 * (exponent - start).double()), 0.0)
    means = []
    for kept in range(3):
        for prefix in range(2**kept):
            some = mantissa >> (7 - kept) == prefix
            total = float(energy[some].sum())
            found = float((energy * (1 + mantissa / 128))[some].sum() / total) if total > 0 else 0.0
            # where there is none: the middle of those there could be
            means.append(found or 1 + (prefix + 0.5) / 2**kept)
    return Plan(start, _window(by_exponent, FIXED), torch.tensor(means, dtype=torch.float32))


def nested(bits: Tensor, known: Plan | None = None) -> Nested:
    """Encode bit patterns (N,) int16. Parts of `SPAN` blocks, encoded by the plan of the whole, can be put one behind
    the other; `spans` of each goes on where the one before ended."""
    known = known or plan(patterns(bits))
    start, u = known.nested, padded(bits, known.nested)
    exponent, mantissa = u >> 7 & 255, u & 127
    inside = (exponent >= start) & (exponent < start + NESTED)
    code = torch.where(inside, exponent - start, NESTED) | (u >> 15) << 3
    counts = (~inside).sum(1)
    spans = spans_of(counts)
    before = counts.cumsum(0) - counts - spans.repeat_interleave(SPAN)[: len(counts)]
    return Nested(
        nibbles(code), _bits(mantissa >> 6), _bits(mantissa >> 5), nibbles(mantissa >> 1), _bits(mantissa),
        exponent[~inside].to(torch.uint8), low16(before), spans, known.means, start, len(bits),
    )  # fmt: skip


def nested_exact(planes: Nested) -> Tensor:
    """The bit patterns (N,) int16 again."""
    sign, exponent = _sign_exponent(planes)
    mantissa = _unbit(planes.first) << 6 | _unbit(planes.second) << 5 | unnibbled(planes.middle) << 1
    return low16(sign << 15 | exponent << 7 | mantissa | _unbit(planes.last)).flatten()[: planes.count]


def nested_draft(planes: Nested, bits: int) -> Tensor:
    """(N,) bfloat16: what sign, exponent, and none, one or two bits of the mantissa say, which is 4, 5 or 6 bits and
    the escapes. What has the same prefix becomes its mean; subnormals become 0."""
    kept = bits - 4
    sign, exponent = _sign_exponent(planes)
    prefix = torch.zeros_like(exponent)
    for plane in (planes.first, planes.second)[:kept]:
        prefix = prefix << 1 | _unbit(plane)
    mean = planes.means[2**kept - 1 : 2 ** (kept + 1) - 1][prefix.long()]
    power = (exponent << 23).view(torch.float32)  # by its bit pattern
    return (mean * power * (1 - 2 * sign)).to(torch.bfloat16).flatten()[: planes.count]


def _sign_exponent(planes: Nested) -> tuple[Tensor, Tensor]:
    """(B, 256) int32 of each."""
    code = unnibbled(planes.code)
    sign, code = code >> 3, code & 7
    outside = code == NESTED
    if not len(planes.escapes):
        return sign, planes.start + code
    known = planes.escapes.int()[ranks(planes, outside).clamp(max=len(planes.escapes) - 1)]
    return sign, torch.where(outside, known, planes.start + code)


def fixed12(bits: Tensor, known: Plan | None = None) -> Fixed12:
    """Encode bit patterns (N,) int16, in parts as `nested` is; places of escapes are within the part."""
    start = (known or plan(patterns(bits))).fixed12
    u = padded(bits, start)
    exponent = u >> 7 & 255
    inside = (exponent >= start) & (exponent < start + FIXED)
    at = (~inside).flatten().nonzero()[:, 0]
    return Fixed12(
        nibbles(torch.where(inside, exponent - start, FIXED)), (u >> 8 & 128 | u & 127).to(torch.uint8),
        at.to(torch.int32), exponent.flatten()[at].to(torch.uint8), start, len(bits),
    )  # fmt: skip


def fixed12_exact(planes: Fixed12) -> Tensor:
    """The bit patterns (N,) int16 again."""
    exponent = planes.start + unnibbled(planes.code)
    exponent = exponent.flatten()
    exponent[planes.escape_at.long()] = planes.escapes.int()
    rest = planes.rest.int().flatten()
    return low16((rest & 128) << 8 | exponent << 7 | rest & 127)[: planes.count]


def ranks(planes: Any, outside: Tensor) -> Tensor:
    """(B, 256) int64: how many escapes stand before each weight, of those that `outside` (B, 256) says are some."""
    within = outside.cumsum(1) - outside.long()
    spans = planes.spans.repeat_interleave(SPAN)[: len(outside)]
    return within + ((planes.before.int() & 0xFFFF).long() + spans)[:, None]


def gathered(planes: Any, blocks: Tensor) -> Any:
    """The planes of these blocks (n,) int64 alone, in this order, as those of a tensor of 256 n weights.

    A plane that was left out, as a draft may, stands there as (B, 0).
    """
    kept = planes._asdict()
    found = {name: p[blocks] for name, p in kept.items() if isinstance(p, Tensor) and p.dim() == 2}
    if "before" in kept and planes.before.dim() == 1:  # escapes in their order, counted by block
        start = (planes.before.int() & 0xFFFF).long() + planes.spans.repeat_interleave(SPAN)[: len(planes.code)]
        bounds = torch.cat([start, start.new_tensor([len(planes.escapes)])])
        begin, counts = bounds[blocks], bounds[blocks + 1] - bounds[blocks]
        spans = spans_of(counts)
        before = counts.cumsum(0) - counts - spans.repeat_interleave(SPAN)[: len(counts)]
        found |= {"escapes": planes.escapes[ranges(begin, counts)], "before": low16(before), "spans": spans}
    for places, values in PLACED.items():
        if places in kept and kept[places].dim() == 1:
            edge = kept[places].long()
            begin, end = (torch.searchsorted(edge, at) for at in (blocks * BLOCK, (blocks + 1) * BLOCK))
            some = ranges(begin, end - begin)
            moved = (torch.arange(len(blocks), device=blocks.device) - blocks) * BLOCK
            at = (edge[some] + moved.repeat_interleave(end - begin)).to(torch.int32)
            found |= {places: at, values: kept[values][some]}
    return planes._replace(**found, count=len(blocks) * BLOCK)


def ranges(begin: Tensor, counts: Tensor) -> Tensor:
    """begin[0], begin[0] + 1, ..., so many as counts[0] says, then those from begin[1] on, and so on."""
    before = counts.cumsum(0) - counts
    return (begin - before).repeat_interleave(counts) + torch.arange(int(counts.sum()), device=counts.device)


def padded(bits: Tensor, start: int) -> Tensor:
    """(B, 256) int32 patterns; what fills them up is no escape."""
    u = bits.flatten().int() & 0xFFFF
    return torch.cat([u, u.new_full((-len(u) % BLOCK,), start << 7)]).view(-1, BLOCK)


def _window(counts: Tensor, codes: int) -> int:
    """Of counts by exponent (256,), the first of so many neighbours that have the most weights; the lowest one if it
    makes no difference."""
    below = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return int((below[codes:] - below[:-codes]).argmax())


def spans_of(counts: Tensor) -> Tensor:
    """Escapes before each span of blocks."""
    padded = torch.cat([counts, counts.new_zeros(-len(counts) % SPAN)]).view(-1, SPAN).sum(1)
    return padded.cumsum(0) - padded


def low16(u: Tensor) -> Tensor:
    """The low 16 bits as int16, which wraps."""
    return ((u.long() + 0x8000 & 0xFFFF) - 0x8000).to(torch.int16)


def nibbles(values: Tensor) -> Tensor:
    values = values & 15
    return (values[:, :128] | values[:, 128:] << 4).to(torch.uint8)


def unnibbled(plane: Tensor) -> Tensor:
    wide = plane.int()
    return torch.cat([wide & 15, wide >> 4], 1)


def _bits(values: Tensor) -> Tensor:
    parts = (values & 1).unflatten(1, (8, 32))
    return sum(parts[:, i] << i for i in range(8)).to(torch.uint8)


def _unbit(plane: Tensor) -> Tensor:
    wide = plane.int()
    return torch.cat([wide >> i & 1 for i in range(8)], 1)
