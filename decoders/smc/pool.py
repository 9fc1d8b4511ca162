"""The pool of persistent sampling: all particles of all stages, weighted as one sample of the mixture of their laws.

Karamanis and Seljak 2024, Persistent Sampling (arXiv 2407.20722). The law at level b is p(y) exp(b l(y)) / Z(b), with
l the log-likelihood and Z(0) = 1. Stage s has N particles from the law at level b_s. Together, t stages are a sample of
the mixture of these laws, so that a particle's weight at level b is (their Equations 13 to 15)

    w(b) = exp(b l) / [(1/t) sum_s exp(b_s l) / Z_s],

in which p cancels, and the mean of w(b) over all t N estimates Z(b) (Equation 16). The effective sample size
1 / sum W^2 (Equation 17) may exceed N: nothing is thrown away.

Dimensions: P prompts, each with a pool of its own; t stages; N particles per stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from decodathlon.decoders.smc import weights
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

#: Halvings by which a level is found.
HALVINGS = 50


@dataclass(frozen=True)
class Pool:
    """All in float64."""

    #: (P, t N) l of every particle, stage by stage.
    log_likelihood: Tensor
    #: (P, t) level b_s of each stage, and the log of the constant Z_s that was estimated when it began.
    levels: Tensor
    log_z: Tensor

    @classmethod
    def of_draws(cls, log_likelihood: Tensor) -> Pool:
        """The first stage: (P, N) independent draws of p itself."""
        none = torch.zeros_like(log_likelihood[:, :1])
        return cls(log_likelihood, none, none)

    @property
    def particles(self) -> int:
        """N."""
        return self.log_likelihood.shape[1] // self.levels.shape[1]

    def grown(self, log_likelihood: Tensor, level: Tensor, log_z: Tensor) -> Pool:
        """With one more stage: (P, N) particles at the levels (P,), whose constants are estimated as (P,)."""
        return Pool(
            torch.cat([self.log_likelihood, log_likelihood], 1),
            torch.cat([self.levels, level[:, None]], 1),
            torch.cat([self.log_z, log_z[:, None]], 1),
        )

    def log_mixture(self) -> Tensor:
        """(P, t N) log of the mixture of the stages' laws over p, at each particle; at most t P N numbers at a time."""
        found = torch.full_like(self.log_likelihood, -math.inf)
        for level, log_z in zip(self.levels.unbind(1), self.log_z.unbind(1), strict=True):
            found = torch.logaddexp(found, _scaled(level, self.log_likelihood) - log_z[:, None])
        return found - math.log(self.levels.shape[1])

    def log_weights(self, level: Tensor, log_mixture: Tensor | None = None) -> Tensor:
        """(P, t N) log w at the levels (P,)."""
        return _scaled(level, self.log_likelihood) - (self.log_mixture() if log_mixture is None else log_mixture)

    def raised(self, effective: float) -> Tensor:
        """(P,) the highest level up to 1 at which that many particles are effective; not below that of the last stage.

        Where there are too few even at the level of the last stage it stays there: another stage adds some.
        """
        mixture, low = self.log_mixture(), self.levels[:, -1]
        high = torch.ones_like(low)

        def enough(level: Tensor) -> Tensor:
            return weights.ess(self.log_weights(level, mixture)) >= effective

        low = torch.where(enough(high), high, low)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            fits = enough(middle)
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
        return low


def _scaled(level: Tensor, log_likelihood: Tensor) -> Tensor:
    """level times l, which is 0 at level 0 whatever l is."""
    return torch.where(level[:, None] == 0, 0.0, level[:, None] * log_likelihood)
