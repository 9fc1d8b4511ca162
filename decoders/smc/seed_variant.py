"""The founding note's code as it is, defects included, so that what it does can be shown. Nobody should use it.

What is wrong in it, beside what steps.py says of the bisection: the bisection weighs by exp(b ell) alone, without the
mixture; the constant of a stage is the sum of exp(ell) over the pool, with neither its level nor its size; there is no
move; and the pool holds answers of different lengths, which no mixture of its stages describes.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from decodathlon.decoders import choosing
from decodathlon.decoders.particles import Particle, Particles
from decodathlon.decoders.smc import weights
from decodathlon.harness.decoder import Completion
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from decodathlon.decoders.smc.steps import Noise, PersistentSMCSteps
    from decodathlon.harness.randomness import RowRandom


def answers(decoder: PersistentSMCSteps, found: Particles, noise: Noise, rng: RowRandom) -> list[Completion]:
    """One answer to each prompt."""
    runs = [_Prompt(decoder, p) for p in range(len(found.prompts))]
    for step in range(1, decoder.max_steps + 1):
        decoder.grow(found, noise)
        everyone, going = list(found.all), []
        for run in runs:
            alive = [run.prompt * decoder.n_particles + i for i in found.unfinished_of(run.prompt)]
            run.score(found, step, alive)
            if len(alive) > 1 and step < decoder.max_steps:
                going.append(run.prompt)
                for i, one in run.drawn(alive, step, lambda p=run.prompt: rng.uniforms(decoder.n_particles, rows=[p])):
                    everyone[i] = one
        if not found.unfinished:
            break
        if any(now is not before for now, before in zip(everyone, found.all, strict=True)):
            found.become(everyone)
    return [run.given(found, float(rng.uniforms(1, rows=[run.prompt]))) for run in runs]


class _Prompt:
    """The pool and the schedule of one prompt, under the names that the note gives them."""

    def __init__(self, decoder: PersistentSMCSteps, prompt: int) -> None:
        self._decoder, self.prompt = decoder, prompt
        self._snapshots: list[Particle] = []
        self._l: list[float] = []
        self._betas: list[float] = []
        self._log_z: list[float] = []
        self._trace: list[dict[str, Any]] = []

    def score(self, found: Particles, step: int, alive: list[int]) -> None:
        """Add what is alive to the pool, then find a level."""
        some = [found.all[i] for i in alive]
        self._l += self._decoder.scoring(found.answers(some, by_model=True))
        self._snapshots += [replace(one, tokens=list(one.tokens)) for one in some]
        if self._decoder.prune == "oldest":
            del self._snapshots[: -self._decoder.pool_size], self._l[: -self._decoder.pool_size]
        if alive:
            ell = torch.tensor(self._l, dtype=torch.float64)
            self._betas.append(self._beta(ell, step))
            self._log_z.append(float(ell.logsumexp(0)))

    def _beta(self, ell: Tensor, step: int) -> float:
        decoder, low = self._decoder, self._betas[-1] if self._betas else self._decoder.beta_min
        if decoder.schedule != "adaptive_ess":
            return decoder.fixed_level(step)
        target, high = decoder.target_ess * decoder.n_particles, decoder.beta_max

        def ess(beta: float) -> float:
            return float(weights.ess((beta * ell)[None]))

        if ess(low) >= target:  # the defect: this is the lowest level, and nearly always effective enough
            return low
        if ess(high) < target:
            return high
        for _ in range(decoder.bisection_max_iter):
            if high - low < decoder.bisection_tol:
                break
            middle = (low + high) / 2
            low, high = (low, middle) if ess(middle) >= target else (middle, high)
        return high

    def drawn(self, alive: list[int], step: int, uniforms: Any) -> list[tuple[int, Particle]]:
        """What takes the place of those alive, where the weights are found too uneven."""
        ell = torch.tensor(self._l, dtype=torch.float64)
        betas, log_z = (torch.tensor(x, dtype=torch.float64)[:, None] for x in (self._betas, self._log_z))
        mixture = (betas * ell - log_z).logsumexp(0) - math.log(len(self._betas))
        log_weights = (self._betas[-1] * ell - mixture)[None]
        effective, decoder = float(weights.ess(log_weights)), self._decoder
        entry: dict[str, Any] = {"step": step, "level": self._betas[-1], "ess": effective / decoder.n_particles,
                                 "pool": len(self._l), "resampled": False}  # fmt: skip
        self._trace.append(entry)
        few = effective < decoder.threshold(step + 1) * len(alive)
        if decoder.policy == "never" or (decoder.policy == "ess" and not few):
            return []
        entry["resampled"] = True
        parents = weights.parents(log_weights, len(alive), uniforms()[:, : len(alive)], decoder.resample)[0].tolist()
        return [(i, self._snapshots[k]) for i, k in zip(alive, parents, strict=True)]

    def given(self, found: Particles, u: float) -> Completion:
        mine = found.of(self.prompt)
        scores, even = self._decoder.scoring(found.answers(mine, by_model=True)), [1.0] * len(mine)
        taken = choosing.chosen(self._decoder.answer, even, scores, [one.tokens for one in mine], found.target, u)
        last = {
            "step": len(self._betas) + 1,
            "level": self._betas[-1] if self._betas else self._decoder.beta_min,
            "ess": 1.0,
            "resampled": False,
            "weights": [1 / len(mine)] * len(mine),
            "scores": scores,
            "chosen": taken,
        }
        return found.completion(mine[taken], [*self._trace, last])
