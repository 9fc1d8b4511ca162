"""Transformers' own assisted generation, on the same weights: what most people would use, to hold ours against."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from decodathlon.decoders.baselines import HFGenerate
from decodathlon.decoders.speculative.models import SELF, DraftModel
from decodathlon.harness.decoder import Completion, Cost, Decoder, Limits, decoder
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from decodathlon.harness.randomness import RowRandom


class Assisted(Decoder):
    """`generate` with an assistant: one row at a time, for it takes no more."""

    @abstractmethod
    def assistance(self, target: Any) -> tuple[dict[str, Any], Any]:
        """What the configuration says beyond greedy search, and the assistant's target where there is one."""

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
            for name, value in options.items() if hasattr(other, "generation_config") else ():
                setattr(other.generation_config, name, value)  # it is the assistant's own that is asked
            for prompt in prompts:
                tokens = torch.tensor([list(prompt)], device=target.device)
                with _counted(model) as own, _counted(other if other is not model else None) as drafting:
                    out = model.generate(
                        tokens, attention_mask=torch.ones_like(tokens), generation_config=config, **more
                    )
                answer = HFGenerate()._completion(target, prompt, out[0, len(prompt) :].tolist(), stop)
                found.append(replace(answer, cost=Cost(*own, *drafting)))
        return found


@contextmanager
def _counted(model: Any) -> Iterator[list[int]]:
    """Calls of a model and the token positions that they read; an assistant that is the target counts as the target."""
    spent = [0, 0]

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        spent[0] += 1
        read = args[0] if args else kwargs.get("input_ids")
        # of a drafter of blocks, the block and what it takes up of the text
        parts = [kwargs["noise_embeds"], kwargs["context_hidden_states"]] if read is None else [read]
        spent[1] += sum(part.shape[1] for part in parts)

    handle = None if model is None else model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield spent
    finally:
        if handle is not None:
            handle.remove()


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

    def __post_init__(self) -> None:
        DraftModel(model=self.model)  # which looks whether there is such a model

    def check(self, target: Any) -> None:
        super().check(target)
        DraftModel(model=self.model).check(target)

    def assistance(self, target: Any) -> tuple[dict[str, Any], Any]:
        options = {"num_assistant_tokens": self.tokens, "assistant_confidence_threshold": self.threshold}
        return options, target if self.model == SELF else DraftModel(model=self.model).loaded(target)
