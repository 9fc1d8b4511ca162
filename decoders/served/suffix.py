"""QAlign and QUEST on a server: keep a beginning of the answer, have the server write the rest anew, accept or not.

The rule is that of mcmc/suffix.py. What stays is cut between the tokens that the server told, or between words where
it told none, and the server reads it anew as text: where that splits into other tokens than it was written in, the
proposal is not quite the one of the rule.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from decodathlon.decoders.mcmc.suffix import SuffixChain
from decodathlon.decoders.served.best_of import check_reward
from decodathlon.harness.decoder import Completion, Cost, Limits
from decodathlon.harness.engines.dialects import Law
from decodathlon.harness.rewards import Answer
from decodathlon.harness.served import add_cost, by_model, completion, seed, served

if TYPE_CHECKING:
    from decodathlon.harness.randomness import RowRandom
    from decodathlon.harness.targets.remote import RemoteTarget, Written

_WORD = re.compile(r"\s*\S+\s*$|\s*\S+|\s+")


@dataclass(frozen=True)
class Begun:
    """An answer, or the beginning of one, in the pieces between which it may be cut."""

    pieces: tuple[int, ...]
    #: Natural-log probability of each; NaN where the server tells none.
    log_probs: tuple[float, ...]
    #: Tokens, as the server counts them.
    tokens: int

    def up_to(self, place: int) -> Begun:
        tokens = round(self.tokens * place / max(1, len(self.pieces)))
        return Begun(self.pieces[:place], self.log_probs[:place], tokens)

    def and_then(self, one: Written, target: RemoteTarget) -> Begun:
        """With what the server wrote behind it."""
        if one.log_probs is not None:
            more, logs = one.tokens, one.log_probs
        else:
            more = [target.pieces.number(word) for word in _WORD.findall(target.decode(one.tokens))]
            more += [target.end] * one.ended
            logs = [math.nan] * len(more)
        return Begun((*self.pieces, *more), (*self.log_probs, *logs), self.tokens + len(one.tokens))


def law_of(decoder: SuffixChain) -> Law:
    return Law(temperature=decoder.temperature)


def _check(decoder: SuffixChain, target: RemoteTarget) -> None:
    check_reward("log-power" if decoder.law == "reward" else decoder.reward, law_of(decoder), target)
    check_reward(decoder.reward, law_of(decoder), target)


def walked(
    decoder: SuffixChain, target: RemoteTarget, prompts: Sequence[Sequence[int]], limits: Limits, rng: RowRandom
) -> list[Completion]:
    """One answer to each prompt: where its chain stands after `steps` moves. All chains move together."""
    from decodathlon.harness.targets.remote import Ask

    law, costs, accepted = law_of(decoder), [Cost() for _ in prompts], [0] * len(prompts)

    def written(beginnings: Sequence[Begun]) -> list[Begun]:
        asks = [
            Ask(
                prompt=prompt, begun=begun.pieces, tokens=max(1, limits.max_new_tokens - begun.tokens), law=law,
                seed=seed(rng, row),
            )
            for row, (prompt, begun) in enumerate(zip(prompts, beginnings, strict=True))
        ]  # fmt: skip
        found = target.write(asks)
        for cost, one in zip(costs, found, strict=True):
            add_cost(cost, one)
        return [begun.and_then(one, target) for begun, one in zip(beginnings, found, strict=True)]

    def log_weights(answers: Sequence[Begun]) -> list[float]:
        """log law(y) - log p(y) - log |y| of each, by which a move is accepted."""
        seen = [
            Answer(list(prompt), list(y.pieces), sum(y.log_probs), target)
            for prompt, y in zip(prompts, answers, strict=True)
        ]
        tilts = decoder.log_tilt(seen).tolist()
        return [tilt - math.log(max(1, len(y.pieces))) for tilt, y in zip(tilts, answers, strict=True)]

    now = written([Begun((), (), 0)] * len(prompts))
    weights = log_weights(now)
    for _ in range(decoder.steps):
        u = rng.uniforms(2).tolist()
        proposed = written([y.up_to(int(a * len(y.pieces))) for y, (a, _) in zip(now, u, strict=True)])
        theirs = log_weights(proposed)
        for row, (_, b) in enumerate(u):
            if math.log(max(b, 1e-300)) < theirs[row] - weights[row]:
                now[row], weights[row] = proposed[row], theirs[row]
                accepted[row] += 1
    told = by_model(target, law)
    return [
        completion(
            target, y.pieces, sum(y.log_probs) if told and not math.isnan(sum(y.log_probs)) else None, cost,
            [{"accepted": count / decoder.steps, "tilt": weight + math.log(max(1, len(y.pieces)))}],
        )
        for y, cost, count, weight in zip(now, costs, accepted, weights, strict=True)
    ]  # fmt: skip


for _name in ("qalign", "quest"):
    served(_name, law=law_of, check=_check, goes_on=True)(walked)
