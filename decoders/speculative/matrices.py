"""Matrices in fewer bits: how numbers are rounded, and products with them.

On a CPU whole-number weights of 4 and 8 bits run on torch's kernels for them, so that their speed is a real one.
What has no kernel here is rounded and kept in the target's type: its drafts are the true ones, its speed is the
target's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

#: Weights that share a scale.
GROUP, MX_GROUP = 32, 32
#: How far the range of a group is drawn in, at most, for the sake of the mean squared error.
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8)
#: The magnitudes of E2M1 (OCP Microscaling Formats 1.0).
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def int4(weight: Tensor, zeros: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(out, in) weights to whole numbers 0..15, scales and zeros by group of 32: w is about (q - 8) scale + zero.

    Without `zeros` the value of greatest magnitude in a group is the end of its scale, -8, so a scale may be negative
    (llama.cpp's Q4_0). The range of each group is drawn in by the one of `CLIPS` that leaves the least squared error.
    """
    groups = weight.float().unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    best: tuple[Tensor, ...] = ()
    for clip in CLIPS:
        # in the precision that the kernel keeps them in
        if zeros:
            scale = (clip * (high - low) / 15).clamp(min=1e-8).bfloat16().float()
            zero = ((low + high) / 2 + scale / 2).bfloat16().float()
        else:
            scale = (clip * torch.where(high > -low, -high, -low) / 8).bfloat16().float()
            scale = torch.where(scale.abs() < 1e-8, 1e-8, scale)
            zero = torch.zeros_like(scale)
        q = ((groups - zero) / scale + 8).round().clamp(0, 15)
        error = ((q - 8) * scale + zero - groups).square().sum(-1, keepdim=True)
        if not best:
            best = (error, q, scale, zero)
        else:
            better = error < best[0]
            best = tuple(torch.where(better, new, old) for new, old in zip((error, q, scale, zero), best, strict=True))
    _, q, scale, zero = best
    return q.flatten(1), scale[..., 0], zero[..., 0]


def int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) weights to whole numbers -127..127 and scales by row."""
    scale = weight.float().abs().amax(1).clamp(min=1e-8) / 127
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale


def mxfp4(weight: Tensor) -> Tensor:
    """(out, in) weights rounded to MXFP4: E2M1 in blocks of 32 with a common power of two, no calibration. ML-SpecQD
    (arXiv 2503.13565) drafts with them."""
    blocks = weight.float().unflatten(1, (-1, MX_GROUP))
    greatest = blocks.abs().amax(-1, keepdim=True).clamp(min=2.0**-120)
    scale = torch.exp2(greatest.log2().floor() - 2)
    grid = torch.tensor(E2M1, device=weight.device)
    middles = (grid[1:] + grid[:-1]) / 2
    magnitude = grid[torch.bucketize((blocks / scale).abs(), middles)]
    return (magnitude * blocks.sign() * scale).flatten(1)


def nested(weight: Tensor, mantissa: int) -> Tensor:
    """(out, in) weights with their leading bits alone: sign, an exponent among the seven greatest of the tensor, and so
    many bits of the mantissa; what is smaller is zero. The middle of what these bits leave open stands for it."""
    fraction, exponent = torch.frexp(weight.float())
    window = int(exponent[weight != 0].max()) - 7 if bool((weight != 0).any()) else 0
    steps = 2.0 ** (mantissa + 1)
    cut = ((fraction.abs() * steps).floor() + 0.5) / steps
    return torch.where(exponent > window, torch.ldexp(cut, exponent) * weight.sign(), 0.0)


class Int4:
    """A product with 4-bit weights: torch's kernel for CPUs."""

    def __init__(self, weight: Tensor, bias: Tensor | None, zeros: bool = False) -> None:
        q, scale, zero = int4(weight, zeros)
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)
        self.scales = torch.stack([scale, zero], -1).transpose(0, 1).contiguous().to(weight.dtype)
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.packed, GROUP, self.scales)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class Int8:
    """A product with 8-bit weights: torch's kernel for CPUs."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, scale = int8(weight)
        self.scale, self.bias = scale.to(weight.dtype), bias

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y: Tensor = torch._weight_int8pack_mm(flat, self.weight, self.scale).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def rounded(weight: Tensor, bits: int, form: str, zeros: bool = False) -> Tensor:
    """The weights that a form of so many bits stands for, in float32."""
    if form == "float":
        return mxfp4(weight) if bits == 4 else nested(weight, bits - 4)
    if bits == 8:
        q, scale = int8(weight)
        return q.float() * scale[:, None]
    q4, scale, zero = int4(weight, zeros)
    steps = q4.unflatten(1, (-1, GROUP)) - 8
    return (steps * scale[..., None] + zero[..., None]).flatten(1)


def product(dense: Any, bits: int, form: str, zeros: bool = False) -> Any:
    """What stands for a `Dense` in so many bits: a kernel where there is one, else its rounded weights."""
    from decodathlon.harness.targets.lean import Dense

    weight, bias = dense.weight, dense.bias
    on_kernel = weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float32)
    if form == "int" and on_kernel and weight.shape[1] % GROUP == 0 and weight.shape[0] % 16 == 0:
        return Int4(weight, bias, zeros) if bits == 4 else Int8(weight, bias)
    short = -weight.shape[1] % GROUP
    padded = torch.nn.functional.pad(weight, (0, short))
    return Dense(rounded(padded, bits, form, zeros)[:, : weight.shape[1]].to(weight.dtype), bias)
