"""`decodathlon tune`: the best parameters of decoders, found on questions or a text that no report uses."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from decodathlon.harness import datasets, decoder_config, spec, tuning
from decodathlon.harness import decoder as decoders
from decodathlon.harness.cells import CellSpec, Outcome
from decodathlon.harness.commands.command import Command, say
from decodathlon.harness.errors import SpecError
from decodathlon.harness.measure.statistics import Estimate
from decodathlon.harness.plan import Options, cells
from decodathlon.harness.registry import registry
from decodathlon.harness.results import environment
from decodathlon.harness.results.table import DASH, aligned

#: What a study is called where nobody says otherwise, in the folder where one stands.
STUDY = "tuning.journal"
#: How much is measured per trial where nobody says.
DEFAULT_SIZE = {"questions": 50, "tokens": 4096}
TRIALS = 20
#: A perplexity of fewer says nothing.
FEWEST_TOKENS = 64


def _arguments(parser: argparse.ArgumentParser) -> None:
    default = Options()
    parser.add_argument(
        "--decoder", action="append", required=True, metavar="SPEC",
        help="what is tuned; repeatable, and every one gets as many trials: name the baseline, too",
    )  # fmt: skip
    parser.add_argument("--suite", required=True, metavar="NAME", help="math500, truthfulqa or wikitext2")
    parser.add_argument("--slice", metavar="NAME", help="of a suite with several parts (default its first)")
    parser.add_argument("--metric", metavar="NAME", help="what to tune for (default the suite's first)")
    parser.add_argument("--method", choices=tuning.METHODS, help="default tpe")
    parser.add_argument(
        "--trials", type=int, metavar="N", help=f"of every decoder, its default among them (default {TRIALS})"
    )
    parser.add_argument(
        "--validation",
        type=int,
        metavar="N",
        help="questions (default 50, and no more are kept for this), or tokens of text (default 4096)",
    )
    parser.add_argument(
        "--study", type=Path, default=Path(STUDY), metavar="FILE", help=f"default {STUDY}; is gone on with"
    )
    parser.add_argument("--scale", choices=["smoke", "quick", "full"], default=default.scale, help="length of answers")
    parser.add_argument("--model", default=default.model, metavar="SPEC")
    parser.add_argument("--data", metavar="DIR")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default=default.device)
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default=default.dtype)
    parser.add_argument("--decoder-file", action="append", default=[], metavar="PATH")
    parser.add_argument(
        "--decoder-config",
        metavar="FILE",
        help="a YAML file with the parameters of a decoder; its section tuning says what is tried, and how long",
    )


def _run(options: argparse.Namespace) -> int:
    for path in options.decoder_file:
        registry.load_file(path)
    spaces = _configure(options)
    for name in ("trials", "validation"):
        if (number := getattr(options, name)) is not None and number < 1:
            raise SpecError(f"--{name} {number}: at least 1")
    metric = tuning.check(options.suite, options.metric)
    for text in options.decoder:
        if spec.parse(text).name not in spaces:
            tuning.space(decoders.build(text))
    counted = registry.get("suite", options.suite).tuned_by
    size = options.validation or DEFAULT_SIZE[counted]
    if counted == "tokens" and size < FEWEST_TOKENS:
        raise SpecError(f"--validation {size}: of a text at least {FEWEST_TOKENS} tokens")
    planned = cells(
        Options(
            scale=options.scale, decoder=options.decoder, suite=[options.suite], model=options.model, seed=options.seed,
            data=options.data or environment.data_folder(), device=options.device, dtype=options.dtype,
            decoder_file=options.decoder_file, split="validation", limit=size,
        )
    )  # fmt: skip
    parts = list(dict.fromkeys(c.slice for c in planned))
    part = options.slice or parts[0]
    if part not in parts:
        raise SpecError(f"--slice {part}: {options.suite} has {', '.join(parts)}")
    from decodathlon.harness.bench import Bench  # needs torch

    bench = Bench(say=lambda text: None)

    def measure(spec: CellSpec) -> Outcome:
        return bench.measure(spec, "tuning")

    name = registry.get("suite", options.suite).data_of(part)
    questions = datasets.find(name, "validation", planned[0].data, say)
    asked = min(len(questions.rows), size) if counted == "questions" else size
    if asked < size:
        say(f"{questions.name} has {asked} questions that are kept for tuning")
    rows = [["decoder", metric, "default", "best less default", "trials"]]
    for first in (c for c in planned if c.slice == part):
        try:
            found = tuning.tune(
                first, metric=metric, method=options.method or "tpe", trials=options.trials or TRIALS,
                study_file=options.study, measure=measure, say=say, basis=questions.sha256[:12],
                ranges=spaces.get(spec.parse(first.decoder).name),
            )  # fmt: skip
        except KeyboardInterrupt:
            say(f"\nThe trials so far are in {options.study}; the same command goes on with them.")
            raise
        gain = DASH if found.gain is None else _interval(found.gain)
        scores = [_interval(found.best.score), _interval(found.default.score), gain]
        rows.append([found.best.decoder, *scores, f"{found.trials}, {found.failed} without a score"])
    say()
    for line in aligned(rows):
        say(line)
    say()
    say(f"On {asked} {counted} of {questions.name} that no report uses. The best of many is too good by chance; what")
    say("counts:")
    best = " ".join(f"--decoder '{row[0]}'" for row in rows[1:])
    more = "".join(f" --decoder-file {shlex.quote(path)}" for path in options.decoder_file)
    more += f" --data {shlex.quote(options.data)}" if options.data else ""
    more += f" --model {shlex.quote(options.model)}" if options.model != Options().model else ""
    scale = "quick" if options.scale == "smoke" else options.scale
    say(f"  pytest suites/ --benchmark --suite {options.suite} --scale {scale} {best}{more}")
    return 0


def _configure(options: argparse.Namespace) -> dict[str, Mapping[str, Sequence[Any]]]:
    """Take from --decoder-config what the command line leaves open; the search space by decoder, if it has one."""
    if options.decoder_config is None:
        return {}
    spaces: dict[str, Mapping[str, Sequence[Any]]] = {}
    options.decoder, aside = decoder_config.applied(options.decoder_config, options.decoder)
    for text in options.decoder:
        name = spec.parse(text).name
        if registry.get("decoder", name).info.layout:
            found = decoder_config.tuning(options.decoder_config, registry.get("decoder", name))
            spaces |= {name: found.space} if found.space else {}
            options.method = options.method or found.method
            options.trials = options.trials or found.trials
            options.validation = options.validation or found.validation
    if aside:
        say(f"{options.decoder_config}: left aside, for the harness has its own options: {', '.join(aside)}")
    return spaces


def _interval(found: Estimate) -> str:
    value, low, high, _ = found
    return f"{value:.4g}" + ("" if low is None else f" [{low:.4g}, {high:.4g}]")


registry.add("command", "tune", Command("find the best parameters of decoders", _arguments, _run), __file__)
