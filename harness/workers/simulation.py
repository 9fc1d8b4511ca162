"""A run without its cells: the schedule as it is, workers that only let time pass, hosts that go and come back.

What it says of the wall-clock is as good as the times that it is given; what it says of the schedule (nothing is lost,
nothing is measured twice, no comparison is split) holds for a real run, whose fleet asks the same `Schedule`.
"""

from __future__ import annotations

import heapq
import itertools
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from decodathlon.harness.workers.base import Place
from decodathlon.harness.workers.schedule import Job, Schedule


@dataclass(frozen=True, kw_only=True)
class Failures:
    """What goes wrong, at random.

    Args:
        host_hours: mean hours between two losses of one host, which takes all its workers; 0 for never.
        back_hours: hours until it is back; 0 for never.
        crashes: the share of cells that crash by themselves.
        retry_lost: whether a cell is measured once more whose host was lost.
    """

    host_hours: float = 0.0
    back_hours: float = 0.5
    crashes: float = 0.0
    retry_lost: bool = True


@dataclass
class Simulated:
    """What came of it."""

    #: Seconds of simulated wall-clock.
    seconds: float = 0.0
    #: Outcomes by status.
    statuses: Counter[str] = field(default_factory=Counter)
    #: How often each cell got its outcome.
    settled: Counter[str] = field(default_factory=Counter)
    #: Kinds of hardware on which each comparison got its numbers.
    kinds: dict[tuple[object, ...], set[str]] = field(default_factory=dict)
    #: Cells that were begun anew, hosts that were lost, models that were loaded.
    retried: int = 0
    lost_hosts: int = 0
    loads: int = 0
    #: Seconds that workers computed, simulated.
    busy: float = 0.0
    #: Seconds that the schedule itself took, on the real clock, and how often it was asked.
    controller: float = 0.0
    asked: int = 0


def simulate(
    jobs: Sequence[Job],
    places: Sequence[Place],
    *,
    exclusive: bool = False,
    loading: Mapping[str, float] | float = 0.0,
    failures: Failures | None = None,
    seed: int = 0,
) -> Simulated:
    """Let the jobs pass over the workers.

    Args:
        loading: seconds to load a model, by its name or for each.
    """
    failures, rng, found = failures or Failures(), random.Random(seed), Simulated()
    plan = Schedule(jobs, exclusive=exclusive, in_order=len(places) == 1)
    events: list[tuple[float, int, str, str]] = []
    number = itertools.count()
    hosts = sorted({place.host for place in places})
    of_host = {host: [p for p in places if p.host == host] for host in hosts}
    began: dict[str, tuple[float, int]] = {}
    model_of: dict[str, tuple[str, str]] = {}

    def at(when: float, what: str, whom: str) -> int:
        mine = next(number)
        heapq.heappush(events, (when, mine, what, whom))
        return mine

    def asks(now: float, names: Sequence[str]) -> None:
        """Idle workers take what they can; who gets nothing is asked again when something has ended."""
        for name in names:
            if name in plan.in_flight or name not in plan.places:
                continue
            begin = time.perf_counter()
            job = plan.take(name)
            found.controller += time.perf_counter() - begin
            found.asked += 1
            if job is None:
                continue
            load = 0.0
            if model_of.get(name) != job.model:
                model_of[name] = job.model
                found.loads += 1
                load = loading if isinstance(loading, float) else loading.get(job.spec.model, 0.0)
            crash = rng.random() < failures.crashes
            seconds = load + job.seconds * (rng.random() if crash else 1.0)
            began[name] = now, at(now + seconds, "crashed" if crash else "ok", name)

    def settle(job: Job, status: str, kind: str) -> None:
        found.statuses[status] += 1
        found.settled[job.spec.cell_id] += 1
        if status == "ok":
            found.kinds.setdefault(job.group, set()).add(kind)

    for place in places:
        plan.came(place)
    if failures.host_hours:
        for host in hosts:
            at(rng.expovariate(1 / (failures.host_hours * 3600)), "lost", host)
    asks(0.0, [p.name for p in places])
    while events and (plan.waiting_count or plan.in_flight):
        now, mine, what, whom = heapq.heappop(events)
        if what == "lost":
            found.lost_hosts += 1
            for place in of_host[whom]:
                if place.name in plan.in_flight:
                    job = plan.in_flight[place.name]
                    if failures.retry_lost and job.losses < 1:
                        plan.in_flight.pop(place.name)
                        plan.put_back(replace(job, losses=job.losses + 1))
                        found.retried += 1
                    else:
                        settle(plan.settled(place.name), "crashed", place.kind)
                    found.busy += now - began.pop(place.name)[0]
                model_of.pop(place.name, None)
                plan.went(place.name)
            if failures.back_hours:
                at(now + failures.back_hours * 3600, "back", whom)
        elif what == "back":
            for place in of_host[whom]:
                plan.came(place)
            at(now + rng.expovariate(1 / (failures.host_hours * 3600)), "lost", whom)
        else:
            if began.get(whom, (0.0, -1))[1] != mine:
                continue  # of a worker that was lost meanwhile
            found.busy += now - began.pop(whom)[0]
            kind = plan.places[whom].kind
            begin = time.perf_counter()
            job = plan.settled(whom)
            found.controller += time.perf_counter() - begin
            settle(job, what, kind)
            found.seconds = now
        asks(now, [whom] if what in ("ok", "crashed") and not exclusive else [p.name for p in places])
    for job in plan.waiting:
        settle(job, "cancelled", "")
    return found
