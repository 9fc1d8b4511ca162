"""Best of n: draw n answers, give the one that a reward values most; with early stopping, drop the hopeless on the way.

The candidates of a prompt share what the model reads of it, and those that ended or were dropped cost nothing more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from decodathlon.decoders.particles import Particle, Particles
from decodathlon.harness import law, rewards
from decodathlon.harness.decoder import Completion, Limits, decoder
from decodathlon.harness.lazy import torch
from decodathlon.harness.rewards import Rewarded

if TYPE_CHECKING:
    from torch import Tensor

    from decodathlon.harness.randomness import RowRandom
    from decodathlon.harness.targets.base import Target


#: Says which of the particles are to be dropped, given all, after so many tokens.
Prune = Callable[[Particles, int], Sequence[Particle]]


def drawn(
    shape: Callable[[Tensor], Tensor],
    target: Target,
    prompts: Sequence[Sequence[int]],
    n: int,
    limits: Limits,
    rng: RowRandom,
    prune: Prune = lambda found, length: (),
) -> Particles:
    """n answers to each prompt, each token from the law `shape`."""
    u = rng.uniforms(n, limits.max_new_tokens).view(len(prompts) * n, -1)
    with torch.no_grad():
        found = Particles(target, prompts, n, limits)
        length = 0
        while growing := found.growing:
            logits = found.next_logits()
            shaped = shape(logits.clone())
            found.take(law.draw(shaped, u[growing, length].to(logits.device)), shaped, logits)
            length += 1
            for one in prune(found, length):
                one.dropped = True
    return found


@decoder(
    "best-of-n",
    claim="heuristic",
    family="best-of-n",
    bounds={"n": "[1, 4096]", "check_every": "[0, inf)", "keep": "(0, 1]", "temperature": "[0.01, 100]"},
    sweep={"n": [4, 16, 64], "check_every": [0, 4, 16]},
    paper="Stiennon et al. 2020, Learning to Summarize from Human Feedback; for `check_every` successive halving, "
    "Jamieson, Talwalkar 2016, Non-stochastic Best Arm Identification",
)
class BestOfN(Rewarded):
    """Of n answers the one of the greatest reward; with `check_every` the hopeless are dropped on the way.

    After every `check_every` tokens (0: never) the reward values what there is so far, and of the candidates that still
    grow the better `keep` go on.
    """

    n: int = 16
    check_every: int = 0
    keep: float = 0.5
    reward: str = "log-power"
    temperature: float = 1.0

    def generate(
        self, target: Any, prompts: Sequence[Sequence[int]], limits: Limits, rng: RowRandom
    ) -> list[Completion]:
        self.check(target)
        value = rewards.build(self.reward)

        def prune(found: Particles, length: int) -> list[Particle]:
            if not self.check_every or length % self.check_every:
                return []
            dropped = []
            for p in range(len(prompts)):
                growing = [one for one in found.of(p) if not (one.ended or one.dropped)]
                worth = value(found.answers(growing)).tolist() if len(growing) > 1 else []
                order = sorted(range(len(worth)), key=lambda i, worth=worth: -worth[i])
                dropped += [growing[i] for i in order[math.ceil(self.keep * len(growing)) :]]
            return dropped

        found = drawn(self.shape, target, prompts, self.n, limits, rng, prune)
        chosen = []
        for p in range(len(prompts)):
            whole = [one for one in found.of(p) if not one.dropped]
            worth = value(found.answers(whole))
            best = int(worth.argmax())
            chosen.append(found.completion(whole[best], [{"reward": float(worth[best]), "candidates": len(whole)}]))
        return chosen
