"""What the overheads suite times: each function prepares one operation of the harness and returns it."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from decodathlon.harness import decoder as decoders
from decodathlon.harness.cells import CellSpec, Outcome
from decodathlon.harness.results import environment, shards, store
from decodathlon.harness.results.journal import Journal
from decodathlon.harness.results.metrics import METRICS


def collect() -> None:
    """Collect the suites in a fresh interpreter, as a user's command does before its first cell."""
    words = ["-m", "pytest", "suites/", "--benchmark", "--collect-only", "-q", "--gates", "none"]
    done = subprocess.run(
        [sys.executable, *words, "--decoder", "greedy"],
        cwd=environment.ROOT, env=os.environ, check=False, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"collection failed: {done.stdout}{done.stderr}")


def sampler_step(spec: str, vocabulary: int) -> Callable[[], Any]:
    """One draw (law and token) of a sampler for one row of random logits."""
    import torch

    sampler: Any = decoders.build(spec)
    logits = 3 * torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(0))
    u = torch.full((1, 1), 0.5, dtype=torch.float64)
    return lambda: sampler.choose(logits, None, u)


def record_pair(folder: Path) -> Callable[[], Any]:
    """The clock around nothing four times, as in a pair of two decoders, and the pair's line in the journal."""
    from decodathlon.harness.measure import speed
    from decodathlon.harness.targets.toy import Ising

    target, book = Ising(2, 0.1), Journal(folder / "overheads.journal")

    def work() -> None:
        seconds = [speed.timed(target, lambda: None)[0] for _ in range(4)]
        book.write("samples", {"row": "pair-0", "data": {"seconds": {"candidate": seconds[:2], "rival": seconds[2:]}}})

    return work


def shard_write(folder: Path) -> Callable[[], Any]:
    """One cell of ordinary size."""
    outcome, number = _outcome("run", 0), itertools.count()
    return lambda: shards.write(folder / f"{next(number)}.json", outcome.as_shard())


def ingest(folder: Path, cells: int, new: int) -> Callable[[], Any]:
    """Each call adds another run of `new` cells to a file that began with `cells`."""
    results = filled(folder, cells)
    runs = itertools.count(1)
    return lambda: store.ingest(results, [_run(folder, f"run-{next(runs)}", new)])


def filled(folder: Path, cells: int) -> Path:
    """A results file of so many cells of as many decoders."""
    results = folder / "overheads.duckdb"
    store.ingest(results, [_run(folder, "run-0", cells)])
    return results


def _run(folder: Path, run_id: str, cells: int) -> Path:
    record = {
        "run_id": run_id, "started": "2026-01-01T00:00:00.000+00:00", "git_commit": "", "git_dirty": None,
        "environment": {"cpu": "a CPU", "cores": 2}, "options": {},
    }  # fmt: skip
    shards.write(folder / run_id / shards.RUN_FILE, record)
    for seed in range(cells):
        outcome = _outcome(run_id, seed)
        shards.write(folder / run_id / f"{outcome.spec.cell_id}.json", outcome.as_shard())
    return folder / run_id


def _outcome(run_id: str, seed: int) -> Outcome:
    spec = CellSpec("throughput", 1, "batch-1", f"decoder-{seed}", "a-model", "quick", 0)
    units = {"rows": [f"pair-{i}" for i in range(8)], "sums": [50.0 + seed] * 8, "counts": [1] * 8, "kind": "median",
             "scale": "identity", "share": False}  # fmt: skip
    metric = {
        "value": 50.0 + seed,
        "ci_low": 49.0 + seed,
        "ci_high": 51.0 + seed,
        "n": 8,
        "baseline": None,
        "units": units,
    }
    names = ("tokens_per_s", "tpot_s", "ttft_s", "ratio_to_greedy", "ratio_to_self", "peak_memory_bytes")
    return Outcome(
        spec,
        run_id,
        metrics=[{**metric, "metric": n, "unit": METRICS[n].unit, "better": METRICS[n].better} for n in names],
        samples=[{"row": f"pair-{i}", "data": {"seconds": {"candidate": [0.5, 0.6]}}} for i in range(8)],
        model={"name": "a-model", "dtype": "float32", "device": "cpu"},
        decoder={"spec": spec.decoder, "family": "a-family", "params": {"k": seed}, "claim": "shaped"},
    )
