"""The target's own weights in fewer bits as its drafter: it shares the target's memory, and verifying repairs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from decodathlon.decoders.speculative.base import SELF_BOUNDS, SelfSpeculative, claim
from decodathlon.decoders.speculative.drafter import Drafter
from decodathlon.decoders.speculative.made import Made
from decodathlon.decoders.speculative.matrices import product
from decodathlon.harness.decoder import decoder
from decodathlon.harness.errors import SpecError


@decoder(
    "quantised-self",
    claim=claim,
    family="speculative",
    bounds=SELF_BOUNDS,
    sweep={"k": [1, 2, 3, 4], "bits": [4, 8], "controller": ["static", "confidence", "break-even", "tapout"]},
    paper="Zhao et al. 2024, QSpec (arXiv 2410.11305); Georganas et al. 2025, ML-SpecQD (arXiv 2503.13565)",
)
class QuantisedSelf(Made, SelfSpeculative):
    """The target with its weights in `bits` bits drafts, in the target's own keys and values; the verify pass writes
    over what it left there.

    `form=int`: groups of 32 with a scale, and with `zeros` a zero (4 bits), or rows with a scale (8). `form=float`:
    MXFP4 (4), or sign, exponent and the leading bits of the mantissa (5: E3M1, 6: E3M2). A checkpoint that was made of
    such a form itself is repeated by it exactly (SmolLM2 as embedded here came from groups of 32 with zeros), and then
    the acceptance says nothing about other models.
    """

    k: int = 2
    bits: Literal[4, 5, 6, 8] = 4
    form: Literal["int", "float"] = "int"
    zeros: bool = False
    #: The output matrix errs more than the others together, and a step reads it once.
    head: Literal["same", "int8", "exact"] = "int8"
    weights: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        able = {"int": (4, 8), "float": (4, 5, 6)}[self.form]
        if self.bits not in able:
            raise SpecError(
                f"{self.info.name}: form={self.form} has {' or '.join(map(str, able))} bits, not {self.bits}"
            )
        if self.zeros and (self.bits, self.form) != (4, "int"):
            raise SpecError(
                f"{self.info.name}: zeros=true is of form=int with 4 bits, not of form={self.form} with {self.bits}"
            )

    def drafter(self, target: Any, context: Any, prompts: Sequence[Sequence[int]]) -> Drafter:
        return self.reading_on(target, context, self.made(target))

    @property
    def recipe(self) -> Mapping[str, Any]:
        return {"kind": "quantised", "bits": self.bits, "form": self.form, "zeros": self.zeros, "head": self.head}

    def layers(self, target: Any) -> Iterator[Any]:
        return (layer.mapped(lambda d: product(d, self.bits, self.form, self.zeros)) for layer in target.lean.layers)

    def output(self, target: Any) -> Any:
        own = target.lean.head
        if self.head == "exact":
            return own
        return product(own, 8, "int") if self.head == "int8" else product(own, self.bits, self.form, self.zeros)
