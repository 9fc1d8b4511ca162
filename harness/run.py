"""One `--benchmark` invocation: its plan, its executor, its progress, its record, its end. Knows nothing of pytest.

A run is a folder of shards. Killed at any moment it keeps every finished cell, and `--resume` measures the others.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from decodathlon.harness import about, resuming
from decodathlon.harness.bench import found_of
from decodathlon.harness.cells import FINAL, HARNESS, CellSpec, Outcome, now
from decodathlon.harness.errors import DecodathlonError, SpecError, StoreError
from decodathlon.harness.locks import file_lock
from decodathlon.harness.measure.conditions import Conditions
from decodathlon.harness.measure.observations import Observations
from decodathlon.harness.plan import Options, cells
from decodathlon.harness.registry import registry
from decodathlon.harness.results import audited, environment, gates, journal, measured, past, shards, store, table
from decodathlon.harness.results.metrics import METRICS
from decodathlon.harness.workers import gpus
from decodathlon.harness.workers.base import Orders
from decodathlon.harness.workers.executors import EXECUTORS
from decodathlon.harness.workers.fleet import Fleet
from decodathlon.harness.workers.schedule import Job

#: Seconds that a cell may measure, by scale, where --cell-timeout says nothing.
CELL_TIMEOUT = {"smoke": 600.0, "quick": 1800.0, "full": 6 * 3600.0}
#: Rounds that an operation of the harness keeps.
MOST_ROUNDS = 200


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a run is carried out; none of it changes what a cell measures."""

    results: Path
    executor: str = "local"
    #: How many workers on this machine; None: one per GPU, or one.
    workers: int | None = None
    ray_address: str = "auto"
    #: Whether cells whose numbers are times run alone on their host.
    timing_exclusive: bool = False
    #: Whether a cell is measured once more whose machine was lost.
    retry_lost: bool = False
    cell_timeout: float | None = None
    #: A file of gates; None for none.
    gates: Path | None = None


