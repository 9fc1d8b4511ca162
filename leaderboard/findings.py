"""What the numbers say: which metric leads a column, who is best, who is on the front, and a sentence that sums it up.

Pure functions of cells: no database, no Streamlit. What "best" and "front" mean is the harness's own rule.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from decodathlon.harness.results import front, measured
from decodathlon.harness.results.measured import Number
from decodathlon.harness.results.metrics import METRICS, Metric
from decodathlon.harness.results.table import DASH, quantity
from decodathlon.leaderboard.queries import Cell, Column

#: A baseline is measured against itself by definition.
_ONE = measured.exactly(1.0)
MEASURED = ("ok", "partial")
#: From this probability on a decoder on the front is marked as such.
LIKELY = 0.5
#: Enough to tell likely from unlikely.
OVERVIEW_RESAMPLES = 400


@dataclass(frozen=True)
class Axis:
    """A metric of a column."""

    column: Column
    metric: str

    def __str__(self) -> str:
        return f"{self.column}: {self.metric}"


@dataclass(frozen=True)
class Entry:
    """What one decoder has in one metric of one column."""

    cell: Cell | None
    number: Number | None
    text: str
    mark: measured.Mark | None = None
    #: Why there is no number; empty where there is one.
    reason: str = ""

    @property
    def doubts(self) -> tuple[str, ...]:
        return self.cell.doubts if self.cell else ()

    @property
    def counts(self) -> bool:
        """Whether it may win: measured whole, without a doubt, on the same units as the others."""
        if self.cell is None or self.number is None:
            return False
        return self.cell.measured.status == "ok" and not self.doubts and self.mark != "unlike"


@dataclass(frozen=True)
class Line:
    """One decoder over all columns of a table."""

    decoder: str
    name: str
    family: str
    claim: str
    audit: str | None
    entries: tuple[Entry, ...]
    pareto: bool = False
    #: Whether it holds what was measured since and does not count.
    beside: bool = False

    @property
    def grey(self) -> bool:
        """Whether nothing of it stands without a doubt."""
        shown = [e for e in self.entries if e.number is not None]
        return bool(shown) and all(e.doubts for e in shown)


def axes(
    columns: Mapping[Column, Iterable[str]],
    suites: Mapping[str, Mapping[str, Any]],
    metrics: Mapping[str, Metric],
) -> list[Axis]:
    """Every metric of every column, most telling first."""
    return [Axis(c, m) for c, names in columns.items() for m in table_of(c, names, suites, metrics)]


def leads(
    columns: Mapping[Column, Iterable[str]],
    suites: Mapping[str, Mapping[str, Any]],
    metrics: Mapping[str, Metric],
) -> list[Axis]:
    """The most telling metric of each column: the first that its suite's table shows and that decoders rank by."""
    first: dict[Column, Axis] = {}
    for axis in axes(columns, suites, metrics):
        if ranks(metrics[axis.metric]):
            first.setdefault(axis.column, axis)
    return list(first.values())


def columns_of(cells: Iterable[Cell]) -> dict[Column, set[str]]:
    """The columns of some cells with their metrics."""
    found: dict[Column, set[str]] = {}
    for cell in cells:
        found.setdefault(cell.column, set()).update(cell.measured.metrics)
    return found


def ranks(metric: Metric) -> bool:
    """Whether decoders can be ranked by it: times and sizes of cells that ran one after another cannot."""
    return metric.unit == "1" and metric.better != "none" and metric.kind not in ("context", "harness")


def table_of(
    column: Column, names: Iterable[str], suites: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, Metric]
) -> list[str]:
    """Metrics of a column in the order of its suite's table, then those that it does not show."""
    present = set(names)
    first = [m for m in suites.get(column.suite, {}).get("table", ()) if m in present]
    return first + [m for m in metrics if m in present and m not in first]


def lines(
    cells: Sequence[Cell], axes: Sequence[Axis], baselines: Mapping[str, str], *, rank: bool = True
) -> list[Line]:
    """A table: a line per decoder, a field per axis; another line for what was measured since and does not count.

    What is doubted can neither be best nor keep others from it.

    Args:
        baselines: of each ratio, the decoder that it is relative to.
        rank: mark the best and what is not told apart from it; False where not all decoders of a column are at hand.
    """
    by_decoder: dict[tuple[str, bool], list[Cell]] = {}
    for cell in cells:
        by_decoder.setdefault((cell.decoder, cell.beside), []).append(cell)
    sound = [c for c in cells if rank and not c.doubts]
    marks = {a: _marks(a, [c.measured for c in sound if c.column == a.column], baselines) for a in axes}
    found = []
    for (decoder, beside), own in by_decoder.items():
        entries = tuple(_entry(decoder, _at(own, axis.column), axis.metric, marks[axis], baselines) for axis in axes)
        one = next((c for c in own if c.claim), own[0])
        found.append(Line(decoder, one.name, one.family, one.claim, one.audit, entries, beside=beside))
    return found


