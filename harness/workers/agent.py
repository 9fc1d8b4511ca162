"""The agent: a local worker on another machine, with which a controller speaks in small messages.

The worker's process writes journal, lines and shard into a folder of this machine; what is new in them goes to the
controller piece by piece, so that a machine that is lost takes no observation with it. Every message may come twice,
for a network may swallow the answer. Knows nothing of how messages travel (ray.py does).
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from decodathlon.harness.cells import CellSpec
from decodathlon.harness.results import environment, journal, lines
from decodathlon.harness.workers import gpus
from decodathlon.harness.workers.base import Orders
from decodathlon.harness.workers.local import LocalWorker

#: The most that one message carries: below it Ray sends a value with the answer, and needs no room in its object store.
PIECE_BYTES = 48 * 1024
#: How long a poll waits for news.
POLL_SECONDS = 1.0


class Agent:
    """Measures one cell after another for a controller elsewhere."""

    def __init__(self, run_id: str, timeout: float, threads: int) -> None:
        """
        Args:
            timeout: seconds that a cell may measure.
            threads: that the worker may compute with.
        """
        self._folder = Path(tempfile.mkdtemp(prefix="decodathlon-"))
        self._said: SimpleQueue[str] = SimpleQueue()
        self._threads = threads
        orders = Orders(run_id=run_id, folder=self._folder, timeout=timeout, say=self._said.put)
        self._worker = LocalWorker(orders, threads=threads)
        # One thread for all cells: the kernel ends the worker's process with the thread that started it.
        self._requests: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._news = threading.Event()
        self._files: dict[str, Path] = {}
        self._begun = ""
        self._ended, self._error = False, ""
        threading.Thread(target=self._serve, daemon=True).start()

    def hello(self) -> dict[str, Any]:
        """Machine and software, and what a cell would compute on."""
        found = environment.describe()
        kind = gpus.kind(next(iter(gpus.visible()), None), self._threads)
        return found | {"code": environment.code(), "kind": kind, "host": environment.host()}

    def put(self, name: str, begin: int, piece: bytes) -> None:
        """A piece of a file that the next cell needs: one of decoders, or the lines that an earlier attempt left."""
        path = self._folder / "given" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("r+b" if path.is_file() else "wb") as file:
            file.seek(begin)
            file.write(piece)

    def begin(
        self, order: str, cell: dict[str, Any], attempts: list[dict[str, Any]], expected: Mapping[str, str]
    ) -> None:
        """Start to measure; files that `put` brought are in place.

        Args:
            order: names this very request.
        """
        if order == self._begun:
            return
        self._begun = order
        spec, given = CellSpec.from_json(cell), self._folder / "given"
        cell["decoder_files"] = [
            str(self._placed(given / str(i) / Path(p).name)) for i, p in enumerate(spec.decoder_files)
        ]
        if spec.data and not Path(spec.data).is_dir():  # the same data may lie elsewhere here; its hash will tell
            cell["data"] = os.environ.get("DECODATHLON_DATA") or spec.data
        shard = self._folder / f"{spec.cell_id}.json"
        self._files = {
            "journal": journal.path_of(self._folder, spec.cell_id),
            "lines": lines.path_of(self._folder, spec.cell_id),
            "shard": shard,
        }
        shard.unlink(missing_ok=True)
        if (given / "lines").is_file():
            os.replace(given / "lines", self._files["lines"])
        shutil.rmtree(given, ignore_errors=True)
        self._ended, self._error = False, ""
        self._news.clear()
        self._requests.put({"cell": cell, "attempts": attempts, "expected": expected})

    def _placed(self, given: Path) -> Path:
        """A file of decoders where it can stay: as long as it says the same, under one name."""
        if not given.is_file():
            raise FileNotFoundError(f"{given.name} was not sent")
        stable = self._folder / environment.digest(given) / given.name
        stable.parent.mkdir(exist_ok=True)
        os.replace(given, stable)
        return stable

    def _serve(self) -> None:
        while True:
            request = self._requests.get()
            try:
                spec = CellSpec.from_json(request["cell"])
                self._worker.run(spec, request["attempts"], request["expected"])
            except Exception as error:  # noqa: BLE001 - the controller hears it: there is nobody else to tell
                self._error = f"{type(error).__name__}: {error}".splitlines()[0]
            self._ended = True
            self._news.set()

    def poll(self, have: Mapping[str, int]) -> list[dict[str, Any]]:
        """What is new, at most a piece of it; `end` comes last, with what went wrong here if something did.

        Args:
            have: how many bytes the controller has of journal, lines and shard.
        """
        found: list[dict[str, Any]] = []
        deadline = time.monotonic() + POLL_SECONDS
        while not found and time.monotonic() < deadline:
            ended = self._ended  # looked at first: what is written before it is seen below
            while not self._said.empty():
                found.append({"say": self._said.get()})
            for part, path in self._files.items():
                if part == "shard" and not ended:
                    continue
                if piece := _piece(path, have[part]):
                    found.append({"part": part, "bytes": piece})
                    break
            else:
                if ended and not found:
                    return [{"end": self._error}]
            if not found:
                self._news.wait(0.1)
        return found


def _piece(path: Path, begin: int) -> bytes:
    """What a file has from `begin` on, at most a piece; nothing where there is no such file (any more)."""
    try:
        with path.open("rb") as file:
            file.seek(begin)
            return file.read(PIECE_BYTES)
    except FileNotFoundError:
        return b""
