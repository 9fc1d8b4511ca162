"""Two lists of cells beside one another: what the harness says of each metric that both have, as a table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from decodathlon.harness.results import changes
from decodathlon.harness.results.measured import Measured
from decodathlon.leaderboard.findings import text_of
from decodathlon.leaderboard.tables import Field, table

#: Lines of a table that a page shows at once.
MOST_LINES = 500
#: What a change says that nobody has to read.
QUIET = ("the same", "changed", "not paired", "two visits of the machine: not ranked")


class Comparison(NamedTuple):
    """A table of what speaks, one of all the rest, and how many intervals there were."""

    speaking: str
    rest: str
    judged: int


def compare(pairs: Iterable[tuple[Measured, Measured]], names: tuple[str, str], caption: str) -> Comparison:
    """
    Args:
        pairs: cells A and B of the same thing.
        names: what A and B are called.
    """
    speaking: list[list[str | Field]] = []
    rest: list[list[str | Field]] = []
    judged = 0
    for a, b in pairs:
        for metric in [m for m in b.metrics if m in a.metrics]:
            change = changes.change_of(metric, a, b)
            judged += change.estimate.low is not None
            verdict = change.verdict.replace("B is", f"{names[1]} is")
            if change.verdict == "not paired" and a.metrics[metric].estimate[:3] == b.metrics[metric].estimate[:3]:
                verdict = "the same"
            small = change.interval if change.estimate.low is not None else ""
            values = [Field(text_of(c.metrics[metric], interval=False), number=True) for c in (a, b)]
            row: list[str | Field] = [b.name, metric, verdict, Field(change.text, small=small, number=True), *values]
            (rest if verdict in QUIET else speaking).append(row)
    head = ["cell", "metric", "what it says", "change", *names]
    made = [table(head, rows[:MOST_LINES], caption) if rows else "" for rows in (speaking, rest)]
    return Comparison(made[0], made[1], judged)
