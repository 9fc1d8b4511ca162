"""A lock file that two processes respect, for work that must happen once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from decodathlon.harness.errors import StoreError

try:
    import fcntl
except ImportError:  # Windows has no flock; there an exclusive create stands in for it
    fcntl = None  # type: ignore[assignment]


@contextmanager
def file_lock(path: Path, timeout: float = 600.0) -> Iterator[None]:
    """Hold an exclusive lock on `path` while the block runs. The kernel drops it when the process dies.

    Raises:
        StoreError: somebody else held it for `timeout` seconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout
    if fcntl is None:
        while True:
            try:
                path.touch(exist_ok=False)
                break
            except FileExistsError:
                _wait(path, deadline)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
        return
    with path.open("a") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                _wait(path, deadline)
        yield


def is_held(path: Path) -> bool:
    """Whether somebody holds the lock now."""
    if fcntl is None:
        return path.exists()
    try:
        with path.open("r") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _wait(path: Path, deadline: float) -> None:
    if time.monotonic() > deadline:
        raise StoreError(f"{path} has been locked by another process for too long; end that process and try again")
    time.sleep(0.05)
