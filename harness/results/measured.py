"""Cells as gates and comparisons see them: what was measured, by which metric; from outcomes or from a results file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from decodathlon.harness.cells import Outcome
from decodathlon.harness.errors import SpecError, near_miss
from decodathlon.harness.measure.observations import Observations, compared, p_value, visible
from decodathlon.harness.measure.statistics import FEWEST_FOR_INTERVAL, LEVEL, Estimate
from decodathlon.harness.results import store

if TYPE_CHECKING:
    import duckdb

_COLUMNS = (
    "cell_id", "suite", "suite_version", "slice", "scale", "decoder", "model", "dtype", "device", "dataset", "seed",
    "status", "reason",
)  # fmt: skip


Mark = Literal["best", "tied", "unlike"]
#: How far, as a logarithm, a decoder may seem to differ from itself before its times are doubted.
BIAS = 0.05


@dataclass(frozen=True)
class Number:
    """One metric of one cell."""

    estimate: Estimate
    unit: str
    better: str
    units: Observations | None


@dataclass(frozen=True)
class Measured:
    """One cell."""

    cell_id: str
    suite: str
    suite_version: int
    slice: str
    scale: str
    decoder: str
    model: str
    dtype: str
    device: str
    dataset: str | None
    seed: int
    status: str
    reason: str
    metrics: Mapping[str, Number] = field(default_factory=dict)
    #: Weights, data and sizes, as far as they are known: names may be the same where these are not.
    basis: tuple[str, ...] = ()
    #: Of a cell that is stored.
    run_id: str = ""

    @property
    def name(self) -> str:
        return f"{self.suite} {self.decoder}" + ("" if self.slice == "all" else f" {self.slice}")

    @property
    def where(self) -> tuple[Any, ...]:
        """What must be equal for two decoders' numbers to share a line."""
        return (self.suite, self.suite_version, self.slice, self.scale, self.model, self.dtype, self.device,
                self.dataset, self.seed)  # fmt: skip


def of_outcomes(outcomes: Sequence[Outcome]) -> list[Measured]:
    return [
        Measured(
            cell_id=o.spec.cell_id,
            suite=o.spec.suite,
            suite_version=o.spec.suite_version,
            slice=o.spec.slice,
            scale=o.spec.sized,
            decoder=o.decoder.get("spec", o.spec.decoder),
            model=o.model.get("name", o.spec.model),
            dtype=o.model.get("dtype", o.spec.dtype),
            device=o.model.get("device", o.spec.device),
            dataset=o.data.get("dataset"),
            seed=o.spec.seed,
            status=o.status,
            reason=o.reason,
            metrics={m["metric"]: number(m) for m in o.metrics},
            basis=basis(o.model, o.data, o.sizes),
        )
        for o in outcomes
    ]


def basis(weights: Mapping[str, Any], data: Mapping[str, Any], sizes: Mapping[str, Any]) -> tuple[str, ...]:
    """What must be the same for two cells of one name to be ranked together."""
    sizes = {k: v for k, v in sizes.items() if k != "slices"}
    return (str(weights.get("weights_fingerprint")), str(data.get("sha256")), json.dumps(sizes, sort_keys=True))


def of_run(path: Path, run: str) -> list[Measured]:
    """Every cell of a run in a results file; `last` is the newest run.

    Raises:
        SpecError: the file has no such run.
    """
    run = run_id(path, run)
    with store.connect(path) as connection:
        return [
            cell for _, cell in _cells(connection, "FROM known_cell WHERE run_id = $run ORDER BY started", {"run": run})
        ]


def of_decoders(path: Path, specs: Sequence[str], run: str | None = None) -> dict[str, list[tuple[str, Measured]]]:
    """Where and how some decoders were measured whole: in one run, or the last time that nothing spoke against it.

    Returns:
        By spec, pairs of model, hardware and scale in words, and a cell.
    """
    source = (
        "FROM known_cell WHERE run_id = $run AND status = 'ok' AND" if run else "FROM newest_of('sound_cell') WHERE"
    )
    values = {"specs": list(specs)} | ({"run": run} if run else {})
    with store.connect(path) as connection:
        found = _cells(connection, f"{source} list_contains($specs, decoder) ORDER BY suite, slice", values)
    return {spec: [(place, cell) for place, cell in found if cell.decoder == spec] for spec in specs}


def decoders(path: Path, run: str | None = None) -> set[str]:
    """Every decoder that a run, or a file, has a whole cell of."""
    where = "AND run_id = $run" if run else ""
    with store.connect(path) as connection:
        found = connection.execute(
            f"SELECT DISTINCT decoder FROM cell WHERE status = 'ok' {where}", {"run": run} if run else {}
        )
        return {str(d) for (d,) in found.fetchall()}


