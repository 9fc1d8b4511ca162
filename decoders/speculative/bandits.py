"""Bandits over stopping rules: which of them decides is itself learnt, from what became of the cycles it decided.

TapOut (arXiv 2511.02017) pulls one arm per cycle, or one per place in the draft; the reward blends how much was
accepted with how little was refused. The contextual form sees what the last cycle looked like (LinUCB, Li et al. 2010).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Literal

from decodathlon.decoders.speculative.clocks import Mean, lengths
from decodathlon.decoders.speculative.controllers import (
    SVIP,
    AdaEDL,
    Confidence,
    Controller,
    Margin,
    Seconds,
    Static,
)
from decodathlon.decoders.speculative.outlook import Outlook
from decodathlon.harness.lazy import torch

Policy = Literal["ucb1", "ucb1-tuned", "thompson"]
Reward = Literal["blend", "tokens-per-second"]
Level = Literal["sequence", "token"]


class Bandit:
    """Which of `count` arms to pull, for rewards in [0, 1].

    Args:
        policy: UCB1 and UCB1-Tuned (Auer, Cesa-Bianchi, Fischer 2002), or Thompson sampling with Gaussian beliefs.
        seed: of Thompson's draws.
    """

    def __init__(self, count: int, policy: Policy, seed: int) -> None:
        self.policy = policy
        self.pulls, self.sums, self.squares = [0] * count, [0.0] * count, [0.0] * count
        self._random = random.Random(seed)

    def choose(self) -> int:
        """Every arm once, then the one that the policy values most."""
        for arm, pulls in enumerate(self.pulls):
            if pulls == 0:
                return arm
        return max(range(len(self.pulls)), key=self._value)

    def _value(self, arm: int) -> float:
        n, t = self.pulls[arm], sum(self.pulls)
        mean = self.sums[arm] / n
        if self.policy == "thompson":
            return self._random.gauss(mean, math.sqrt(1 / n) / 2)  # what lies in [0, 1] deviates by 1/2 at most
        if self.policy == "ucb1":
            return mean + math.sqrt(2 * math.log(t) / n)
        spread = max(0.0, self.squares[arm] / n - mean * mean) + math.sqrt(2 * math.log(t) / n)
        return mean + math.sqrt(math.log(t) / n * min(0.25, spread))

    def learn(self, arm: int, reward: float) -> None:
        if not 0 <= reward <= 1:
            raise ValueError(f"a reward is between 0 and 1, not {reward}")
        self.pulls[arm] += 1
        self.sums[arm] += reward
        self.squares[arm] += reward * reward


class Rewarding:
    """A cycle's reward in [0, 1]."""

    def __init__(self, kind: Reward, longest: int) -> None:
        self.kind, self.longest = kind, longest
        self._most = 0.0

    def of(self, drafted: int, accepted: int, seconds: Seconds) -> float:
        """`blend`: half of accepted / longest and half of accepted / drafted. `tokens-per-second`: of the cycle,
        over the most that any cycle had."""
        if self.kind == "blend":
            return 0.5 * accepted / self.longest + 0.5 * accepted / max(1, drafted)
        rate = (accepted + 1) / max(sum(seconds), 1e-9)
        self._most = max(rate, self._most)
        return rate / self._most


def arms(longest: int, *, laws: bool) -> list[Controller]:
    """The rules to choose from; of a drafter without laws, lengths."""
    if not laws:
        return [Static(n) for n in lengths(longest) if n]
    rules: Sequence[Callable[[int], Controller]] = (Static, Confidence, SVIP, AdaEDL, Margin)
    return [*(rule(longest) for rule in rules), Confidence(longest, 0.8)]


