"""What a suite author uses: `@suite` on a test function, and the `Cell` that the function receives.

A suite says what is measured, at which sizes, on which data. A cell is one suite on one decoder, model and slice.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from decodathlon.harness import datasets
from decodathlon.harness.progress import told
from decodathlon.harness.registry import registry
from decodathlon.harness.results.journal import Journal
from decodathlon.harness.results.lines import Lines
from decodathlon.harness.results.metrics import METRICS

if TYPE_CHECKING:
    from decodathlon.harness.datasets import Split, Text
    from decodathlon.harness.decoder import Decoder
    from decodathlon.harness.judges import Judge
    from decodathlon.harness.measure.observations import Observations
    from decodathlon.harness.measure.statistics import Estimate
    from decodathlon.harness.targets.base import Target

SCALES = ("smoke", "quick", "full")
T = TypeVar("T")


class LateError(Exception):
    """The time of a cell was over before it had measured anything."""


@dataclass(frozen=True)
class Suite:
    """A registered suite.

    Args:
        version: raised when the measurement changes, so that old and new rows never share a line.
        asks: the question that it answers, in one line.
        data: the data set that it reads, one per slice where it is a mapping; or None.
        sizes: per scale, the fixed sample sizes; a list under `slices` makes one cell per element.
        rivals: decoders that every cell of the suite is compared with, side by side in the same worker.
        table: the metrics that the summary shows, most telling first.
        targets: of a suite that brings its own, the model spec of each slice, in place of --model.
        workloads: other prompts that --workload names: per name and scale what differs in its sizes, its slices among
            them.
    """

    name: str
    version: int
    asks: str
    data: str | Mapping[str, str] | None
    sizes: Mapping[str, Mapping[str, Any]]
    rivals: Sequence[str]
    table: Sequence[str]
    function: Callable[[Cell], None]
    #: How it measures, for the record.
    protocol: Mapping[str, str] = field(default_factory=dict)
    #: Whether its rows are operations of the harness that pytest-benchmark timed; it then has no cells.
    timed: bool = False
    targets: Mapping[str, str] = field(default_factory=dict)
    #: Whether it asks a judge where there is one.
    judged: bool = False
    workloads: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    #: Whether it measures the model alone: it then has one cell, of the baseline, whatever decoders are named.
    of_target: bool = False
    #: Whether its numbers are times, which what runs beside it on its machine would spoil.
    clocked: bool = False
    #: What a target must have for it, such as `logits` or `server`; others are unsupported.
    needs: Sequence[str] = ()

    def slices(self, scale: str, workload: str = "") -> Sequence[str]:
        return tuple(self.sized(scale, workload).get("slices", ("all",)))

    def sized(self, scale: str, workload: str = "") -> Mapping[str, Any]:
        """The sample sizes of a scale; a workload that the suite does not have changes nothing."""
        return {**self.sizes[scale], **self.workloads.get(workload, {}).get(scale, {})}

    def data_of(self, part: str) -> str | None:
        """The data set of a slice."""
        return self.data if self.data is None or isinstance(self.data, str) else self.data[part]

    @property
    def data_sets(self) -> set[str]:
        """All data sets that it reads."""
        return set() if self.data is None else {self.data} if isinstance(self.data, str) else set(self.data.values())

    @property
    def tuned_by(self) -> str:
        """What of its validation data a tuner measures so many of, `questions` or `tokens`; empty where it has none."""
        if not any("validation" in datasets.splits(name) for name in self.data_sets):
            return ""
        sizes = self.sizes.values()
        if all("questions" in size for size in sizes):
            return "questions"
        return "tokens" if all("validation" in size for size in sizes) else ""


F = TypeVar("F", bound=Callable[..., None])


def suite(
    name: str,
    *,
    version: int,
    asks: str,
    sizes: Mapping[str, Mapping[str, Any]],
    data: str | Mapping[str, str] | None = None,
    rivals: Sequence[str] = (),
    table: Sequence[str] = (),
    protocol: Mapping[str, str] | None = None,
    targets: Mapping[str, str] | None = None,
    judged: bool = False,
    workloads: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
    of_target: bool = False,
    clocked: bool = False,
    needs: Sequence[str] = (),
) -> Callable[[F], F]:
    """Register the test function below as a suite; it receives one `cell`.

    Raises:
        ValueError: a scale has no sizes, or the table names an unknown metric.
        SpecError: the name is taken or malformed.
    """
    missing = [scale for scale in SCALES if scale not in sizes]
    if missing:
        raise ValueError(f"suite {name!r} has no sizes for {', '.join(missing)}")
    unknown = [metric for metric in table if metric.partition("(")[0] not in METRICS]
    if unknown:
        raise ValueError(f"suite {name!r}: {unknown[0]!r} is not a metric")

    def register(function: F) -> F:
        made = Suite(
            name, version, asks, data, sizes, rivals, table, function, protocol or {},
            targets=targets or {}, judged=judged, workloads=workloads or {},
            of_target=of_target, clocked=clocked, needs=tuple(needs),
        )  # fmt: skip
        registry.add("suite", name, made, inspect.getfile(function))
        function.__decodathlon_suite__ = name  # type: ignore[attr-defined]
        return function

    return register


def timed(name: str, *, version: int, asks: str, table: Sequence[str]) -> Callable[[F], F]:
    """A suite of operations of the harness itself, each a test function that pytest-benchmark times.

    Such a suite has no cells of decoders; every decorated function becomes one row, called after it.
    """

    def mark(function: F) -> F:
        function.__decodathlon_timed__ = name  # type: ignore[attr-defined]
        return function

    def nothing(cell: Cell) -> None:
        raise TypeError(f"suite {name} has no cells")

    sizes: Mapping[str, Mapping[str, Any]] = {scale: {"slices": ()} for scale in SCALES}
    registry.add(
        "suite",
        name,
        Suite(name, version, asks, None, sizes, (), table, nothing, timed=True),
        inspect.stack()[1].filename,
    )
    return mark


class Cell:
    """One measurement: what a suite function gets, and where it puts what it found."""

    def __init__(
        self,
        *,
        suite: Suite,
        decoder: Decoder,
        target: Target,
        rivals: Mapping[str, Decoder],
        scale: str,
        slice: str,
        seed: int,
        texts: Mapping[Split, Text],
        timeout: float | None = None,
        notebook: Journal | None = None,
        lines: Lines | None = None,
        sizes: Mapping[str, Any] | None = None,
        judge: Judge | None = None,
        versus: Decoder | None = None,
        profile: bool = False,
        cycle_trace: bool = False,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.suite = suite
        self.decoder = decoder
        self.target = target
        #: The decoders of paired ratios, by the metric that the ratio to them goes under.
        self.rivals = rivals
        self.scale, self.slice, self.seed = scale, slice, seed
        self.sizes = suite.sizes[scale] if sizes is None else sizes
        self._texts = texts
        self.metrics: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []
        self.arrays: dict[str, Sequence[float]] = {}
        self.notes: list[str] = list(target.notes)
        #: Why the cell measured less than it should have; empty where it did not.
        self.late = ""
        self._timeout, self._deadline = timeout, float("inf")
        self._notebook = notebook or Journal(None)
        #: What is kept of every unit of a long cell, and what an earlier attempt has kept.
        self.lines = lines or Lines(None)
        #: Who grades open answers, or None.
        self.judge = judge
        #: Where there is a judge, the decoder whose answers it compares with this one's; None for that decoder itself.
        self.versus = versus
        #: Whether to look where time and memory go, too.
        self.profile = profile
        #: Whether to keep every cycle of a decoder that drafts.
        self.cycle_trace = cycle_trace
        self._say = say

    def begin(self) -> None:
        """Start the clock of --cell-timeout."""
        if self._timeout is not None:
            self._deadline = time.monotonic() + self._timeout

    def of(self, decoder: Decoder) -> Cell:
        """This cell as if it were another decoder's: the same questions, seeds and clock; for answers to compare with.

        What it reports is this cell's; its lines have names of their own.
        """
        other = copy.copy(self)
        other.decoder, other.lines = decoder, self.lines.of(f"{decoder.spec}: ")
        return other

    def until_late(self, units: Sequence[T]) -> Iterator[T]:
        """The units of work, one by one, until the cell's time is over; what was measured by then is kept.

        Raises:
            LateError: nothing had been measured.
        """
        for done, unit in enumerate(told(units, f"{self.suite.name} {self.decoder.spec}", self._say)):
            if time.monotonic() > self._deadline:
                self.late = f"after {self._timeout:.4g} s {done} of {len(units)} units were measured"
                if done == 0 and not self.metrics:
                    raise LateError(f"--cell-timeout {self._timeout:.4g}: nothing was measured in time")
                return
            yield unit

    def each(self, units: Iterator[T], count: int) -> Iterator[T]:
        """Units of work that come by themselves, as requests that are answered; until the cell's time is over."""
        for done, unit in enumerate(units):
            yield unit
            if time.monotonic() > self._deadline and done + 1 < count:
                self.late = f"after {self._timeout:.4g} s {done + 1} of {count} units were measured"
                return

    def text(self, split: Split = "test") -> Text:
        """Rows of the suite's data set."""
        return self._texts[split]

    def report(self, metric: str, found: Estimate | Observations, *, baseline: str | None = None) -> None:
        """Record one number; with its units, where it has some, so that it can be compared unit by unit.

        Raises:
            KeyError: the metric is not in the table of results/metrics.py.
        """
        known = METRICS[metric.partition("(")[0]]  # what stands in brackets tells several of one kind apart
        units = None if isinstance(found, tuple) else found.as_json()
        estimate = found if isinstance(found, tuple) else found.estimate()
        row = {
            "metric": metric,
            "value": estimate.value,
            "unit": known.unit,
            "better": known.better,
            "ci_low": estimate.low,
            "ci_high": estimate.high,
            "n": estimate.n,
            "baseline": baseline,
            "units": units,
        }
        self.metrics.append(row)
        self._notebook.write("metrics", row)

    def sample(self, row: str, **values: Any) -> None:
        """Keep the raw observations of one prompt, window or pair."""
        sample = {"row": row, "data": values}
        self.samples.append(sample)
        self._notebook.write("samples", sample)

    def array(self, name: str, values: Sequence[float]) -> None:
        """Keep raw numbers per token or per step."""
        self.arrays[name] = values

    def note(self, text: str) -> None:
        """Say something that a reader of the row should know."""
        if text not in self.notes:
            self.notes.append(text)
