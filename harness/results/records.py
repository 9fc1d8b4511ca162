"""What the files of a run must say. They come from other people's machines, so each is checked before it is a row.

The types are those of the JSON. What newer code adds to a record is let through; what is missing or of another kind is
not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, ValidationError, model_validator

from decodathlon.harness.cells import Status
from decodathlon.harness.errors import StoreError
from decodathlon.harness.measure.observations import Observations
from decodathlon.harness.results.metrics import METRICS, Kind

_RIVAL = re.compile(r"ratio_to_(?!baseline$|self$)(.+)")
_MOMENT = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d{1,6})?(Z|[+-]\d\d:\d\d)")


def _moment(text: str) -> str:
    if not _MOMENT.fullmatch(text):
        raise ValueError("it is no time like 2026-11-21T10:00:00.000+00:00")
    try:
        moment = datetime.fromisoformat(text).astimezone(UTC)
    except OverflowError:
        raise ValueError("it is out of range") from None
    if moment > datetime.now(UTC) + timedelta(days=1):
        raise ValueError("it lies in the future")
    return text


#: ISO 8601 with a time zone; not in the future, where it would count as the newest for good.
Moment = Annotated[str, AfterValidator(_moment)]
#: What DuckDB's BIGINT and INTEGER hold.
Count = Annotated[int, Field(ge=0, lt=2**63)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Version = Annotated[int, Field(ge=0, lt=2**31)]
Name = Annotated[str, Field(min_length=1)]
#: The name of a decoder and its parameters.
SpecString = Annotated[str, Field(pattern=r"^[^\[\]\s][^\[]*(\[.*\])?$")]
Better = Literal["higher", "lower", "none"]


class Record(BaseModel):
    """JSON that a run left."""

    model_config = ConfigDict(strict=True, extra="allow")


class Units(Record):
    """What a metric was computed from (measure/observations.py)."""

    model_config = ConfigDict(strict=True, extra="forbid")

    rows: list[str]
    sums: list[float]
    counts: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    kind: Literal["mean", "median"] = "mean"
    scale: Literal["identity", "exp"] = "identity"
    share: bool = False
    trials: bool = False

    @model_validator(mode="after")
    def _as_many_of_each(self) -> Self:
        if not len(self.rows) == len(self.sums) == len(self.counts):
            raise ValueError(f"{len(self.rows)} rows, {len(self.sums)} sums and {len(self.counts)} counts")
        _unique("row", self.rows)
        if sum(self.counts) == 0 or (self.kind == "median" and 0 in self.counts):
            raise ValueError("nothing was counted")
        return self


class Metric(Record):
    """One number of a cell with its interval."""

    metric: Name
    value: float
    unit: str
    better: Better
    ci_low: float | None
    ci_high: float | None
    n: Count | None
    baseline: str | None = None
    units: Units | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.ci_low is None) != (self.ci_high is None):
            raise ValueError("an interval has two ends")
        if self.ci_low is not None and self.ci_high is not None:
            if not all(map(math.isfinite, (self.value, self.ci_low, self.ci_high))):
                raise ValueError("what has an interval is finite, and so is the interval")
            if not self.ci_low - _near(self.value) <= self.value <= self.ci_high + _near(self.value):
                raise ValueError(f"{self.value} is outside its interval")
        known = METRICS.get(self.metric)
        if known is not None and (known.unit, known.better) != (self.unit, self.better):
            raise ValueError(f"{self.metric} has the unit {known.unit!r}, better {known.better}")
        rival = _RIVAL.fullmatch(self.metric)
        if rival and known and self.baseline not in (rival[1].replace("_", "-"), None):
            raise ValueError(f"{self.metric} is not relative to {self.baseline}")
        if self.units is not None:
            found = Observations(**vars(self.units)).value
            if not (
                found == self.value
                or math.isclose(found, self.value, rel_tol=1e-4, abs_tol=1e-12)
                or (math.isnan(found) and math.isnan(self.value))
            ):
                raise ValueError(f"{self.value} is not what follows from its units, {found:.6g}")
        return self


class Spec(Record):
    """What identifies a cell (cells.CellSpec)."""

    suite: Name
    suite_version: Version
    slice: str
    decoder: SpecString
    model: str
    scale: str
    workload: str = ""
    sizes: list[Annotated[tuple[str, int | None], Strict(False)]] = []
    seed: Seed


class Described(Record):
    """A decoder, model or data set as a cell found it; a cell that failed early knows nothing of it."""

    name: str = ""
    spec: SpecString = "unknown"
    family: str = ""
    claim: str = ""
    dtype: str = ""
    dataset: str = ""
    source: str = ""
    params: dict[str, Any] = {}


class Sample(Record):
    """One observation of a cell."""

    model_config = ConfigDict(strict=True, extra="forbid")

    row: str
    data: Any


class CellRecord(Record):
    """A shard: one finished cell."""

    version: Annotated[int, Field(alias="schema", ge=0)] = 0
    run_id: str
    spec: Spec
    status: Status
    started: Moment
    reason: str = ""
    error: str = ""
    log: str = ""
    seconds: dict[str, float] = {}
    decoder: Described = Described()
    model: Described = Described()
    data: Described = Described()
    notes: list[str] = []
    metrics: list[Metric] = []
    samples: list[Sample] = []
    attempts: list[dict[str, Any]] = []

    @model_validator(mode="after")
    def _each_metric_once(self) -> Self:
        _unique("metric", [m.metric for m in self.metrics])
        return self


class Environment(Record):
    """The machine and its software."""

    cpu: str
    cores: int | None
    packages: dict[str, str] = {}
    gpus: list[dict[str, Any]] = []


class AboutParameter(Record):
    """A parameter of a decoder."""

    name: str
    type: str
    default: Any
    bounds: str
    sweep: list[Any]


class AboutDecoder(Record):
    """What a decoder is."""

    family: str
    summary: str
    text: str
    paper: str | None
    parameters: list[AboutParameter]


class AboutSuite(Record):
    """What a suite asks."""

    version: Version
    asks: str
    table: list[str]


class AboutMetric(Record):
    """A metric of a plugin."""

    unit: str
    better: Better
    meaning: str
    kind: Kind


class About(Record):
    """What the names of a run mean (harness/about.py)."""

    decoders: dict[str, AboutDecoder] = {}
    suites: dict[str, AboutSuite] = {}
    metrics: dict[str, AboutMetric] = {}


class RunRecord(Record):
    """`run.json`."""

    run_id: Name
    started: Moment
    git_commit: str
    git_dirty: bool | None
    environment: Environment
    options: dict[str, Any]
    about: About | None = None


class Verdict(Record):
    """What a gate said of a cell."""

    gate: str
    decoder: str
    cell_id: str
    outcome: Literal["pass", "fail", "inconclusive", "not run"]
    detail: str
    judged: Moment


class GatesRecord(Record):
    """`gates.json`."""

    verdicts: list[Verdict]

    @model_validator(mode="after")
    def _each_verdict_once(self) -> Self:
        _unique("verdict", [(v.gate, v.decoder, v.cell_id) for v in self.verdicts])
        return self


def check(content: Mapping[str, Any], kind: type[Record], path: Path) -> None:
    """
    Raises:
        StoreError: the content of the file is not what such a record says; the first thing wrong is named.
    """
    try:
        kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise StoreError(f"{path} is damaged or foreign: {f'{where}: ' if where else ''}{first['msg']}") from None


def _near(value: float) -> float:
    """How far rounding may move a number."""
    return 1e-6 * max(1.0, abs(value))


def _unique(what: str, names: Sequence[Any]) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"a {what} stands there twice")
