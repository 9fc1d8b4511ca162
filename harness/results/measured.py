"""Cells as gates and comparisons see them: what was measured, by which metric; from outcomes or from a results file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from decodathlon.harness.cells import Outcome
from decodathlon.harness.errors import SpecError, near_miss
from decodathlon.harness.measure.observations import Observations, compared
from decodathlon.harness.measure.statistics import Estimate
from decodathlon.harness.results import store

_COLUMNS = (
    "cell_id", "suite", "suite_version", "slice", "scale", "decoder", "model", "dtype", "device", "dataset", "seed",
    "status", "reason",
)  # fmt: skip


Mark = Literal["best", "tied"]
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
            scale=o.spec.scale,
            decoder=o.decoder.get("spec", o.spec.decoder),
            model=o.model.get("name", o.spec.model),
            dtype=o.model.get("dtype", o.spec.dtype),
            device=o.model.get("device", o.spec.device),
            dataset=o.data.get("dataset"),
            seed=o.spec.seed,
            status=o.status,
            reason=o.reason,
            metrics={m["metric"]: number(m) for m in o.metrics},
        )
        for o in outcomes
    ]


def of_run(path: Path, run: str) -> list[Measured]:
    """Every cell of a run in a results file; `last` is the newest run.

    Raises:
        SpecError: the file has no such run.
    """
    run = run_id(path, run)
    with store.connect(path) as connection:
        cells = connection.execute(f"SELECT {', '.join(_COLUMNS)} FROM cell WHERE run_id = ? ORDER BY started", [run])
        found = [dict(zip(_COLUMNS, row, strict=True)) for row in cells.fetchall()]
        names = ("cell_id", "metric", "value", "unit", "better", "ci_low", "ci_high", "n", "units")
        rows = connection.execute(f"SELECT {', '.join(names)} FROM metric WHERE run_id = ?", [run]).fetchall()
    metrics: dict[str, dict[str, Number]] = {}
    for row in rows:
        metric = dict(zip(names, row, strict=True))
        metrics.setdefault(metric["cell_id"], {})[metric["metric"]] = number(metric)
    return [Measured(**cell, metrics=metrics.get(cell["cell_id"], {})) for cell in found]


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


def differ(metric: str, a: Measured, b: Measured) -> bool:
    """Whether two cells are told apart in a metric: unit by unit, beyond the spread of each decoder from itself."""
    x, y = a.metrics[metric], b.metrics[metric]
    floor = max(noise_floor(metric, a), noise_floor(metric, b))
    how: Literal["ratio", "difference"] = "ratio" if floor > 0 else "difference"
    found = compared(x.units, y.units, how) if x.units and y.units else None
    if found is None or found.low is None or found.high is None:
        return False
    if how == "difference":
        return not found.low <= 0 <= found.high
    return not min(found.low, found.value * math.exp(-floor)) <= 1 <= max(found.high, found.value * math.exp(floor))


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
    """By cell id, which cell of a column is best and which cannot be told apart from it; empty where there is no rank.

    Nothing ranks without an interval, nor times and sizes: cells run one after another, so only paired ratios rank.
    Told apart are two cells by the interval of their difference, unit by unit, beyond the spread of each from itself.
    Where nobody is told apart from the best, nobody is marked.

    Args:
        baseline: of a ratio, the cell that has 1 by definition.
    """
    found = {c.cell_id: c for c in cells if c.status == "ok" and _ranks(c.metrics.get(metric))}
    found = {i: c for i, c in found.items() if c.metrics[metric].estimate.low is not None}
    if len(found) + (baseline is not None) < 2 or not found:
        return {}
    sign = 1.0 if next(iter(found.values())).metrics[metric].better == "higher" else -1.0
    leader = max(found.values(), key=lambda c: sign * c.metrics[metric].estimate.value)
    if baseline is not None and sign * leader.metrics[metric].estimate.value <= sign:
        tied = {i for i, c in found.items() if beside_one(metric, c) == "not told apart"}
        return {baseline.cell_id: "best", **dict.fromkeys(tied, "tied")} if len(tied) < len(found) else {}
    tied = {i for i, c in found.items() if c is not leader and not differ(metric, c, leader)}
    others = len(found) - 1 + (baseline is not None)
    if baseline is not None and beside_one(metric, leader) == "not told apart":
        tied.add(baseline.cell_id)
    return {leader.cell_id: "best", **dict.fromkeys(tied, "tied")} if len(tied) < others else {}


def _ranks(number: Number | None) -> bool:
    if number is None or number.units is None or number.better == "none" or number.unit != "1":
        return False
    return math.isfinite(number.estimate.value)


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
