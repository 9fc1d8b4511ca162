"""Stored profiles: the boxes of a flame graph, and the trace that Chrome and Perfetto read.

A profile has stacks, names joined by semicolons, with what each took by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Box(NamedTuple):
    """One box of a flame graph: a stack, how deep it is, and where it begins and ends, as shares of the whole."""

    stack: str
    depth: int
    begin: float
    end: float
    #: What it took with all that it called, and by itself.
    whole: float
    own: float

    @property
    def name(self) -> str:
        return self.stack.rpartition(";")[2]


def flame(values: Mapping[str, float], least: float = 0.0) -> list[Box]:
    """The boxes of folded stacks, each over what called it, the greatest first.

    Args:
        least: boxes below this share of the whole are left out.
    """
    whole: dict[str, float] = {}
    for stack, value in values.items():
        names = stack.split(";")
        for n in range(1, len(names) + 1):
            part = ";".join(names[:n])
            whole[part] = whole.get(part, 0.0) + value
    children: dict[str, list[str]] = {}
    for stack in whole:
        children.setdefault(stack.rpartition(";")[0], []).append(stack)
    total = sum(values.values())
    boxes: list[Box] = []
    if not total:
        return boxes

    def place(parent: str, begin: float) -> None:
        for stack in sorted(children.get(parent, []), key=lambda s: (-whole[s], s)):
            end = begin + whole[stack] / total
            if end - begin >= least:
                boxes.append(Box(stack, stack.count(";"), begin, end, whole[stack], values.get(stack, 0.0)))
                place(stack, begin)
            begin = end

    place("", 0.0)
    return boxes


def shares(values: Mapping[str, float]) -> dict[str, float]:
    """What the phases directly below the root took of the whole; what the root did by itself is the host's."""
    total = sum(values.values())
    found: dict[str, float] = {}
    for stack, value in values.items():
        names = stack.split(";")
        phase = names[1] if len(names) > 1 and names[1] in ("prefill", "forward", "sampler") else "host"
        found[phase] = found.get(phase, 0.0) + value / total
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def chrome_trace(profile: Mapping[str, Any]) -> dict[str, Any]:
    """The events of a stored profile, as chrome://tracing and Perfetto read them."""
    stacks = profile["stacks"]
    return {
        "displayTimeUnit": "ms",
        "traceEvents": [
            {"name": stacks[i].rpartition(";")[2], "cat": (stacks[i].split(";")[1:2] or ["host"])[0], "ph": "X",
             "ts": begin, "dur": took, "pid": 1, "tid": 1}
            for i, begin, took in profile["events"]
        ],
    }  # fmt: skip