def _marks(axis: Axis, cells: Sequence[measured.Measured], baselines: Mapping[str, str]) -> dict[str, measured.Mark]:
    baseline = next((c for c in cells if c.decoder == baselines.get(axis.metric) and c.status == "ok"), None)
    return measured.marks(axis.metric, cells, baseline)


def _at(own: Sequence[Cell], column: Column) -> Cell | None:
    """The cell of a column; one that failed before it knew its data stands in all columns of its part of the suite."""
    found = [c for c in own if c.column.part == column.part and c.column.dataset in ("", column.dataset)]
    return max(found, key=lambda c: c.column.dataset, default=None)


def _entry(
    decoder: str, cell: Cell | None, metric: str, marks: Mapping[str, measured.Mark], baselines: Mapping[str, str]
) -> Entry:
    if cell is None:
        return Entry(None, None, DASH, reason="not measured in this setting")
    if cell.measured.status not in MEASURED:
        return Entry(cell, None, cell.measured.status, reason=cell.measured.reason)
    number = cell.number(metric)
    if number is None and baselines.get(metric) == decoder:
        return Entry(cell, _ONE, "1 (baseline)", marks.get(cell.measured.cell_id))
    if number is None:
        return Entry(cell, None, DASH, reason=f"its cell has no {metric}")
    return Entry(cell, number, text_of(number), marks.get(cell.measured.cell_id))


def text_of(number: Number, *, interval: bool = True) -> str:
    """A number with its interval in the unit that a person would say it in."""
    value, low, high, _ = number.estimate
    return quantity({"value": value, "ci_low": low, "ci_high": high, "unit": number.unit}, interval=interval)


def sweeps(cells: Sequence[Cell], metric: str) -> dict[tuple[Column, str], list[dict[str, Any]]]:
    """One metric over each parameter that was measured at several values, all others being equal.

    Where that holds for several sets of the others, the largest is taken. Values stand in their order where all are
    numbers, else as text.
    """
    found: dict[tuple[Column, str], list[dict[str, Any]]] = {}
    for cell in cells:
        for parameter in cell.params:
            others = {k: v for k, v in cell.params.items() if k != parameter}
            alike = [
                c
                for c in cells
                if c.column == cell.column
                and not c.doubts
                and (n := c.number(metric)) is not None
                and math.isfinite(n.estimate.value)
                and {k: v for k, v in c.params.items() if k != parameter} == others
            ]
            rows = [_swept(c, parameter, metric) for c in alike if c.params[parameter] is not None]
            if len(rows) > max(1, len(found.get((cell.column, parameter), ()))):
                found[cell.column, parameter] = _in_order(rows)
    return found


