"""The process that measures: reads cell specs as JSON lines, writes one shard per cell, answers with its path.

Started by local.py as `python -P -m decodathlon.harness.workers.worker IN OUT`, IN and OUT being inherited pipes; its
own stdout and stderr belong to whatever the decoders print.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from decodathlon.harness.bench import Bench
from decodathlon.harness.cells import CellSpec

_PR_SET_PDEATHSIG = 1
#: How much of its own output a cell that was not measured keeps.
TAIL_BYTES = 4000


def main(incoming: int, outgoing: int) -> None:
    """Serve until the other end closes its pipe."""
    _die_with_parent()
    for pipe in (incoming, outgoing):
        os.set_inheritable(pipe, False)  # no child of a decoder may hold them
    with os.fdopen(incoming, encoding="utf-8") as requests, os.fdopen(outgoing, "w", encoding="utf-8") as answers:

        def answer(**message: Any) -> None:
            answers.write(json.dumps(message) + "\n")
            answers.flush()

        bench = Bench(say=lambda text: answer(say=text), ready=lambda: answer(ready=True))
        log = os.dup(2)  # a decoder may close what it was given
        for line in requests:
            request = json.loads(line)
            spec = CellSpec.from_json(request["cell"])
            folder = Path(request["folder"])
            bench.run(
                spec,
                request["run_id"],
                folder,
                timeout=request["timeout"],
                attempts=request["attempts"],
                log=partial(_printed, log, begin=os.lseek(log, 0, os.SEEK_END)),
                expected=request["expected"],
                kind=request["kind"],
            )
            answer(done=str(folder / f"{spec.cell_id}.json"), cell=spec.cell_id)


def _printed(log: int, begin: int) -> str:
    """The end of what went to stdout and stderr since `begin`; both are one file that local.py opened for us."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed by the decoder: then there is nothing to flush
            stream.flush()
    end = os.lseek(log, 0, os.SEEK_END)
    return os.pread(log, TAIL_BYTES, max(begin, end - TAIL_BYTES)).decode(errors="replace")


def _die_with_parent() -> None:
    """No orphan keeps a GPU busy: the kernel ends us with our parent, and a thread watches where it does not."""
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):  # not Linux: the thread below is all there is
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
