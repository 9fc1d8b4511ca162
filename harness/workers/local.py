"""Executors: where a cell runs. `LocalExecutor` in one process beside this one, `InlineExecutor` right here."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from decodathlon.harness.cells import Bench, CellSpec, Outcome
from decodathlon.harness.results import shards

#: How much of a dead worker's stderr its row keeps.
TAIL_CHARACTERS = 4000
#: How often we look whether a silent worker still lives.
POLL_SECONDS = 0.5


class Executor(ABC):
    """Runs cells one after another; every finished cell has left its shard."""

    def __init__(self, run_id: str, folder: Path, say: Callable[[str], None]) -> None:
        self.run_id, self.folder, self.say = run_id, folder, say

    @abstractmethod
    def run(self, spec: CellSpec) -> Outcome:
        """Measure one cell."""

    @abstractmethod
    def close(self) -> None:
        """End what was started."""


class InlineExecutor(Executor):
    """In this process, for a debugger. A decoder that crashes takes the run with it."""

    def __init__(self, run_id: str, folder: Path, say: Callable[[str], None]) -> None:
        super().__init__(run_id, folder, say)
        self._bench = Bench(say)

    def run(self, spec: CellSpec) -> Outcome:
        outcome = self._bench.measure(spec, self.run_id)
        shards.write(self.folder / f"{spec.cell_id}.json", outcome.as_shard())
        return outcome

    def close(self) -> None:
        """Nothing was started."""


class LocalExecutor(Executor):
    """In a worker process of its own group, which keeps the loaded model between cells and is replaced when it dies."""

    def __init__(self, run_id: str, folder: Path, say: Callable[[str], None]) -> None:
        super().__init__(run_id, folder, say)
        self._process: subprocess.Popen[bytes] | None = None
        self._requests: IO[str] | None = None
        self._answers: int | None = None
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - lives as long as the executor

    def run(self, spec: CellSpec) -> Outcome:
        if self._process is None:
            self._start()
        assert self._requests is not None
        assert self._answers is not None
        log_begin = self._log.seek(0, os.SEEK_END)
        request = {"cell": asdict(spec), "run_id": self.run_id, "folder": str(self.folder)}
        with contextlib.suppress(BrokenPipeError):  # it died before it read; told below like any other death
            self._requests.write(json.dumps(request) + "\n")
            self._requests.flush()
        for line in self._lines():
            message: dict[str, Any] = json.loads(line)
            if "done" in message:
                return Outcome.from_shard(shards.read(Path(message["done"])))
            self.say(message["say"])
        return self._died(spec, log_begin)

    def _lines(self) -> Iterator[bytes]:
        """What the worker answers, until it is dead. Its pipe alone does not tell: a child that it forked holds it."""
        assert self._process is not None
        assert self._answers is not None
        pending = b""
        while True:
            alive = self._process.poll() is None
            readable, _, _ = select.select([self._answers], [], [], POLL_SECONDS if alive else 0)
            chunk = os.read(self._answers, 1 << 16) if readable else b""
            if not chunk and not alive:
                return
            *lines, pending = (pending + chunk).split(b"\n")
            yield from lines

    def _start(self) -> None:
        to_worker, from_us = os.pipe()
        to_us, from_worker = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "decodathlon.harness.workers.worker", str(to_worker), str(from_worker)],
            pass_fds=(to_worker, from_worker),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        os.close(to_worker)
        os.close(from_worker)
        self._requests = os.fdopen(from_us, "w", encoding="utf-8")
        self._answers = to_us

    def _died(self, spec: CellSpec, log_begin: int) -> Outcome:
        assert self._process is not None
        code = self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self._log.seek(log_begin)
        tail = self._log.read().decode(errors="replace")[-TAIL_CHARACTERS:]
        self.close()
        path = self.folder / f"{spec.cell_id}.json"
        if path.exists():  # it had finished, and died before it could say so
            return Outcome.from_shard(shards.read(path))
        outcome = Outcome(spec, self.run_id, status="crashed", reason=f"the worker {how}", error=tail)
        shards.write(path, outcome.as_shard())
        return outcome

    def close(self) -> None:
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):  # the whole group, also what a dead worker left behind
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._requests is not None:
            with contextlib.suppress(BrokenPipeError):  # its reader is gone, which is what we wanted
                self._requests.close()
        if self._answers is not None:
            os.close(self._answers)
        self._process = None


EXECUTORS: dict[str, type[Executor]] = {"local": LocalExecutor, "inline": InlineExecutor}
