"""`decodathlon plan`: what a run would be, how long it would take on so many GPUs, how much memory it needs."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from statistics import median

from decodathlon.harness import plan
from decodathlon.harness.cells import CellSpec
from decodathlon.harness.commands.command import Command, results_option, say
from decodathlon.harness.errors import SpecError
from decodathlon.harness.registry import registry
from decodathlon.harness.results import environment, past, table
from decodathlon.harness.results.past import Guess, Past
from decodathlon.harness.suite import SCALES
from decodathlon.harness.workers import gpus
from decodathlon.harness.workers.base import Place
from decodathlon.harness.workers.schedule import Job
from decodathlon.harness.workers.simulation import simulate

#: GPUs of a host, where --gpus says only how many there are in all.
PER_HOST = 8


def _arguments(parser: argparse.ArgumentParser) -> None:
    usual = plan.Options()
    parser.add_argument("--scale", choices=SCALES, default=usual.scale, help=f"default {usual.scale}")
    for name, metavar in (("--decoder", "SPEC"), ("--suite", "NAME"), ("--size", "[SUITE.]NAME=N"),
                          ("--decoder-file", "PATH"), ("--lm-eval-task", "NAME")):  # fmt: skip
        parser.add_argument(name, action="append", default=[], metavar=metavar, help="as for a run; repeatable")
    parser.add_argument("--model", default=usual.model, metavar="SPEC", help=f"default {usual.model}")
    parser.add_argument("--model-url", default="", metavar="URL", help="of the server of a model openai:NAME")
    parser.add_argument("--baseline", default=usual.baseline, metavar="SPEC", help="as for a run")
    parser.add_argument("--workload", default="", metavar="NAME", help="as for a run")
    parser.add_argument("--data", default=environment.data_folder(), metavar="DIR", help="as for a run")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="as for a run")
    parser.add_argument("--dtype", default="auto", metavar="TYPE", help="as for a run")
    parser.add_argument("--sweep", action="store_true", help="also the sweep values of every decoder")
    parser.add_argument(
        "--gpus", type=int, default=None, metavar="N", help="workers at once (default what this machine has)"
    )
    parser.add_argument("--timing-exclusive", action="store_true", help="cells with times run alone on their host")
    parser.add_argument(
        "--hardware",
        default="",
        metavar="NAME",
        help="whose rows count first, as the column hardware has it (default this machine)",
    )
    results_option(parser)


def _run(options: argparse.Namespace) -> int:
    given = {k: v for k, v in vars(options).items() if k in plan.Options.__dataclass_fields__}
    specs = plan.cells(plan.Options(**given), ahead=True)
    if not specs:
        raise SpecError("these options make no cell")
    workers = options.gpus if options.gpus is not None else max(1, len(gpus.visible()))
    if workers < 1:
        raise SpecError(f"--gpus {workers}: a whole number from 1 on is wanted")
    known = past.read(options.results.resolve(), options.hardware or gpus.kind(None))
    guesses = {spec.cell_id: known.of(spec) for spec in specs}
    for line in _table(specs, guesses, known):
        say(line)
    say()
    for line in _summary(specs, guesses, known, workers, options.timing_exclusive):
        say(line)
    return 0


def _table(specs: Sequence[CellSpec], guesses: dict[str, Guess | None], known: Past) -> list[str]:
    """A line per suite and slice."""
    groups: dict[tuple[str, str, str], list[CellSpec]] = {}
    for spec in specs:
        groups.setdefault((spec.suite, spec.slice, spec.model), []).append(spec)
    head = ["suite", "slice", "model", "cells", "each", "all", "memory", "judged by"]
    return table.aligned([head, *(_line(key, some, guesses, known) for key, some in groups.items())])


def _line(
    key: tuple[str, str, str], some: Sequence[CellSpec], guesses: dict[str, Guess | None], known: Past
) -> list[str]:
    found = [g for spec in some if (g := guesses[spec.cell_id]) is not None]
    memory = [m for spec in some if (m := known.memory(spec)) is not None]
    bases = Counter(g.basis for g in found)
    unknown = len(some) - len(found)
    told = [f"{basis} ({count})" if len(bases) + bool(unknown) > 1 else basis for basis, count in bases.most_common()]
    told += [f"nothing ({unknown})" if found else "nothing: never measured"] * bool(unknown)
    return [
        *key,
        str(len(some)),
        _duration(median(g.seconds for g in found)) if found else "–",
        _duration(sum(g.seconds for g in found)) if found else "–",
        f"{max(memory) / 2**30:.1f} GiB" if memory else "–",
        ", ".join(told),
    ]


def _summary(
    specs: Sequence[CellSpec], guesses: dict[str, Guess | None], known: Past, workers: int, exclusive: bool
) -> list[str]:
    found = [g.seconds for g in guesses.values() if g is not None]
    missing = sum(g is None for g in guesses.values())
    told = [f"{len(specs)} cells of {len({s.decoder for s in specs})} decoders"]
    if not found:
        scale = specs[0].sized
        return [*told, f"nothing like them was ever measured at {scale}: a cell or two of that tell how long they take"]
    usual = sum(found) / len(found)
    jobs = [
        Job(
            spec,
            clocked=registry.get("suite", spec.suite).clocked,
            seconds=guess.seconds if (guess := guesses[spec.cell_id]) is not None else usual,
        )
        for spec in specs
    ]
    places = [Place(f"gpu {i:04}", f"host-{i // PER_HOST}", "GPU") for i in range(workers)]
    loading = {spec.model: known.loading(spec.model) for spec in specs}
    there = simulate(jobs, places, exclusive=exclusive, loading=loading)
    one = "1 worker" if workers == 1 else f"{workers} workers"
    told.append(
        f"about {_duration(sum(job.seconds for job in jobs))} of work; {_duration(there.seconds)} on {one}, "
        f"{there.busy / (there.seconds * workers):.0%} busy"
    )
    if missing:
        told.append(f"{missing} of them were never measured, nor anything like them; each counts as {_duration(usual)}")
    if workers > 1 and not exclusive and any(job.clocked for job in jobs):
        told.append("cells with times will run side by side on a host and say so; --timing-exclusive keeps them apart")
    return told


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


registry.add("command", "plan", Command("cells, hours and memory of a run to be", _arguments, _run), __file__)
