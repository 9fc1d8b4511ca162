"""Ten thousand cells on 64 GPUs, with hosts that are lost: does the schedule lose anything, and what does it cost?

    python scripts/schedule_simulation.py [--cells N] [--gpus N] [--fleet]

The schedule is the one of real runs, time is simulated. With `--fleet` the cells go through the real fleet as well: a
thread per GPU whose worker does nothing but write a shard, so that what remains is what the controller costs.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from decodathlon.harness.cells import CellSpec, Outcome
from decodathlon.harness.results import shards, table
from decodathlon.harness.workers.base import Orders, Place, Worker
from decodathlon.harness.workers.fleet import Fleet
from decodathlon.harness.workers.schedule import Job
from decodathlon.harness.workers.simulation import Failures, Simulated, simulate

MODELS, SUITES, SLICES = 5, 8, 5
PER_HOST = 8
KINDS = ("NVIDIA H200", "NVIDIA A100")


def jobs(count: int, seed: int = 0) -> list[Job]:
    """Cells of several models, suites and slices; how long each takes has a long tail, as in real runs."""
    rng = random.Random(seed)
    places = [(m, s, part) for m in range(MODELS) for s in range(SUITES) for part in range(SLICES)]
    found = []
    for i in range(count):
        m, s, part = places[i % len(places)]
        spec = CellSpec(f"suite-{s}", 1, f"part-{part}", f"decoder[n={i // len(places)}]", f"model-{m}", "full", 0)
        found.append(Job(spec, clocked=s == 0, seconds=60 * rng.lognormvariate(2.0, 1.0)))
    return found


def places(gpus: int, kinds: Sequence[str] = KINDS) -> list[Place]:
    """Hosts of eight GPUs, of one kind each."""
    return [Place(f"gpu {i:03}", f"host-{i // PER_HOST}", kinds[(i // PER_HOST) % len(kinds)]) for i in range(gpus)]


def wrong(work: Sequence[Job], found: Simulated) -> list[str]:
    """What must not be."""
    told = []
    if set(found.settled) != {job.spec.cell_id for job in work} or set(found.settled.values()) != {1}:
        told.append("cells were lost, or have two outcomes")
    if any(len(kinds) > 1 for kinds in found.kinds.values()):
        told.append("a comparison was split over two kinds of hardware")
    return told


class Idle(Worker):
    """Measures nothing, and writes a shard."""

    may_be_lost = True

    def __init__(self, orders: Orders, place: Place, text: str) -> None:
        super().__init__(orders, place.name)
        self._place, self._text = place, text

    def open(self) -> Place:
        return self._place

    def run(
        self, spec: CellSpec, attempts: Sequence[dict[str, Any]] = (), expected: Mapping[str, str] | None = None
    ) -> Outcome:
        outcome = Outcome(spec, self.run_id, log=self._text)
        shards.write(self._shard(spec), outcome.as_shard())
        return outcome

    def cancel(self) -> None:
        """It ends at once by itself."""

    def close(self) -> None:
        """Nothing was started."""


def through_the_fleet(work: Sequence[Job], there: Sequence[Place], folder: Path) -> float:
    """Seconds of the real controller for all of them, shards written and read included."""
    orders = Orders(run_id="simulated", folder=folder, timeout=60.0, say=lambda text: None)
    fleet = Fleet(lambda given: [Idle(given, place, "x" * 20_000) for place in there], orders)
    begin = time.perf_counter()
    found = list(fleet.outcomes(work, {}))
    seconds = time.perf_counter() - begin
    fleet.close()
    assert len(found) == len(work)
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--fleet", action="store_true", help="also through the real fleet")
    options = parser.parse_args()
    work, there = jobs(options.cells), places(options.gpus)
    hours = sum(job.seconds for job in work) / 3600
    bound = hours / options.gpus
    rows, bad = [], []
    for name, failures, exclusive in (
        ("nothing fails", Failures(), False),
        ("a host is lost every 4 h, back in 30 min; 2 % crash", Failures(host_hours=32, crashes=0.02), False),
        ("the same, lost cells not measured again", Failures(host_hours=32, crashes=0.02, retry_lost=False), False),
        ("hosts that are lost stay away", Failures(host_hours=60, back_hours=0.0), False),
        ("times run alone on their host", Failures(), True),
    ):
        found = simulate(work, there, exclusive=exclusive, loading=90.0, failures=failures)
        bad += [f"{name}: {line}" for line in wrong(work, found)]
        statuses = ", ".join(f"{count} {status}" for status, count in sorted(found.statuses.items()))
        rows.append(
            [
                name,
                f"{found.seconds / 3600:.1f} h",
                f"{found.busy / (found.seconds * options.gpus):.1%}",
                statuses,
                f"{found.lost_hosts}",
                f"{found.retried}",
                f"{1e6 * found.controller / max(1, len(work)):.0f} us",
            ]
        )
    sys.stdout.write(f"{options.cells} cells, {hours:.0f} GPU hours, {options.gpus} GPUs: at least {bound:.1f} h\n")
    head = ["", "wall-clock", "GPUs busy", "outcomes", "hosts lost", "begun anew", "schedule per cell"]
    sys.stdout.write("\n".join(table.aligned([head, *rows])) + "\n")
    if options.fleet:
        with tempfile.TemporaryDirectory(prefix="decodathlon-") as folder:
            seconds = through_the_fleet(work, there, Path(folder))
        each = 1000 * seconds / len(work)
        busy = seconds / (hours * 3600 / options.gpus)
        sys.stdout.write(
            f"the real fleet with {options.gpus} threads: {each:.2f} ms per cell, shards written; "
            f"{busy:.2%} of the time of such a run\n"
        )
    for line in bad:
        sys.stderr.write(f"WRONG: {line}\n")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