def _cells(connection: duckdb.DuckDBPyConnection, query: str, values: dict[str, Any]) -> list[tuple[str, Measured]]:
    """Cells that a query finds, each with model, hardware and scale in words."""
    columns = ("run_id", *_COLUMNS, "weights", "data", "sizes", "hardware")
    rows = connection.execute(f"SELECT {', '.join(columns)} {query}", values).fetchall()
    found = [dict(zip(columns, row, strict=True)) for row in rows]
    names = ("run_id", "cell_id", "metric", "value", "unit", "better", "ci_low", "ci_high", "n", "units")
    numbers = connection.execute(
        f"SELECT {', '.join(names)} FROM metric "
        "SEMI JOIN (SELECT unnest($runs) AS run_id, unnest($cells) AS cell_id) USING (run_id, cell_id) ORDER BY rowid",
        {"runs": [row["run_id"] for row in found], "cells": [row["cell_id"] for row in found]},
    ).fetchall()
    metrics: dict[tuple[str, str], dict[str, Number]] = {}
    for values_of in numbers:
        metric = dict(zip(names, values_of, strict=True))
        metrics.setdefault((metric["run_id"], metric["cell_id"]), {})[metric["metric"]] = number(metric)
    return [
        (
            f"{row['model']} {row['dtype']}, {row['hardware']}, {row['scale']}",
            _measured(row, metrics.get((row["run_id"], row["cell_id"]), {})),
        )
        for row in found
    ]


def _measured(row: Mapping[str, Any], metrics: Mapping[str, Number]) -> Measured:
    """A row of the table `cell`."""
    parts = (json.loads(row[part] or "{}") or {} for part in ("weights", "data", "sizes"))
    columns = {k: row[k] for k in (*_COLUMNS, "run_id")}
    return Measured(**columns, metrics=metrics, basis=basis(*parts))


def run_id(path: Path, run: str) -> str:
    """The id that `run` names; `last` is the newest run of the file.

    Raises:
        SpecError: the file has no such run; the nearest one is named.
    """
    with store.connect(path) as connection:
        known = [str(r) for (r,) in connection.execute("SELECT run_id FROM run ORDER BY started, run_id").fetchall()]
    if run == "last" and known:
        return known[-1]
    if run not in known:
        raise SpecError(f"{path} has no run {run!r}{near_miss(run, known[-20:])}")
    return run


def noise_floor(metric: str, cell: Measured) -> float:
    """How far, as a logarithm, the decoder seemed to differ from itself; 0 for what time does not move."""
    timed = metric.startswith("ratio_to_") or cell.metrics[metric].unit in ("s", "1/s")
    own = cell.metrics.get("ratio_to_self")
    if not timed or own is None or metric == "ratio_to_self":
        return 0.0
    ends = [x for x in (own.estimate.value, own.estimate.low, own.estimate.high) if x is not None and x > 0]
    return max((abs(math.log(x)) for x in ends), default=0.0)


def differ(metric: str, a: Measured, b: Measured, comparisons: int = 1) -> bool:
    """Whether two cells are told apart in a metric: unit by unit, beyond the spread of each decoder from itself.

    Args:
        comparisons: how many are made at once; means and shares are then tested at 5 % over that many (Bonferroni).
            Medians of ratios of times are not: eight pairs of runs could never pass, and each interval is 95 % alone.
    """
    x, y = a.metrics[metric], b.metrics[metric]
    floor = max(noise_floor(metric, a), noise_floor(metric, b))
    how: Literal["ratio", "difference"] = "ratio" if floor > 0 else "difference"
    p = p_value(x.units, y.units) if x.units and y.units and floor == 0 else None
    if p is not None:
        return p < (1 - LEVEL) / comparisons
    found = compared(x.units, y.units, how) if x.units and y.units else None
    if found is None or found.low is None or found.high is None:
        return False
    if how == "difference":
        return not found.low <= 0 <= found.high
    return not min(found.low, found.value * math.exp(-floor)) <= 1 <= max(found.high, found.value * math.exp(floor))


def undecided(smallest: float, questions: int) -> str:
    """What to say where questions are too few, or decoders too much alike, to tell them apart.

    Args:
        smallest: the smallest difference of shares that could have been seen.
    """
    if smallest > 1:
        return f"cannot tell: {questions} question{'s are' if questions != 1 else ' is'} too few for any difference"
    return f"cannot tell: {questions} questions show no difference below {math.ceil(100 * smallest - 1e-9)} points"


