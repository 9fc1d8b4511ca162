"""The founding note's buckets: weights that share one number, chosen so that those which matter are moved least; and
bits given out where they are worth most.

Both are rounded and kept in the target's type: their drafts are the true ones, their speed is the target's.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from decodathlon.decoders.speculative.cycle import SELF_BOUNDS, claim
from decodathlon.decoders.speculative.sparse import Calibrated, Recorder
from decodathlon.harness.decoder import decoder
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

#: Steps of Lloyd's algorithm: it has hardly anything left to gain behind them.
STEPS = 25
#: What a channel may have in mixed precision.
BITS = (0, 2, 4, 8, 16)


def codebook(weight: Tensor, square: Tensor, bits: int) -> Tensor:
    """(O, I) weights, each replaced by the nearest of 2^bits numbers, which minimise the sum of (W_ij - c)^2 times
    the mean square of input j: Lloyd's algorithm in one dimension, from quantiles of the weighted law.

    Args:
        square: (I,) mean squares of the inputs.
    """
    values, order = weight.float().flatten().sort()
    importance = square.float().clamp(min=1e-12).expand_as(weight).flatten()[order].double()
    mass = torch.cat([importance.new_zeros(1), importance.cumsum(0)])
    moment = torch.cat([torch.zeros_like(mass[:1]), (importance * values.double()).cumsum(0)])
    count = 2**bits
    at = (torch.arange(count, device=values.device) + 0.5) / count * mass[-1]
    centres = values[torch.searchsorted(mass[1:], at).clamp(max=len(values) - 1)].double()
    for _ in range(STEPS):
        ends = torch.searchsorted(values.double(), (centres[1:] + centres[:-1]) / 2)
        edges = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), len(values))])
        inside = mass[edges[1:]] - mass[edges[:-1]]
        moved = (moment[edges[1:]] - moment[edges[:-1]]) / inside.clamp(min=1e-300)
        centres = torch.where(inside > 0, moved, centres).sort().values
    nearest = torch.bucketize(weight.double(), (centres[1:] + centres[:-1]) / 2)
    return centres[nearest].to(weight.dtype)


def rounded_channels(weight: Tensor, bits: Tensor) -> Tensor:
    """(O, I) weights, input j rounded to `bits[j]` bits (symmetric, one scale per input); 0 is zero, 16 as it is."""
    found = torch.zeros_like(weight)
    for b in BITS[1:]:
        mine = bits == b
        if b == 16:
            found[:, mine] = weight[:, mine]
        elif bool(mine.any()):
            some = weight[:, mine].float()
            most = 2 ** (b - 1) - 1
            scale = some.abs().amax(0).clamp(min=1e-12) / most
            found[:, mine] = ((some / scale).round().clamp(-most, most) * scale).to(weight.dtype)
    return found


def allotted(weight: Tensor, square: Tensor, budget: float) -> Tensor:
    """(I,) bits for each input of a matrix, `budget` of them on average: each next step goes where it takes away
    most of the sum of (W - rounded)^2 times the mean square of the input, per bit. HAWQ (arXiv 1905.03696) gives
    bits so by layer.
    """
    inputs = weight.shape[1]
    errors = torch.stack([_errors(weight, square, b) for b in BITS]).tolist()
    level, left = [0] * inputs, budget * inputs
    waiting = [_step(errors, j, 0) for j in range(inputs)]
    heapq.heapify(waiting)
    while waiting:
        gain, j, to = heapq.heappop(waiting)
        price = BITS[to] - BITS[level[j]]
        if gain >= 0 or price > left:
            continue
        left -= price
        level[j] = to
        if to + 1 < len(BITS):
            heapq.heappush(waiting, _step(errors, j, to))
    return torch.tensor([BITS[n] for n in level], device=weight.device)


def _errors(weight: Tensor, square: Tensor, bits: int) -> Tensor:
    """(I,) what rounding each input's weights to so many bits costs."""
    every = torch.full((weight.shape[1],), bits, device=weight.device)
    return (weight.float() - rounded_channels(weight, every).float()).square().sum(0) * square.float()


def _step(errors: Sequence[Sequence[float]], j: int, now: int) -> tuple[float, int, int]:
    """The next step up of an input that gains most per bit: minus that gain, the input, the level."""
    ups = [((errors[to][j] - errors[now][j]) / (BITS[to] - BITS[now]), j, to) for to in range(now + 1, len(BITS))]
    return min(ups)


@decoder(
    "codebook-self",
    claim=claim,
    family="speculative",
    bounds=SELF_BOUNDS,
    sweep={"bits": [2, 3, 4], "k": [1, 2, 4]},
    paper="the founding note on drafters; Kim et al. 2023, SqueezeLLM (arXiv 2306.07629), has such codebooks",
)
class CodebookSelf(Calibrated):
    """The target with the weights of each matrix put into 2^`bits` buckets of one number each drafts."""

    k: int = 2
    bits: Literal[2, 3, 4, 5] = 4

    @property
    def recipe(self) -> Mapping[str, Any]:
        return {"kind": "codebook", "bits": self.bits}

    def changed(self, seen: Recorder) -> Any:
        from decodathlon.harness.targets.lean import Dense

        return Dense(codebook(seen.dense.weight, seen.mean, self.bits), seen.dense.bias)


@decoder(
    "mixed-precision-self",
    claim=claim,
    family="speculative",
    bounds={**SELF_BOUNDS, "budget_bits": "[0.5, 16]"},
    sweep={"budget_bits": [2.0, 3.0, 4.0, 6.0], "k": [1, 2, 4]},
    paper="the founding note on drafters; Dong et al. 2019, HAWQ (arXiv 1905.03696)",
)
class MixedPrecisionSelf(Calibrated):
    """The target with 16, 8, 4, 2 or no bits for the weights of each input drafts: `budget_bits` on average, given
    to those where they are worth most."""

    k: int = 2
    budget_bits: float = 4.0

    @property
    def recipe(self) -> Mapping[str, Any]:
        return {"kind": "mixed-precision", "budget_bits": self.budget_bits}

    def changed(self, seen: Recorder) -> Any:
        from decodathlon.harness.targets.lean import Dense

        weight = seen.dense.weight
        return Dense(rounded_channels(weight, allotted(weight, seen.mean, self.budget_bits)), seen.dense.bias)
