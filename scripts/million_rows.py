"""Does the store carry a million rows? Makes runs with so many metrics, ingests them, asks everything that users ask.

    python scripts/million_rows.py [--rows 1000000] [--keep FOLDER]

Every step is what a command calls, in this process, with the plugins imported; views are asked over a connection that
is opened for the question, as in docs/results.md, whose queries are among them. The exit code is 1 where a limit is
broken.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import synthetic_runs

from decodathlon.harness.commands.command import Command, say
from decodathlon.harness.progress import told
from decodathlon.harness.registry import load_builtins, registry
from decodathlon.harness.results import environment, gates, store
from decodathlon.harness.results.table import aligned
from decodathlon.leaderboard import findings, queries

#: Seconds: for all that is ingested, and for each question.
INGEST, QUESTION = 60.0, 2.0
NEW_CELLS = 20
#: What users ask of a view: a few rows, and a number over all.
FILTER = "SELECT * FROM {} WHERE decoder = 'greedy' LIMIT 1000"
WHOLE = "SELECT {}, count(*) FROM {} GROUP BY ALL ORDER BY ALL"
VIEWS = {
    "results": "suite, metric, round(avg(value) FILTER (isfinite(value)), 6)",
    "latest": "suite, metric, round(avg(value) FILTER (isfinite(value)), 6)",
    "known_cell": "hardware, status",
    "sound_cell": "hardware, status",
    "latest_cell": "hardware, status",
    "audited": "decoder, audit",
    "verdict": "audit",
}
PAGE = environment.ROOT / "docs" / "results.md"


class Step(NamedTuple):
    """Something that was timed."""

    what: str
    seconds: float
    limit: float

    @property
    def held(self) -> bool:
        return self.seconds < self.limit

    @property
    def row(self) -> list[str]:
        return [self.what, f"{self.seconds:.2f}", f"{self.limit:.0f}", "holds" if self.held else "TOO SLOW"]


def timed(what: str, limit: float, work: Callable[[], object]) -> Step:
    """Do it once, without what it tells the terminal."""
    _progress(what)
    with contextlib.redirect_stdout(io.StringIO()):
        begin = time.perf_counter()
        work()
        return Step(what, time.perf_counter() - begin, limit)


def make(folder: Path, rows: int, jobs: int = 1) -> synthetic_runs.Made:
    """Write the runs; a line now and then says how far that is."""
    made = synthetic_runs.made(folder, rows, jobs)
    units = range(synthetic_runs.count(rows))
    return sum((next(made) for _ in told(units, "writing runs", _progress)), synthetic_runs.Made(()))


def ingesting(folder: Path, results: Path, made: synthetic_runs.Made) -> Iterator[Step]:
    """All that was made into a new file, then one more run of a few cells."""
    yield timed(
        f"ingest {made.metrics:,} metrics of {made.cells:,} cells", INGEST, lambda: store.ingest(results, [folder])
    )
    more = synthetic_runs.run_of(folder.with_name("one-more"), len(made.folders), NEW_CELLS)
    yield timed(f"ingest one more run of {NEW_CELLS} cells", INGEST, lambda: store.ingest(results, more.folders))


def asking(results: Path) -> Iterator[Step]:
    """Every view, filtered and in full, and the queries of docs/results.md."""

    def answer(sql: str) -> Callable[[], object]:
        def work() -> object:
            with store.connect(results) as connection:
                return connection.execute(sql).fetchall()

        return work

    for view, columns in VIEWS.items():
        filtered = FILTER.format(view) if view != "audited" else FILTER.format(view).replace("greedy", "temperature")
        yield timed(f"view {view}, one decoder", QUESTION, answer(filtered))
        yield timed(f"view {view}, all of it", QUESTION, answer(WHOLE.format(columns, view)))
    for title, sql in documented():
        yield timed(title, QUESTION, answer(sql))


def documented() -> list[tuple[str, str]]:
    """The questions of docs/results.md with their queries."""
    return re.findall(r"^([^\n]+\?)\n\n```sql\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(results: Path, runs: Sequence[str]) -> Iterator[Step]:
    """What `decodathlon gates check`, `compare` and `list` do."""

    def call(name: str, *words: str) -> Callable[[], object]:
        command: Command = registry.get("command", name)
        parser = argparse.ArgumentParser()
        command.arguments(parser)
        options = parser.parse_args([*words, "--results", str(results)])
        return lambda: command.run(options)

    middle = runs[len(runs) // 2]
    rules = str(environment.ROOT / gates.FILE)
    yield timed("gates check, a run", QUESTION, call("gates", "check", "--run", middle, "--gates", rules))
    yield timed("gates check, the last run", QUESTION, call("gates", "check", "--gates", rules))
    two = ["--decoder", "greedy", "--decoder", "temperature"]
    yield timed("compare two decoders of a run", QUESTION, call("compare", middle, *two))
    yield timed("compare two decoders", QUESTION, call("compare", *two))
    yield timed("compare two runs", QUESTION, call("compare", middle, runs[-1]))
    yield timed("list runs", QUESTION, call("list", "runs"))


def board(results: Path, folder: Path) -> Iterator[Step]:
    """What the board does when results have changed, and what its first page asks then."""
    import duckdb

    copy = folder / "board.duckdb"
    yield timed("board: snapshot", QUESTION, lambda: store.snapshot(results, copy, queries.prepare))
    with duckdb.connect(str(copy), read_only=True) as connection:

        def overview() -> None:
            (setting, _), *_ = queries.settings(connection)
            suites, metrics = queries.suites(connection), queries.metrics(connection)
            baselines = queries.baselines(connection, setting)
            axes = findings.leads(queries.columns(connection, setting), suites, metrics)
            names = sorted({a.metric for a in axes} | {"ratio_to_self"})
            findings.lines(queries.cells(connection, setting, names), axes, baselines)
            queries.numbers_as_rows(connection, setting)

        yield timed("board: overview", QUESTION, overview)


def _progress(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of metrics (default %(default)s)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where runs and results file stay; default nowhere")
    options = parser.parse_args(words)
    load_builtins()
    registry.load_package("decodathlon.harness.commands")
    with contextlib.ExitStack() as stack:
        place = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="decodathlon-")))
        place.mkdir(parents=True, exist_ok=True)
        folder, results = place / "runs", place / "million.duckdb"
        if results.exists() or folder.exists():
            parser.error(f"{place} holds an earlier trial; name another folder")
        cores = len(os.sched_getaffinity(0))
        made = make(folder, options.rows, cores)
        steps = [*ingesting(folder, results, made), *asking(results)]
        steps += [*commands(results, [f.name for f in made.folders]), *board(results, place)]
        size = results.stat().st_size
    counts = ", ".join(f"{n:,} {what}" for what, n in vars(made).items() if what != "folders")
    say(f"{len(made.folders)} runs: {counts}; a file of {size / 1e6:.0f} MB; {cores} cores")
    for line in aligned([["what", "seconds", "limit", "verdict"], *(step.row for step in steps)]):
        say(line)
    return 0 if all(step.held for step in steps) else 1


if __name__ == "__main__":
    sys.exit(main())
