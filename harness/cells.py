"""Cells: the unit of work. Which cells a run has, what identifies one, and how one is measured.

The controller makes `CellSpec`s without torch; the process that measures turns one into a shard with `measure`.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from decodathlon.harness import datasets, models
from decodathlon.harness import decoder as decoders
from decodathlon.harness.decoder import Decoder
from decodathlon.harness.errors import UnsupportedError
from decodathlon.harness.registry import load_builtins, registry
from decodathlon.harness.suite import Cell, Suite

Status = Literal["ok", "partial", "failed", "oom", "timeout", "crashed", "cancelled", "unsupported"]
#: Raised when the shape of a shard changes.
SHARD_SCHEMA = 1


#: Fields of a `CellSpec` that say where something lies, not what is measured.
_PLACES = ("data", "decoder_files", "model_spec", "broken")


@dataclass(frozen=True)
class CellSpec:
    """Everything that decides what a cell measures; plain values, so that it travels as JSON."""

    suite: str
    suite_version: int
    slice: str
    decoder: str
    model: str
    scale: str
    seed: int
    device: str = "auto"
    dtype: str = "auto"
    baseline: str = "greedy"
    data: str | None = None
    decoder_files: Sequence[str] = ()
    #: How the user named the model, where that is more than its name: a path.
    model_spec: str = ""
    #: Traceback of a plugin that could not be imported: the cell fails with it, without a measurement.
    broken: str | None = None

    @property
    def cell_id(self) -> str:
        """Stable over runs and folders: a hash of what is measured, not of where its files lie."""
        identity = {k: v for k, v in asdict(self).items() if k not in _PLACES}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        return f"{self.suite}-{digest}"

    @property
    def label(self) -> str:
        """How progress lines and pytest ids call it."""
        return "-".join([self.decoder, *([] if self.slice == "all" else [self.slice])])


@dataclass
class Outcome:
    """What became of a cell. `as_shard` is what is stored."""

    spec: CellSpec
    run_id: str
    status: Status = "ok"
    reason: str = ""
    error: str = ""
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))
    seconds: dict[str, float] = field(default_factory=dict)
    decoder: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    arrays: dict[str, Any] = field(default_factory=dict)

    def as_shard(self) -> dict[str, Any]:
        """What is stored. Of the user's folders only the last name: rows are published."""
        spec = asdict(self.spec)
        spec["data"] = Path(self.spec.data).name if self.spec.data else None
        spec["model_spec"] = ""
        spec["decoder_files"] = [Path(p).name for p in self.spec.decoder_files]
        shard = {k: v for k, v in vars(self).items() if k != "spec"}
        return {"schema": SHARD_SCHEMA, "cell_id": self.spec.cell_id, "spec": spec, **shard}

    @classmethod
    def from_shard(cls, shard: dict[str, Any]) -> Outcome:
        """The inverse of `as_shard`."""
        values = {k: v for k, v in shard.items() if k not in ("schema", "cell_id", "spec")}
        return cls(spec=CellSpec(**shard["spec"]), **values)


