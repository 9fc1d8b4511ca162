"""Workers of this machine: `LocalWorker` in one process beside this one, `InlineWorker` right here.

A worker always returns an outcome, and every outcome has left its shard. A process that hangs, dies or was out of
memory is replaced; what its cell had observed is in the journal.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from decodathlon.harness.bench import Bench
from decodathlon.harness.cells import CellSpec, Outcome, Status
from decodathlon.harness.results import environment, journal, shards
from decodathlon.harness.workers import gpus
from decodathlon.harness.workers.base import Orders, Place, Worker

#: How much of a dead worker's output its row keeps.
TAIL_CHARACTERS = 4000
#: How often we look whether a silent worker still lives.
POLL_SECONDS = 0.5
#: A cell looks at its time between units of work; one that does not come to its end is killed so much later.
GRACE_SHARE, GRACE_SECONDS = 0.1, 5.0
#: The time to fetch, convert and load a model, and to read the data.
PREPARE_SECONDS = 3600.0


class InlineWorker(Worker):
    """In this process, for a debugger. A decoder that crashes takes the run with it, and one that hangs hangs."""

    def __init__(self, orders: Orders, name: str = "inline") -> None:
        super().__init__(orders, name)
        self._bench, self._kind = Bench(orders.say), gpus.kind(None)

    def open(self) -> Place:
        return Place(self.name, environment.host(), self._kind)

    def run(
        self, spec: CellSpec, attempts: Sequence[dict[str, Any]] = (), expected: Mapping[str, str] | None = None
    ) -> Outcome:
        return self._bench.run(
            spec,
            self.run_id,
            self.folder,
            timeout=self.timeout,
            attempts=attempts,
            expected=expected,
            kind=self._kind,
        )

    def close(self) -> None:
        """Nothing was started."""


class LocalWorker(Worker):
    """In a process of its own group, which keeps the loaded model between cells and is replaced when it dies."""

    def __init__(
        self, orders: Orders, name: str = "local", *, gpu: str | None = None, threads: int = 0, kind: str = ""
    ) -> None:
        """
        Args:
            gpu: what CUDA_VISIBLE_DEVICES is to be for the process; None leaves it as it is.
            threads: how many it may compute with; 0 leaves it as it is.
            kind: what it computes on, where that is known already.
        """
        super().__init__(orders, name)
        self._own, self._kind = gpus.environment_of(gpu, threads), kind or gpus.kind(gpu, threads)
        self._process: subprocess.Popen[bytes] | None = None
        self._requests: IO[str] | None = None
        self._answers: int | None = None
        self._deadline, self._late, self._cancelled, self._began = math.inf, False, False, 0.0
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - lives as long as the worker

    def open(self) -> Place:
        return Place(self.name, environment.host(), self._kind)

    def run(
        self, spec: CellSpec, attempts: Sequence[dict[str, Any]] = (), expected: Mapping[str, str] | None = None
    ) -> Outcome:
        # A run that was killed has left the journal of its last cell; it says nothing of this attempt.
        with contextlib.suppress(NotADirectoryError):  # told when the shard is written
            journal.path_of(self.folder, spec.cell_id).unlink(missing_ok=True)
        if self._process is None:
            self._start()
        assert self._requests is not None
        log_begin = self._log.seek(0, os.SEEK_END)
        kills, self._began = kernel_kills(), time.monotonic()
        request = {
            "cell": asdict(spec),
            "run_id": self.run_id,
            "folder": str(self.folder),
            "timeout": self.timeout,
            "attempts": list(attempts),
            "expected": expected or {},
            "kind": self._kind,
        }
        try:
            with contextlib.suppress(BrokenPipeError):  # it died before it read; told below like any other death
                self._requests.write(json.dumps(request) + "\n")
                self._requests.flush()
            patience = max(PREPARE_SECONDS, self.timeout)
            self._deadline = time.monotonic() + patience
            for line in self._lines():
                message: dict[str, Any] = json.loads(line)
                if "done" in message:
                    if message["cell"] != spec.cell_id:
                        continue  # of somebody who outlived his cell
                    outcome = Outcome.from_shard(shards.read(Path(message["done"])))
                    if self._spoilt(outcome):
                        self.close()
                    return outcome
                if "ready" in message:
                    patience = self.timeout + max(GRACE_SECONDS, GRACE_SHARE * self.timeout)
                    self._deadline = time.monotonic() + patience
                else:
                    self.say(message["say"])
        except KeyboardInterrupt:
            self._end(spec, attempts, log_begin, "cancelled", "interrupted")
            raise
        if self._cancelled:
            return self._end(spec, attempts, log_begin, "cancelled", "interrupted")
        if self._late:
            reason = f"killed: it did not come to an end within {patience:.4g} s (--cell-timeout {self.timeout:.4g})"
            return self._end(spec, attempts, log_begin, "timeout", reason)
        assert self._process is not None
        code = self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        if code == -signal.SIGKILL and kernel_kills() > kills:
            return self._end(spec, attempts, log_begin, "oom", "the system killed the worker for want of memory")
        return self._end(spec, attempts, log_begin, "crashed", f"the worker {how}")

    @staticmethod
    def _spoilt(outcome: Outcome) -> bool:
        """Whether the worker should go: its memory may be in pieces, its CUDA context broken, its settings changed."""
        if outcome.conditions.get("left_behind"):
            return True
        on_gpu = str(outcome.model.get("device", "")).startswith("cuda")
        return outcome.status in ("oom", "timeout") or (outcome.status == "failed" and on_gpu)

    def _lines(self) -> Iterator[bytes]:
        """What the worker answers, until it is dead or late. Its pipe alone does not tell: a child may hold it."""
        assert self._process is not None
        assert self._answers is not None
        self._late = False
        pending = b""
        while True:
            if self._cancelled:
                return
            alive = self._process.poll() is None
            readable, _, _ = select.select([self._answers], [], [], POLL_SECONDS if alive else 0)
            chunk = os.read(self._answers, 1 << 16) if readable else b""
            if not chunk and not alive:
                return
            *lines, pending = (pending + chunk).split(b"\n")
            yield from lines
            if time.monotonic() > self._deadline:
                self._late = True
                return

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
            env=os.environ | {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"} | self._own,
        )
        os.close(to_worker)
        os.close(from_worker)
        self._requests = os.fdopen(from_us, "w", encoding="utf-8")
        self._answers = to_us

    def _end(
        self, spec: CellSpec, attempts: Sequence[dict[str, Any]], log_begin: int, status: Status, reason: str
    ) -> Outcome:
        """End the process and bury its cell."""
        self.close()
        self._log.seek(log_begin)
        tail = self._log.read().decode(errors="replace")[-TAIL_CHARACTERS:]
        return self._bury(spec, attempts, status, reason, seconds=time.monotonic() - self._began, printed=tail)

    def cancel(self) -> None:
        self._cancelled = True
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                os.killpg(self._process.pid, signal.SIGKILL)

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


def kernel_kills() -> int:
    """How many processes the kernel has killed for want of memory since it started; 0 where it does not tell."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
