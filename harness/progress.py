"""How far long work is: a line with an estimate, now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

#: Seconds before the first line, and between two.
FIRST_AFTER, SAY_EVERY = 8.0, 30.0
T = TypeVar("T")


def told(
    units: Sequence[T], what: str, say: Callable[[str], None], size: Callable[[T], float] = lambda unit: 1.0
) -> Iterator[T]:
    """The units, one by one; `say` hears how many are done and how long the rest will take.

    Args:
        size: what the time for a unit grows with.
    """
    began, whole, past = time.monotonic(), sum(map(size, units)), 0.0
    said = began - SAY_EVERY + FIRST_AFTER
    for done, unit in enumerate(units):
        now = time.monotonic()
        if past and now - said > SAY_EVERY:
            said = now
            left = (now - began) / past * (whole - past)
            say(f"  {what}: {done} of {len(units)}, about {left:.0f} s left")
        yield unit
        past += size(unit)
