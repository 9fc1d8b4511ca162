"""Peak memory of a block of work."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

SMAPS = Path("/proc/self/smaps_rollup")


MEMINFO = Path("/proc/meminfo")
#: What a container may use, and uses.
_GROUP = Path("/sys/fs/cgroup")
_LIMIT, _USED, _STAT = _GROUP / "memory.max", _GROUP / "memory.current", _GROUP / "memory.stat"


def free_bytes(device: str) -> int | None:
    """Memory that can still be had, or None where this machine does not tell."""
    if device.startswith("cuda"):
        held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(torch.cuda.mem_get_info()[0]) + held
    if not MEMINFO.exists():
        return None
    (line,) = [line for line in MEMINFO.read_text().splitlines() if line.startswith("MemAvailable:")]
    free = 1024 * int(line.split()[1])
    if _LIMIT.exists() and (limit := _LIMIT.read_text().strip()).isdigit():
        stat = dict(line.split() for line in _STAT.read_text().splitlines()) if _STAT.exists() else {}
        given_back = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))  # files that were read
        free = min(free, int(limit) - int(_USED.read_text()) + given_back)
    return free


def peak_bytes(work: Callable[[], Any], device: str) -> int | None:
    """The most memory in use while `work` runs, or None where this machine does not tell.

    On CUDA what torch allocated; on a CPU anonymous memory, because mapped files are not the process's own.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated())
    if not SMAPS.exists():
        return None
    with contextlib.suppress(OSError, AttributeError):  # another libc keeps what was freed; then so does the number
        ctypes.CDLL(None).malloc_trim(0)
    peak, done = anonymous_bytes(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, anonymous_bytes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join()
    return max(peak, anonymous_bytes())


def of_a_call(generate: Callable[[], Sequence[Any]], target: Any, *, drafts: bool = False) -> dict[str, float]:
    """By metric, what is known: the most memory in use while it generates, and what it reads of the target's weights.

    Args:
        drafts: whether there is a drafter, whose reads not every target counts.
    """
    answers: list[Any] = []
    before = target.weight_reads
    peak = peak_bytes(lambda: answers.extend(generate()), torch.device(target.device).type)
    read, fetched, hits, misses = (now - then for now, then in zip(target.weight_reads, before, strict=True))
    tokens = sum(len(answer.tokens) for answer in answers)
    known: dict[str, float | None] = {
        "peak_memory_bytes": peak,
        "weight_bytes_per_token": read / tokens if read and (target.counts_drafts or not drafts) else None,
        "fetched_bytes_per_token": fetched / tokens if hits + misses else None,
        "weight_hit_share": hits / (hits + misses) if hits + misses else None,
        "bits_per_weight": target.bits_per_weight or None,
        "weights_on_disk_bytes": target.file_bytes or None,
    }
    return {name: value for name, value in known.items() if value is not None}


def anonymous_bytes() -> int:
    """Anonymous memory of this process, in bytes (Linux)."""
    for line in SMAPS.read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{SMAPS} has no line 'Anonymous:'")
