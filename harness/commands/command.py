"""What a sub-command is, and the entry point that finds and runs it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from decodathlon.harness.errors import DecodathlonError
from decodathlon.harness.registry import load_builtins, registry
from decodathlon.harness.results import environment, team

#: What argparse, too, ends with when the user erred.
EXIT_USAGE = 2
#: What shells report of a command that Ctrl-C ended.
EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class Command:
    """
    Args:
        summary: one line for the help.
        arguments: adds the sub-command's own options to its parser.
        run: does the work and returns the exit code; raises DecodathlonError for what the user can mend.
    """

    summary: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def say(text: str = "") -> None:
    """Write one line to the terminal, at once: who waits behind a pipe sees it, too."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _results(text: str) -> Path:
    try:
        return team.path_of(text)
    except DecodathlonError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def results_option(parser: argparse.ArgumentParser) -> None:
    """The results file that most sub-commands read."""
    parser.add_argument(
        "--results",
        type=_results,
        default=environment.results_file(),
        metavar="PATH",
        help="results file (default results.duckdb of the project), or postgres:CONNECTION of a team",
    )


def main(words: Sequence[str] | None = None) -> int:
    """Run `decodathlon WORDS` and return its exit code."""
    registry.load_package("decodathlon.harness.commands")
    try:
        load_builtins()
        registry.load_entry_points()
        parser = argparse.ArgumentParser(prog="decodathlon", description="A decathlon for LLM decoders.")
        parser.add_argument("--version", action="version", version=f"decodathlon {metadata.version('decodathlon')}")
        subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
        for name in registry.names("command"):
            command: Command = registry.get("command", name)
            command.arguments(subparsers.add_parser(name, help=command.summary, description=command.summary))
        options = parser.parse_args(words)
        chosen: Command = registry.get("command", options.command)
        code = chosen.run(options)
        sys.stdout.flush()
        return code
    except DecodathlonError as error:
        sys.stderr.write(f"decodathlon: {error}\n")
        return EXIT_USAGE
    except KeyboardInterrupt:
        sys.stderr.write("\ndecodathlon: interrupted\n")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `| head` has seen enough; nothing more may be written, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
