"""What a worker promises: cells in, one after another, and for each of them an outcome whose shard is written.

The controller alone decides what runs where (schedule.py), what becomes of a lost cell (fleet.py), and ingests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from decodathlon.harness.cells import CellSpec, Outcome, Status
from decodathlon.harness.errors import DecodathlonError
from decodathlon.harness.results import journal, shards


@dataclass(frozen=True)
class Place:
    """Where a worker computes."""

    #: How progress lines call it; no two workers of a run have the same.
    name: str
    #: Workers of one host disturb one another's clocks.
    host: str
    #: What computes, such as "NVIDIA H200": cells that are compared with one another are all measured on one kind. Rows
    #: have it as `place.kind`, beside the hardware of their own target, which may be a toy on the CPU.
    kind: str


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What the workers of a run are told before the first cell."""

    run_id: str
    #: Where shards go.
    folder: Path
    #: Seconds that a cell may measure; loading is apart.
    timeout: float
    #: Receives lines of progress; called in the thread that runs the cell.
    say: Callable[[str], None]
    #: auto, cpu or cuda.
    device: str = "auto"
    #: How many workers on this machine; None: one per GPU, or one.
    workers: int | None = None
    #: Of a Ray cluster: auto, local or HOST:PORT.
    ray_address: str = "auto"
    #: Facts of the controller that a machine elsewhere must share: commit, versions of libraries.
    same: Mapping[str, Any] = field(default_factory=dict)


class RefusedError(DecodathlonError):
    """A worker cannot be had, or may not measure for this run; the others go on."""


class Worker(ABC):
    """Runs cells one after another; every finished cell has left its shard."""

    #: Whether the machine below it may go while the controller stays.
    may_be_lost: ClassVar[bool] = False

    def __init__(self, orders: Orders, name: str = "worker") -> None:
        self.orders, self.name = orders, name
        self.run_id, self.folder, self.timeout, self.say = orders.run_id, orders.folder, orders.timeout, orders.say

    @abstractmethod
    def open(self) -> Place:
        """Get ready, and say where cells will run; also after it was lost.

        Raises:
            RefusedError: it cannot be had (any more).
        """

    @abstractmethod
    def run(
        self, spec: CellSpec, attempts: Sequence[dict[str, Any]] = (), expected: Mapping[str, str] | None = None
    ) -> Outcome:
        """Measure one cell.

        Args:
            attempts: how it ended before.
            expected: weights and data that the run began with (`bench.found_of`); a cell that finds other fails.
        """

    @property
    def gone(self) -> Literal["", "worker", "machine"]:
        """What the last cell took with it, so that `open` must be called before the next one; a machine that goes says
        nothing of the cell."""
        return ""

    @property
    def described(self) -> Mapping[str, Any]:
        """Machine and software where it computes, if that is not this machine."""
        return {}

    def cancel(self) -> None:
        """End the cell in flight, from another thread; `run` then returns it as cancelled."""
        raise NotImplementedError(f"{type(self).__name__} runs in the thread that would cancel it")

    @abstractmethod
    def close(self) -> None:
        """End what was started."""

    def _shard(self, spec: CellSpec) -> Path:
        return self.folder / f"{spec.cell_id}.json"

    def _bury(
        self,
        spec: CellSpec,
        attempts: Sequence[dict[str, Any]],
        status: Status,
        reason: str,
        *,
        seconds: float,
        printed: str = "",
    ) -> Outcome:
        """Write the shard that a dead process could not write, from its journal.

        Args:
            seconds: how long the cell took in all.
            printed: the end of what the process wrote.
        """
        path, notes = self._shard(spec), journal.path_of(self.folder, spec.cell_id)
        if path.exists() and not notes.exists():  # it had finished, and died before it could say so
            found = Outcome.from_shard(shards.read(path))
            if len(found.attempts) == len(attempts):
                return found
        seen = journal.read(notes)
        seen["metrics"] = []  # of half a measurement; the observations are kept
        if status == "timeout" and seen["samples"]:
            status = "partial"
        seen["seconds"] = {**seen.get("seconds", {}), "total": seconds}
        outcome = Outcome(
            spec, self.run_id, status=status, reason=reason, error=printed, log=printed, attempts=list(attempts), **seen
        )
        shards.write(path, outcome.as_shard())
        notes.unlink(missing_ok=True)
        return outcome
