"""Where the board reads: private snapshots of a results file, retaken when it changes; the file is never held."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decodathlon.harness.errors import StoreError
from decodathlon.harness.locks import is_held
from decodathlon.harness.results import shards, store
from decodathlon.leaderboard import queries

if TYPE_CHECKING:
    import duckdb


_PREFIX = "decodathlon-board-"


def _sweep() -> None:
    """Take away the copies of boards that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        owner = folder.name[len(_PREFIX) :].partition("-")[0]
        if owner.isdigit() and Path("/proc").is_dir() and not Path("/proc", owner).exists():
            shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Snapshot:
    """The results as they were at one moment."""

    #: Changes whenever the results do; what was computed from one version holds for that version.
    version: str
    path: Path
    taken: datetime
    #: What a reader should know of it: shards that could not be read, a file that is locked.
    remarks: tuple[str, ...]
    _connection: duckdb.DuckDBPyConnection = field(repr=False, compare=False)

    def cursor(self) -> duckdb.DuckDBPyConnection:
        """A connection of one's own to this snapshot, for one thread."""
        return self._connection.cursor()


@dataclass(frozen=True)
class Progress:
    """A run that has not been ingested yet."""

    run_id: str
    done: int
    planned: int
    #: Whether a process measures it now; else it was stopped, and can be resumed.
    live: bool


class Source:
    """A results file and the shards beside it, for any number of readers in this process."""

    def __init__(self, results: Path) -> None:
        self.results = results
        _sweep()
        self._folder = tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}-", ignore_cleanup_errors=True)
        self._lock = threading.Lock()
        self._snapshot: Snapshot | None = None
        self._count = 0
        self._shards: dict[Path, tuple[int, str]] = {}

    def current(self) -> Snapshot:
        """The newest snapshot; retaken if anything was written since.

        Raises:
            StoreError: there is nothing to read, and nothing was read before.
            MissingError: DuckDB is not installed.
        """
        with self._lock:
            version = self._version()
            before = self._snapshot
            if before is not None and before.version == version:
                return before
            try:
                self._snapshot = self._take(version)
            except StoreError as error:
                if before is None:
                    raise
                stale = f"shown as of {before.taken:%H:%M:%S} UTC: {error}"
                return Snapshot(before.version, before.path, before.taken, (stale,), before._connection)
            if before is not None:
                with contextlib.suppress(OSError):  # whoever still reads it keeps it until he is done
                    before.path.unlink()
            return self._snapshot

    def changed(self, version: str) -> bool:
        """Whether something was written since the snapshot of that version; cheap enough to ask every few seconds."""
        with self._lock:
            return self._version() != version

    def progress(self) -> list[Progress]:
        """Runs beside the file that planned more than they have measured, newest first."""
        found = []
        for folder in reversed(shards.runs(self.results)):
            plan = folder / shards.PLAN_FILE
            if not plan.is_file():
                continue
            try:
                cells = shards.read(plan).get("cells")
                planned = len(cells) if isinstance(cells, list) else 0
                done, live = len(list(shards.cells(folder))), is_held(folder / shards.LOCK_FILE)
            except (StoreError, OSError):  # damaged, or taken away meanwhile: no progress to speak of
                continue
            if done < planned:
                found.append(Progress(folder.name, done, planned, live))
        return found

    def _version(self) -> str:
        """A digest of what a snapshot would be made of, without reading it."""
        seen: list[Any] = []
        for path in (self.results, self.results.with_name(f"{self.results.name}.wal")):
            with contextlib.suppress(FileNotFoundError):
                found = path.stat()
                seen.append((found.st_mtime_ns, found.st_size, found.st_ino))
        for folder in shards.runs(self.results):
            with contextlib.suppress(FileNotFoundError):  # taken away meanwhile
                seen.append((folder.name, self._finished(folder)))
        return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]

    def _finished(self, folder: Path) -> str:
        """A digest of a run's finished shards; looked at anew only when the folder's own time has moved."""
        moved = folder.stat().st_mtime_ns
        known = self._shards.get(folder)
        if known is None or known[0] != moved:
            entries = [(e.name, e.stat().st_mtime_ns) for e in os.scandir(folder) if not e.name.startswith(".")]
            known = self._shards[folder] = (moved, hashlib.sha256(repr(sorted(entries)).encode()).hexdigest())
        return known[1]

    def _take(self, version: str) -> Snapshot:
        import duckdb

        if not self.results.exists() and not shards.runs(self.results):
            raise StoreError(f"there are no results at {self.results}; run `pytest suites/ --benchmark` first")
        self._count += 1
        copy = Path(self._folder.name) / f"{self._count}.duckdb"
        try:
            remarks = store.snapshot(self.results, copy, queries.prepare)
            connection = duckdb.connect(str(copy), read_only=True)
        except BaseException:  # whatever it was, half a copy is of use to nobody, and there may be many
            for path in Path(self._folder.name).glob(f"{copy.name}*"):
                path.unlink(missing_ok=True)
            raise
        return Snapshot(version, copy, datetime.now(UTC), tuple(remarks), connection)
