"""Resampling where it has a use: the weight is expensive, and candidates of a cheap law are drawn before it is asked.

Of m answers drawn from the model one is given, in proportion to exp(reward / beta): resampled importance sampling with
the tilted law p(y) exp(r(y) / beta) as its target and p as the law of its candidates, so that every p cancels. A
reservoir of one answer sees the candidates one after the other, and holds nothing else.

The law of what is given nears the tilted one as m grows; at m = 1 it is the model's own. The candidates' mean weight
estimates the constant of the tilted law without bias at every m.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from decodathlon.decoders.best_of import drawn
from decodathlon.decoders.reservoir.stream import survivor
from decodathlon.harness import rewards
from decodathlon.harness.decoder import Completion, Limits, decoder
from decodathlon.harness.rewards import Answer, Tilted

if TYPE_CHECKING:
    from torch import Tensor

    from decodathlon.harness.randomness import RowRandom


@decoder(
    "reservoir-reward",
    claim="heuristic",
    bounds={"m": "[1, 4096]", "beta": "(0, 1e6]", "temperature": "[0.01, 100]"},
    sweep={"m": [4, 16, 64]},
    paper="Talbot, Cline, Egbert 2005, Importance Resampling for Global Illumination",
)
class ReservoirReward(Tilted):
    """Of m answers one, in proportion to exp(reward / beta): near p(y) exp(r(y) / beta), the nearer the more."""

    m: int = 16
    reward: str = "log-power"
    beta: float = 1.0
    temperature: float = 1.0

    def log_tilt(self, answers: Sequence[Answer]) -> Tensor:
        return rewards.build(self.reward)(answers) / self.beta

    def generate(
        self, target: Any, prompts: Sequence[Sequence[int]], limits: Limits, rng: RowRandom
    ) -> list[Completion]:
        self.check(target)
        found = drawn(self.shape, target, prompts, self.m, limits, rng)
        chosen = []
        for p, numbers in enumerate(rng.uniforms(self.m)):
            weights = self.log_tilt(found.answers(found.of(p)))
            taken = int(survivor(weights[None], numbers[None])[0])
            ess = float((2 * weights.logsumexp(0) - (2 * weights).logsumexp(0)).exp()) / self.m
            mean = float(weights.logsumexp(0)) - math.log(self.m)
            trace = {"ess": ess, "resampled": True, "log_mean_weight": mean}
            chosen.append(found.completion(found.of(p)[taken], [trace]))
        return chosen
