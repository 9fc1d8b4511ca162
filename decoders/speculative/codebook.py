"""The founding note's buckets: weights that share one number, chosen so that those which matter are moved least; and
bits given out where they are worth most.

Both are rounded and kept in the target's type: their drafts are the true ones, their speed is the target's.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from decodathlon.decoders.speculative.base import SELF_BOUNDS, claim
from decodathlon.decoders.speculative.sparse import Calibrated, Recorder, calibration, over_layers
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
    """(I,) bits for each input of a matrix, `budget` of them on average, where they lessen the sum of (W - rounded)^2
    times the mean square of the input most."""
    errors = torch.stack([_errors(weight, square, b) for b in BITS], 1).tolist()
    return torch.tensor(shared_out(errors, [1] * len(errors), budget), device=weight.device)


def shared_out(errors: Sequence[Sequence[float]], sizes: Sequence[int], budget: float) -> list[int]:
    """Bits for each unit, `budget` of them per weight: each next step goes where it takes away most of the error per
    bit, among those that can still be paid. HAWQ (arXiv 1905.03696) gives bits to layers so.

    Args:
        errors: by unit, the error at each of `BITS`.
        sizes: weights of each unit.
    """
    level, left = [0] * len(sizes), budget * sum(sizes)

    def step(unit: int) -> tuple[float, int, int] | None:
        """The step up that gains most per bit and can be paid: minus that gain, the unit, the level."""
        now, mine = level[unit], errors[unit]
        ups = [
            ((mine[to] - mine[now]) / price, unit, to)
            for to in range(now + 1, len(BITS))
            if (price := (BITS[to] - BITS[now]) * sizes[unit]) <= left
        ]
        return min(ups, default=None)

    waiting = [up for unit in range(len(sizes)) if (up := step(unit))]
    heapq.heapify(waiting)
    while waiting:
        gain, unit, to = heapq.heappop(waiting)
        price = (BITS[to] - BITS[level[unit]]) * sizes[unit]
        if gain < 0 and price <= left:
            left -= price
            level[unit] = to
        elif gain >= 0:
            continue
        if up := step(unit):
            heapq.heappush(waiting, up)
    return [BITS[n] for n in level]


def _errors(weight: Tensor, square: Tensor, bits: int) -> Tensor:
    """(I,) what rounding each input's weights to so many bits costs."""
    every = torch.full((weight.shape[1],), bits, device=weight.device)
    return (weight.float() - rounded_channels(weight, every).float()).square().sum(0) * square.float()


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
    """The target with 16, 8, 4, 2 or no bits for the weights of each input (`by=channel`) or of each matrix
    (`by=layer`) drafts: `budget_bits` on average, given to those where they are worth most."""

    k: int = 2
    budget_bits: float = 4.0
    by: Literal["channel", "layer"] = "channel"

    @property
    def recipe(self) -> Mapping[str, Any]:
        return {"kind": "mixed-precision", "budget_bits": self.budget_bits, "by": self.by}

    def layers(self, target: Any) -> Iterator[Any]:
        if self.by == "channel":
            return super().layers(target)
        errors: list[list[float]] = []
        sizes: list[int] = []

        def felt(seen: Recorder) -> Any:
            errors.append([float(_errors(seen.dense.weight, seen.mean, b).double().sum()) for b in BITS])
            sizes.append(seen.dense.weight.numel())
            return seen.dense

        for _ in over_layers(target, calibration(target), felt, whole=False):
            pass
        bits = iter(shared_out(errors, sizes, self.budget_bits))
        return (layer.mapped(lambda dense: _rounded(dense, next(bits))) for layer in target.lean.layers)

    def changed(self, seen: Recorder) -> Any:
        return _rounded(seen.dense, allotted(seen.dense.weight, seen.mean, self.budget_bits))


def _rounded(dense: Any, bits: Tensor | int) -> Any:
    from decodathlon.harness.targets.lean import Dense

    inputs = dense.weight.shape[1]
    every = torch.full((inputs,), bits, device=dense.weight.device) if isinstance(bits, int) else bits
    return Dense(rounded_channels(dense.weight, every), dense.bias)
