"""Sequential Monte Carlo over growing answers, with and without a twist.

The law at length t is p(x_1:t) psi_t(x_1:t) up to a constant, and at the end p(y) exp(r(y) / beta). A particle that is
drawn token by token from q weighs p(x_t | x_<t) psi_t / (q(x_t | x_<t) psi_t-1) more with each of them. Where too few
particles are effective they are drawn anew by weight, and weigh the mean from then on; weights are carried over
otherwise. The product of these means is an unbiased estimate of the constant Z, with any psi and any number of
particles (Del Moral 2004; for language models Lew et al. 2023, Zhao et al. 2024).

- `smc` draws from p, and psi_t is what the reward makes of the answer so far, looked at every few tokens.
- `twisted-smc` draws from p psi_t itself, so that the next token is chosen with an eye on what it is worth. With the
  optimal twist, psi_t(x_1:t) = E[exp(r(y) / beta) | x_1:t], every weight is Z and one particle is enough.

Dimensions: P prompts, M particles of each, G of all P M that still grow, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from decodathlon.decoders import choosing
from decodathlon.decoders.choosing import Way
from decodathlon.decoders.particles import Particles
from decodathlon.decoders.smc import weights
from decodathlon.decoders.smc.twists import optimal, valued
from decodathlon.decoders.smc.weights import Scheme
from decodathlon.harness import law, rewards
from decodathlon.harness.decoder import Completion, Limits, decoder
from decodathlon.harness.lazy import torch
from decodathlon.harness.rewards import Answer, Tilted

if TYPE_CHECKING:
    from torch import Tensor

    from decodathlon.harness.randomness import RowRandom
    from decodathlon.harness.targets.base import Target

#: Particles from which on an audit of 12,000 draws sees no difference from the tilted law, as long as the tilt is mild
#: and looked at often: for sharper ones, longer texts and rewards of unknown size no number is enough.
ENOUGH, MILD, WARM, OFTEN = 64, 0.3, 0.5, 8
_BOUNDS = {"beta": "(0, 1e6]", "particles": "[1, 4096]", "ess": "[0, 1]", "temperature": "[0.01, 100]"}


class Sequential(Tilted):
    """What both share: weights that are carried, resampling, and the choice at the end."""

    reward: str
    beta: float
    particles: int
    ess: float
    resample: Scheme
    answer: Way

    def log_tilt(self, answers: Sequence[Answer]) -> Tensor:
        """(len(answers),) the reward over beta."""
        return rewards.build(self.reward)(answers) / self.beta

    def check(self, target: Target) -> None:
        super().check(target)
        choosing.check(self.answer, target)

    def resampled(
        self, found: Particles, log_weights: Tensor, rng: RowRandom, traces: Sequence[list[dict[str, Any]]], length: int
    ) -> tuple[Tensor, list[int]]:
        """The weights (P, M) afterwards, and whose copy each of the P M particles is."""
        weights.check(log_weights, self.spec)
        P, M = log_weights.shape
        effective, mean = weights.ess(log_weights), weights.log_mean(log_weights)
        alive = [any(not one.ended for one in found.of(p)) for p in range(P)]
        few = (effective < self.ess * M) & torch.tensor(alive)
        rows, u = few.nonzero()[:, 0].tolist(), torch.zeros(P, M, dtype=torch.float64)
        if rows:
            u[rows] = rng.uniforms(M, rows=rows)  # each prompt its own, whatever the others do
        parents = weights.parents(log_weights, M, u, self.resample)
        parents = torch.where(few[:, None], parents, torch.arange(M))
        for p, trace in enumerate(traces):
            if alive[p]:
                trace.append(
                    {"length": length, "ess": float(effective[p]) / M, "log_z": float(mean[p]),
                     "resampled": bool(few[p])} | ({"parents": parents[p].tolist()} if few[p] else {})
                )  # fmt: skip
        copies = (parents + torch.arange(P)[:, None] * M).view(-1).tolist()
        if bool(few.any()):
            found.copy(copies)
        return torch.where(few[:, None], mean[:, None], log_weights), copies

    def given(
        self, found: Particles, log_weights: Tensor, tilts: Tensor, u: Tensor, traces: Sequence[list[dict[str, Any]]]
    ) -> list[Completion]:
        """One of the weighted particles of each prompt; `tilts` (P, M) is what their answers are worth."""
        weights.check(log_weights, self.spec)
        completions = []
        for p, trace in enumerate(traces):
            share, scores, mine = log_weights[p].softmax(-1).tolist(), tilts[p].tolist(), found.of(p)
            tokens = [one.tokens for one in mine]
            taken = choosing.chosen(self.answer, share, scores, tokens, found.target, float(u[p]))
            last = {
                "length": max(map(len, tokens)),
                "ess": float(weights.ess(log_weights)[p]) / self.particles,
                "log_z": float(weights.log_mean(log_weights)[p]),
                "resampled": False,
                "weights": share,
                "scores": scores,
                "chosen": taken,
            }
            completions.append(found.completion(mine[taken], [*trace, last]))
        return completions


@decoder(
    "smc",
    claim=lambda self: "sharpened" if _samples(self, ENOUGH) and self.every <= OFTEN else "heuristic",
    bounds={**_BOUNDS, "every": "[1, 100000]"},
    sweep={"particles": [4, 16, 64], "every": [1, 8, 32], "ess": [0.3, 0.5, 0.8]},
    paper="Del Moral 2004, Feynman-Kac Formulae; Lew et al. 2023, Sequential Monte Carlo Steering (arXiv 2306.03081)",
)
class SMC(Sequential):
    """Answers from p(y) exp(r(y) / beta): drawn from p, weighed by the reward so far, and copied by weight.

    Every `every` tokens the reward looks at what there is; where fewer than `ess` of the particles are effective they
    are drawn anew.
    """

    reward: str = "log-power"
    beta: float = 1.0
    particles: int = 8
    every: int = 8
    ess: float = 0.5
    resample: Scheme = "systematic"
    answer: Way = "draw"
    temperature: float = 1.0

    def generate(
        self, target: Any, prompts: Sequence[Sequence[int]], limits: Limits, rng: RowRandom
    ) -> list[Completion]:
        self.check(target)
        P, M = len(prompts), self.particles
        noise = rng.uniforms(M, limits.max_new_tokens).view(P * M, -1)
        log_weights, tilts = torch.zeros(P, M, dtype=torch.float64), torch.zeros(P * M, dtype=torch.float64)
        traces: list[list[dict[str, Any]]] = [[] for _ in prompts]
        with torch.no_grad():
            found = Particles(target, prompts, M, limits)
            length = 0
            unseen: set[int] = set()  # grown since the reward looked last
            while growing := found.growing:
                logits = found.next_logits()
                log_law = self.shape(logits.clone())
                found.take(law.draw(log_law, noise[growing, length].to(logits.device)), log_law, logits)
                unseen |= set(growing)
                length += 1
                if length % self.every and found.growing:
                    continue
                changed = sorted(unseen)
                now = self.log_tilt(found.answers([found.all[i] for i in changed]))
                log_weights.view(-1)[changed] += now - tilts[changed]
                tilts[changed] = now
                unseen = set()
                if found.growing:
                    log_weights, copies = self.resampled(found, log_weights, rng, traces, length)
                    tilts = tilts[copies]
        return self.given(found, log_weights, tilts.view(P, M), rng.uniforms(1)[:, 0], traces)


@decoder(
    "twisted-smc",
    claim=lambda self: (
        "sharpened"
        if _samples(self, ENOUGH) or (self.twist == "optimal" and self.answer == "draw" and self.resample != "topN")
        else "heuristic"
    ),
    bounds={**_BOUNDS, "candidates": "[1, 1000000]"},
    sweep={"particles": [4, 16, 64], "ess": [0.3, 0.5, 0.8]},
    paper="Zhao, Brekelmans, Makhzani, Grosse 2024, Probabilistic Inference in Language Models via Twisted Sequential "
    "Monte Carlo (arXiv 2404.17546)",
)
class TwistedSMC(Sequential):
    """Answers from p(y) exp(r(y) / beta), the next token drawn with an eye on what it is worth.

    `twist=reward` values the answer so far with each of the `candidates` likeliest next tokens (with `log-power` as the
    reward with all of them, for no more than the logits); `twist=optimal` knows what will come of it, on targets whose
    every answer can be enumerated.
    """

    reward: str = "log-power"
    beta: float = 1.0
    particles: int = 8
    twist: Literal["reward", "optimal"] = "reward"
    candidates: int = 4
    ess: float = 0.5
    resample: Scheme = "systematic"
    answer: Way = "draw"
    temperature: float = 1.0

    def generate(
        self, target: Any, prompts: Sequence[Sequence[int]], limits: Limits, rng: RowRandom
    ) -> list[Completion]:
        self.check(target)
        P, M = len(prompts), self.particles
        noise = rng.uniforms(M, limits.max_new_tokens).view(P * M, -1)
        log_weights, twists = torch.zeros(P, M, dtype=torch.float64), torch.zeros(P * M, dtype=torch.float64)
        traces: list[list[dict[str, Any]]] = [[] for _ in prompts]
        with torch.no_grad():
            twist = optimal(self, target, prompts, limits) if self.twist == "optimal" else valued(self, self.candidates)
            found = Particles(target, prompts, M, limits)
            length = 0
            while growing := found.growing:
                logits = found.next_logits()
                log_law = self.shape(logits.clone()).double()
                worth = log_law + twist(found, [found.all[i] for i in growing], twists[growing], log_law)
                log_z = worth.logsumexp(-1)
                tokens = law.draw(worth - log_z[:, None], noise[growing, length].to(logits.device))
                found.take(tokens, log_law, logits)
                log_weights.view(-1)[growing] += log_z.cpu() - twists[growing]
                twists[growing] = (worth - log_law).gather(1, tokens[:, None])[:, 0].cpu()
                length += 1
                if found.growing:
                    log_weights, copies = self.resampled(found, log_weights, rng, traces, length)
                    twists = twists[copies]
            tilts = self.log_tilt(found.answers(found.all))
        log_weights = log_weights + (tilts - twists).view(P, M)  # the last psi is the reward itself
        return self.given(found, log_weights, tilts.view(P, M), rng.uniforms(1)[:, 0], traces)


def _samples(self: Sequential, enough: int) -> bool:
    """Whether one of enough particles is drawn by weight, whose tilt is mild and whose resampling is one."""
    mild = self.reward == "log-power" and self.beta >= MILD and self.temperature >= WARM
    return self.answer == "draw" and self.resample != "topN" and mild and self.particles >= enough
