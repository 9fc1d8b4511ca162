"""`decodathlon models fetch`: have a model at hand before a run."""

from __future__ import annotations

import argparse

from decodathlon.harness import embedded, models
from decodathlon.harness.commands.command import Command, say
from decodathlon.harness.registry import registry


def _arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    fetch = actions.add_parser("fetch", help="download, check and convert a model; what is there is not fetched again")
    fetch.add_argument("model", nargs="*", default=[embedded.NAME], help=f"specs (default {embedded.NAME})")


def _run(options: argparse.Namespace) -> int:
    wanted = [models.resolve(text) for text in options.model]
    for model in wanted:
        say(f"{model.name}: {models.fetch(model, say)}")
    return 0


registry.add("command", "models", Command("fetch a model", _arguments, _run), __file__)
