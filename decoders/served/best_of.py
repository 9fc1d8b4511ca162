"""Best of n and self-consistency on a server: n answers to each prompt; the choice among them is made here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from decodathlon.decoders import choosing
from decodathlon.decoders.best_of import BestOfN
from decodathlon.decoders.self_consistency import SelfConsistency
from decodathlon.harness import rewards
from decodathlon.harness.decoder import Completion, Cost, Limits
from decodathlon.harness.engines.dialects import Law
from decodathlon.harness.errors import UnsupportedError
from decodathlon.harness.rewards import Answer
from decodathlon.harness.served import add_cost, by_model, completion, needs, seed, served, whole

if TYPE_CHECKING:
    from decodathlon.harness.randomness import RowRandom
    from decodathlon.harness.targets.remote import RemoteTarget, Written

#: Rewards that are made of the answer's own log-probability.
BY_LOG_PROB = ("log-power", "mean-log-prob", "hybrid")


def check_reward(reward: str, law: Law, target: RemoteTarget) -> None:
    """
    Raises:
        UnsupportedError: the reward reads log-probabilities of the law that is drawn from, and the server tells none.
    """
    rewards.build(reward).check(target)
    if reward.partition(":")[0] in BY_LOG_PROB:
        needs("log-probs", f"the reward {reward} is made of them", target)
        if target.raw_log_probs and law.temperature != 1:
            raise UnsupportedError(
                "log-probs of the law at its temperature",
                f"the reward {reward} is made of them, and {target.name} tells those of the model; temperature=1 works",
            )


def several(
    target: RemoteTarget, prompts: Sequence[Sequence[int]], n: int, law: Law, limits: Limits, rng: RowRandom
) -> tuple[list[list[Written]], list[Cost]]:
    """n answers to each prompt, and what they cost."""
    from decodathlon.harness.targets.remote import Ask

    asks = [
        Ask(prompt=prompt, tokens=limits.max_new_tokens, law=law, seed=seed(rng, row), ignore_eos=limits.ignore_eos)
        for row, prompt in enumerate(prompts)
        for _ in range(n)
    ]
    found = target.write(asks)
    costs = [Cost() for _ in prompts]
    for i, one in enumerate(found):
        add_cost(costs[i // n], one)
    return [found[p * n : (p + 1) * n] for p in range(len(prompts))], costs


def _law_of_best(decoder: BestOfN) -> Law:
    return Law(temperature=decoder.temperature)


def _check_best(decoder: BestOfN, target: RemoteTarget) -> None:
    if decoder.check_every:
        raise UnsupportedError("logits", f"check_every={decoder.check_every} drops answers on their way; 0 works")
    check_reward(decoder.reward, _law_of_best(decoder), target)


@served("best-of-n", law=_law_of_best, check=_check_best)
def best_of_n(
    decoder: BestOfN, target: RemoteTarget, prompts: Sequence[Sequence[int]], limits: Limits, rng: RowRandom
) -> list[Completion]:
    """Of n answers the one of the greatest reward."""
    law, value = _law_of_best(decoder), rewards.build(decoder.reward)
    every, costs = several(target, prompts, decoder.n, law, limits, rng)
    chosen = []
    for prompt, mine, cost in zip(prompts, every, costs, strict=True):
        logs = [whole(one.log_probs) for one in mine]
        answers = [
            Answer(list(prompt), one.tokens, math.nan if p is None else p, target)
            for one, p in zip(mine, logs, strict=True)
        ]
        worth = value(answers)
        best = int(worth.argmax())
        log_prob = logs[best] if by_model(target, law) else None
        trace = [{"reward": float(worth[best]), "candidates": decoder.n}]
        chosen.append(completion(target, mine[best].tokens, log_prob, cost, trace))
    return chosen


def _law_of_votes(decoder: SelfConsistency) -> Law:
    return Law(temperature=decoder.temperature, top_p=decoder.top_p)


@served("self-consistency", law=_law_of_votes)
def self_consistency(
    decoder: SelfConsistency, target: RemoteTarget, prompts: Sequence[Sequence[int]], limits: Limits, rng: RowRandom
) -> list[Completion]:
    """Of those whose last box is the commonest the likeliest, or where the server tells no likelihoods the first."""
    law = _law_of_votes(decoder)
    every, costs = several(target, prompts, decoder.n, law, limits, rng)
    given, told = [], by_model(target, law)
    for mine, cost in zip(every, costs, strict=True):
        scores = [whole(one.log_probs) or 0.0 if told else 0.0 for one in mine]
        tokens = [one.tokens for one in mine]
        taken = choosing.chosen("vote", [1.0] * decoder.n, scores, tokens, target, 0.0)
        log_prob = scores[taken] if told else None
        given.append(completion(target, tokens[taken], log_prob, cost, [{"chosen": taken, "scores": scores}]))
    return given
