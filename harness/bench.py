"""The bench: measures one cell after another in this process, keeping the loaded model in between."""

from __future__ import annotations

import hashlib
import inspect
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from decodathlon.harness import datasets, judges, models, served
from decodathlon.harness import decoder as decoders
from decodathlon.harness.cells import TOY, CellSpec, Outcome
from decodathlon.harness.decoder import Decoder
from decodathlon.harness.engines.client import EngineDownError
from decodathlon.harness.errors import DecodathlonError, MissingError, UnsupportedError
from decodathlon.harness.measure.conditions import Conditions
from decodathlon.harness.registry import load_builtins, registry
from decodathlon.harness.results import environment, journal, shards
from decodathlon.harness.results.journal import Journal
from decodathlon.harness.results.lines import Lines
from decodathlon.harness.results.lines import path_of as path_of_lines
from decodathlon.harness.suite import Cell, LateError, Suite

#: Bytes of a file beyond which only its ends are hashed.
LARGE = 1 << 22


class Bench:
    """Runs cells in this process."""

    def __init__(self, say: Callable[[str], None], ready: Callable[[], None] = lambda: None) -> None:
        """
        Args:
            say: receives one line when something takes long.
            ready: called when a cell's model is loaded and its measurement begins.
        """
        self._say, self._ready, self._process = say, ready, os.getpid()
        self._kind = ""
        self._target: tuple[tuple[str, ...], Any] | None = None
        self._unloadable: dict[tuple[str, ...], DecodathlonError] = {}
        self._judges: dict[tuple[str, str], judges.Judge | None] = {}
        self._texts: dict[tuple[str, str, str | None], datasets.Text] = {}

    def run(
        self,
        spec: CellSpec,
        run_id: str,
        folder: Path,
        *,
        timeout: float | None = None,
        attempts: Sequence[dict[str, Any]] = (),
        log: Callable[[], str] = lambda: "",
        expected: Mapping[str, str] | None = None,
        kind: str = "",
    ) -> Outcome:
        """Measure one cell, leave its shard in `folder`, take its journal away.

        Args:
            timeout: seconds after which no further unit of work begins; the cell is then `partial`.
            attempts: how it ended before, in a run that is resumed.
            log: what the process has printed since the cell began.
            expected: what the run began with; other weights or data are an error.
            kind: what its worker computes on, as the schedule calls it.
        """
        self._kind = kind
        path = journal.path_of(folder, spec.cell_id)
        notebook, lines = Journal(path), Lines(path_of_lines(folder, spec.cell_id))
        outcome = self.measure(spec, run_id, timeout=timeout, notebook=notebook, lines=lines, expected=expected)
        if os.getpid() != self._process:  # a child that a decoder forked has come back as if it were us
            os._exit(1)
        notebook.close()
        lines.close()
        outcome.attempts = list(attempts)
        if outcome.status not in ("ok", "unsupported"):
            outcome.log = log()
        shards.write(folder / f"{spec.cell_id}.json", outcome.as_shard())
        path.unlink(missing_ok=True)
        return outcome

    def measure(
        self,
        spec: CellSpec,
        run_id: str,
        *,
        timeout: float | None = None,
        notebook: Journal | None = None,
        lines: Lines | None = None,
        expected: Mapping[str, str] | None = None,
    ) -> Outcome:
        """Run one cell to its end, whatever that is; only a dying process is not turned into an outcome."""
        outcome, notebook = Outcome(spec, run_id), notebook or Journal(None)
        begin = time.perf_counter()
        cell: Cell | None = None
        conditions = Conditions()
        try:
            if spec.broken is not None:
                raise _BrokenPluginError(spec.broken)
            cell = self._prepare(spec, outcome, timeout, notebook, lines or Lines(None))
            _refuse_other(outcome, expected or {})
            outcome.seconds["prepare"] = time.perf_counter() - begin
            for part in ("decoder", "model", "place", "data", "sizes", "protocol", "seconds"):
                notebook.write(part, getattr(outcome, part))
            conditions.begin(cell.target.device)
            self._ready()
            cell.begin()
            cell.suite.function(cell)
            if cell.late:
                outcome.status, outcome.reason = "partial", cell.late
        except LateError as error:
            outcome.status, outcome.reason = "timeout", str(error)
        except UnsupportedError as error:
            outcome.status, outcome.reason = "unsupported", str(error)
        except EngineDownError as error:
            outcome.status, outcome.reason = "failed", f"the server is gone: {error}"
            self._target = None  # whether it is back is asked before the next cell
        except _BrokenPluginError as error:
            outcome.status, outcome.error = "failed", str(error)
            outcome.reason = "plugin cannot be imported: " + str(error).strip().splitlines()[-1]
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a cell raises is its result
            outcome.status = "oom" if _is_out_of_memory(error) else "failed"
            outcome.reason = f"{type(error).__name__}: {error}".splitlines()[0]
            outcome.error = traceback.format_exc()
        outcome.seconds["total"] = time.perf_counter() - begin
        outcome.conditions = conditions.end()
        if cell is not None:
            incidents, cell.target.incidents[:] = list(cell.target.incidents), []
            outcome.samples, outcome.notes = cell.samples, [*cell.notes, *incidents, *conditions.remarks]
            # What a cell reported before it failed is no result; the raw observations above are kept.
            outcome.metrics = cell.metrics if outcome.status in ("ok", "partial") else []
            outcome.arrays = {name: [float(f"{x:.7g}") for x in values] for name, values in cell.arrays.items()}
        return outcome

    def _prepare(
        self, spec: CellSpec, outcome: Outcome, timeout: float | None, notebook: Journal, lines: Lines
    ) -> Cell:
        """Everything that can be wrong is looked at before the model is loaded."""
        load_builtins()
        registry.load_entry_points()
        for path in spec.decoder_files:
            registry.load_file(path)
        suite: Suite = registry.get("suite", spec.suite)
        decoder = decoders.build(spec.decoder)
        outcome.decoder = describe(decoder)
        outcome.sizes = (
            dict(suite.sized(spec.scale, spec.workload))
            | dict(spec.sizes)
            | ({suite.tuned_by: spec.limit} if spec.limit else {})
        )
        source = Path(inspect.getfile(suite.function)).read_bytes()
        outcome.protocol = {"suite_sha256": hashlib.sha256(source).hexdigest(), **suite.protocol}
        if suite.judged:
            # rows of different judges share no line and no rank
            outcome.sizes["judge"] = judges.label(spec.judge, spec.judge_url)
        texts = {}
        name = suite.data_of(spec.slice)
        if name is not None:
            texts = {split: self._text(name, split, spec.data) for split in datasets.splits(name)}
            if spec.split == "validation":  # a tuner sees those alone
                texts = dict.fromkeys(texts, texts["validation"])
            outcome.data = texts["test"].record()
            if "validation" in texts:
                outcome.data |= {"validation_sha256": texts["validation"].sha256}
        target = self._load(spec)
        from decodathlon.harness.measure import identity  # needs torch, which the controller does not load

        outcome.model = identity.record(target)
        outcome.place = environment.place(outcome.model, identity.gpu_uuid(target.device))
        outcome.place |= {"kind": self._kind} if self._kind else {}
        if suite.targets:
            outcome.model |= {"name": TOY, "target": target.name}
        for capability in suite.needs:
            if capability not in target.capabilities:
                raise UnsupportedError(capability, f"{suite.name} measures it, and {target.name} shows none")
        if hasattr(target, "remember"):
            target.remember(lines)
        decoder = served.on(decoder, target)
        decoder.check(target)
        outcome.decoder = describe(decoder)
        rivals, left_out = _rivals(suite, decoder, spec.baseline, target)
        versus, no_judge = _versus(suite, spec, decoder, target)
        cell = Cell(
            suite=suite,
            decoder=decoder,
            target=target,
            rivals=rivals,
            scale=spec.scale,
            slice=spec.slice,
            seed=spec.seed,
            texts=texts,
            timeout=timeout,
            notebook=notebook,
            lines=lines,
            sizes=outcome.sizes,
            judge=self._judge(spec) if suite.judged else None,
            versus=versus,
            profile=spec.profile,
            cycle_trace=spec.cycle_trace,
            say=self._say,
        )
        cell.notes += left_out + no_judge + decoder.remarks(target)
        return cell

    def _text(self, name: str, split: datasets.Split, folder: str | None) -> datasets.Text:
        key = (name, split, folder)
        if key not in self._texts:
            self._texts[key] = datasets.find(name, split, folder, self._say)
        return self._texts[key]

    def _judge(self, spec: CellSpec) -> judges.Judge | None:
        """The judge of a cell; one of our own stays loaded."""
        key = (spec.judge, spec.judge_url)
        if key not in self._judges:
            self._judges[key] = judges.build(*key, device=spec.device, dtype=spec.dtype, say=self._say)
        return self._judges[key]

    def _load(self, spec: CellSpec) -> Any:
        named = spec.model_spec or spec.model
        key = (named, spec.model_url, spec.device, spec.dtype)
        if key in self._unloadable:  # it would take as long to fail again
            raise self._unloadable[key]
        if self._target is None or self._target[0] != key:
            self._target = None  # the old model must be gone before the new one comes
            model = models.resolve(named, spec.model_url)
            self._say(f"loading {model.name}")
            try:
                self._target = (key, models.load(model, device=spec.device, dtype=spec.dtype, say=self._say))
            except DecodathlonError as error:
                self._unloadable[key] = error
                raise
        return self._target[1]


