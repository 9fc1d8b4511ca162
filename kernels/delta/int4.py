"""A 4-bit model and what it lacks: the definition of `int4-delta`, in plain torch.

The base is whole numbers -8 to 7 in groups with a scale: of 64 with one in bfloat16, or, as Q4_0 files have them
already, of 32 with one in half precision. The delta is the difference of the weight and the
rounded product of both, counted in the bfloat16 numbers that lie between them. Where the base is not 0, what is rounded
to it lies within a byte of it; where it is 0 the delta is all 16 bits. What does not fit, of a base that clips much, is
a patch.

It is larger than `nested`, for a base of 4 flat bits repeats what the delta has to say again; it is here because the
founding note asks for it, and for bases that exist already.

Dimensions as in reference.py: N weights, B blocks of 256.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .reference import BLOCK, SPAN, low16, nibbles, padded, ranks, spans_of, unnibbled

#: Weights that share a scale, in a base that is made here.
GROUP = 64
#: How far the range of a group is drawn in, at most, for the sake of the mean squared error.
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8)


class Int4Delta(NamedTuple):
    """Planes of `int4-delta`."""

    #: (B, 128) uint8 the whole number plus 8, and (B, 4 or 8) int16 the pattern of each group's scale (see `groups`).
    code: Tensor
    scales: Tensor
    #: (B, 256) uint8 low byte of the delta.
    low: Tensor
    #: (Z,) uint8 its high byte, of those whose whole number is 0, in their order.
    escapes: Tensor
    #: As in `Nested`, of these.
    before: Tensor
    spans: Tensor
    #: (P,) int32 places and int16 patterns of what the delta does not reach.
    patch_at: Tensor
    patches: Tensor
    #: Number of weights.
    count: int


def int4_delta(bits: Tensor, base: tuple[Tensor, Tensor] | None = None) -> Int4Delta:
    """Encode bit patterns (N,) int16; parts of `SPAN` blocks can be put one behind the other, as those of `nested`.

    Args:
        base: whole numbers (B, 256) int32 and patterns of finite scales (B, 4 or 8) int16, where there are some.
    """
    u = padded(bits, 0)
    q, scales = base or _base(low16(u).view(torch.bfloat16))
    none = q == 0
    delta = _ordinal(u) - _base_ordinal(q, scales)
    unfit = ~none & ((delta < -128) | (delta > 127))
    at = unfit.flatten().nonzero()[:, 0]
    counts = none.sum(1)
    spans = spans_of(counts)
    before = counts.cumsum(0) - counts - spans.repeat_interleave(SPAN)[: len(counts)]
    return Int4Delta(
        nibbles(q + 8), scales, (delta & 255).to(torch.uint8), (delta[none] >> 8 & 255).to(torch.uint8), low16(before),
        spans, at.to(torch.int32), low16(u.flatten()[at]), len(bits),
    )  # fmt: skip


def int4_delta_exact(planes: Int4Delta) -> Tensor:
    """The bit patterns (N,) int16 again."""
    q = unnibbled(planes.code) - 8
    low = planes.low.int()
    delta = (low ^ 128) - 128  # with its sign
    none = q == 0
    if len(planes.escapes):
        known = planes.escapes.int()[ranks(planes, none).clamp(max=len(planes.escapes) - 1)]
        delta = torch.where(none, known << 8 | low, delta)
    found = _pattern(_base_ordinal(q, planes.scales) + delta).flatten()
    found[planes.patch_at.long()] = planes.patches
    return found[: planes.count]


def int4_draft(planes: Int4Delta) -> Tensor:
    """(N,) bfloat16: the base alone."""
    return _values(unnibbled(planes.code) - 8, planes.scales).flatten()[: planes.count]


def _base(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers (B, 256) int32, and scales (B, 4) as the patterns of bfloat16. What is not finite gets the 0."""
    groups = weights.float().view(-1, BLOCK // GROUP, GROUP)
    finite = groups.isfinite()
    groups = torch.where(finite, groups, 0.0)
    most = groups.abs().amax(-1, keepdim=True)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for clip in CLIPS:
        scale = (clip * most / 7).to(torch.bfloat16).float()
        q = torch.where(scale > 0, groups / scale, 0.0).nan_to_num(0.0, 0.0, 0.0).round().clamp(-8, 7)
        error = (q * scale - groups).square().sum(-1, keepdim=True)
        if best is None:
            best = error, q, scale
        else:
            better = error < best[0]
            best = tuple(torch.where(better, new, old) for new, old in zip((error, q, scale), best, strict=True))  # type: ignore[assignment]
    assert best is not None
    q = torch.where(finite, best[1], 0.0)
    return q.int().view(-1, BLOCK), best[2][..., 0].to(torch.bfloat16).view(torch.int16)


def groups(scales: Tensor) -> tuple[int, torch.dtype]:
    """Of scales (B, 4) or (B, 8): how many weights have one, and what its pattern is of."""
    per = scales.shape[1]
    return BLOCK // per, torch.bfloat16 if per == BLOCK // GROUP else torch.float16


def _values(q: Tensor, scales: Tensor) -> Tensor:
    """(B, 256) bfloat16: the product is exact in float32, and rounded once."""
    group, dtype = groups(scales)
    wide = scales.view(dtype).float().repeat_interleave(group, 1)
    return (q.float() * wide).to(torch.bfloat16)


def _base_ordinal(q: Tensor, scales: Tensor) -> Tensor:
    """Of the base; 0 where the whole number is, whatever the sign of its scale."""
    found = _ordinal(_values(q, scales).view(torch.int16).int() & 0xFFFF)
    return torch.where(q == 0, 0, found)


def _ordinal(u: Tensor) -> Tensor:
    """Of patterns 0 to 65535: their number in the order of the values, so that neighbours differ by 1; -0 is -1."""
    return torch.where(u < 0x8000, u, 0x7FFF - u)


def _pattern(ordinal: Tensor) -> Tensor:
    """The pattern of such a number, int16; numbers of more than 16 bits wrap."""
    wrapped = (ordinal + 0x8000 & 0xFFFF) - 0x8000
    return low16(torch.where(wrapped >= 0, wrapped, 0x7FFF - wrapped))
