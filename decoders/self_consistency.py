"""Self-consistency: draw n answers, give one whose final answer most of them have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from decodathlon.decoders import choosing
from decodathlon.decoders.best_of import drawn
from decodathlon.harness import law
from decodathlon.harness.decoder import Completion, Decoder, Limits, decoder

if TYPE_CHECKING:
    from torch import Tensor

    from decodathlon.harness.randomness import RowRandom
    from decodathlon.harness.targets.base import Target


@decoder(
    "self-consistency",
    claim="heuristic",
    bounds={"n": "[1, 4096]", "temperature": "[0.01, 100]", "top_p": "(0, 1]"},
    sweep={"n": [4, 8, 16], "temperature": [0.5, 0.7, 1.0]},
    paper="Wang et al. 2022, Self-Consistency Improves Chain of Thought Reasoning (arXiv 2203.11171)",
)
class SelfConsistency(Decoder):
    """Of n answers the likeliest of those whose last box is the commonest; where there are no boxes, the likeliest."""

    n: int = 8
    temperature: float = 0.7
    top_p: float = 0.95

    def check(self, target: Target) -> None:
        super().check(target)
        choosing.check("vote", target)

    def shape(self, logits: Tensor) -> Tensor:
        """(N, V) logits to (N, V) log-probabilities: the law that answers are drawn from."""
        return law.process(logits, temperature=self.temperature, top_p=self.top_p)

    def generate(
        self, target: Target, prompts: Sequence[Sequence[int]], limits: Limits, rng: RowRandom
    ) -> list[Completion]:
        self.check(target)
        found = drawn(self.shape, target, prompts, self.n, limits, rng)
        given = []
        for p in range(len(prompts)):
            mine = found.of(p)
            scores = [one.model_log_prob for one in mine]
            taken = choosing.chosen("vote", [1.0] * self.n, scores, [one.tokens for one in mine], target, 0.0)
            given.append(found.completion(mine[taken], [{"chosen": taken, "scores": scores}]))
        return given