class Bench:
    """The process that measures: it keeps the last loaded target and the texts between cells."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._target: tuple[tuple[str, str, str], Any] | None = None
        self._texts: dict[tuple[str, str, str | None], datasets.Text] = {}

    def measure(self, spec: CellSpec, run_id: str) -> Outcome:
        """Run one cell to its end, whatever that is; only a dying process is not turned into an outcome."""
        outcome = Outcome(spec, run_id)
        begin = time.perf_counter()
        cell: Cell | None = None
        try:
            if spec.broken is not None:
                raise _BrokenPluginError(spec.broken)
            cell = self._prepare(spec, outcome)
            outcome.seconds["prepare"] = time.perf_counter() - begin
            cell.suite.function(cell)
        except UnsupportedError as error:
            outcome.status, outcome.reason = "unsupported", str(error)
        except _BrokenPluginError as error:
            outcome.status, outcome.error = "failed", str(error)
            outcome.reason = "plugin cannot be imported: " + str(error).strip().splitlines()[-1]
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a cell raises is its result
            outcome.status = "oom" if _is_out_of_memory(error) else "failed"
            outcome.reason = f"{type(error).__name__}: {error}".splitlines()[0]
            outcome.error = traceback.format_exc()
        if cell is not None:
            outcome.samples, outcome.notes = cell.samples, cell.notes
            # What a cell reported before it failed is no result; the raw observations above are kept.
            outcome.metrics = cell.metrics if outcome.status == "ok" else []
            outcome.arrays = {name: [float(f"{x:.7g}") for x in values] for name, values in cell.arrays.items()}
        outcome.seconds["total"] = time.perf_counter() - begin
        return outcome

    def _prepare(self, spec: CellSpec, outcome: Outcome) -> Cell:
        """Everything that can be wrong is looked at before the model is loaded."""
        load_builtins()
        registry.load_entry_points()
        for path in spec.decoder_files:
            registry.load_file(path)
        suite: Suite = registry.get("suite", spec.suite)
        decoder = decoders.build(spec.decoder)
        outcome.decoder = describe(decoder)
        outcome.sizes = dict(suite.sizes[spec.scale])
        texts = {}
        if suite.data is not None:
            texts = {split: self._text(suite.data, split, spec.data) for split in ("test", "validation")}
            outcome.data = texts["test"].record() | {"validation_sha256": texts["validation"].sha256}
        target = self._load(spec)
        outcome.model = {
            "name": target.name,
            "dtype": str(target.dtype).removeprefix("torch."),
            "device": str(target.device),
            "parameters": target.parameters,
            **_processor(target.device),
        }
        decoder.check(target)
        rivals, left_out = _rivals(suite, decoder, spec.baseline, target)
        cell = Cell(
            suite=suite,
            decoder=decoder,
            target=target,
            rivals=rivals,
            scale=spec.scale,
            slice=spec.slice,
            seed=spec.seed,
            texts=texts,
        )
        cell.notes += left_out
        return cell

    def _text(self, name: str, split: datasets.Split, folder: str | None) -> datasets.Text:
        key = (name, split, folder)
        if key not in self._texts:
            self._texts[key] = datasets.find(name, split, folder, self._say)
        return self._texts[key]

    def _load(self, spec: CellSpec) -> Any:
        named = spec.model_spec or spec.model
        key = (named, spec.device, spec.dtype)
        if self._target is None or self._target[0] != key:
            self._target = None  # the old model must be gone before the new one comes
            model = models.resolve(named)
            self._say(f"loading {model.name}")
            self._target = (key, models.load(model, device=spec.device, dtype=spec.dtype, say=self._say))
        return self._target[1]


def _processor(device: Any) -> dict[str, Any]:
    """What computes, as the process that computes knows it: the GPU's name, or the threads on the CPU."""
    import torch

    if getattr(device, "type", "cpu") == "cuda":
        return {"processor": torch.cuda.get_device_name(device)}
    return {"threads": torch.get_num_threads()}


def describe(decoder: Decoder) -> dict[str, Any]:
    """What a row stores of a decoder."""
    return {
        "name": decoder.info.name,
        "spec": decoder.spec,
        "family": decoder.info.family,
        "params": decoder.params(),
        "claim": decoder.claim,
        "source_sha256": hashlib.sha256(Path(inspect.getfile(type(decoder))).read_bytes()).hexdigest(),
    }


def _rivals(suite: Suite, decoder: Decoder, baseline: str, target: Any) -> tuple[dict[str, Decoder], list[str]]:
    """Rivals by the metric their ratio goes under, and remarks on those that this target cannot run."""
    rivals: dict[str, Decoder] = {}
    remarks: list[str] = []
    if not suite.rivals:
        return rivals, remarks
    named = {f"ratio_to_{name.replace('-', '_')}": name for name in suite.rivals}
    if baseline not in suite.rivals:
        named["ratio_to_baseline"] = baseline
    for metric, text in named.items():
        rival = decoders.build(text)
        try:
            rival.check(target)
        except UnsupportedError as error:
            remarks.append(f"no {metric}: {rival.spec} {error}")
            continue
        # Against itself a decoder must give 1: the row shows the noise.
        rivals["ratio_to_self" if rival.spec == decoder.spec else metric] = rival
    return rivals, remarks


class _BrokenPluginError(Exception):
    """Carries the traceback of an import."""


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
