"""Another model as the drafter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from decodathlon.decoders.speculative.base import BOUNDS, Speculative, claim
from decodathlon.decoders.speculative.drafter import Drafter, OwnMemory
from decodathlon.harness import models
from decodathlon.harness.decoder import decoder
from decodathlon.harness.errors import SpecError

#: The target as its own drafter: everything stays, nothing is won. The control of all others.
SELF = "self"


@decoder(
    "draft-model",
    claim=claim,
    family="speculative",
    bounds=BOUNDS,
    sweep={"k": [1, 2, 4, 8]},
    paper="Leviathan, Kalman, Matias 2023 (arXiv 2211.17192); Chen et al. 2023 (arXiv 2302.01318)",
)
class DraftModel(Speculative):
    """A smaller model with the same tokens drafts: `model` is a folder, a hub id or a name, as for --model."""

    model: str = SELF
    k: int = 4
    proposal: Literal["sample", "guess"] = "sample"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model != SELF:
            models.resolve(self.model)  # what does not exist is told before a run

    def check(self, target: Any) -> None:
        super().check(target)
        if self.model != SELF:
            _check_tokens(target, self.loaded(target), self.spec)

    def drafter(self, target: Any, context: Any, prompts: Sequence[Sequence[int]]) -> Drafter:
        drafting = target if self.model == SELF else self.loaded(target)
        room = min(context.capacity, drafting.context_length)
        return self.autoregressive(OwnMemory, drafting.open(prompts, capacity=room))

    def loaded(self, target: Any) -> Any:
        """The drafting model, which the target keeps."""
        made = ("draft-model", self.model)
        if made not in target.kept:
            found = models.resolve(self.model)
            models.check(found, target.device.type)
            dtype = str(target.dtype).removeprefix("torch.")
            target.kept[made] = models.load(found, device=target.device.type, dtype=dtype, say=lambda text: None)
        return target.kept[made]


def _check_tokens(target: Any, drafting: Any, who: str) -> None:
    """
    Raises:
        SpecError: the two models do not speak of the same tokens.
    """
    if target.vocab_size != drafting.vocab_size:
        raise SpecError(
            f"{who}: {drafting.name} has {drafting.vocab_size} tokens and {target.name} has {target.vocab_size}; "
            "a drafter needs the same tokenizer"
        )
    if "text" in target.capabilities and "text" in drafting.capabilities:
        for text in _PROBES:
            if target.encode(text) != drafting.encode(text):
                raise SpecError(
                    f"{who}: {drafting.name} and {target.name} read {text!r} as other tokens; a drafter needs the same "
                    "tokenizer"
                )


#: Texts by which two tokenizers are told apart.
_PROBES = ("Once upon a time, there was a little girl.", "def f(x):\n    return 3.14 * x", "Größe, naïve, 東京, 2024")
