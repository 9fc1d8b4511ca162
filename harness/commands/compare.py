"""`decodathlon compare`: two runs, or two decoders, metric by metric, unit by unit where their units are the same."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from decodathlon.harness.commands.command import Command, results_option, say
from decodathlon.harness.errors import SpecError, near_miss
from decodathlon.harness.registry import registry
from decodathlon.harness.results import measured, store
from decodathlon.harness.results.changes import Change, change_of
from decodathlon.harness.results.measured import Measured, Number
from decodathlon.harness.results.table import DASH, aligned, number

PACKAGES = ("torch", "transformers", "triton")


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="*", metavar="RUN", help="two runs (an id, or last); with --decoder one, or none")
    parser.add_argument(
        "--decoder", action="append", default=[], metavar="SPEC",
        help="given twice: A and B are these decoders, of the run, or as they were measured last",
    )  # fmt: skip
    parser.add_argument("--metric", action="append", default=[], metavar="NAME", help="only this metric; repeatable")
    results_option(parser)


def _run(options: argparse.Namespace) -> int:
    path = options.results.resolve()
    for name in options.metric:
        registry.get("metric", name)
    if options.decoder:
        pairs, title = _decoders(path, options)
    else:
        pairs, title = _runs(path, options)
    for line in title:
        say(line)
    rows = [["suite", "decoder", "slice", "metric", "A", "B", "change", "95 % interval", "pairs", "what it says"]]
    judged = 0
    scales = {one.scale for pair in pairs for one in pair if one is not None}
    for a, b in pairs:
        if len(scales) > 1:
            a, b = (one and replace(one, slice=f"{one.slice} ({one.scale})") for one in (a, b))
        one = a or b
        assert one is not None
        if a is None or b is None:
            rows.append([one.suite, one.decoder, one.slice, *[""] * 6, "only in A" if b is None else "only in B"])
            continue
        if "ok" not in (a.status, b.status) or a.status != b.status:
            rows.append([a.suite, a.decoder, a.slice, "", a.status, b.status, "", "", "", ""])
            continue
        for name in [m for m in a.metrics if m in b.metrics and (not options.metric or m in options.metric)]:
            change = change_of(name, a, b)
            judged += change.estimate.low is not None
            rows.append(_line(a, name, a.metrics[name], b.metrics[name], change))
    if options.decoder:  # both names stand in the title
        rows = [[row[0], *row[2:]] for row in rows]
    for line in aligned(rows):
        say(line)
    other = sum(a is not None and b is not None and a.basis != b.basis for a, b in pairs)
    if other:
        say(f"! {other} pairs of cells were measured with other weights, data or sizes under the same names")
    if judged:
        say(f"{judged} intervals: about {judged * 0.05:.1f} of them would speak of a change by chance alone")
    return 0


Pairs = list[tuple[Measured | None, Measured | None]]


def _runs(path: Path, options: argparse.Namespace) -> tuple[Pairs, list[str]]:
    if len(options.runs) != 2:
        raise SpecError("compare takes two runs (`decodathlon list runs` names them), or --decoder A --decoder B")
    ids = [measured.run_id(path, run) for run in options.runs]
    first, second = (measured.of_run(path, run) for run in ids)
    theirs = {(c.decoder, c.where): c for c in second}
    pairs: Pairs = [(a, theirs.pop((a.decoder, a.where), None)) for a in first]
    return pairs + [(None, b) for b in theirs.values()], _differences(path, ids)


def _decoders(path: Path, options: argparse.Namespace) -> tuple[Pairs, list[str]]:
    if len(options.decoder) != 2 or len(options.runs) > 1:
        raise SpecError("compare takes --decoder twice, and one run at most")
    run = measured.run_id(path, options.runs[0]) if options.runs else None
    a, b = options.decoder
    found = measured.of_decoders(path, options.decoder, run)
    for name in (a, b):
        if not found[name]:
            known = sorted(measured.decoders(path, run))
            raise SpecError(f"compare: {run or path} has no cell of {name!r} that was measured{near_miss(name, known)}")
    theirs = {(where, c.where): c for where, c in found[b]}
    pairs: Pairs = [(one, theirs[place, one.where]) for place, one in found[a] if (place, one.where) in theirs]
    if not pairs:
        raise SpecError(f"compare: {a} and {b} were never measured on the same suite, data, model and hardware")
    places = dict.fromkeys(place for place, one in found[a] if (place, one.where) in theirs)
    return pairs, [f"A {a}", f"B {b}", *places, ""]


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


registry.add(
    "command", "compare", Command("two runs or two decoders, paired where rows pair", _arguments, _run), __file__
)
