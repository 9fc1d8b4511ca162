"""Folders of runs that nobody measured, but which look as if: what `million_rows.py` ingests.

Cells are those that a plan of several suites and every decoder with its sweep has; models, machines, seeds, commits and
days go round. Numbers are noise around what is made up for each decoder, and follow from their units wherever they have
some, as those of a real shard must.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from decodathlon.harness.cells import TOY, CellSpec, Outcome
from decodathlon.harness.measure.observations import Observations
from decodathlon.harness.plan import Options
from decodathlon.harness.plan import cells as planned
from decodathlon.harness.results import shards
from decodathlon.harness.results.metrics import METRICS

#: Rows of metrics that a run has, and those of one measured cell.
OF_A_RUN, OF_A_CELL = 2000, 8
SUITES = ("throughput", "wikitext2", "math500", "audit")
MODELS = tuple(
    f"synthetic-{size}" for size in ("70m", "135m", "160m", "360m", "410m", "500m", "1b", "1.7b", "3b", "7b")
)
#: Processors; an empty name is the CPU itself.
HARDWARE = ("", "Synthetic GPU 24GB", "Synthetic GPU 40GB", "Synthetic GPU 80GB", "Synthetic GPU 141GB")
DATASETS = {"throughput": "wikitext-2-raw-v1", "wikitext2": "wikitext-2-raw-v1", "math500": "math-500", "audit": "toy"}
PAIRS, WINDOWS, QUESTIONS = 8, 12, 20
#: Of a hundred cells: which were not measured, or not whole; and of four runs, how many keep their samples.
FAILED, UNSUPPORTED, PARTIAL, SAMPLED = 4, 3, 1, 4
FIRST = datetime(2025, 1, 1, tzinfo=UTC)
Metric = dict[str, Any]


@dataclass(frozen=True)
class Made:
    """What was written."""

    folders: tuple[Path, ...]
    cells: int = 0
    #: Of those, cells without a number.
    bare: int = 0
    metrics: int = 0
    #: Of those, metrics with their units.
    units: int = 0
    samples: int = 0
    verdicts: int = 0

    def __add__(self, other: Made) -> Made:
        return Made(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def made(folder: Path, rows: int, jobs: int = 1) -> Iterator[Made]:
    """Write the runs, one after another, as they are done; together they have so many rows of metrics.

    Args:
        jobs: processes that write; a shard is flushed to disk, so writing is slow.
    """
    runs = max(2, rows // OF_A_RUN)
    quotas = [rows * (i + 1) // runs - rows * i // runs for i in range(runs)]
    specs = planned(Options(sweep=True, decoder=["greedy", "temperature", "all"], suite=list(SUITES)))
    tasks = [(folder, specs, number, quota) for number, quota in enumerate(quotas)]
    if jobs == 1:
        yield from map(_written, tasks)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(_written, tasks, chunksize=4)


def run_of(folder: Path, number: int, cells: int) -> Made:
    """One more run of so many cells."""
    specs = planned(Options(sweep=True, decoder=["greedy", "temperature", "all"], suite=list(SUITES)))
    return _written((folder, specs, number, cells * OF_A_CELL), most=cells)


def count(rows: int) -> int:
    """How many runs `made` writes."""
    return max(2, rows // OF_A_RUN)


def _written(task: tuple[Path, Sequence[CellSpec], int, int], most: int | None = None) -> Made:
    folder, specs, number, quota = task
    started = FIRST + timedelta(hours=number)
    run_id = f"{started:%Y%m%dT%H%M%S}-{number:06x}"
    place = folder / run_id
    outcomes = list(islice(_outcomes(_chosen(specs, number), number, run_id, started, quota), most))
    shards.write(place / shards.RUN_FILE, _run_record(run_id, number, started))
    for outcome in outcomes:
        shards.write(place / f"{outcome.spec.cell_id}.json", outcome.as_shard())
    verdicts = _verdicts(outcomes, started) if number % 2 else []
    if verdicts:
        shards.write(place / shards.GATES_FILE, {"run_id": run_id, "verdicts": verdicts})
    return Made(
        folders=(place,),
        cells=len(outcomes),
        bare=sum(not o.metrics for o in outcomes),
        metrics=sum(len(o.metrics) for o in outcomes),
        units=sum(m["units"] is not None for o in outcomes for m in o.metrics),
        samples=sum(len(o.samples) for o in outcomes),
        verdicts=len(verdicts),
    )


def _chosen(specs: Sequence[CellSpec], number: int) -> list[CellSpec]:
    """The cells of a run: each time other decoders, but always the two that all are held against."""
    decoders = list(dict.fromkeys(s.decoder for s in specs))
    always, others = decoders[:2], decoders[2:]
    first = number * 7 % len(others)
    order = {d: i for i, d in enumerate([*always, *others[first:], *others[:first]])}
    model, seed = MODELS[number % len(MODELS)], number // (len(MODELS) * len(HARDWARE)) % 2
    return [
        replace(s, seed=seed, model=s.model if s.model == TOY else model)
        for s in sorted(specs, key=lambda s: order[s.decoder])
    ]


def _outcomes(specs: Sequence[CellSpec], number: int, run_id: str, started: datetime, quota: int) -> Iterator[Outcome]:
    """Cells until they have so many rows of metrics."""
    random = np.random.default_rng(number)
    processor = HARDWARE[number // len(MODELS) % len(HARDWARE)]
    for place, spec in enumerate(specs):
        when = (started + timedelta(seconds=10 * place)).isoformat(timespec="milliseconds")
        outcome = _outcome(spec, run_id, when, processor, version=number // 200)
        fate = int(random.integers(100)) if place > 1 else 99
        if fate < FAILED:
            outcome.status, outcome.reason = "failed", "ValueError: made up"
            outcome.error, outcome.log = "Traceback (most recent call last):\n" * 8, "it said nothing\n" * 8
        elif fate < FAILED + UNSUPPORTED:
            outcome.status, outcome.reason = "unsupported", "needs what it has not"
        else:
            if fate == 99 - PARTIAL:
                outcome.status, outcome.reason = "partial", "after 900 s 6 of 8 units were measured"
            outcome.metrics = _MAKERS[spec.suite](random, spec.decoder)[:quota]
            quota -= len(outcome.metrics)
            if number % SAMPLED == 0:
                outcome.samples = _samples(random, spec.suite)
        yield outcome
        if not quota:
            return
    raise ValueError(f"a run has room for fewer rows: {quota} too many")


def _outcome(spec: CellSpec, run_id: str, when: str, processor: str, version: int) -> Outcome:
    """A cell before its numbers."""
    name, _, params = spec.decoder.rstrip("]").partition("[")
    device = {"device": "cuda", "processor": processor} if processor else {"device": "cpu", "threads": 2}
    return Outcome(
        spec,
        run_id,
        started=when,
        seconds={"prepare": 0.5, "total": 9.5},
        decoder={
            "name": name, "spec": spec.decoder, "family": name, "claim": "shaped",
            "source_sha256": _hash(name, version),
            "params": dict(pair.split("=", 1) for pair in params.split(",") if pair),
        },
        model={"name": spec.model, "dtype": "bfloat16", "parameters": 134515008, "revision": _hash(spec.model)}
        | {"weights_fingerprint": _hash("weights", spec.model), "tokenizer_sha256": _hash("tokens")} | device,
        data={"dataset": DATASETS[spec.suite], "split": "test", "source": "folder", "sha256": _hash(spec.suite)},
        sizes={"slices": [spec.slice], "pairs": PAIRS, "tokens": 32, "prompt": 32},
        protocol={"suite_sha256": _hash("suite", spec.suite), "order": "each pair forth and back", "clock": "wall"},
        conditions={"load_before": 0.5, "load_after": 0.9, "switches": {"torch_threads": 2, "grad": True}, "pid": 1},
        notes=["contended: by a neighbour"] if zlib.crc32(when.encode()) % 50 == 0 else [],
    )  # fmt: skip


def _run_record(run_id: str, number: int, started: datetime) -> dict[str, Any]:
    return {
        "run_id": run_id, "started": started.isoformat(timespec="milliseconds"),
        "git_commit": _hash("commit", number // 20)[:40], "git_dirty": number % 20 == 19,
        "environment": {"cpu": "Synthetic CPU", "cores": 2, "gpus": [], "python": "3.11.7",
                        "packages": {"torch": "2.13.0", "transformers": "5.23.0", "duckdb": "2.0.0"}},
        "options": {"scale": "quick", "sweep": True, "suite": list(SUITES), "model": MODELS[number % len(MODELS)]},
    }  # fmt: skip


def _verdicts(outcomes: Sequence[Outcome], started: datetime) -> list[dict[str, Any]]:
    judged = (started + timedelta(minutes=50)).isoformat(timespec="milliseconds")
    return [
        {"gate": "throughput: ratio_to_self >= 0.9", "decoder": o.spec.decoder, "cell_id": o.spec.cell_id,
         "outcome": "pass" if o.metrics else "not run", "detail": "made up", "judged": judged}
        for o in outcomes if o.spec.suite == "throughput"
    ]  # fmt: skip


def _samples(random: np.random.Generator, suite: str) -> list[dict[str, Any]]:
    if suite == "math500":
        return [
            {"row": f"math-{i}/0", "data": {"correct": bool(x < 0.5), "says": int(3 * x), "tokens": 64, "log_prob": -x}}
            for i, x in enumerate(random.random(QUESTIONS).tolist())
        ]
    drawn = random.random((PAIRS, 4)).tolist()
    return [
        {"row": f"pair-{i}", "data": {"seconds": {"candidate": x[:2], "ratio_to_greedy": x[2:]}, "first": x[0]}}
        for i, x in enumerate(drawn)
    ]


def _speeds(random: np.random.Generator, decoder: str) -> list[Metric]:
    fast = 0.5 + 2 * _own(decoder)
    noise = random.normal(0, 0.02, (4, PAIRS))
    rows = [f"pair-{i}" for i in range(PAIRS)]
    per_second = 40 * fast * np.exp(noise[3])

    def ratio(name: str, to: float, baseline: str, i: int) -> Metric:
        found = Observations.each(rows, (np.log(fast / to) + noise[i]).tolist(), scale="exp")
        return _of_units(name, found, baseline)

    return [
        _of_units("tokens_per_s", Observations.each(rows, per_second.tolist())),
        _of_units("tpot_s", Observations.each(rows, (1 / per_second).tolist())),
        ratio("ratio_to_self", fast, "itself", 0),
        ratio("ratio_to_greedy", 1.0, "greedy", 1),
        ratio("ratio_to_hf_generate", 0.9, "hf-generate", 2),
        _plain("ttft_s", 0.05 / fast, 0.01),
        _plain("generated_tokens", 2048.0),
        _plain("peak_memory_bytes", 2.0**28 * (1 + round(fast, 3))),
    ]


def _texts(random: np.random.Generator, decoder: str) -> list[Metric]:
    nats = 3 + 0.3 * random.normal(size=WINDOWS) + 0.2 * _own(decoder)
    rows, tokens = [f"window-{i}" for i in range(WINDOWS)], [100] * WINDOWS

    def means(name: str, values: Any, **more: Any) -> Metric:
        return _of_units(name, Observations(rows, (100 * values).tolist(), tokens, **more))

    return [
        means("ppl_epsilon", nats, scale="exp"),
        means("ppl_model", nats - 0.1, scale="exp"),
        means("coverage", 1 - random.random(WINDOWS) / 10, share=True),
        means("sparsemax_score", random.random(WINDOWS), share=True),
        _plain("ppl_mixture", float(np.exp(nats.mean())), 0.02),
        _plain("mixture_weight", 1.0),
        _plain("copies_error", 1e-4),
        _plain("copies_bias", 1e-5),
    ]


def _answers(random: np.random.Generator, decoder: str) -> list[Metric]:
    rows = [f"math-{i}" for i in range(QUESTIONS)]
    right = (random.random(QUESTIONS) < 0.2 + 0.6 * _own(decoder)).astype(float)
    tokens = random.integers(20, 400, QUESTIONS).astype(float)
    return [
        _of_units("pass_at_1", Observations.questions(rows, right.tolist())),
        _of_units("answered", Observations.questions(rows, [1.0] * QUESTIONS)),
        _of_units("answer_tokens", Observations(rows, tokens.tolist(), [1] * QUESTIONS)),
        _plain("answer_seconds", float(tokens.mean()) / 50),
        _plain("oracle", float(right.mean())),
        _plain("samples", 1.0),
        _plain("grader_timeouts", 0.0),
        _plain("answer_calls", float(tokens.mean())),
    ]


def _laws(random: np.random.Generator, decoder: str) -> list[Metric]:
    """A few decoders do not draw from the law that they claim."""
    honest = _own(decoder) > 0.02
    return [
        _plain("goodness_p", float(random.random()) if honest else 1e-12, count=20_000),
        _plain("visible_tvd", 0.04),
        _plain("own_law", float(_own(decoder) > 0.9)),
        _plain("definition_gap", 0.0),
        _plain("tvd", 0.013 + 0.001 * float(random.random())),
        _plain("tvd_floor", 0.0128),
        _plain("tvd_floor_ratio", 1 + 0.05 * float(random.random()), 0.1),
        _plain("set_tvd_bound", 0.02),
    ]


_MAKERS = {"throughput": _speeds, "wikitext2": _texts, "math500": _answers, "audit": _laws}


def _of_units(name: str, found: Observations, baseline: str | None = None) -> Metric:
    value, low, high, n = found.estimate()
    known = METRICS[name]
    return {"metric": name, "value": value, "unit": known.unit, "better": known.better, "ci_low": low, "ci_high": high,
            "n": n, "baseline": baseline, "units": found.as_json()}  # fmt: skip


def _plain(name: str, value: float, spread: float = 0.0, count: int = 8) -> Metric:
    """A number without units; with an interval where it has a spread."""
    known = METRICS[name]
    low, high = (value * (1 - spread), value * (1 + spread)) if spread else (None, None)
    return {"metric": name, "value": value, "unit": known.unit, "better": known.better, "ci_low": low, "ci_high": high,
            "n": count, "baseline": None, "units": None}  # fmt: skip


def _own(decoder: str) -> float:
    """What is made up for a decoder, between 0 and 1; the same in every run."""
    return zlib.crc32(decoder.encode()) / 2**32


def _hash(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
