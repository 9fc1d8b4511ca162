"""Controllers decide how many tokens are worth drafting: rules that look at the drafter's laws, and rules that count.

One controller serves one row. It says before a cycle how many tokens at most (`width`), after each one whether to go on
(`stops`, by the law and not by the token, so that whatever it decides, what is drawn stays true to the target), and
learns from what became of them (`settle`). Bandits over these rules are in `bandits.py`, those that go by the clock in
`clocks.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from decodathlon.decoders.speculative.outlook import Outlook


class Seconds(NamedTuple):
    """What a cycle took: drafting, verifying, and the rest (laws of the target, acceptance, memory)."""

    draft: float
    verify: float
    keep: float


class Controller:
    """How far to draft, for one row. This base drafts `longest` tokens always."""

    #: Whether it looks at laws; a drafter that has none cannot serve it.
    watches = False

    def __init__(self, longest: int) -> None:
        self.longest = longest

    def begin(self) -> None:
        """A new text begins. What was learnt of older ones may stay."""

    def width(self) -> int:
        """The most tokens of the coming cycle, at most `longest`."""
        return self.longest

    def stops(self, outlook: Outlook, row: int) -> bool:
        """Whether nothing is drafted behind the token that this law is for; `row` is the row of the outlook."""
        return False

    def settle(self, drafted: int, accepted: int, seconds: Seconds) -> None:
        """What became of the cycle."""

    @property
    def state(self) -> dict[str, float | str]:
        """What a trace shows of it."""
        return {}


class Static(Controller):
    """Always so many."""


class Confidence(Controller):
    """Stop where the likeliest token has less than this probability; 0.4 is the default of transformers."""

    watches = True

    def __init__(self, longest: int, threshold: float = 0.4) -> None:
        super().__init__(longest)
        self.threshold = threshold

    def stops(self, outlook: Outlook, row: int) -> bool:
        return outlook.top[row] < self.threshold


class SVIP(Controller):
    """Stop where sqrt(c H(q)) > h: the entropy bounds from below how likely the token stays. arXiv 2411.18462."""

    watches = True
    c, h = 0.15, 0.3

    def stops(self, outlook: Outlook, row: int) -> bool:
        return math.sqrt(self.c * outlook.entropy[row]) > self.h


class AdaEDL(Controller):
    """Stop where 1 - sqrt(g H(q)) falls below a threshold that follows the acceptance. arXiv 2410.18351.

    The threshold moves as that of Draft & Verify (arXiv 2309.08168): a step up while less than `aim` of what is drafted
    stays, else a step down, smoothed; a cycle that was cut at its greatest length says nothing.
    """

    watches = True
    g, aim, step, smooth = 0.2, 0.9, 0.01, 0.9

    def __init__(self, longest: int, threshold: float = 0.4) -> None:
        super().__init__(longest)
        self.threshold, self.kept = threshold, 0.5

    def stops(self, outlook: Outlook, row: int) -> bool:
        return 1 - math.sqrt(self.g * outlook.entropy[row]) < self.threshold

    def settle(self, drafted: int, accepted: int, seconds: Seconds) -> None:
        if not drafted:
            return
        self.kept = 0.5 * self.kept + 0.5 * accepted / drafted
        if drafted < self.longest:
            moved = self.threshold + (self.step if self.kept < self.aim else -self.step)
            self.threshold = self.smooth * self.threshold + (1 - self.smooth) * moved

    @property
    def state(self) -> dict[str, float | str]:
        return {"threshold": self.threshold}


class Margin(Controller):
    """Stop where the two likeliest tokens are closer than this."""

    watches = True
    least = 0.2

    def stops(self, outlook: Outlook, row: int) -> bool:
        return outlook.margin[row] < self.least


class Heuristic(Controller):
    """Two more after a cycle of which everything stayed, else one less: the schedule "heuristic" of transformers."""

    def __init__(self, longest: int) -> None:
        super().__init__(longest)
        self._width = min(5, longest)

    def width(self) -> int:
        return self._width

    def settle(self, drafted: int, accepted: int, seconds: Seconds) -> None:
        if drafted:
            self._width = min(self.longest, self._width + 2) if accepted == drafted else max(1, self._width - 1)


class Panel:
    """The controllers of all rows, as a drafter sees them."""

    def __init__(self, controllers: Sequence[Controller]) -> None:
        self.controllers = list(controllers)

    @property
    def watches(self) -> bool:
        return any(c.watches for c in self.controllers)

    def stops(self, outlook: Outlook, going: Sequence[bool]) -> list[bool]:
        pairs = zip(self.controllers, going, strict=True)
        return [not goes or c.stops(outlook, row) for row, (c, goes) in enumerate(pairs)]

    def select(self, rows: Sequence[int]) -> None:
        self.controllers = [self.controllers[row] for row in rows]
