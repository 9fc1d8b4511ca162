"""The fleet: all workers of a run at work on one schedule, each in a thread of its own; outcomes come out as they end.

What only the controller can know of a cell is added here: who else measured on its host, that a lost machine made it
begin anew, that it found other weights than the others. A worker that is refused or lost leaves its work to the rest;
what nobody can take any more ends as cancelled, with the reason.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from decodathlon.harness.bench import found_of
from decodathlon.harness.cells import FINAL, Outcome
from decodathlon.harness.results import shards
from decodathlon.harness.workers.base import Orders, RefusedError, Worker
from decodathlon.harness.workers.schedule import Job, Schedule

#: How often a cell may be begun anew because its machine was lost, where that is asked for.
RETRIES = 1


@dataclass
class _Shared:
    """What threads hand to the one that called `outcomes`: an outcome, a line to say, a worker's end, or an error."""

    outcome: Outcome | None = None
    said: str = ""
    over: str = ""
    error: BaseException | None = None


class Fleet:
    """The workers of a run."""

    def __init__(
        self,
        build: Callable[[Orders], Sequence[Worker]],
        orders: Orders,
        *,
        exclusive: bool = False,
        retry_lost: bool = False,
    ) -> None:
        """
        Args:
            build: makes the workers; nothing is started yet.
            exclusive: measure times alone on each host.
            retry_lost: measure a cell once more whose machine was lost.
        """
        self._orders, self._exclusive, self._retries = orders, exclusive, RETRIES if retry_lost else 0
        self._events: queue.SimpleQueue[_Shared] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._workers = list(build(replace(orders, say=self._tell)))
        self._stopped = False
        #: Workers that are not there yet, and why those are not that were refused or lost.
        self._coming: set[str] = set()
        self._gone: dict[str, str] = {}
        #: Machine and software of workers elsewhere, by node.
        self.nodes: dict[str, Mapping[str, Any]] = {}
        #: By cell in flight whose numbers are times, the cells that have shared its host.
        self._beside: dict[str, set[str]] = {}
        self._expected: dict[str, str] = {}
        self._schedule = Schedule(())

    @property
    def size(self) -> int:
        """Workers that are there or may come."""
        return len(self._workers) - len(self._gone)

    def outcomes(
        self, jobs: Sequence[Job], expected: Mapping[str, str], kinds: Mapping[tuple[Any, ...], str] | None = None
    ) -> Iterator[Outcome]:
        """Every job's outcome, in the order in which they end.

        Args:
            expected: weights and data that the run began with.
            kinds: on what hardware earlier cells were measured, by what they are compared with.

        Raises:
            StoreError: a shard cannot be written.
        """
        self._expected = dict(expected)
        alone = len(self._workers) == 1 and not self._workers[0].may_be_lost
        self._schedule = Schedule(jobs, exclusive=self._exclusive, in_order=alone, kinds=dict(kinds or {}))
        if alone:
            yield from self._one_by_one(self._workers[0])
            return
        self._coming = {worker.name for worker in self._workers}
        self._threads = [
            threading.Thread(target=self._serve, args=(worker,), name=worker.name, daemon=True)
            for worker in self._workers
        ]
        for thread in self._threads:
            thread.start()
        try:
            working = len(self._threads)
            while working:
                event = self._events.get()
                if event.error is not None:
                    raise event.error
                if event.said:
                    self._orders.say(event.said)
                working -= bool(event.over)
                if event.outcome is not None:
                    yield self._settled(event.outcome)
            for job in self._schedule.waiting:
                yield self._stranded(job)
        except (KeyboardInterrupt, GeneratorExit):
            self.close()
            raise

    def _one_by_one(self, worker: Worker) -> Iterator[Outcome]:
        """In this thread and in the given order."""
        self._schedule.came(worker.open())
        while (job := self._schedule.take(worker.name)) is not None:
            outcome = worker.run(job.spec, job.attempts, self._expected)
            self._schedule.settled(worker.name, measured=outcome.status in FINAL)
            yield self._settled(outcome)
        for job in self._schedule.waiting:  # of a run that was begun on other hardware
            yield self._stranded(job)

    def _tell(self, text: str) -> None:
        """Have a line said, by the thread that waits for outcomes; it tells which worker says so."""
        if self._threads:
            self._events.put(_Shared(said=f"  {threading.current_thread().name}: {text.strip()}"))
        else:
            self._orders.say(text)

    def close(self) -> None:
        """End the cells in flight as cancelled, and all workers."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._threads:
            for worker in self._workers:  # those that have a cell, and those that wait to begin
                worker.cancel()
            for thread in self._threads:
                thread.join()
        for worker in self._workers:
            worker.close()

    def _serve(self, worker: Worker) -> None:
        try:
            self._work(worker)
        except RefusedError as error:
            self._gone[worker.name] = str(error)
            self._tell(str(error))
        except BaseException as error:  # noqa: BLE001 - whoever waits for outcomes gets it
            self._events.put(_Shared(error=error))
        finally:
            worker.close()
            with self._changed:
                self._coming.discard(worker.name)
                self._schedule.went(worker.name)
                self._changed.notify_all()
            self._events.put(_Shared(over=worker.name))

    def _work(self, worker: Worker) -> None:
        place = worker.open()
        with self._changed:
            self._coming.discard(worker.name)
            self._schedule.came(place)
            self._changed.notify_all()
        if worker.described:
            self.nodes[place.host] = worker.described
        while (job := self._next(worker.name)) is not None:
            outcome = worker.run(job.spec, job.attempts, dict(self._expected))
            with self._changed:
                self._schedule.settled(worker.name, measured=outcome.status in FINAL)
                neighbours = self._beside.pop(job.spec.cell_id, set())
                again = worker.gone == "machine" and outcome.status == "crashed" and job.losses < self._retries
                if again:
                    earlier = [*outcome.attempts, outcome.as_attempt()]
                    self._schedule.put_back(replace(job, attempts=earlier, losses=job.losses + 1))
                self._changed.notify_all()
            if again:
                self._tell(f"{job.spec.suite} {job.spec.label}: {outcome.reason}; it is measured again")
            else:
                self._amend(outcome, job, neighbours)
                self._events.put(_Shared(outcome=outcome))
            if worker.gone:
                with self._changed:
                    self._schedule.went(worker.name)
                    self._coming.add(worker.name)
                place = worker.open()
                with self._changed:
                    self._coming.discard(worker.name)
                    self._schedule.came(place)
                    self._changed.notify_all()

    def _next(self, name: str) -> Job | None:
        """Waits until there is a cell for the worker; None when there will be none."""
        with self._changed:
            while not self._stopped:
                job = self._schedule.take(name)
                if job is not None:
                    self._note_neighbours(name, job)
                    return job
                if not (self._schedule.in_flight or self._coming or self._schedule.goes_on):
                    return None
                self._changed.wait()
            return None

    def _note_neighbours(self, name: str, job: Job) -> None:
        """A cell begins beside others of its host: those whose numbers are times are told of it, and it of them."""
        mine, host = job.spec.cell_id, self._schedule.places[name].host
        for other, theirs in self._schedule.in_flight.items():
            if other == name or self._schedule.places[other].host != host:
                continue
            if job.clocked:
                self._beside.setdefault(mine, set()).add(theirs.spec.cell_id)
            if theirs.clocked:
                self._beside.setdefault(theirs.spec.cell_id, set()).add(mine)

    def _amend(self, outcome: Outcome, job: Job, neighbours: set[str]) -> None:
        """What its worker could not know goes into the shard."""
        told = []
        if neighbours:
            cells = f"{len(neighbours)} other cell{'s' * (len(neighbours) > 1)}"
            told.append(f"contended: {cells} ran on its host meanwhile (--timing-exclusive measures it alone)")
            outcome.conditions["beside"] = sorted(neighbours)
        if job.losses:
            told.append("measured a second time: the first time its machine was lost")
        if told:
            outcome.notes = [*outcome.notes, *told]
            self._keep(outcome)

    def _keep(self, outcome: Outcome) -> None:
        shards.write(self._orders.folder / f"{outcome.spec.cell_id}.json", outcome.as_shard())

    def _settled(self, outcome: Outcome) -> Outcome:
        """The first cell says what weights and data the run has; of cells that began together only one was first."""
        if outcome.status in FINAL:
            found = found_of(outcome)
            other = [what for what, value in found.items() if self._expected.get(what, value) != value]
            if other:
                outcome.status, outcome.metrics = "failed", []
                outcome.reason = f"MissingError: {other[0]} are not what cells before it found"
                self._keep(outcome)
            else:
                self._expected = found | self._expected
        return outcome

    def _stranded(self, job: Job) -> Outcome:
        """A cell that nobody is left to measure."""
        why = "; ".join(f"{name}: {reason}" for name, reason in sorted(self._gone.items())) or "no worker came"
        if (kind := self._schedule.kinds.get(job.group)) is not None:
            why = f"cells that it is compared with ran on {kind}, and no such worker is left ({why})"
        reason = f"no worker could take it: {why}"
        outcome = Outcome(job.spec, self._orders.run_id, status="cancelled", reason=reason, attempts=list(job.attempts))
        self._keep(outcome)
        return outcome
