"""What the files of a run must say. They come from other people's machines, so each is checked before it is a row.

The types are those of the JSON. What newer code adds to a record is let through; what is missing or of another kind is
not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from decodathlon.harness.cells import Status
from decodathlon.harness.errors import StoreError
from decodathlon.harness.results.metrics import Kind


def _moment(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("it has no time zone")
    return text


#: ISO 8601 with a time zone, between the years 1 and 9999.
Moment = Annotated[str, AfterValidator(_moment)]
#: What DuckDB's BIGINT and INTEGER hold.
Count = Annotated[int, Field(ge=0, lt=2**63)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Version = Annotated[int, Field(ge=0, lt=2**31)]
Name = Annotated[str, Field(min_length=1)]
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
    def _both_ends(self) -> Self:
        if (self.ci_low is None) != (self.ci_high is None):
            raise ValueError("an interval has two ends")
        return self


class Spec(Record):
    """What identifies a cell (cells.CellSpec)."""

    suite: Name
    suite_version: Version
    slice: str
    decoder: Name
    model: str
    scale: str
    seed: Seed


class Described(Record):
    """A decoder, model or data set as a cell found it; a cell that failed early knows nothing of it."""

    name: str = ""
    spec: Name = "unknown"
    family: str = ""
    claim: str = ""
    dtype: str = ""
    dataset: str = ""
    source: str = ""
    params: dict[str, Any] = {}


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
    samples: list[dict[str, Any]] = []
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


class AboutDecoder(Record):
    """What a decoder is."""

    family: str
    summary: str
    text: str
    paper: str | None
    parameters: list[dict[str, Any]]


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


def _unique(what: str, names: Sequence[Any]) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"a {what} stands there twice")
