"""`decodathlon gates check`: judge a stored run by rules. The exit code is for CI; docs/gating.md explains it."""

from __future__ import annotations

import argparse
from pathlib import Path

from decodathlon.harness.commands.command import Command, results_option, say
from decodathlon.harness.errors import SpecError
from decodathlon.harness.registry import registry
from decodathlon.harness.results import environment, gates, measured


def _arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser("check", help="exit 0 pass, 1 fail, 10 inconclusive where that matters, 11 not measured")
    check.add_argument("--run", default="last", metavar="RUN", help="a run's id (default last)")
    check.add_argument(
        "--gates", type=Path, default=environment.ROOT / gates.FILE, metavar="PATH", help=f"default {gates.FILE}"
    )
    results_option(check)


def _run(options: argparse.Namespace) -> int:
    cells = measured.of_run(options.results.resolve(), options.run)
    rules = gates.load(options.gates, {c.decoder for c in cells})
    if not rules:
        raise SpecError(f"gates {options.gates} has no [[gate]]; docs/gating.md shows how to write one")
    verdicts = gates.judge(rules, cells)
    for verdict in verdicts:
        say(verdict.line)
    counts = {o: sum(v.outcome == o for v in verdicts) for o in ("pass", "fail", "inconclusive", "not run")}
    say(", ".join(f"{n} {o}" for o, n in counts.items()))
    return gates.exit_code(verdicts)


registry.add("command", "gates", Command("judge a run by gates.toml", _arguments, _run), __file__)
