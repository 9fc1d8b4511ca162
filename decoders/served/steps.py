"""The founding note's stepwise scheme on a server: a step is asked for as a whole, and cut here where it is over.

Scores, weights, copies and the choice are those of smc/steps.py; only the particles grow elsewhere. What the server
wrote behind the end of a step is thrown away, which changes no law.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from decodathlon.decoders.particles import Particle
from decodathlon.decoders.served.suffix import Begun
from decodathlon.decoders.smc import repaired, seed_variant
from decodathlon.decoders.smc.steps import PersistentSMCSteps
from decodathlon.harness.decoder import Completion, Cost, Limits
from decodathlon.harness.engines.dialects import Law
from decodathlon.harness.errors import UnsupportedError
from decodathlon.harness.rewards import Answer
from decodathlon.harness.served import add_cost, by_model, completion, seed, served

if TYPE_CHECKING:
    from decodathlon.harness.randomness import RowRandom
    from decodathlon.harness.targets.remote import RemoteTarget


def law_of(decoder: PersistentSMCSteps) -> Law:
    return Law(temperature=decoder.temperature, top_p=decoder.top_p)


def _check(decoder: PersistentSMCSteps, target: RemoteTarget) -> None:
    if decoder.score != "prm_reward" and not by_model(target, law_of(decoder)):
        raise UnsupportedError(
            "log-probs of the model", f"score={decoder.score} reads them; score=prm_reward works without"
        )
    if decoder.reward is not None:
        decoder.reward.check(target)


class Grown:
    """Particles whose answers a server writes; what smc/repaired.py and smc/seed_variant.py ask of them."""

    def __init__(
        self, target: RemoteTarget, prompts: Sequence[Sequence[int]], each: int, limits: Limits, *, told: bool
    ) -> None:
        """
        Args:
            told: whether the server tells the model's own log-probabilities.
        """
        self.target, self.prompts, self.each, self._most = target, prompts, each, limits.max_new_tokens
        self.all = [Particle(p, []) for p in range(len(prompts)) for _ in range(each)]
        self.costs = [Cost() for _ in prompts]
        self._told = told

    def of(self, prompt: int) -> list[Particle]:
        return self.all[prompt * self.each : (prompt + 1) * self.each]

    def _unfinished(self, one: Particle) -> bool:
        return not one.ended and len(one.tokens) < self._most

    @property
    def unfinished(self) -> list[int]:
        return [i for i, one in enumerate(self.all) if self._unfinished(one)]

    def unfinished_of(self, prompt: int) -> list[int]:
        return [i for i, one in enumerate(self.of(prompt)) if self._unfinished(one)]

    def copy(self, parents: Sequence[int]) -> None:
        self.become([self.all[k] for k in parents])

    def become(self, others: Sequence[Particle]) -> None:
        self.all = [replace(one, tokens=list(one.tokens)) for one in others]

    def answers(self, some: Sequence[Particle], *, by_model: bool = False) -> list[Answer]:
        """As a reward sees them; the server tells one log-probability, the model's own."""
        return [Answer(list(self.prompts[o.prompt]), list(o.tokens), o.model_log_prob, self.target) for o in some]

    def completion(self, one: Particle, trace: Sequence[dict[str, Any]]) -> Completion:
        log_prob = one.model_log_prob if self._told and math.isfinite(one.model_log_prob) else None
        return completion(self.target, one.tokens, log_prob, self.costs[one.prompt], trace)


class _Stepwise:
    """The decoder, but for how its particles grow."""

    def __init__(self, decoder: PersistentSMCSteps) -> None:
        self._decoder = decoder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def grow(self, found: Grown, rng: RowRandom) -> None:
        """One step of all that are unfinished, asked for together."""
        from decodathlon.harness.targets.remote import Ask

        decoder, target, there = self._decoder, found.target, found.unfinished
        length = decoder.max_tokens_per_step
        if decoder.step_boundary == "fixed":
            length = min(length, decoder.fixed_step_tokens)
        asks = []
        for i in there:
            one = found.all[i]
            left = found._most - len(one.tokens)
            asks.append(
                Ask(
                    prompt=found.prompts[one.prompt], begun=one.tokens, tokens=min(length, left), law=law_of(decoder),
                    seed=seed(rng, one.prompt),
                )
            )  # fmt: skip
        for i, written in zip(there, target.write(asks), strict=True):
            one = found.all[i]
            add_cost(found.costs[one.prompt], written)
            step = Begun((), (), 0).and_then(written, target)
            end = next(
                (k for k in range(1, len(step.pieces)) if decoder._over(step.pieces[:k], target)), len(step.pieces)
            )
            one.tokens += step.pieces[:end]
            if written.log_probs is None:  # its pieces are words: as many empty ones as it has further tokens
                further = round(len(written.tokens) * end / len(step.pieces)) - end
                one.tokens[-1:] = [*[target.blank] * max(0, further), one.tokens[-1]]
            one.model_log_prob += sum(step.log_probs[:end])
            one.ended = one.tokens[-1:] == [target.end]


@served("persistent-smc-steps", law=law_of, check=_check, goes_on=True)
def stepwise(
    decoder: PersistentSMCSteps, target: RemoteTarget, prompts: Sequence[Sequence[int]], limits: Limits, rng: RowRandom
) -> list[Completion]:
    """The whole scheme."""
    told = by_model(target, law_of(decoder))
    scheme: Any = seed_variant if decoder.variant == "seed" else repaired
    found: list[Completion] = scheme.answers(
        _Stepwise(decoder), Grown(target, prompts, decoder.n_particles, limits, told=told), rng, rng
    )
    return found
