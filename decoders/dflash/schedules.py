"""How large the next block shall be: by the rate of each size, or by the break-even between neighbours.

A larger block costs a wider pass of the target, and hardly more of the drafter, which makes it in one pass anyway.
"""

from __future__ import annotations

from dataclasses import dataclass

from decodathlon.decoders.speculative.clocks import Mean
from decodathlon.decoders.speculative.controllers import Controller, Seconds

#: What of the whole block is tried: the founding note's 8, 12 and 16 of 16.
SHARES = (0.5, 0.75, 1.0)


def sizes(block: int) -> list[int]:
    """Sizes that are tried, the last token of the text among them; ascending."""
    return sorted({max(2, round(share * block)) for share in SHARES})


@dataclass
class _Arm:
    """What is known of a size: tokens and seconds per cycle, averaged."""

    tokens: float = 0.0
    seconds: float = 0.0
    count: int = 0

    def add(self, tokens: float, seconds: float, alpha: float) -> None:
        share = alpha if self.count else 1.0
        self.tokens += share * (tokens - self.tokens)
        self.seconds += share * (seconds - self.seconds)
        self.count += 1

    @property
    def rate(self) -> float:
        return self.tokens / max(self.seconds, 1e-12)


class Scheduler(Controller):
    """The founding note's scheduler: averages of tokens and seconds by size, and a switch to the size whose ratio is
    the greatest if it is by a margin and several times in a row; from time to time another size is probed.

    It is one per prompt there, and the seconds of the first cycle hold the drafter's pass over the prompt; here what
    was learnt is kept from prompt to prompt, that first cycle is left out, and every size is tried before a switch.
    """

    alpha, margin, streak, cooldown = 0.10, 0.05, 2, 2
    probe, low, low_streak = 12, 0.35, 2

    def __init__(self, longest: int) -> None:
        super().__init__(longest)
        self.arms = {size: _Arm() for size in sizes(longest + 1)}
        self.order = list(self.arms)
        self.current = self.pending = self.order[-1]
        self.cycle = self.cool = self.in_a_row = self.lows = self.cursor = 0
        self.now, self.first = self.current, True

    def begin(self) -> None:
        self.first = True

    def width(self) -> int:
        self.now = self._size()
        return self.now - 1

    def _size(self) -> int:
        untried = [size for size, arm in self.arms.items() if not arm.count]
        if untried:
            return untried[0]
        if self.cycle % self.probe == 0 and len(self.order) > 1:
            others = [size for size in self.order if size != self.current]
            self.cursor += 1
            return others[self.cursor % len(others)]
        return self.current

    def settle(self, drafted: int, accepted: int, seconds: Seconds) -> None:
        if self.first:
            self.first = False
            return
        self.cycle += 1
        tokens = accepted + 1
        self.arms[self.now].add(tokens, sum(seconds), self.alpha)
        if self._fell(tokens):
            return
        if self.cool:
            self.cool -= 1
            return
        if not all(arm.count for arm in self.arms.values()):
            return
        best = max(self.order, key=lambda size: self.arms[size].rate)
        if best == self.current or self.arms[best].rate <= (1 + self.margin) * self.arms[self.current].rate:
            self.pending, self.in_a_row = self.current, 0
            return
        self.in_a_row = self.in_a_row + 1 if best == self.pending else 1
        self.pending = best
        if self.in_a_row >= self.streak:
            self.current, self.in_a_row, self.cool = best, 0, self.cooldown

    def _fell(self, tokens: int) -> bool:
        """Step down where little of a block stayed, several times in a row."""
        little = self.now == self.current and tokens / self.now < self.low
        self.lows = self.lows + 1 if little else 0
        if self.lows < self.low_streak:
            return False
        self.lows = 0
        place = self.order.index(self.current)
        if place:
            self.current = self.pending = self.order[place - 1]
            self.in_a_row, self.cool = 0, self.cooldown
        return bool(place)

    @property
    def state(self) -> dict[str, float | str]:
        return {"block": self.now, "best": self.current}


class BreakEvenSize(Controller):
    """From the smallest size on, each next one that is worth its wider pass over the best so far.

    A size b makes E(b) = 1 + sum over j < b of P(the first j guesses stay) tokens in c(b) seconds, and pays over b' < b
    where E(b) / E(b') > c(b) / c(b'). E comes from every cycle, by place; c only from cycles of that size. The seconds
    of a batch are those of its widest row.
    """

    #: Cycles between two looks at another size, so that what it costs is not forgotten.
    probe = 24

    def __init__(self, longest: int) -> None:
        super().__init__(longest)
        self.order = sizes(longest + 1)
        self.costs = {size: Mean() for size in self.order}
        self.stays = [Mean() for _ in range(longest)]
        self.best = self.now = self.order[-1]
        self.cycle, self.first = 0, True

    def begin(self) -> None:
        self.first = True

    def width(self) -> int:
        untried = [size for size, cost in self.costs.items() if cost.count < 2]
        self.now = self.best
        if untried:
            self.now = untried[-1]
        elif self.cycle % self.probe == 0:
            others = [size for size in self.order if size != self.best] or self.order
            self.now = others[(self.cycle // self.probe) % len(others)]
        return self.now - 1

    def settle(self, drafted: int, accepted: int, seconds: Seconds) -> None:
        if self.first:  # its seconds hold the drafter's pass over the prompt
            self.first = False
            return
        self.cycle += 1
        for place in range(min(drafted, accepted + 1)):
            self.stays[place].add(float(place < accepted))
        self.costs[self.now].add(sum(seconds))
        if any(not cost.count for cost in self.costs.values()):
            return
        best = self.order[0]
        for size in self.order[1:]:
            if self.tokens(size) * self.costs[best].value > self.tokens(best) * self.costs[size].value:
                best = size
        self.best = best

    def tokens(self, size: int) -> float:
        """Expected of a cycle with a block of this size."""
        total = chain = 1.0
        for stays in self.stays[: size - 1]:
            chain *= stays.value
            total += chain
        return total

    @property
    def state(self) -> dict[str, float | str]:
        return {"block": self.now, "best": self.best}
