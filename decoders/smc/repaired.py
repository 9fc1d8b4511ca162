"""The founding note's scheme put right: sequential Monte Carlo over answers whose score counts more and more.

See steps.py for what is approached, and what of the note's pool can be kept.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

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
        parents = list(range(len(found.all)))
        for run in runs:
            if run.over:
                continue
            run.weigh(found, step)
            if not run.over and step < decoder.max_steps:
                u = rng.uniforms(decoder.n_particles, rows=[run.prompt])[0]
                begin = run.prompt * decoder.n_particles
                parents[begin : begin + decoder.n_particles] = [begin + k for k in run.copied(u)]
        if all(run.over for run in runs):
            break
        if parents != list(range(len(parents))):
            found.copy(parents)
    return [run.given(found, float(rng.uniforms(1, rows=[run.prompt]))) for run in runs]


class _Prompt:
    """Where the particles of one prompt stand."""

    def __init__(self, decoder: PersistentSMCSteps, prompt: int) -> None:
        self._decoder, self.prompt = decoder, prompt
        M = decoder.n_particles
        #: (M,) of each particle: the log of its weight, and the score of its answer so far.
        self._log_weights, self._scores = torch.zeros(2, M, dtype=torch.float64)
        self._level, self._step = decoder.beta_min, 0
        #: By particle, the step at which its answer ended.
        self._ended_at: dict[int, int] = {}
        #: Whole answers by their tokens: score, log of the sum of the weights of all its steps, the step of its end.
        self._pool: dict[tuple[int, ...], tuple[Particle, float, float, int]] = {}
        #: What was taken out of the pool for want of room, and does not come back.
        self._pruned: set[tuple[int, ...]] = set()
        self._trace: list[dict[str, Any]] = []
        self.over = False

    def weigh(self, found: Particles, step: int) -> None:
        """Score what there is after a step, raise the level, weigh; what has ended goes into the pool."""
        decoder, mine = self._decoder, found.of(self.prompt)
        scores = torch.tensor(decoder.scoring(found.answers(mine, by_model=True)), dtype=torch.float64)
        before = self._log_weights - self._level * self._scores
        level = self._raised(before, scores, step)
        self._log_weights, self._scores, self._level, self._step = before + level * scores, scores, level, step
        weights.check(self._log_weights[None], decoder.spec)
        effective = float(weights.ess(self._log_weights[None])) / decoder.n_particles
        log_z = float(weights.log_mean(self._log_weights))
        self._trace.append({"step": step, "level": level, "ess": effective, "log_z": log_z, "resampled": False})
        unfinished = set(found.unfinished_of(self.prompt))
        self.over = not unfinished
        for i in set(range(len(mine))) - unfinished:
            self._ended_at.setdefault(i, step)
        if decoder.pool:
            for i in set(range(len(mine))) - unfinished:
                self._add(self._entry(mine, i))
            self._prune()

    def _entry(self, mine: list[Particle], i: int) -> tuple[Particle, float, float, int]:
        """A particle as the pool has it: weighed as the last level would, among those that ended when it did."""
        score = float(self._scores[i])
        weight = float(self._log_weights[i]) + (self._decoder.beta_max - self._level) * score
        return (mine[i], score, weight, self._ended_at.get(i, self._step))

    def _add(self, entry: tuple[Particle, float, float, int]) -> None:
        one, score, weight, end = entry
        key = tuple(one.tokens)
        if key not in self._pruned:
            so_far = self._pool[key][2] if key in self._pool else -math.inf
            self._pool[key] = (one, score, float(np.logaddexp(so_far, weight)), end)

    def _prune(self) -> None:
        """Keep no more answers than may be kept. What is left out has no weight at all any more: a bias."""
        while len(self._pool) > self._decoder.pool_size:
            scores = {key: score for key, (_, score, _, _) in self._pool.items()}
            worst = next(iter(scores)) if self._decoder.prune == "oldest" else min(scores, key=scores.__getitem__)
            self._pruned.add(worst)
            del self._pool[worst]

    def _raised(self, before: Tensor, scores: Tensor, step: int) -> float:
        """The highest level at which enough particles are effective; where there are too few already, it stays."""
        decoder = self._decoder
        if decoder.schedule != "adaptive_ess":
            return decoder.fixed_level(step)

        def enough(level: float) -> bool:
            return float(weights.ess((before + level * scores)[None])) >= decoder.target_ess * decoder.n_particles

        low, high = self._level, decoder.beta_max
        if enough(high):
            return high
        for _ in range(decoder.bisection_max_iter):
            if high - low <= decoder.bisection_tol * decoder.beta_max:
                break
            middle = (low + high) / 2
            low, high = (middle, high) if enough(middle) else (low, middle)
        return low

    def copied(self, u: Tensor) -> list[int]:
        """Whose copy each particle is from now on, by (M,) uniforms; its own where the weights are even enough."""
        decoder, entry = self._decoder, self._trace[-1]
        M = decoder.n_particles
        if decoder.policy == "never" or (decoder.policy == "ess" and entry["ess"] >= decoder.threshold(self._step)):
            return list(range(M))
        chosen = weights.parents(self._log_weights[None], M, u[None], decoder.resample)[0]
        parents: list[int] = chosen.tolist()
        self._log_weights = weights.log_mean(self._log_weights).expand(M).clone()
        self._scores = self._scores[chosen]
        self._ended_at = {i: self._ended_at[k] for i, k in enumerate(parents) if k in self._ended_at}
        entry |= {"resampled": True, "parents": parents}
        return parents

    def given(self, found: Particles, u: float) -> Completion:
        """One of the whole answers of all steps; what never ended counts as whole at the last one."""
        decoder, mine = self._decoder, found.of(self.prompt)
        if decoder.pool and self._step < decoder.max_steps:
            # All have ended: at the steps that are left out each would weigh what it weighs now. With them the number
            # of terms of every mean is fixed, and the mean is without bias.
            for i in range(len(mine)):
                one, score, weight, end = self._entry(mine, i)
                self._add((one, score, weight + math.log(decoder.max_steps - self._step), end))
        last = found.unfinished_of(self.prompt) if decoder.pool else range(len(mine))
        every = [*self._pool.values(), *(self._entry(mine, i) for i in last)]
        # An answer that ended at step e was weighed at each step from e to the last, each time without bias: the mean
        # of these is what counts.
        steps = [decoder.max_steps - e + 1 if decoder.pool else 1 for *_, e in every]
        log_weights = torch.tensor(
            [w - math.log(n) for (_, _, w, _), n in zip(every, steps, strict=True)], dtype=torch.float64
        )
        weights.check(log_weights[None], decoder.spec)
        share, scores = log_weights.softmax(-1).tolist(), [score for _, score, _, _ in every]
        tokens = [one.tokens for one, *_ in every]
        taken = choosing.chosen(decoder.answer, share, scores, tokens, found.target, u)
        log_z = float(log_weights.logsumexp(0)) - math.log(decoder.n_particles)
        self._trace.append(
            {"step": self._step, "level": decoder.beta_max, "log_z": log_z, "resampled": False, "pool": len(every),
             "ess": float(weights.ess(log_weights[None])) / decoder.n_particles, "weights": share, "scores": scores,
             "chosen": taken}
        )  # fmt: skip
        return found.completion(every[taken][0], self._trace)
