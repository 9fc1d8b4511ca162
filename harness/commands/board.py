"""`decodathlon board`: the leaderboard in the browser, live while runs write."""

from __future__ import annotations

import argparse
import importlib.util
import os
import socket
import subprocess
import sys

from decodathlon.harness.commands.command import Command, results_option, say
from decodathlon.harness.errors import MissingError, SpecError
from decodathlon.harness.registry import registry
from decodathlon.harness.results import environment, store, team

APP = environment.ROOT / "leaderboard" / "app.py"


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=8501, help="default 8501")
    parser.add_argument(
        "--address", default="localhost", help="default localhost, this machine only; 0.0.0.0 shows it to the network"
    )
    parser.add_argument("--no-browser", action="store_true", help="do not open a browser")
    results_option(parser)


def command(options: argparse.Namespace) -> list[str]:
    """The Streamlit command that shows the board.

    Raises:
        SpecError: there is no such place for results, or no such port.
        MissingError: Streamlit is not installed.
    """
    if options.results.is_dir() or not options.results.resolve().parent.is_dir():
        raise SpecError(f"--results {options.results}: name a results file, such as results.duckdb")
    if not 1 <= options.port <= 65535:
        raise SpecError(f"--port {options.port} is not between 1 and 65535")
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(options.address, options.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except OSError as error:
        raise SpecError(
            f"{options.address}:{options.port} cannot be used ({error.strerror}); another --port, such as "
            f"{options.port % 65535 + 1}, may be free"
        ) from None
    if importlib.util.find_spec("streamlit") is None:
        raise MissingError("the board needs the package streamlit: pip install streamlit")
    settings = {
        "server.port": options.port,
        "server.address": options.address,
        "server.headless": str(options.no_browser).lower(),
        "logger.hideWelcomeMessage": "true",
        "server.showEmailPrompt": "false",
        "server.fileWatcherType": "none",
    }
    return [sys.executable, "-m", "streamlit", "run", str(APP), *(f"--{k}={v}" for k, v in settings.items())]


def _run(options: argparse.Namespace) -> int:
    words = command(options)
    if team.of(options.results.resolve()) is not None:
        store.check(options.results.resolve())
    say(f"the board of {options.results.resolve()} at http://{options.address}:{options.port}; Ctrl-C ends it")
    sys.stdout.flush()
    surroundings = os.environ | {environment.RESULTS_VARIABLE: str(options.results.resolve())}
    if os.name == "posix":  # the server takes the place of this process, so that whoever ends this ends the server
        os.execve(words[0], words, surroundings)
    return subprocess.run(words, env=surroundings, check=False).returncode


registry.add("command", "board", Command("show the leaderboard in the browser", _arguments, _run), __file__)
