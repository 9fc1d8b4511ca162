"""`self-delta`: the first bits of the target's weights draft, all of them verify; one copy of the bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from decodathlon.decoders.jit_delta import contextual
from decodathlon.decoders.speculative.base import SELF_BOUNDS, SelfSpeculative, claim
from decodathlon.decoders.speculative.drafter import Drafter
from decodathlon.harness.decoder import decoder
from decodathlon.harness.errors import UnsupportedError
from decodathlon.harness.lazy import torch


@decoder(
    "self-delta",
    claim=claim,
    family="jit-delta",
    bounds={**SELF_BOUNDS, "share": "[0, 1]"},
    sweep={"k": [1, 2, 3, 4], "bits": [4, 5, 6], "share": [0.0, 0.25, 0.5]},
    paper="after Zhao et al. 2025, SPEQ (arXiv 2510.18525), and ZipServ (ASPLOS 2026)",
)
class SelfDelta(SelfSpeculative):
    """The first `bits` bits of each weight (sign, exponent code, none to two bits of the mantissa) are a model that
    drafts `k` tokens, in the target's own keys and values; the pass of the whole weights verifies and writes over them.

    With `share` the drafter reads that share of each MLP exactly: the chunks of channels that its own activations say
    matter most for the token (decoders/jit_delta/contextual.py).

    It is for a target that `decodathlon pack` made (`--model OUT`), whose planes it reads: nothing is stored twice. Of
    another target it makes a rounded copy (windows and means over matrices that are read together, so nearly the same
    drafts), and memory is not saved.
    """

    k: int = 3
    #: 0: the usual number of the scheme, 5 of `nested` and 4 of `int4-delta`.
    bits: Literal[0, 4, 5, 6] = 0
    #: How much of each MLP the drafter reads exactly.
    share: float = 0.0

    def check(self, target: Any) -> None:
        super().check(target)
        self._forward(target)

    def remarks(self, target: Any) -> list[str]:
        packed = hasattr(target, "packing")
        which = f"the first {self.bits}" if self.bits else "the usual number of first"
        return [f"drafter: {which} bits of each weight" + ("" if packed else ", a copy of them")]

    def drafter(self, target: Any, context: Any, prompts: Sequence[Sequence[int]]) -> Drafter:
        return self.reading_on(target, context, self._forward(target))

    def _forward(self, target: Any) -> Any:
        key = ("self-delta", self.bits, self.share)
        if key not in target.kept:
            target.kept[key] = self._mixed(target) if self.share else self._drafting(target)
        return target.kept[key]

    def _drafting(self, target: Any) -> Any:
        """The model of the first bits: the target's own planes, or beside it."""
        if hasattr(target, "packing"):
            return target.first_bits(self.bits)
        own, drafted = target.lean, self._drafted(target)
        return own.replaced([layer.mapped(drafted) for layer in own.layers], drafted(own.head))

    def _mixed(self, target: Any) -> Any:
        """The same, with a share of each MLP exact."""
        drafted, kept = self._drafted(target), ("self-delta chunks", self.bits)
        if kept not in target.kept:
            target.kept[kept] = contextual.calibrated(target, drafted)
        return contextual.mixed(target.lean, drafted, target.kept[kept], self.share, attention=True)[0]

    def _drafted(self, target: Any) -> Any:
        """Of a matrix, the one that its first bits say."""
        if hasattr(target, "packing"):
            return target.of_first_bits(self.bits)
        made: dict[int, Any] = {}

        def drafted(matrix: Any) -> Any:
            if id(matrix) not in made:
                made[id(matrix)] = self._rounded(matrix)
            return made[id(matrix)]

        return drafted

    def _rounded(self, matrix: Any) -> Any:
        from decodathlon.harness.targets.lean import Dense
        from decodathlon.kernels.delta import reference

        if not isinstance(matrix, Dense):
            raise UnsupportedError("weights whose first bits can be read", f"a matrix is a {type(matrix).__name__}")
        bits = matrix.weight.detach().to(torch.bfloat16).flatten().view(torch.int16)
        draft = reference.nested_draft(reference.nested(bits), self.bits or 5).view(matrix.weight.shape)
        return Dense(draft.to(matrix.weight.dtype), matrix.bias)
