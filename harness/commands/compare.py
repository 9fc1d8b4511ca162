"""`decodathlon compare`: two runs, metric by metric, unit by unit where their units are the same."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from decodathlon.harness.commands.command import Command, results_option, say
from decodathlon.harness.registry import registry
from decodathlon.harness.results import measured, store
from decodathlon.harness.results.changes import Change, change_of
from decodathlon.harness.results.measured import Measured, Number
from decodathlon.harness.results.table import DASH, aligned, number

PACKAGES = ("torch", "transformers", "triton")


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="RUN_A", help="a run's id, or last")
    parser.add_argument("b", metavar="RUN_B")
    parser.add_argument("--metric", action="append", default=[], metavar="NAME", help="only this metric; repeatable")
    results_option(parser)


def _run(options: argparse.Namespace) -> int:
    path = options.results.resolve()
    for name in options.metric:
        registry.get("metric", name)
    ids = [measured.run_id(path, run) for run in (options.a, options.b)]
    first, second = (measured.of_run(path, run) for run in ids)
    for line in _differences(path, ids):
        say(line)
    theirs = {(c.decoder, c.where): c for c in second}
    rows = [["suite", "decoder", "slice", "metric", "A", "B", "change", "95 % interval", "pairs", "what it says"]]
    judged = 0
    for a in first:
        b = theirs.pop((a.decoder, a.where), None)
        if b is None:
            rows.append([a.suite, a.decoder, a.slice, "", "", "", "", "", "", "only in A"])
            continue
        if "ok" not in (a.status, b.status) or a.status != b.status:
            rows.append([a.suite, a.decoder, a.slice, "", a.status, b.status, "", "", "", ""])
            continue
        for name in [m for m in a.metrics if m in b.metrics and (not options.metric or m in options.metric)]:
            change = change_of(name, a, b)
            judged += change.estimate.low is not None
            rows.append(_line(a, name, a.metrics[name], b.metrics[name], change))
    rows += [[b.suite, b.decoder, b.slice, "", "", "", "", "", "", "only in B"] for b in theirs.values()]
    for line in aligned(rows):
        say(line)
    if judged:
        say(f"{judged} intervals: about {judged * 0.05:.1f} of them would speak of a change by chance alone")
    return 0


def _line(cell: Measured, name: str, x: Number, y: Number, change: Change) -> list[str]:
    return [cell.suite, cell.decoder, cell.slice, name, number(x.estimate.value), number(y.estimate.value), change.text,
            change.interval, str(change.estimate.n or DASH), change.verdict]  # fmt: skip


def _differences(path: Path, ids: list[str]) -> list[str]:
    """What is not the same about the two runs, before anybody reads a number."""
    with store.connect(path) as connection:
        found = {
            run: connection.execute(
                "SELECT hardware, git_commit, git_dirty, environment FROM run WHERE run_id = ?", [run]
            ).fetchone()
            for run in ids
        }
    (ha, ca, da, ea), (hb, cb, db, eb) = (found[run] or ("", "", None, "{}") for run in ids)
    pa, pb = _packages(ea), _packages(eb)
    lines = [f"A {ids[0]}: {ha}, commit {ca[:12]}{' + changes' if da else ''}",
             f"B {ids[1]}: {hb}, commit {cb[:12]}{' + changes' if db else ''}"]  # fmt: skip
    if ha != hb:
        lines.append("OTHER HARDWARE: times of A and B say nothing about each other")
    lines += [
        f"{name}: A has {pa.get(name)}, B has {pb.get(name)}" for name in PACKAGES if pa.get(name) != pb.get(name)
    ]
    return [*lines, ""]


def _packages(environment: Any) -> dict[str, str]:
    stored = json.loads(environment) if isinstance(environment, str) else environment
    packages: dict[str, str] = stored.get("packages", {})
    return packages


registry.add("command", "compare", Command("two runs, paired where rows pair", _arguments, _run), __file__)
