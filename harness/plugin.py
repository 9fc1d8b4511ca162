"""The pytest plugin: options, cells out of suites and decoders, progress, the summary, the exit code.

The controller knows no torch. It plans cells, hands each to an executor, and ingests the shards that come out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from decodathlon.harness.cells import CellSpec, Outcome
from decodathlon.harness.errors import DecodathlonError
from decodathlon.harness.plan import Options, cells
from decodathlon.harness.results import environment, shards, store, table
from decodathlon.harness.suite import SCALES
from decodathlon.harness.workers.local import EXECUTORS

EXIT_NOTHING_MEASURED = 11
_RUN = pytest.StashKey["Run"]()
#: How many suites were deselected for want of --benchmark.
_IDLE = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("decodathlon", "decodathlon: decoders x suites")

    def add(name: str, **options: Any) -> None:
        # `benchmark_*` belongs to pytest-benchmark, so every destination carries our own prefix.
        group.addoption(name, dest="decodathlon_" + name[2:].replace("-", "_"), **options)

    default = Options()
    add("--benchmark", action="store_true", help="measure: run the suites (without it they are deselected)")
    add(
        "--scale",
        choices=SCALES,
        default=default.scale,
        help="sample sizes: minutes, 20 minutes, a night (default quick)",
    )
    add("--decoder", action="append", default=[], metavar="SPEC", help="name or name[key=value,...]; repeatable")
    add("--suite", action="append", default=[], metavar="NAME", help="only this suite; repeatable")
    add(
        "--model", default=default.model, metavar="SPEC", help=f"name, hub id, folder or GGUF (default {default.model})"
    )
    add("--baseline", default=default.baseline, metavar="SPEC", help="one more decoder to compare with, side by side")
    add("--data", default=None, metavar="DIR", help="folder with the data sets (or set DECODATHLON_DATA)")
    add("--results", default=None, metavar="PATH", help="results file (default results.duckdb beside pyproject.toml)")
    add("--seed", type=int, default=default.seed, metavar="N", help="same seed, same tokens (default 0)")
    add("--device", choices=["auto", "cpu", "cuda"], default=default.device, help="where the model runs (default auto)")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default=default.dtype, help="of the weights")
    add("--sweep", action="store_true", help="also the sweep values of every decoder, one parameter at a time")
    add("--decoder-file", action="append", default=[], metavar="PATH", help="a Python file with decoders; repeatable")
    add("--executor", choices=sorted(EXECUTORS), default="local", help="a worker process, or this one for a debugger")


def pytest_configure(config: pytest.Config) -> None:
    if not config.option.decodathlon_benchmark:
        return
    try:
        config.stash[_RUN] = Run(config)
    except DecodathlonError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    suite = getattr(metafunc.function, "__decodathlon_suite__", None)
    if suite is not None and "cell" in metafunc.fixturenames:
        run = metafunc.config.stash.get(_RUN, None)
        specs = [s for s in run.specs if s.suite == suite] if run else []
        metafunc.parametrize("cell", specs, ids=[s.label for s in specs])


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [i for i in items if hasattr(getattr(i, "function", None), "__decodathlon_suite__")]
    run = config.stash.get(_RUN, None)
    idle = [i for i in ours if run is None or _spec(i) is None]
    if idle:
        items[:] = [i for i in items if i not in idle]
        config.hook.pytest_deselected(items=idle)
        if run is None:
            config.stash[_IDLE] = len(idle)
    if run is not None:
        chosen = [spec for i in items if (spec := _spec(i)) is not None]
        run.waiting = {spec.cell_id: spec for spec in chosen}


def _spec(item: pytest.Item) -> CellSpec | None:
    callspec = getattr(item, "callspec", None)
    spec = callspec.params.get("cell") if callspec is not None else None
    return spec if isinstance(spec, CellSpec) else None


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    spec = _spec(pyfuncitem)
    if spec is None:
        return None
    outcome = pyfuncitem.config.stash[_RUN].measure(spec)
    if outcome.status == "unsupported":
        pytest.skip(outcome.reason)
    if outcome.status != "ok":
        text = f"{outcome.status}: {outcome.reason}\n{outcome.error}".rstrip()
        pytest.fail(text, pytrace=False)
    return True


def pytest_report_teststatus(report: pytest.TestReport, config: pytest.Config) -> tuple[str, str, str] | None:
    run = config.stash.get(_RUN, None)
    if run is None or report.when != "call" or not any(key == "decodathlon" for key, _ in report.user_properties):
        return None
    return report.outcome, "", report.outcome.upper()  # the progress line has said it


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report: pytest.TestReport = yield  # type: ignore[assignment]
    spec = _spec(item)
    if spec is not None and report.when == "call":
        report.user_properties.append(("decodathlon", spec.cell_id))
    return report  # type: ignore[return-value]


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    run = session.config.stash.get(_RUN, None)
    if run is None:
        return
    run.finish()
    fine = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    if fine and not session.config.option.collectonly and not any(o.status == "ok" for o in run.outcomes):
        session.exitstatus = EXIT_NOTHING_MEASURED
    elif fine and run.failed_to_ingest:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    idle = config.stash.get(_IDLE, 0)
    if idle:
        terminalreporter.write_line(f"{idle} suites deselected: they measure for minutes and run only with --benchmark")
    run = config.stash.get(_RUN, None)
    if run is None or config.option.collectonly:
        return
    if not run.outcomes:
        terminalreporter.write_line("nothing was measured: name the suites, as in `pytest suites/ --benchmark`")
        return
    terminalreporter.section("decodathlon")
    for line in [*table.tables(run.outcomes)[1:], "", *run.closing]:
        terminalreporter.write_line(line)


class Run:
    """One `--benchmark` invocation: its plan, its executor, its progress, its record."""

    def __init__(self, config: pytest.Config) -> None:
        given = {f.name: getattr(config.option, "decodathlon_" + f.name) for f in fields(Options)}
        self.options = Options(**given | {"data": given["data"] or environment.data_folder()})
        # resolved, so that a link to a shared file stays a link
        self.results = Path(config.option.decodathlon_results or config.rootpath / "results.duckdb").resolve()
        store.check(self.results)
        self.specs = cells(self.options)
        self.waiting: dict[str, CellSpec] = {}
        self.outcomes: list[Outcome] = []
        self.closing: list[str] = []
        self.failed_to_ingest = False
        self.run_id = environment.run_id()
        self.folder = shards.folder_of(self.results, self.run_id)
        self._config = config
        self._began = time.monotonic()
        self._announced: Any = None
        self._executor = EXECUTORS[config.option.decodathlon_executor](self.run_id, self.folder, self._say)

    def measure(self, spec: CellSpec) -> Outcome:
        """Run one cell and say how it went and how long the rest will take."""
        if not self.outcomes:
            self._record()
            reporter: Any = self._config.pluginmanager.get_plugin("terminalreporter")
            if reporter is not None:
                reporter._show_progress_info = False  # our lines tell how far we are; pytest's percentage would cut in
        outcome = self._executor.run(spec)
        self.outcomes.append(outcome)
        self.waiting.pop(spec.cell_id, None)
        done = len(self.outcomes)
        self._say(
            f"  [{done}/{done + len(self.waiting)}] {spec.suite} {spec.label}: {outcome.status} in "
            f"{_measuring(outcome):.0f} s, {table.short(outcome)}{self._time_left()}"
        )
        return outcome

    def finish(self) -> None:
        """End the workers and add what was measured to the results file."""
        self._executor.close()
        if not self.outcomes:
            return
        took = time.monotonic() - self._began
        self.closing.append(
            f"run {self.run_id}: {_cells(len(self.outcomes))} in {_duration(took)}; shards in {self.folder}"
        )
        if not store.available():
            self.closing.append(f"DuckDB is not installed here; where it is: python scripts/ingest.py {self.folder}")
            return
        try:
            added = store.ingest(self.results, [self.folder])
        except DecodathlonError as error:
            self.closing.append(
                f"NOT INGESTED, the shards are safe: {error}. Then: python scripts/ingest.py {self.folder}"
            )
            self.failed_to_ingest = True
            return
        self.closing.append(f"{_cells(added)} added to {self.results}")

    def _record(self) -> None:
        """What code, machine and options: written before the first cell, so that even a killed run has it."""
        described = environment.describe()
        options = asdict(self.options) | {
            "data": Path(self.options.data).name if self.options.data else None,
            "decoder_file": [Path(p).name for p in self.options.decoder_file],
            "model": self.specs[0].model if self.specs else self.options.model,
        }
        shards.write(
            self.folder / shards.RUN_FILE,
            {
                "run_id": self.run_id,
                "started": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "git_commit": described.pop("git_commit"),
                "git_dirty": described.pop("git_dirty"),
                "environment": described,
                "options": options,
            },
        )

    def _time_left(self) -> str:
        if not self.waiting:
            return ""
        past: dict[str, list[float]] = {}
        for outcome in self.outcomes:
            past.setdefault(outcome.spec.suite, []).append(_measuring(outcome))
        mean = {suite: sum(times) / len(times) for suite, times in past.items()}
        overall = sum(mean.values()) / len(mean)
        return f" (about {_duration(sum(mean.get(s.suite, overall) for s in self.waiting.values()))} left)"

    def _say(self, text: str) -> None:
        """Write a line past pytest's capture, without making it name the suite's file anew for every cell."""
        reporter: Any = self._config.pluginmanager.get_plugin("terminalreporter")
        capture: Any = self._config.pluginmanager.get_plugin("capturemanager")
        if reporter is None:
            return
        with capture.global_and_fixture_disabled() if capture is not None else nullcontext():
            path = reporter.currentfspath
            if path != self._announced:
                reporter.ensure_newline()
            reporter.currentfspath = None
            reporter.write_line(text)
            reporter.currentfspath = self._announced = path


def _cells(count: int) -> str:
    return f"{count} cell" if count == 1 else f"{count} cells"


def _measuring(outcome: Outcome) -> float:
    """Seconds of a cell without what it spent on loading, which the next cell need not spend again."""
    return outcome.seconds.get("total", 0.0) - outcome.seconds.get("prepare", 0.0)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