def describe(decoder: Decoder) -> dict[str, Any]:
    """What a row stores of a decoder."""
    return {
        "name": decoder.info.name,
        "spec": decoder.spec,
        "family": decoder.info.family,
        "params": decoder.params(),
        "claim": decoder.claim,
        "source_sha256": hashlib.sha256(b"".join(map(_content, decoder.sources()))).hexdigest(),
    }


def _content(file: Path) -> bytes:
    """What a file says; of a large one, such as weights, its size and both ends."""
    size = file.stat().st_size
    if size <= LARGE:
        return file.read_bytes()
    with file.open("rb") as handle:
        head = handle.read(LARGE // 2)
        handle.seek(size - LARGE // 2)
        return str(size).encode() + head + handle.read()


def _rivals(suite: Suite, decoder: Decoder, baseline: str, target: Any) -> tuple[dict[str, Decoder], list[str]]:
    """Rivals by the metric their ratio goes under, and remarks on those that this target cannot run.

    Every cell has the decoder itself among them: against itself it must give 1, so the row shows the noise.
    """
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
            rival = served.on(rival, target)
            rival.check(target)
        except UnsupportedError as error:
            remarks.append(f"no {metric}: {rival.spec} {error}")
            continue
        if rival.spec != decoder.spec:
            rivals[metric] = rival
    rivals["ratio_to_self"] = decoder
    return rivals, remarks


def _versus(suite: Suite, spec: CellSpec, decoder: Decoder, target: Any) -> tuple[Decoder | None, list[str]]:
    """Whose answers a judge compares with this decoder's, or a remark on why nobody's."""
    other = decoders.build(spec.baseline)
    if not suite.judged or spec.judge == "none" or other.spec == decoder.spec:
        return None, []
    try:
        other = served.on(other, target)
        other.check(target)
    except UnsupportedError as error:
        return None, [f"no judge_win_rate: {other.spec} {error}"]
    return other, []


class _BrokenPluginError(Exception):
    """Carries the traceback of an import."""


def found_of(outcome: Outcome) -> dict[str, str]:
    """What must stay the same over the cells of a run: the weights, and each suite's data."""
    found = {
        # a suite's own targets are made anew in every process, by code that the row names
        "the model's weights": None if outcome.spec.model == TOY else outcome.model.get("weights_fingerprint"),
        f"the data of {outcome.spec.suite} {outcome.spec.slice}": outcome.data.get("sha256"),
    }
    return {what: value for what, value in found.items() if value is not None}


def _refuse_other(outcome: Outcome, expected: Mapping[str, str]) -> None:
    for what, value in found_of(outcome).items():
        if expected.get(what, value) != value:
            raise MissingError(f"{what} changed after the run began; a run is of one piece: start a new one")


def _is_out_of_memory(error: BaseException) -> bool:
    """Python's, CUDA's, or that of torch's allocator on a CPU, which has no type of its own."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
