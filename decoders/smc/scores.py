"""What the founding note's scheme makes of an answer so far: its score, a prior on its length, and where both end.

The note's own text and code contradict one another; here a score s stands for exp(l), and l is

    logprob_power: log p / tau;  logprob_avg: log p / tokens / tau;  prm_reward: reward / tau;
    hybrid_prm_logprob: (alpha * reward + (1 - alpha) * log p) / tau.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from decodathlon.harness import rewards
from decodathlon.harness.rewards import Answer

Score = Literal["logprob_power", "logprob_avg", "prm_reward", "hybrid_prm_logprob"]
LengthPrior = Literal["none", "poisson", "geometric", "lognormal", "linear_penalty"]


@dataclass(frozen=True)
class Scoring:
    """Parameters as the note's file has them, under `scoring`."""

    score: Score
    prm: str
    tau: float
    alpha: float
    min_score: float
    max_score: float
    length_prior: LengthPrior
    lambda_len: float
    lambda_poisson: float
    p_geometric: float
    mu_lognormal: float
    sigma_lognormal: float
    penalty_linear: float

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """l of each, with the prior on its length, clipped to the logs of `min_score` and `max_score`."""
        reward = [0.0] * len(answers)
        if self.score in ("prm_reward", "hybrid_prm_logprob") and answers:
            reward = rewards.build(f"prm:{self.prm}")(answers).tolist()
        low = -math.inf if self.min_score == 0 else math.log(self.min_score)
        high = math.log(self.max_score)
        return [
            min(high, max(low, self._plain(a, r) / self.tau + self.lambda_len * self.log_length(len(a.tokens))))
            for a, r in zip(answers, reward, strict=True)
        ]

    def _plain(self, answer: Answer, reward: float) -> float:
        if self.score == "logprob_avg":
            return answer.log_prob / max(1, len(answer.tokens))
        if self.score == "prm_reward":
            return reward
        if self.score == "hybrid_prm_logprob":
            return self.alpha * reward + (1 - self.alpha) * answer.log_prob
        return answer.log_prob

    def log_length(self, n: int) -> float:
        """Log of the prior of so many tokens, n at least 1."""
        if self.length_prior == "poisson":
            return n * math.log(self.lambda_poisson) - self.lambda_poisson - math.lgamma(n + 1)
        if self.length_prior == "geometric":
            return math.log(self.p_geometric) + n * math.log1p(-self.p_geometric)
        if self.length_prior == "lognormal":
            z = (math.log(n) - self.mu_lognormal) / self.sigma_lognormal
            return -0.5 * z * z - math.log(n * self.sigma_lognormal * math.sqrt(2 * math.pi))
        return -self.penalty_linear * n if self.length_prior == "linear_penalty" else 0.0