class TapOut(Controller):
    """A bandit over the rules of `arms`, which pulls one for a cycle, or one anew for each place of the draft."""

    watches = True

    def __init__(
        self, longest: int, *, policy: Policy, level: Level, reward: Reward, seed: int, laws: bool = True
    ) -> None:
        super().__init__(longest)
        self.arms, self.level, self.watches = arms(longest, laws=laws), level, laws
        self.rewarding = Rewarding(reward, longest)
        places = longest if level == "token" and laws else 1
        self.bandits = [Bandit(len(self.arms), policy, seed + place) for place in range(places)]
        self._pulled: list[int] = []

    def width(self) -> int:
        self._pulled = [self.bandits[0].choose()]
        return self.longest if len(self.bandits) > 1 else self.arms[self._pulled[0]].width()

    def stops(self, outlook: Outlook, row: int) -> bool:
        if len(self.bandits) > 1 and outlook.position:
            self._pulled.append(self.bandits[outlook.position].choose())
        return self.arms[self._pulled[-1]].stops(outlook, row)

    def settle(self, drafted: int, accepted: int, seconds: Seconds) -> None:
        if not drafted:
            return
        reward = self.rewarding.of(drafted, accepted, seconds)
        for bandit, arm in zip(self.bandits, self._pulled, strict=False):
            bandit.learn(arm, reward)
        for arm in set(self._pulled):
            self.arms[arm].settle(drafted, accepted, seconds)

    @property
    def state(self) -> dict[str, float | str]:
        arm = self.arms[self._pulled[0]] if self._pulled else None
        return {"arm": type(arm).__name__.lower() if arm else "", "pulls": sum(self.bandits[0].pulls)}


class LinUCB:
    """One ridge regression of the reward per arm, and an allowance for what is not known of it. Li et al. 2010,
    algorithm 1 (disjoint), ridge 1."""

    def __init__(self, count: int, features: int, alpha: float = 0.5) -> None:
        self.alpha = alpha
        self.A = torch.eye(features, dtype=torch.float64).repeat(count, 1, 1)
        self.b = torch.zeros(count, features, dtype=torch.float64)

    def choose(self, x: Sequence[float]) -> int:
        at = torch.tensor(x, dtype=torch.float64)
        solved = torch.linalg.solve(self.A, torch.stack([self.b, at.expand_as(self.b)], -1))  # (arms, features, 2)
        value = solved[..., 0] @ at + self.alpha * (solved[..., 1] @ at).clamp(min=0).sqrt()
        return int(value.argmax())

    def learn(self, arm: int, x: Sequence[float], reward: float) -> None:
        at = torch.tensor(x, dtype=torch.float64)
        self.A[arm] += torch.outer(at, at)
        self.b[arm] += reward * at


class Contextual(Controller):
    """LinUCB over the rules of `arms`, by what the last cycle's first law looked like and how large the activations
    were that it was made from, how much stays on average, and how far the text has come."""

    watches = True

    def __init__(self, longest: int, *, reward: Reward, laws: bool = True) -> None:
        super().__init__(longest)
        self.arms, self.watches = arms(longest, laws=laws), laws
        self.rewarding = Rewarding(reward, longest)
        self.kept, self.tokens, self._arm = Mean(), 0, 0
        self._seen = [0.0, 0.0, 0.0, 0.0]
        self.model = LinUCB(len(self.arms), len(self._features()))

    def _features(self) -> list[float]:
        """A constant, root of the entropy, top probability, margin, log of the activations' root mean square,
        acceptance, and the log of the position, all of order one."""
        return [1.0, *self._seen, self.kept.value, math.log1p(self.tokens) / 8]

    def begin(self) -> None:
        self.tokens = 0

    def width(self) -> int:
        self._x = self._features()
        self._arm = self.model.choose(self._x)
        return self.arms[self._arm].width()

    def stops(self, outlook: Outlook, row: int) -> bool:
        if outlook.position == 0:
            size = math.log1p(outlook.norm[row]) / 4
            self._seen = [math.sqrt(outlook.entropy[row]) / 3, outlook.top[row], outlook.margin[row], size]
        return self.arms[self._arm].stops(outlook, row)

    def settle(self, drafted: int, accepted: int, seconds: Seconds) -> None:
        self.tokens += accepted + 1
        if not drafted:
            return
        self.kept.add(accepted / drafted)
        self.model.learn(self._arm, self._x, self.rewarding.of(drafted, accepted, seconds))
        self.arms[self._arm].settle(drafted, accepted, seconds)

    @property
    def state(self) -> dict[str, float | str]:
        return {"arm": type(self.arms[self._arm]).__name__.lower()}
