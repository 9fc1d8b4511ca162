"""`decodathlon ingest`: add shards, or the results files of other machines, to a results file."""

from __future__ import annotations

import argparse
from pathlib import Path

from decodathlon.harness.commands.command import Command, results_option, say
from decodathlon.harness.registry import registry
from decodathlon.harness.results import store


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=Path, nargs="+", metavar="PATH", help="folder of a run, folder of such folders, or results file"
    )
    results_option(parser)


def _run(options: argparse.Namespace) -> int:
    """Exit code 1 where something is there already that says something else."""
    path = options.results.resolve()
    store.check(path)
    found = store.ingest(path, options.source)
    for line in found.conflicts:
        say(f"conflict: {line}")
    say(f"{found.added} cells added, {found.replaced} replaced, {len(found.conflicts)} conflicts in {path}")
    return 1 if found.conflicts else 0


registry.add("command", "ingest", Command("add shards or other results files", _arguments, _run), __file__)
