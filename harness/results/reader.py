"""Many runs at once: processes that read shards side by side, for reading is most of what ingesting does.

The module is also what such a process runs: a file names its folders, and it says on stdout what is wrong with them.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from decodathlon.harness.errors import StoreError
from decodathlon.harness.results import reading
from decodathlon.harness.results.metrics import METRICS, Metric

#: Shards for which a process is worth its start.
ENOUGH = 2000
#: Of a process that was given a shard which is none, and of one that was interrupted with its parent.
EXIT_REFUSED, EXIT_INTERRUPTED = 3, 130


def rows_of(folders: Sequence[Path], into: Path) -> list[Path]:
    """As `reading.rows_of`, by as many processes as there are cores and shards enough; one folder of rows by each.

    Raises:
        StoreError: a shard is damaged or was written by newer code, or a reader died.
    """
    sizes = [sum(1 for _ in os.scandir(folder)) for folder in folders]
    readers = min(_cores(), sum(sizes) // ENOUGH)
    if readers < 2:
        return [reading.rows_of(folders, into)]
    # neighbours stay neighbours: rows of a run that lie together are found faster
    place = [(before - size / 2) * readers / sum(sizes) for before, size in zip(accumulate(sizes), sizes, strict=True)]
    shares = [[f for f, at in zip(folders, place, strict=True) if int(at) == n] for n in range(readers)]
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(_reader(share, into / str(n))) for n, share in enumerate(shares)]
        for process in started:
            told, _ = process.communicate()
            if process.returncode == EXIT_REFUSED:
                raise StoreError(json.loads(told))
            if process.returncode != 0:
                raise StoreError(f"a process that read shards ended with exit code {process.returncode}")
    return [into / str(n) for n in range(readers)]


@contextlib.contextmanager
def _reader(folders: Sequence[Path], into: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has been told what to read."""
    task = into.with_suffix(".json")
    task.parent.mkdir(parents=True, exist_ok=True)
    known = {"folders": list(map(str, folders)), "into": str(into), "metrics": METRICS}
    task.write_text(json.dumps(known), encoding="utf-8")
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "decodathlon.harness.results.reader", str(task)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()  # where it has not ended


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(path: str) -> int:
    """Read what a file names."""
    task = json.loads(Path(path).read_text(encoding="utf-8"))
    METRICS.update({name: Metric(*values) for name, values in task["metrics"].items()})  # with those of plugins
    gc.disable()  # what is read has no cycles, and looking for some takes a sixth of the time
    try:
        reading.rows_of(list(map(Path, task["folders"])), Path(task["into"]))
    except StoreError as error:
        sys.stdout.write(json.dumps(str(error)))
        return EXIT_REFUSED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
