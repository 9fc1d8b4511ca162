"""What people use today: greedy search, ancestral sampling, the usual truncations, `transformers.generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from decodathlon.harness import law
from decodathlon.harness.decoder import Completion, Cost, Decoder, Limits, Sampler, decoder
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from decodathlon.harness.randomness import RowRandom


class Processed(Sampler):
    """A sampler of the processed law: on a GPU it draws with one fused operation, without a sort (kernels/sample)."""

    @property
    def settings(self) -> dict[str, Any]:
        """What `law.process` takes beyond the temperature."""
        return {}

    temperature: float

    def shape(self, logits: Tensor) -> Tensor:
        return law.process(logits, temperature=self.temperature, **self.settings)

    def draw(self, logits: Tensor, u: Tensor) -> Tensor:
        if logits.device.type != "cuda" or type(self).shape is not Processed.shape:
            return super().draw(logits, u)
        from decodathlon.kernels.sample import dispatch, reference

        own = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | self.settings
        return dispatch.sample(logits, reference.keys(u[:, 0]), self.temperature, **own)


@decoder("greedy", claim="greedy-exact", family="greedy", headline="greedy")
class Greedy(Sampler):
    """The likeliest token at every step."""

    def shape(self, logits: Tensor) -> Tensor:
        return law.one_hot(logits)

    def choose(self, logits: Tensor, state: Any, u: Tensor) -> tuple[Tensor, Any]:
        return logits.argmax(-1), state


@decoder(
    "temperature",
    claim=lambda self: "exact" if self.temperature == 1 else "shaped",
    family="ancestral",
    headline="temperature",
    bounds={"temperature": "[0.01, 100]"},
    sweep={"temperature": [0.5, 0.7, 0.9, 1.1]},
)
class Temperature(Processed):
    """Ancestral sampling from the law with its logits divided by a temperature."""

    temperature: float = 1.0

    def definition(self, logits: Sequence[float]) -> list[float]:
        return law.plainly(logits, self.temperature)


@decoder(
    "top-k",
    claim="shaped",
    headline="top-k",
    bounds={"k": "[1, inf)", "temperature": "[0.01, 100]"},
    sweep={"k": [10, 20, 100, 200]},
    paper="Fan, Lewis, Dauphin 2018, Hierarchical Neural Story Generation",
)
class TopK(Processed):
    """Only the k likeliest tokens, renormalised."""

    k: int = 50
    temperature: float = 1.0

    @property
    def settings(self) -> dict[str, Any]:
        return {"top_k": self.k}

    def definition(self, logits: Sequence[float]) -> list[float]:
        p = law.plainly(logits, self.temperature)
        return [x if sum(other > x for other in p) < self.k else 0.0 for x in p]


@decoder(
    "top-p",
    claim="shaped",
    headline="top-p",
    bounds={"p": "(0, 1]", "temperature": "[0.01, 100]"},
    sweep={"p": [0.8, 0.9, 0.98]},
    paper="Holtzman, Buys, Du, Forbes, Choi 2020, The Curious Case of Neural Text Degeneration",
)
class TopP(Processed):
    """Nucleus sampling: the smallest set of likeliest tokens whose probability reaches p, renormalised."""

    p: float = 0.95
    temperature: float = 1.0

    @property
    def settings(self) -> dict[str, Any]:
        return {"top_p": self.p}

    @property
    def uniforms(self) -> int:
        return law.ATTEMPTS - 1

    def draw(self, logits: Tensor, u: Tensor) -> Tensor:
        if logits.device.type != "cpu" or self.p == 1 or type(self).shape is not TopP.shape:
            return super().draw(logits, u)
        log_p = law.process(logits, temperature=self.temperature)
        return law.draw_least(-log_p, log_p, self.p, u)

    def definition(self, logits: Sequence[float]) -> list[float]:
        p = law.plainly(logits, self.temperature)
        return [x if sum(other for other in p if other > x) < self.p else 0.0 for x in p]


@decoder(
    "min-p",
    claim="shaped",
    headline="min-p",
    bounds={"p": "[0, 1]", "temperature": "[0.01, 100]"},
    sweep={"p": [0.02, 0.1, 0.2]},
    paper="Nguyen et al. 2024, Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM Outputs",
)
class MinP(Processed):
    """Tokens with at least the fraction p of the greatest probability, renormalised."""

    p: float = 0.05
    temperature: float = 1.0

    @property
    def settings(self) -> dict[str, Any]:
        return {"min_p": self.p}

    def definition(self, logits: Sequence[float]) -> list[float]:
        p = law.plainly(logits, self.temperature)
        return [x if x >= self.p * max(p) else 0.0 for x in p]


@decoder(
    "hf-generate",
    claim=lambda self: "shaped" if self.sample else "greedy-exact",
    headline="hf-generate",
    bounds={"temperature": "[0.01, 100]", "top_p": "(0, 1]", "top_k": "[0, inf)"},
    needs=["hf-model"],
)
class HFGenerate(Decoder):
    """`transformers.generate` on the same weights: the engine that most people compare with.

    Its random numbers come from one global stream, so with `sample` a row does depend on its neighbours.
    """

    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def generate(
        self, target: Any, prompts: Sequence[Sequence[int]], limits: Limits, rng: RowRandom
    ) -> list[Completion]:
        self.check(target)
        width = max(map(len, prompts))
        target.check_room(prompts, width + limits.max_new_tokens)
        stop = set() if limits.ignore_eos else set(target.stop_tokens)
        pad = min(target.stop_tokens, default=0)
        tokens = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=target.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=target.device)
        options: dict[str, Any] = {"do_sample": False}
        if self.sample:
            options = {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        with target.native() as model, torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=rng.row(0))))
            out = model.generate(
                tokens,
                attention_mask=mask,
                generation_config=_plain_config(limits.max_new_tokens, sorted(stop) or None, pad, options),
            )
        return [self._completion(target, p, row, stop) for p, row in zip(prompts, out[:, width:].tolist(), strict=True)]

    def _completion(self, target: Any, prompt: Sequence[int], row: list[int], stop: set[int]) -> Completion:
        end = next((i + 1 for i, token in enumerate(row) if token in stop), None)
        kept = row[:end]
        return Completion(
            tokens=kept,
            stop_reason="length" if end is None else "stop",
            text=target.decode(kept) if "text" in target.capabilities else "",
            cost=Cost(target_calls=len(kept), target_positions=len(prompt) + len(kept) - 1),
        )


def _plain_config(max_new_tokens: int, eos: list[int] | None, pad: int, options: dict[str, Any]) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=eos, pad_token_id=pad, **options)