class Run:
    """A new run, or one that is taken up again."""

    def __init__(
        self, settings: Settings, options: Options | None, resume: str | None, say: Callable[[str], None]
    ) -> None:
        """
        Args:
            options: what a new run measures; None where `resume` names a run.
            resume: a run's id or `last`.
            say: writes a line of progress.

        Raises:
            DecodathlonError: whatever is wrong with the options, the files or the run, before anything is loaded.
        """
        self.settings, self._say = settings, say
        store.check(settings.results)
        for path in options.decoder_file if options is not None else ():
            registry.load_file(path)  # gates may name its decoders
        self.gates: list[gates.Gate] = []
        self.outcomes: list[Outcome] = []
        self.verdicts: list[gates.Verdict] = []
        #: Lines that say where the results are.
        self.closing: list[str] = []
        self.failed_to_ingest = False
        #: Whether there were no such workers as it was asked for.
        self.refused = False
        self._before: dict[str, Outcome] = {}
        #: All cells of a run that is resumed, as it planned them.
        self._planned: list[CellSpec] = []
        self._held = ExitStack()
        #: What the first cell found of weights and data; a later one that finds other fails.
        self._expected: dict[str, str] = {}
        self._record: dict[str, Any] = {}
        if resume is not None:
            self.folder = resuming.find(settings.results, resume)
            self.run_id = self.folder.name
            self._hold()
            for left in self.folder.glob(".*.json.*"):  # half a shard of a process that was killed
                left.unlink(missing_ok=True)
            self.specs, scale = self._taken_up()
        else:
            assert options is not None
            self.run_id = environment.run_id()
            self.folder = shards.folder_of(settings.results, self.run_id)
            self.specs, scale = cells(options), options.scale
        if settings.gates is not None:
            self.gates = gates.load(settings.gates)
        self._options, self.resumed = options, resume is not None
        self._timeout = settings.cell_timeout or CELL_TIMEOUT[scale]
        self.waiting: dict[str, CellSpec] = {s.cell_id: s for s in self.specs}
        self._began = time.monotonic()
        #: Seconds of cells, by what like ones took before.
        self._guessed: dict[str, float] = {}
        self._fleet: Fleet | None = None
        self._coming: Iterator[Outcome] = iter(())

    def _hold(self) -> None:
        """A run has one controller."""
        try:
            # a moment, because a board may be looking whether somebody measures
            self._held.enter_context(file_lock(self.folder / shards.LOCK_FILE, timeout=0.2))
        except StoreError:
            raise StoreError(f"run {self.run_id} is being measured by another process") from None

    def begin(self, chosen: Sequence[CellSpec]) -> None:
        """Write down what will be measured, with what code and machine, before the first cell.

        Raises:
            DecodathlonError: there are no such workers.
        """
        self.waiting = {s.cell_id: s for s in chosen}
        settings = self.settings
        orders = Orders(
            run_id=self.run_id,
            folder=self.folder,
            timeout=self._timeout,
            say=self._say,
            # who asks a server needs no GPU here
            device="cpu" if any(s.model_url for s in chosen) else chosen[0].device if chosen else "auto",
            workers=settings.workers,
            ray_address=settings.ray_address,
            same=resuming.same() if settings.executor == "ray" else {},
        )
        self._fleet = Fleet(
            EXECUTORS[settings.executor], orders, exclusive=settings.timing_exclusive, retry_lost=settings.retry_lost
        )
        known = past.read(settings.results, gpus.kind(None)) if store.available() else past.Past(())
        self._guessed = {s.cell_id: guess.seconds for s in chosen if (guess := known.of(s)) is not None}
        jobs = [self._job(spec) for spec in chosen]
        self._coming = self._fleet.outcomes(jobs, self._expected, self._kinds())
        if self.resumed:
            record = shards.read(self.folder / shards.RUN_FILE)
            self._record = record | {"resumed": [*record.get("resumed", []), now()]}
            shards.write(self.folder / shards.RUN_FILE, self._record)
            return
        self._hold()
        assert self._options is not None
        shards.write(self.folder / shards.PLAN_FILE, {"cells": [asdict(s) for s in chosen], "decoders": _files(chosen)})
        described = environment.describe()
        options = asdict(self._options) | {
            "data": Path(self._options.data).name if self._options.data else None,
            "decoder_file": [Path(p).name for p in self._options.decoder_file],
            "model": self.specs[0].model if self.specs else self._options.model,
            "judge_url": "given" if self._options.judge_url else "",
            "model_url": "given" if self._options.model_url else "",
        }
        self._record = {
            "run_id": self.run_id,
            "started": now(),
            "git_commit": described.pop("git_commit"),
            "git_dirty": described.pop("git_dirty"),
            "environment": described,
            "options": options,
            "execution": {
                "executor": settings.executor,
                "workers": self._fleet.size,
                "timing_exclusive": settings.timing_exclusive,
                "retry_lost": settings.retry_lost,
            },
            "about": about.describe(
                [*(s.decoder for s in chosen), *(s.baseline for s in chosen)],
                [*(s.suite for s in chosen), *(n for n in self.timed_suites if registry.get("suite", n).timed)],
            ),
        }
        shards.write(self.folder / shards.RUN_FILE, self._record)

    def measure(self, spec: CellSpec) -> Outcome:
        """What became of a cell; others may end before it. Says how each went and how long the rest will take."""
        while spec.cell_id in self.waiting:
            outcome = next(self._coming, None)
            if outcome is None:
                raise StoreError(f"{spec.label} was given to no worker: they have ended")
            self._take(outcome)
        return next(o for o in self.outcomes if o.spec.cell_id == spec.cell_id)

    def _job(self, spec: CellSpec) -> Job:
        before = self._before.get(spec.cell_id)
        attempts = [*before.attempts, before.as_attempt()] if before is not None else []
        usual = sum(self._guessed.values()) / len(self._guessed) if self._guessed else 1.0
        seconds = self._guessed.get(spec.cell_id, usual)
        return Job(spec, attempts, clocked=registry.get("suite", spec.suite).clocked, seconds=seconds)

    def _kinds(self) -> dict[tuple[Any, ...], str]:
        """On what hardware the cells of a resumed run were measured, by what they are compared with."""
        planned = {spec.cell_id: spec for spec in self._planned}  # stored ones lack the user's paths
        return {
            Job(planned[cell_id]).group: str(o.place["kind"])
            for cell_id, o in self._before.items()
            if "kind" in o.place and o.status in FINAL
        }

    def _take(self, outcome: Outcome) -> None:
        spec = outcome.spec
        self._expect(outcome)
        self.outcomes = [o for o in self.outcomes if o.spec.cell_id != spec.cell_id] + [outcome]
        self.waiting.pop(spec.cell_id, None)
        done = len(self.outcomes)
        self._say(
            f"  [{done}/{done + len(self.waiting)}] {spec.suite} {spec.label}: {outcome.status} in "
            f"{_measuring(outcome):.0f} s, {table.short(outcome)}{self._time_left()}"
        )

    def _expect(self, outcome: Outcome) -> None:
        if outcome.status in FINAL:
            self._expected = found_of(outcome) | self._expected

    @property
    def timed_suites(self) -> list[str]:
        """Suites of the harness's own operations that this run was asked for, or that a run of everything has."""
        if self._options is None or (self._options.decoder and not self._options.suite):
            return []
        return list(self._options.suite or registry.names("suite"))

    def record_timed(self, suite: str, operation: str, seconds: Sequence[float], watch: Conditions) -> None:
        """Keep what pytest-benchmark measured of one operation of the harness, or of a kernel, like any cell."""
        assert self._options is not None
        known_suite = registry.get("suite", suite)
        metric = known_suite.table[0]
        spec = CellSpec(
            suite, known_suite.version, operation, HARNESS, HARNESS, self._options.scale, self._options.seed
        )
        rounds = Observations.each([f"round-{i}" for i in range(len(seconds))], list(seconds))
        found, known = rounds.estimate(), METRICS[metric]
        row = {"metric": metric, "value": found.value, "unit": known.unit, "better": known.better,
               "ci_low": found.low, "ci_high": found.high, "n": found.n, "baseline": None, "units": None}  # fmt: skip
        outcome = Outcome(
            spec,
            self.run_id,
            decoder={"name": HARNESS, "spec": HARNESS, "family": HARNESS, "params": {}, "claim": "–"},
            model={"name": HARNESS, "dtype": "", "device": "cpu"},
            seconds={"total": float(sum(seconds))},
            conditions=watch.end(),
            metrics=[row],
            samples=[{"row": "rounds", "data": {"seconds": [float(f"{s:.4g}") for s in seconds[:MOST_ROUNDS]]}}],
        )
        outcome.notes = watch.remarks
        shards.write(self.folder / f"{spec.cell_id}.json", outcome.as_shard())
        self.outcomes.append(outcome)

    def finish(self) -> None:
        """End the workers, judge the gates, and add what was measured to the results file."""
        if self._fleet is not None:
            self._fleet.close()
            if self._fleet.nodes:
                self._record["nodes"] = dict(self._fleet.nodes)
                shards.write(self.folder / shards.RUN_FILE, self._record)
        if self._record or self.resumed:
            if self._record and not (self.folder / shards.RUN_FILE).exists():
                shards.write(self.folder / shards.RUN_FILE, self._record)  # somebody took it away meanwhile
            self._collect()
            planned = {spec.cell_id: place for place, spec in enumerate(self.specs)}
            self.outcomes.sort(key=lambda o: planned.get(o.spec.cell_id, len(planned)))  # as tables have them
            if self.outcomes:
                self._judge()
                self._ingest()
            if self.waiting:
                self.closing.append(f"{_cells(len(self.waiting))} not measured; go on with: {self.resume_command}")
        self._held.close()

    @property
    def resume_command(self) -> str:
        return f"pytest suites/ --benchmark --resume {self.run_id}{self._results_option}"

    @property
    def _ingest_command(self) -> str:
        return f"decodathlon ingest {shlex.quote(str(self.folder))}{self._results_option}"

    @property
    def _results_option(self) -> str:
        usual = self.settings.results == environment.results_file().resolve()
        return "" if usual else f" --results {shlex.quote(str(self.settings.results))}"

    def _collect(self) -> None:
        """Also what the interrupted cell left: its executor wrote its shard, but nobody got its outcome."""
        known = {o.spec.cell_id for o in self.outcomes}
        for cell_id in list(self.waiting):
            path = self.folder / f"{cell_id}.json"
            if cell_id not in known and path.exists():
                self.outcomes.append(Outcome.from_shard(shards.read(path)))

    def _judge(self) -> None:
        self.verdicts = gates.judge(self.gates, measured.of_outcomes(self.outcomes))
        if self.verdicts:
            judged = now()
            rows = [
                {
                    "gate": v.gate.text,
                    "decoder": v.cell.decoder if v.cell else ", ".join(v.gate.decoder),
                    "cell_id": v.cell.cell_id if v.cell else "",
                    "outcome": v.outcome,
                    "detail": v.detail,
                    "judged": judged,
                }
                for v in self.verdicts
            ]
            shards.write(self.folder / shards.GATES_FILE, {"run_id": self.run_id, "verdicts": rows})

    def _ingest(self) -> None:
        took = time.monotonic() - self._began
        self.closing.append(
            f"run {self.run_id}: {_cells(len(self.outcomes))} in {_duration(took)}; shards in {self.folder}"
        )
        if not store.available():
            self.closing.append(f"DuckDB is not installed here; where it is: {self._ingest_command}")
            return
        try:
            found = store.ingest(self.settings.results, [self.folder])
        except (DecodathlonError, KeyboardInterrupt) as error:
            why = str(error) or "interrupted"
            self.closing.append(f"NOT INGESTED, the shards are safe: {why}. Then: {self._ingest_command}")
            self.failed_to_ingest = True
            return
        again = f", {found.replaced} replaced" if found.replaced else ""
        self.closing.append(f"{_cells(found.added)} added{again} in {self.settings.results}")
        self.closing += found.conflicts

    def _taken_up(self) -> tuple[list[CellSpec], str]:
        """The cells that are left of a run, and its scale.

        Raises:
            StoreError: code, machine or libraries are not those that it began with, or it left no plan.
        """
        plan = shards.read(self.folder / shards.PLAN_FILE)
        planned = [CellSpec.from_json(c) for c in plan["cells"]]
        if not planned:
            raise SpecError(f"--resume {self.run_id}: that run had no cells of decoders; start a new one")
        resuming.refuse_changes(self.folder, plan, planned)
        self._planned = planned
        for spec in planned:
            path = self.folder / f"{spec.cell_id}.json"
            if path.exists():
                self._before[spec.cell_id] = Outcome.from_shard(shards.read(path))
            orphan = journal.path_of(self.folder, spec.cell_id)
            if orphan.exists():  # it was in flight when everything was killed
                before = self._before.get(spec.cell_id)
                attempts = [*before.attempts, before.as_attempt()] if before is not None else []
                self._before[spec.cell_id] = Outcome(
                    spec, self.run_id, status="cancelled", reason="the whole run was killed", attempts=attempts
                )
        for outcome in self._before.values():
            self._expect(outcome)
        self.outcomes = [o for o in self._before.values() if o.status in FINAL]
        finished = {o.spec.cell_id for o in self.outcomes}
        return [s for s in planned if s.cell_id not in finished], planned[0].scale

    def _time_left(self) -> str:
        if not self.waiting:
            return ""
        took: dict[str, list[float]] = {}
        for outcome in self.outcomes:
            took.setdefault(outcome.spec.suite, []).append(_measuring(outcome))
        mean = {suite: sum(times) / len(times) for suite, times in took.items()}
        overall = sum(mean.values()) / len(mean)
        # this run knows best how long a suite takes here and now; then what was measured before
        work = sum(mean.get(s.suite, self._guessed.get(s.cell_id, overall)) for s in self.waiting.values())
        return f" (about {_duration(work / max(1, self._fleet.size if self._fleet else 1))} left)"

    @property
    def dishonest(self) -> list[str]:
        """Who failed an audit of this run; nobody where no rules are asked for."""
        found = audited.verdicts(self.outcomes) if self.settings.gates is not None else {}
        return [decoder for decoder, verdict in found.items() if verdict == "fail"]

    @property
    def measured_nothing(self) -> bool:
        return not any(o.metrics for o in self.outcomes)


def _files(specs: Sequence[CellSpec]) -> dict[str, str]:
    return {path: environment.digest(Path(path)) for spec in specs for path in spec.decoder_files}


def _cells(count: int) -> str:
    return f"{count} cell" if count == 1 else f"{count} cells"


def _measuring(outcome: Outcome) -> float:
    """Seconds of a cell without what it spent on loading, which the next cell need not spend again."""
    return outcome.seconds.get("total", 0.0) - outcome.seconds.get("prepare", 0.0)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