def _in_order(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    if any(isinstance(row["at"], bool) or not isinstance(row["at"], int | float) for row in rows):
        rows = [row | {"at": str(row["at"])} for row in rows]
    return sorted(rows, key=lambda row: row["at"])


def _swept(cell: Cell, parameter: str, metric: str) -> dict[str, Any]:
    value, low, high, _ = cell.measured.metrics[metric].estimate
    return {"at": cell.params[parameter], "value": value, "low": low, "high": high, "decoder": cell.decoder}


def ordered(table: Sequence[Line], place: int) -> list[Line]:
    """Best first by one column; last, by name, those without a number there, then those without any."""

    def key(line: Line) -> tuple[int, float, str]:
        number = line.entries[place].number if line.entries else None
        if number is None or math.isnan(number.estimate.value):
            return (1 if any(e.number for e in line.entries) else 2, 0.0, line.decoder)
        sign = -1.0 if number.better == "higher" else 1.0
        return (0, sign * number.estimate.value, line.decoder)

    return sorted(table, key=key)


def default_axes(axes: Sequence[Axis], metrics: Mapping[str, Metric]) -> tuple[Axis, Axis] | None:
    """The axis of cost and that of quality whose metrics come first in the table of metrics, if there are both."""
    known = {name: place for place, name in enumerate(METRICS)}
    telling = sorted(axes, key=lambda a: known.get(a.metric, len(known)))
    cost = [a for a in telling if metrics[a.metric].kind in ("speed", "memory")]
    quality = [a for a in telling if metrics[a.metric].kind == "quality"]
    return (cost[0], quality[0]) if cost and quality else None


# --- The front ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One decoder in the plane of two axes."""

    decoder: str
    family: str
    claim: str
    x: Number
    y: Number
    doubts: tuple[str, ...]
    on_front: bool
    probability: float | None

    @property
    def likely(self) -> bool:
        """Whether it is on the front, and more likely than not."""
        return self.on_front and (self.probability or 0.0) >= LIKELY


def points(cells: Sequence[Cell], x: Axis, y: Axis, baselines: Mapping[str, str]) -> tuple[list[Point], list[Line]]:
    """Every decoder that has both numbers, and the lines of those that lack one.

    What is greyed takes part in no front: it is drawn, but it dominates nobody.
    """
    table = lines(cells, [x, y], baselines)
    contestants = _contestants(table, (0, 1), (x, y))
    judged = dict(zip(contestants, front.probabilities(list(contestants.values())), strict=True))
    on = _on_front(contestants)
    found = []
    for line in table:
        first, second = (e.number for e in line.entries)
        if first is not None and second is not None:
            doubts = tuple(dict.fromkeys(d for e in line.entries for d in e.doubts))
            at = (False, None) if line.beside else (line.decoder in on, judged.get(line.decoder))
            found.append(Point(line.decoder, line.family, line.claim, first, second, doubts, *at))
    return found, [line for line in table if any(e.number is None for e in line.entries)]


def with_front(table: Sequence[Line], axes: Sequence[Axis], plane: tuple[Axis, Axis] | None) -> list[Line]:
    """The lines of a table with those marked that are on the front of two of its axes, more likely than not."""
    if plane is None:
        return list(table)
    contestants = _contestants(table, (axes.index(plane[0]), axes.index(plane[1])), plane)
    sure = front.probabilities(list(contestants.values()), resamples=OVERVIEW_RESAMPLES)
    likely = {decoder for decoder, p in zip(contestants, sure, strict=True) if (p or 0.0) >= LIKELY}
    on = _on_front(contestants) & likely
    return [replace(line, pareto=line.decoder in on and not line.beside) for line in table]


def _contestants(
    table: Sequence[Line], places: tuple[int, int], axes: tuple[Axis, Axis]
) -> dict[str, front.Contestant]:
    """By decoder, those that have both numbers, measured whole and without a doubt, on what the others have."""
    found = {}
    for line in table:
        one, other = (line.entries[place] for place in places)
        if one.number is not None and other.number is not None and one.counts and other.counts:
            own = (_own(one, axes[0].metric), _own(other, axes[1].metric))
            found[line.decoder] = front.Contestant(one.number, other.number, own)
    return found


def _on_front(contestants: Mapping[str, front.Contestant]) -> set[str]:
    return {d for d, on in zip(contestants, front.members(list(contestants.values())), strict=True) if on}


def as_row(point: Point) -> dict[str, Any]:
    """A point as a row for other programs."""
    (x, x_low, x_high, _), (y, y_low, y_high, _) = point.x.estimate, point.y.estimate
    return {
        "decoder": point.decoder, "family": point.family, "claim": point.claim, "x": x, "x_low": x_low,
        "x_high": x_high, "y": y, "y_low": y_low, "y_high": y_high, "on_front": point.on_front,
        "probability": point.probability, "doubts": "; ".join(point.doubts),
    }  # fmt: skip


def _own(entry: Entry, metric: str) -> Number | None:
    timed = metric.startswith("ratio_to_") or (entry.number is not None and entry.number.unit in ("s", "1/s"))
    return entry.cell.number("ratio_to_self") if timed and entry.cell else None


# --- In a sentence -----------------------------------------------------------------------------------------------


def summary(table: Sequence[Line], axes: Sequence[Axis], baselines: Mapping[str, str]) -> list[tuple[str, str]]:
    """What a hurried reader takes away: per column that has something to say its name and a sentence."""
    found = []
    for place, axis in enumerate(axes):
        entries = [(line.decoder, line.entries[place]) for line in table]
        sound = [(d, e) for d, e in entries if e.counts]
        if axis.metric in baselines:
            text = _against(baselines[axis.metric], axis.metric, sound)
        else:
            text = _leading(sound)
        if text:
            found.append((f"{axis.column} ({axis.metric})", text))
    return found


def _against(baseline: str, metric: str, entries: Sequence[tuple[str, Entry]]) -> str:
    sides: dict[str | None, list[str]] = {"above": [], "below": [], "not told apart": []}
    for decoder, entry in entries:
        if entry.cell is not None and decoder != baseline:
            contended = any(r.startswith("contended") for r in entry.cell.remarks)
            said = f"{decoder} (contended)" if contended else decoder
            sides.setdefault(measured.beside_one(metric, entry.cell.measured), []).append(said)
    faster, slower, same = sides["above"], sides["below"], sides["not told apart"]
    if not faster + slower + same:
        return ""
    parts = [f"faster than {baseline}: {listed(faster)}" if faster else f"none is shown to be faster than {baseline}"]
    if same:
        parts.append(f"not told apart from it: {listed(same)}")
    if slower:
        parts.append(f"slower: {listed(slower)}")
    return "; ".join(parts) + "."


def _leading(entries: Sequence[tuple[str, Entry]]) -> str:
    leader = next(((d, e.number) for d, e in entries if e.mark == "best" and e.number is not None), None)
    if leader is None:  # of solved questions it can be said what would have been needed
        return measured.cannot_rank([e.number for _, e in entries if e.number is not None])
    text = f"{leader[0]} leads with {text_of(leader[1])}"
    rest = [d for d, e in entries if e.mark == "tied"]
    return text + (f"; not told apart from it: {listed(rest)}." if rest else ", ahead of all that count.")


def listed(names: Sequence[str], most: int = 20) -> str:
    """Names in a sentence; of many the first and how many more."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
