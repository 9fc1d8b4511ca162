"""The founding note's scheme: answers grow step by step, a step being a line; each step is scored, weighted, copied.

`variant=repaired` is that scheme put right, sequential Monte Carlo over growing answers whose reward counts more and
more. The law of step t is p(x) exp(b_t l(x)) with the score l of the answer so far; the level b_t is the highest at
which enough particles stay effective; a particle weighs exp(b_t l_t - b_t-1 l_t-1) more with each step, and keeps that
weight until it is drawn anew. Answers on the way have different lengths, so those of several steps are no sample of one
mixture, and the note's weights mean nothing there. What can be kept of its pool is whole answers: one that ended at
step e has at each step from e to `max_steps` an unbiased estimate of its mass, and their mean is what counts.

`variant=seed` is the note's code as it is. Its bisection looks for the lowest level at which enough are effective,
which is the level it comes from: it stays at 0 as long as enough answers grow, all weights are equal, nothing is
copied, and what is left is self-consistency (tests/decoders/test_smc_steps.py shows it answer by answer). Where so
few still grow that `target_ess` cannot be had at any level, it jumps to the greatest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from decodathlon.decoders import choosing
from decodathlon.decoders.choosing import Way
from decodathlon.decoders.particles import Particles
from decodathlon.decoders.smc import repaired, seed_variant
from decodathlon.decoders.smc.scores import LengthPrior, Score, Scoring
from decodathlon.decoders.smc.weights import Scheme
from decodathlon.harness import law, rewards
from decodathlon.harness.decoder import Completion, Decoder, Limits, decoder
from decodathlon.harness.errors import SpecError, UnsupportedError
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from decodathlon.harness.randomness import RowRandom
    from decodathlon.harness.rewards import Reward
    from decodathlon.harness.targets.base import Target

#: Where the note's file has each parameter; what stands under a key of None is the harness's own business.
LAYOUT: Mapping[str, str | None] = {
    "system": None,
    "models.generator": None,
    "models.prm.enabled": None,
    "models.prm.model_path": "prm",
    "models.prm.max_model_len": None,
    "models.prm.gpu_memory_utilization": None,
    "models.prm.tensor_parallel_size": None,
    "models.prm.dtype": None,
    "models.prm.trust_remote_code": None,
    "generation.n_particles": "n_particles",
    "generation.max_steps": "max_steps",
    "generation.max_tokens_per_step": "max_tokens_per_step",
    "generation.min_tokens_per_step": "min_tokens_per_step",
    "generation.temperature": "temperature",
    "generation.top_p": "top_p",
    "generation.stop_tokens": None,
    "generation.step_boundary": "step_boundary",
    "generation.fixed_step_tokens": "fixed_step_tokens",
    "generation.include_logprobs": None,
    "scoring.type": "score",
    "scoring.params.tau": "tau",
    "scoring.params.alpha": "alpha",
    "scoring.params.min_score": "min_score",
    "scoring.params.max_score": "max_score",
    "scoring.length_prior.type": "length_prior",
    "scoring.length_prior.lambda_len": "lambda_len",
    "scoring.length_prior.lambda_poisson": "lambda_poisson",
    "scoring.length_prior.p_geometric": "p_geometric",
    "scoring.length_prior.mu_lognormal": "mu_lognormal",
    "scoring.length_prior.sigma_lognormal": "sigma_lognormal",
    "scoring.length_prior.penalty_linear": "penalty_linear",
    "ps.variant": "variant",
    "ps.answer": "answer",
    "ps.temperature_schedule.mode": "schedule",
    "ps.temperature_schedule.beta_min": "beta_min",
    "ps.temperature_schedule.beta_max": "beta_max",
    "ps.temperature_schedule.target_ess": "target_ess",
    "ps.temperature_schedule.bisection_tol": "bisection_tol",
    "ps.temperature_schedule.bisection_max_iter": "bisection_max_iter",
    "ps.resample.policy": "policy",
    "ps.resample.method": "resample",
    "ps.resample.alpha_start": "alpha_start",
    "ps.resample.alpha_end": "alpha_end",
    "ps.resample.alpha_schedule": "alpha_schedule",
    "ps.snapshot_pool.enabled": "pool",
    "ps.snapshot_pool.max_size": "pool_size",
    "ps.snapshot_pool.prune_strategy": "prune",
    "ps.z_estimation": None,
    "evaluation": None,
    "tuning": None,
    "smoke_test": None,
    "logging": None,
    "performance": None,
}
#: Marks behind which a sentence is over.
_SENTENCE = (".", "!", "?")


@decoder(
    "persistent-smc-steps",
    claim="heuristic",
    layout=LAYOUT,
    bounds={
        "n_particles": "[1, 4096]", "max_steps": "[1, 10000]", "max_tokens_per_step": "[1, 100000]",
        "min_tokens_per_step": "[1, 100000]", "fixed_step_tokens": "[1, 100000]", "temperature": "[0.01, 100]",
        "top_p": "(0, 1]", "tau": "(0, 1e6]", "alpha": "[0, 1]", "min_score": "[0, inf)", "max_score": "(0, 1e300]",
        "lambda_len": "[0, 1e6]", "lambda_poisson": "(0, 1e6]", "p_geometric": "(0, 1)", "mu_lognormal": "[-100, 100]",
        "sigma_lognormal": "(0, 100]", "penalty_linear": "[-1e6, 1e6]", "beta_min": "[0, 1e6]", "beta_max": "(0, 1e6]",
        "target_ess": "(0, 1]", "bisection_tol": "(0, 1)", "bisection_max_iter": "[1, 10000]", "alpha_start": "[0, 1]",
        "alpha_end": "[0, 1]", "pool_size": "[1, 1000000]",
    },
    sweep={"n_particles": [4, 8, 16], "tau": [0.5, 1.0, 2.0], "alpha_start": [0.3, 0.5, 0.7],
           "alpha_end": [0.6, 0.8, 0.9], "resample": ["topN", "systematic", "multinomial"]},
    paper="the founding note, after Karamanis, Seljak 2024, Persistent Sampling; put right after Del Moral 2004",
)  # fmt: skip
class PersistentSMCSteps(Decoder):
    """Answers that grow step by step, scored, weighted and copied on the way; the best, or the commonest, is given.

    The scores read the model's own probabilities of what was drawn at `temperature` within `top_p`, as the note has it:
    the law that is approached has both as factors.
    """

    variant: Literal["repaired", "seed"] = "repaired"
    n_particles: int = 8
    max_steps: int = 20
    max_tokens_per_step: int = 128
    min_tokens_per_step: int = 1
    step_boundary: Literal["newline", "sentence", "fixed"] = "newline"
    fixed_step_tokens: int = 64
    temperature: float = 0.7
    top_p: float = 0.95
    score: Score = "logprob_power"
    prm: str = "none"
    tau: float = 1.0
    alpha: float = 0.5
    min_score: float = 0.0
    max_score: float = 1e300
    length_prior: LengthPrior = "none"
    lambda_len: float = 0.1
    lambda_poisson: float = 10.0
    p_geometric: float = 0.1
    mu_lognormal: float = 2.0
    sigma_lognormal: float = 0.5
    penalty_linear: float = 0.01
    schedule: Literal["adaptive_ess", "fixed_linear", "fixed_cosine"] = "adaptive_ess"
    beta_min: float = 0.0
    beta_max: float = 1.0
    target_ess: float = 0.5
    bisection_tol: float = 1e-4
    bisection_max_iter: int = 50
    policy: Literal["ess", "always", "never"] = "ess"
    resample: Scheme = "systematic"
    alpha_start: float = 0.5
    alpha_end: float = 0.8
    alpha_schedule: Literal["linear", "constant"] = "linear"
    pool: bool = True
    pool_size: int = 1000
    prune: Literal["oldest", "lowest_score"] = "oldest"
    answer: Way = "best"

    def __post_init__(self) -> None:
        name = self.info.name
        if self.beta_max < self.beta_min:
            raise SpecError(f"{name}: beta_max={self.beta_max:g} is below beta_min={self.beta_min:g}")
        if self.max_score <= self.min_score:
            raise SpecError(f"{name}: max_score={self.max_score:g} is not above min_score={self.min_score:g}")
        if self.min_tokens_per_step > self.max_tokens_per_step:
            least, most = self.min_tokens_per_step, self.max_tokens_per_step
            raise SpecError(f"{name}: min_tokens_per_step={least} is above max_tokens_per_step={most}")
        if self.score in ("prm_reward", "hybrid_prm_logprob"):
            if self.prm == "none":
                raise SpecError(f"{name}: score={self.score} needs a process reward model: prm=FOLDER or hub id")
            rewards.build(f"prm:{self.prm}")

    @property
    def reward(self) -> Reward | None:
        """The process reward model, where the score asks for one."""
        return rewards.build(f"prm:{self.prm}") if self.score in ("prm_reward", "hybrid_prm_logprob") else None

    def sources(self) -> list[Path]:
        return sorted({*super().sources(), *(self.reward.sources if self.reward else ())})

    @property
    def scoring(self) -> Scoring:
        """What scores the answers."""
        return Scoring(**{f.name: getattr(self, f.name) for f in fields(Scoring)})

    def check(self, target: Target) -> None:
        super().check(target)
        choosing.check(self.answer, target)
        if self.reward is not None:
            self.reward.check(target)
        if self.step_boundary != "fixed" and "text" not in target.capabilities:
            raise UnsupportedError("text", f"step_boundary={self.step_boundary} reads it; fixed does not")

    def shape(self, logits: Tensor) -> Tensor:
        """(N, V) logits to (N, V) log-probabilities: the law that tokens are drawn from."""
        return law.process(logits, temperature=self.temperature, top_p=self.top_p)

    def generate(
        self, target: Target, prompts: Sequence[Sequence[int]], limits: Limits, rng: RowRandom
    ) -> list[Completion]:
        self.check(target)
        with torch.no_grad():
            found = Particles(target, prompts, self.n_particles, limits)
            noise = Noise(rng, self.n_particles, limits.max_new_tokens)
            return (seed_variant if self.variant == "seed" else repaired).answers(self, found, noise, rng)

    def grow(self, found: Particles, noise: Noise) -> None:
        """One step of all that are unfinished."""
        begun = [len(one.tokens) for one in found.all]
        while growing := found.growing:
            logits = found.next_logits()
            log_law = self.shape(logits.clone())
            found.take(law.draw(log_law, noise(growing).to(logits.device)), log_law, logits)
            for i in growing:
                found.all[i].waits = self._over(found.all[i].tokens[begun[i] :], found.target)
        for one in found.all:
            one.waits = False

    def _over(self, step: Sequence[int], target: Target) -> bool:
        """Whether these tokens are a whole step."""
        if self.step_boundary == "fixed":
            return len(step) >= min(self.fixed_step_tokens, self.max_tokens_per_step)
        if len(step) < self.min_tokens_per_step:
            return False
        text = target.decode(step)
        ends = text.endswith("\n") or (self.step_boundary == "sentence" and text.rstrip().endswith(_SENTENCE))
        return len(step) >= self.max_tokens_per_step or (ends and bool(text.strip()))

    def threshold(self, step: int) -> float:
        """The share of effective particles below which they are drawn anew, at a step from 1 on."""
        if self.alpha_schedule == "constant":
            return self.alpha_start
        return self.alpha_start + (self.alpha_end - self.alpha_start) * (step - 1) / max(1, self.max_steps - 1)

    def fixed_level(self, step: int) -> float:
        """The level of a step from 1 on where it does not follow from the particles."""
        share = (step - 1) / max(1, self.max_steps - 1)
        share = share if self.schedule == "fixed_linear" else (1 - math.cos(math.pi * share)) / 2
        return self.beta_min + share * (self.beta_max - self.beta_min)


class Noise:
    """Uniform numbers for particles that do not grow in step: each slot of a prompt goes through its own."""

    def __init__(self, rng: RowRandom, each: int, length: int) -> None:
        self._rng, self._each, self._length = rng, each, max(1, length)
        #: By prompt (M, numbers), and how many of them each slot has used.
        self._numbers = list(rng.uniforms(each, self._length))
        self._used = [0] * (len(rng) * each)

    def __call__(self, growing: Sequence[int]) -> Tensor:
        """(G,) the next number of each of these."""
        return torch.stack([self._next(*divmod(i, self._each)) for i in growing])

    def _next(self, p: int, slot: int) -> Tensor:
        place = self._used[p * self._each + slot]
        self._used[p * self._each + slot] += 1
        if place >= self._numbers[p].shape[1]:  # copies of shorter answers take more steps than one answer has
            more = self._rng.uniforms(self._each, self._length, rows=[p])[0]
            self._numbers[p] = torch.cat([self._numbers[p], more], 1)
        return self._numbers[p][slot, place]
