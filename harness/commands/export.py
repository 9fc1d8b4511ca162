"""`decodathlon export`: the rows of a results file for other programs, or for a page."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

from decodathlon.harness.commands.command import Command, results_option, say
from decodathlon.harness.errors import SpecError
from decodathlon.harness.registry import registry
from decodathlon.harness.results import answers, measured, profiles, rows, shards, store

#: What a page has room for; the other formats have every column.
MARKDOWN = ("suite", "slice", "scale", "decoder", "claim", "model", "dtype", "dataset", "metric", "value", "ci_low",
            "ci_high", "n", "hardware", "status", "reason", "notes", "run_id")  # fmt: skip


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=["csv", "parquet", "jsonl", "markdown"], help="default csv")
    parser.add_argument("--view", choices=["latest", "results"], default="latest", help="newest rows, or all")
    parser.add_argument("--run", metavar="RUN", help="only this run (its id, or last); implies --view results")
    parser.add_argument("--suite", metavar="NAME", help="only this suite")
    parser.add_argument(
        "--samples",
        action="store_true",
        help="one JSON line per answer, window or pair, with its question where the run's lines are at hand",
    )
    parser.add_argument(
        "--trace", metavar="CELL", help="a profiled cell (its id, or last) as a trace for Chrome or Perfetto"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="default the terminal")
    results_option(parser)


def _run(options: argparse.Namespace) -> int:
    if options.trace is not None:
        return _trace(options)
    if options.suite is not None:
        registry.get("suite", options.suite)
    path = options.results.resolve()
    of_run = f"run_id = '{measured.run_id(path, options.run)}'" if options.run else "TRUE"
    of_suite = f"suite = '{options.suite}'" if options.suite else "TRUE"
    view = "results" if options.run else options.view
    query = f"FROM {view} WHERE {of_run} AND {of_suite} ORDER BY suite, slice, decoder, metric, run_id"
    if options.samples and options.format not in (None, "jsonl"):
        raise SpecError(f"export --samples writes JSON lines, not {options.format}")
    options.format = options.format or ("jsonl" if options.samples else "csv")
    if options.format == "parquet" and options.out is None:
        raise SpecError("export --format parquet needs --out FILE: a terminal cannot show it")
    if options.out is not None and not options.out.resolve().parent.is_dir():
        raise SpecError(f"--out {options.out}: the folder {options.out.resolve().parent} does not exist; create it")
    with store.connect(path) as connection:
        if not connection.execute(f"SELECT 1 FROM {view} WHERE {of_run} AND {of_suite} LIMIT 1").fetchone():
            suites = connection.execute(f"SELECT DISTINCT suite FROM {view} WHERE {of_run} ORDER BY 1").fetchall()
            there = ", ".join(s for (s,) in suites) or "nothing"
            raise SpecError(f"export: there are no such rows in {path}; the run or view has {there}")
        if options.samples:
            shown = "TRUE" if options.run else "(run_id, cell_id) IN (SELECT (run_id, cell_id) FROM latest_cell)"
            table = list(answers.lines(connection, path, f"{of_run} AND {of_suite} AND {shown}"))
            return _out(table, [], options)
        if options.format == "parquet":
            count = connection.execute(f"COPY ({query}) TO '{rows.quoted(options.out)}' (FORMAT parquet)").fetchone()
            say(f"{count[0] if count else 0} rows in {options.out}")
            return 0
        found = connection.execute(query)
        names = [d[0] for d in found.description or []]
        table = [dict(zip(names, row, strict=True)) for row in found.fetchall()]
    return _out(table, names, options)


def _trace(options: argparse.Namespace) -> int:
    """The newest profile of a cell, or of all."""
    with store.connect(options.results.resolve()) as connection:
        found = connection.execute(
            "SELECT s.data FROM sample s JOIN cell c USING (run_id, cell_id) WHERE s.row = 'profile' "
            "AND $cell IN (cell_id, 'last') ORDER BY c.started DESC LIMIT 1",
            {"cell": options.trace},
        ).fetchone()
        known = connection.execute("SELECT DISTINCT cell_id FROM sample WHERE row = 'profile'").fetchall()
    if found is None:
        there = ", ".join(sorted(c for (c,) in known)[:10]) or "none; --profile makes them"
        raise SpecError(f"export --trace {options.trace}: no profile of that cell is stored; there are {there}")
    text = json.dumps(profiles.chrome_trace(json.loads(found[0])))
    if options.out is None:
        sys.stdout.write(text + "\n")
        return 0
    options.out.write_text(text, encoding="utf-8")
    say(f"a trace in {options.out}: open it in chrome://tracing or ui.perfetto.dev")
    return 0


def _out(table: list[dict[str, Any]], names: list[str], options: argparse.Namespace) -> int:
    if options.out is None:
        _write(table, names, options.format, sys.stdout)
        return 0
    try:
        with options.out.open("w", encoding="utf-8", newline="") as handle:
            _write(table, names, options.format, handle)
    except OSError as error:
        raise SpecError(f"--out {options.out}: {error.strerror}") from None
    say(f"{len(table)} rows in {options.out}")
    return 0


def _write(table: list[dict[str, Any]], names: list[str], form: str, to: Any) -> None:
    if form == "csv":
        writer = csv.DictWriter(to, names)
        writer.writeheader()
        writer.writerows(table)
    elif form == "jsonl":
        for row in table:
            to.write(json.dumps(shards.plain({k: _text(k, v) for k, v in row.items()}), ensure_ascii=False) + "\n")
    else:
        to.write("| " + " | ".join(MARKDOWN) + " |\n" + "|---" * len(MARKDOWN) + "|\n")
        for row in table:
            to.write("| " + " | ".join(_cell(row[c]) for c in MARKDOWN) + " |\n")


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _text(name: str, value: Any) -> Any:
    """Times as text, and what DuckDB keeps as JSON as what it is."""
    if name in ("params", "notes") and isinstance(value, str):
        return json.loads(value)
    return value.isoformat() if hasattr(value, "isoformat") else value


registry.add("command", "export", Command("rows as csv, parquet, jsonl or markdown", _arguments, _run), __file__)
