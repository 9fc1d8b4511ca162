"""What a suite author uses: `@suite` on a test function, and the `Cell` that the function receives.

A suite says what is measured, at which sizes, on which data. A cell is one suite on one decoder, model and slice.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from decodathlon.harness.registry import registry
from decodathlon.harness.results.metrics import METRICS

if TYPE_CHECKING:
    from decodathlon.harness.datasets import Split, Text
    from decodathlon.harness.decoder import Decoder
    from decodathlon.harness.measure.statistics import Estimate
    from decodathlon.harness.targets.base import Target

SCALES = ("smoke", "quick", "full")


@dataclass(frozen=True)
class Suite:
    """A registered suite.

    Args:
        version: raised when the measurement changes, so that old and new rows never share a line.
        asks: the question that it answers, in one line.
        data: the data set that it reads, or None.
        sizes: per scale, the fixed sample sizes; a list under `slices` makes one cell per element.
        rivals: decoders that every cell of the suite is compared with, side by side in the same worker.
        table: the metrics that the summary shows, most telling first.
    """

    name: str
    version: int
    asks: str
    data: str | None
    sizes: Mapping[str, Mapping[str, Any]]
    rivals: Sequence[str]
    table: Sequence[str]
    function: Callable[[Cell], None]

    def slices(self, scale: str) -> Sequence[str]:
        return tuple(self.sizes[scale].get("slices", ("all",)))


F = TypeVar("F", bound=Callable[..., None])


def suite(
    name: str,
    *,
    version: int,
    asks: str,
    sizes: Mapping[str, Mapping[str, Any]],
    data: str | None = None,
    rivals: Sequence[str] = (),
    table: Sequence[str] = (),
) -> Callable[[F], F]:
    """Register the test function below as a suite; it receives one `cell`.

    Raises:
        ValueError: a scale has no sizes, or the table names an unknown metric.
        SpecError: the name is taken or malformed.
    """
    missing = [scale for scale in SCALES if scale not in sizes]
    if missing:
        raise ValueError(f"suite {name!r} has no sizes for {', '.join(missing)}")
    unknown = [metric for metric in table if metric not in METRICS]
    if unknown:
        raise ValueError(f"suite {name!r}: {unknown[0]!r} is not a metric")

    def register(function: F) -> F:
        registry.add(
            "suite", name, Suite(name, version, asks, data, sizes, rivals, table, function), inspect.getfile(function)
        )
        function.__decodathlon_suite__ = name  # type: ignore[attr-defined]
        return function

    return register


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
    ) -> None:
        self.suite = suite
        self.decoder = decoder
        self.target = target
        #: The decoders of paired ratios, by the metric that the ratio to them goes under.
        self.rivals = rivals
        self.scale, self.slice, self.seed = scale, slice, seed
        self.sizes = suite.sizes[scale]
        self._texts = texts
        self.metrics: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []
        self.arrays: dict[str, Sequence[float]] = {}
        self.notes: list[str] = list(target.notes)

    def text(self, split: Split = "test") -> Text:
        """Rows of the suite's data set."""
        return self._texts[split]

    def report(self, metric: str, estimate: Estimate, *, baseline: str | None = None) -> None:
        """Record one number.

        Raises:
            KeyError: the metric is not in the table of results/metrics.py.
        """
        known = METRICS[metric]
        self.metrics.append(
            {
                "metric": metric,
                "value": estimate.value,
                "unit": known.unit,
                "better": known.better,
                "ci_low": estimate.low,
                "ci_high": estimate.high,
                "n": estimate.n,
                "baseline": baseline,
            }
        )

    def sample(self, row: str, **values: Any) -> None:
        """Keep the raw observations of one prompt, window or pair."""
        self.samples.append({"row": row, "data": values})

    def array(self, name: str, values: Sequence[float]) -> None:
        """Keep raw numbers per token or per step."""
        self.arrays[name] = values

    def note(self, text: str) -> None:
        """Say something that a reader of the row should know."""
        self.notes.append(text)