def cannot_rank(numbers: Sequence[Number]) -> str:
    """A sentence where shares of questions are all there is and even the best and the worst are not told apart."""
    units = [n.units for n in numbers if n.units is not None and n.units.trials]
    if len(units) < 2:
        return ""
    low, *_, high = sorted(units, key=lambda o: o.estimate().value)
    return undecided(*visible(high, low))


def beside_one(metric: str, cell: Measured) -> Literal["above", "below", "not told apart"] | None:
    """Where a ratio lies to the baseline's 1, beyond the decoder's spread from itself; None without an interval."""
    value, low, high, _ = cell.metrics[metric].estimate
    if low is None or high is None:
        return None
    floor = noise_floor(metric, cell)
    if min(low, value * math.exp(-floor)) > 1:
        return "above"
    return "below" if max(high, value * math.exp(floor)) < 1 else "not told apart"


def biased(cell: Measured) -> bool:
    """Whether the A/A test failed: the decoder was measured to differ from itself by more than noise allows."""
    own = cell.metrics.get("ratio_to_self")
    if own is None or own.estimate.low is None or own.estimate.high is None:
        return False
    return not own.estimate.low <= 1 <= own.estimate.high and abs(math.log(own.estimate.value)) > BIAS


def marks(metric: str, cells: Sequence[Measured], baseline: Measured | None = None) -> dict[str, Mark]:
    """By cell id, which cell of a column is best, which cannot be told apart from it, and which are unlike the others.

    Nothing ranks without an interval, nor times and sizes: cells run one after another, so only paired ratios rank.
    Told apart are two cells by the interval of their difference, unit by unit, beyond the spread of each from itself;
    means and shares so that among decoders that are all the same one is marked in 5 % of columns at most.
    Cells rank together only on the same units, weights, data and sizes: the largest such group ranks, the rest is
    `unlike` it. Where nobody is told apart from the best, neither is marked.

    Args:
        baseline: of a ratio, the cell that has 1 by definition.
    """
    groups: dict[tuple[Any, ...], list[Measured]] = {}
    for cell in cells:
        if cell.status == "ok" and _ranks(cell.metrics.get(metric)):
            groups.setdefault((cell.basis, *sorted(cell.metrics[metric].units.rows)), []).append(cell)  # type: ignore[union-attr]
    if not groups:
        return {}
    ranked = max(groups.values(), key=lambda group: (len(group), len(group[0].metrics[metric].units.rows)))  # type: ignore[union-attr]
    unlike: dict[str, Mark] = {c.cell_id: "unlike" for group in groups.values() if group is not ranked for c in group}
    return unlike | _best_and_tied(metric, ranked, baseline)


def _best_and_tied(metric: str, cells: Sequence[Measured], baseline: Measured | None) -> dict[str, Mark]:
    sign = 1.0 if cells[0].metrics[metric].better == "higher" else -1.0
    leader = max(cells, key=lambda c: sign * c.metrics[metric].estimate.value)
    tied: set[str]
    if baseline is not None and sign * leader.metrics[metric].estimate.value <= sign:
        best, others = baseline.cell_id, len(cells)
        tied = {c.cell_id for c in cells if beside_one(metric, c) == "not told apart"}
    else:
        best, others = leader.cell_id, len(cells) - 1 + (baseline is not None)
        pairs = len(cells) * (len(cells) - 1) // 2  # the leader was not known before
        tied = {c.cell_id for c in cells if c is not leader and not differ(metric, c, leader, max(1, pairs))}
        if baseline is not None and beside_one(metric, leader) == "not told apart":
            tied.add(baseline.cell_id)
    return {best: "best", **dict.fromkeys(tied, "tied")} if len(tied) < others else {}


def _ranks(number: Number | None) -> bool:
    if number is None or number.units is None or number.better == "none" or number.unit != "1":
        return False
    if len(number.units.rows) < FEWEST_FOR_INTERVAL:
        return False
    # Where all units agree there is no interval, but the differences from others may well have one.
    return all(x is None or math.isfinite(x) for x in number.estimate[:3])


def exactly(value: float, *, unit: str = "1", better: str = "higher") -> Number:
    """A number that holds by definition, such as a baseline's ratio to itself."""
    return Number(Estimate(value), unit, better, None)


def number(metric: dict[str, Any]) -> Number:
    """A row of the table `metric`, or of a shard."""
    units = metric.get("units")
    if isinstance(units, str):
        units = json.loads(units)
    return Number(
        Estimate(metric["value"], metric["ci_low"], metric["ci_high"], metric["n"]),
        metric["unit"],
        metric["better"],
        Observations.from_json(units) if units else None,
    )
