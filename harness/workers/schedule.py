"""The schedule: which cell which worker measures next. It knows no process and no clock, so it can be simulated whole.

- Cells that are compared with one another (all decoders on one part of a suite, on one model) go to one kind of
  hardware: the kind of the worker that takes the first of them.
- A worker stays with the model that it has loaded as long as there is work for it; else it takes the model with the
  most work. Among the cells of a model the longest go first, so that no long one is left for the end.
- `exclusive`: a cell whose numbers are times runs alone on its host, and after all others.
- Nothing is given to two workers, and nothing is forgotten: a cell is waiting, in flight, or settled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from decodathlon.harness.cells import CellSpec
from decodathlon.harness.workers.base import Place


@dataclass(frozen=True)
class Job:
    """A cell that is to be measured."""

    spec: CellSpec
    #: How it ended before.
    attempts: Sequence[dict[str, Any]] = ()
    #: Whether its numbers are times.
    clocked: bool = False
    #: How long it is expected to take.
    seconds: float = 1.0
    #: How often the machine below it was lost in this run.
    losses: int = 0

    @property
    def group(self) -> tuple[Any, ...]:
        """What cells that are compared with one another share."""
        s = self.spec
        return (s.suite, s.slice, s.model, s.model_spec, s.sized, s.seed, s.dtype, s.workload, s.split, s.judge)

    @property
    def model(self) -> tuple[str, str]:
        """What a worker must have loaded."""
        return self.spec.model_spec or self.spec.model, self.spec.dtype


@dataclass
class Schedule:
    """Cells and who has them. `in_order` keeps the order that they came in, for a worker that is alone."""

    jobs: Sequence[Job]
    exclusive: bool = False
    in_order: bool = False
    #: The workers that may still come or are there, by name.
    places: dict[str, Place] = field(default_factory=dict)
    in_flight: dict[str, Job] = field(default_factory=dict)
    #: The kind of hardware of each group, as far as one of its cells has been begun.
    kinds: dict[tuple[Any, ...], str] = field(default_factory=dict)
    _settled: Counter[tuple[Any, ...]] = field(default_factory=Counter)
    _loaded: dict[str, tuple[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        #: By group and then by length: the group is what decides who may have a cell.
        self._waiting: dict[tuple[Any, ...], list[Job]] = {}
        for job in self.jobs:
            self._waiting.setdefault(job.group, []).append(job)
        if not self.in_order:
            for group in self._waiting.values():
                group.sort(key=lambda job: job.seconds)  # the longest is taken from the end
        else:
            for group in self._waiting.values():
                group.reverse()
        self._order = {group: place for place, group in enumerate(self._waiting)}
        #: Seconds of work that wait, by model.
        self._load: dict[tuple[str, str], float] = {}
        for job in self.jobs:
            self._load[job.model] = self._load.get(job.model, 0.0) + job.seconds

    @property
    def waiting(self) -> list[Job]:
        """What nobody has."""
        return [job for group in self._waiting.values() for job in group]

    @property
    def waiting_count(self) -> int:
        return sum(map(len, self._waiting.values()))

    def came(self, place: Place) -> None:
        """A worker is there."""
        self.places[place.name] = place

    def went(self, name: str) -> None:
        """A worker is gone, and has no cell any more."""
        self.places.pop(name, None)
        self._loaded.pop(name, None)
        there = {place.kind for place in self.places.values()}
        for group, kind in list(self.kinds.items()):
            if kind not in there and not self._settled[group]:  # nothing to compare with yet: another kind may have it
                del self.kinds[group]

    def take(self, name: str) -> Job | None:
        """The next cell for a worker that is there; None where it can have none now."""
        place = self.places[name]
        open_to = [g for g in self._waiting if self.kinds.get(g, place.kind) == place.kind]
        if self.exclusive:
            beside = [self.in_flight[n] for n, p in self.places.items() if p.host == place.host and n in self.in_flight]
            if any(job.clocked for job in beside):
                return None
            unclocked = [g for g in open_to if not self._waiting[g][-1].clocked]
            if not unclocked and beside:
                return None
            open_to = unclocked or open_to
        if not open_to:
            return None
        group = open_to[0] if self.in_order else self._best(open_to, name)
        job = self._waiting[group].pop()
        if not self._waiting[group]:
            del self._waiting[group]
        self._load[job.model] -= job.seconds
        self.kinds.setdefault(group, place.kind)
        self._loaded[name] = job.model
        self.in_flight[name] = job
        return job

    def _best(self, groups: Sequence[tuple[Any, ...]], name: str) -> tuple[Any, ...]:
        mine = self._loaded.get(name)
        others = Counter(model for worker, model in self._loaded.items() if worker != name)

        def rank(group: tuple[Any, ...]) -> tuple[Any, ...]:
            longest = self._waiting[group][-1]
            share = self._load[longest.model] / (1 + others[longest.model])
            return longest.model == mine, share, longest.seconds, -self._order[group]

        return max(groups, key=rank)

    def settled(self, name: str, *, measured: bool = True) -> Job:
        """The cell of a worker has its outcome; `measured` says whether there is something to compare others with."""
        job = self.in_flight.pop(name)
        self._settled[job.group] += measured
        return job

    def put_back(self, job: Job) -> None:
        """A cell that is in flight no more is to be measured again."""
        self._waiting.setdefault(job.group, []).append(job)
        self._load[job.model] += job.seconds

    @property
    def goes_on(self) -> bool:
        """Whether a cell waits that one of the workers that are there may take, now or when others have ended."""
        there = {place.kind for place in self.places.values()}
        return bool(there) and any(self.kinds.get(group) in {None, *there} for group in self._waiting)
