"""Best of n: draw n answers, give the one that a reward values most; with early stopping, drop the hopeless on the way.

The candidates of a prompt share what the model reads of it, and those that ended or were dropped cost nothing more.

Dimensions: B prompts, n candidates of each, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from decodathlon.harness import law, rewards
from decodathlon.harness.decoder import Completion, Cost, Limits, decoder
from decodathlon.harness.lazy import torch
from decodathlon.harness.rewards import Answer, Rewarded

if TYPE_CHECKING:
    from torch import Tensor

    from decodathlon.harness.randomness import RowRandom
    from decodathlon.harness.targets.base import Target


@dataclass
class Candidate:
    """An answer to one of the prompts, whole or so far."""

    prompt: int
    tokens: list[int]
    #: Under the law that it is drawn from, and under the model itself.
    log_prob: float = 0.0
    model_log_prob: float = 0.0
    ended: bool = False
    dropped: bool = False


#: Says which of the candidates that still grow are to be dropped, given all, after so many tokens.
Prune = Callable[[Sequence[Candidate], int], Sequence[Candidate]]


def candidates(
    decoder: Rewarded,
    target: Target,
    prompts: Sequence[Sequence[int]],
    n: int,
    limits: Limits,
    rng: RowRandom,
    prune: Prune = lambda found, length: (),
) -> tuple[list[list[Candidate]], list[Cost]]:
    """n answers to each prompt from the law of the decoder's proposals, and what they cost.

    Raises:
        ValueError: there is no room for a token.
    """
    B, T = len(prompts), limits.max_new_tokens
    if T < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {T}")
    u = rng.uniforms(n, T).view(B * n, T)
    stop = frozenset() if limits.ignore_eos else target.stop_tokens
    found = [Candidate(b, []) for b in range(B) for _ in range(n)]
    costs = [Cost(target_positions=len(p)) for p in prompts]
    with torch.no_grad():
        context = target.open(prompts, capacity=max(map(len, prompts)) + T)
        context.select([b for b in range(B) for _ in range(n)])
        growing = list(range(B * n))
        for t in range(T):
            logits = context.next_logits
            shaped = decoder.shape(logits.clone())
            tokens = law.draw(shaped, u[growing, t].to(logits.device))
            _grow([found[i] for i in growing], tokens, shaped, logits, stop)
            for b in {found[i].prompt for i in growing}:
                costs[b].target_calls += 1
            for one in prune(found, t + 1):
                one.dropped = True
            places = [k for k, i in enumerate(growing) if not (found[i].ended or found[i].dropped)]
            growing = [growing[k] for k in places]
            if not growing or t + 1 == T:
                break
            context.select(places)
            context.extend(tokens[places][:, None])
            context.keep(1)
            for i in growing:
                costs[found[i].prompt].target_positions += 1
    return [found[b * n : (b + 1) * n] for b in range(B)], costs


def _grow(some: Sequence[Candidate], tokens: Tensor, shaped: Tensor, logits: Tensor, stop: frozenset[int]) -> None:
    model = logits.double().log_softmax(-1)
    own, raw = (x.gather(1, tokens[:, None])[:, 0].tolist() for x in (shaped.double(), model))
    for one, token, p, q in zip(some, tokens.tolist(), own, raw, strict=True):
        one.tokens.append(token)
        one.log_prob += p
        one.model_log_prob += q
        one.ended = token in stop


def answers_of(some: Sequence[Candidate], prompts: Sequence[Sequence[int]], target: Target) -> list[Answer]:
    """The candidates as a reward sees them."""
    return [Answer(list(prompts[one.prompt]), one.tokens, one.log_prob, target) for one in some]


def completion(one: Candidate, target: Target, cost: Cost, **trace: Any) -> Completion:
    """The candidate that was chosen."""
    return Completion(
        tokens=one.tokens,
        stop_reason="stop" if one.ended else "length",
        log_prob=one.model_log_prob,
        text=target.decode(one.tokens) if "text" in target.capabilities else "",
        cost=cost,
        trace=[trace],
    )


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

        def prune(found: Sequence[Candidate], length: int) -> list[Candidate]:
            if not self.check_every or length % self.check_every:
                return []
            dropped = []
            for b in range(len(prompts)):
                growing = [one for one in found if one.prompt == b and not (one.ended or one.dropped)]
                worth = value(answers_of(growing, prompts, target)).tolist() if len(growing) > 1 else []
                order = sorted(range(len(worth)), key=lambda i, worth=worth: -worth[i])
                dropped += [growing[i] for i in order[math.ceil(self.keep * len(growing)) :]]
            return dropped

        found, costs = candidates(self, target, prompts, self.n, limits, rng, prune)
        chosen = []
        for mine, cost in zip(found, costs, strict=True):
            whole = [one for one in mine if not one.dropped]
            worth = value(answers_of(whole, prompts, target))
            best = int(worth.argmax())
            chosen.append(completion(whole[best], target, cost, reward=float(worth[best]), candidates=len(whole)))
        return chosen
