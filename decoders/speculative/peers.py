"""Transformers' own assisted generation, on the same weights: what most people would use, to hold ours against."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from decodathlon.decoders.speculative.models import SELF, DraftModel
from decodathlon.harness.decoder import Completion, Cost, Decoder, Limits, decoder
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from decodathlon.harness.randomness import RowRandom


class Assisted(Decoder):
    """`generate` with an assistant: one row at a time, for it takes no more."""

    def assistance(self, target: Any) -> tuple[dict[str, Any], Any]:
        """What the configuration says beyond greedy search, and the assistant's target where there is one."""
        raise NotImplementedError

    def generate(
        self, target: Any, prompts: Sequence[Sequence[int]], limits: Limits, rng: RowRandom
    ) -> list[Completion]:
        from transformers import GenerationConfig

        self.check(target)
        target.check_room(prompts, max(map(len, prompts), default=0) + limits.max_new_tokens)
        stop = set() if limits.ignore_eos else set(target.stop_tokens)
        pad = min(target.stop_tokens, default=0)
        options, assistant = self.assistance(target)
        config = GenerationConfig(
            max_new_tokens=limits.max_new_tokens,
            eos_token_id=sorted(stop) or None,
            pad_token_id=pad,
            do_sample=False,
            **options,
        )
        found = []
        with target.native() as model, assistant.native() if assistant else nullcontext() as other, torch.no_grad():
            more = {"assistant_model": other} if assistant else {}
            for prompt in prompts:
                tokens = torch.tensor([list(prompt)], device=target.device)
                out = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=config, **more)
                found.append(self._completion(target, prompt, out[0, len(prompt) :].tolist(), stop))
        return found

    def _completion(self, target: Any, prompt: Sequence[int], row: list[int], stop: set[int]) -> Completion:
        end = next((i + 1 for i, token in enumerate(row) if token in stop), None)
        kept = row[:end]
        return Completion(
            tokens=kept,
            stop_reason="length" if end is None else "stop",
            text=target.decode(kept) if "text" in target.capabilities else "",
            # transformers does not say how many passes it took; so many at most
            cost=Cost(target_calls=len(kept), target_positions=len(prompt) + len(kept) - 1),
        )


@decoder(
    "hf-prompt-lookup",
    claim="greedy-exact",
    family="hf-assisted",
    bounds={"tokens": "[1, 64]", "longest": "[1, 16]"},
    needs=["hf-model"],
    paper="Saxena 2023, Prompt Lookup Decoding, as transformers has it",
)
class HFPromptLookup(Assisted):
    """`transformers.generate` with `prompt_lookup_num_tokens`; its own defaults."""

    tokens: int = 10
    longest: int = 2

    def assistance(self, target: Any) -> tuple[dict[str, Any], Any]:
        return {"prompt_lookup_num_tokens": self.tokens, "max_matching_ngram_size": self.longest}, None


@decoder(
    "hf-assisted",
    claim="greedy-exact",
    family="hf-assisted",
    bounds={"tokens": "[1, 64]", "threshold": "[0, 1]"},
    needs=["hf-model"],
    paper="Gante 2023, Assisted Generation, as transformers has it",
)
class HFAssisted(Assisted):
    """`transformers.generate` with an assistant model; its own defaults. `model` as for `draft-model`."""

    model: str = SELF
    tokens: int = 20
    threshold: float = 0.4

    def check(self, target: Any) -> None:
        super().check(target)
        DraftModel(model=self.model).check(target)

    def assistance(self, target: Any) -> tuple[dict[str, Any], Any]:
        options = {"num_assistant_tokens": self.tokens, "assistant_confidence_threshold": self.threshold}
        return options, target if self.model == SELF else DraftModel(model=self.model).loaded(target)
