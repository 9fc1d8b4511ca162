"""Which GPUs the workers of this machine may have, and what each worker's process is told of it. Knows no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from decodathlon.harness.results import environment

#: The environment variable by which CUDA, and everything above it, is told which devices there are.
VISIBLE = "CUDA_VISIBLE_DEVICES"
#: Variables that say how many threads the libraries of a process compute with.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def visible(outer: Mapping[str, str] | None = None) -> list[str]:
    """What names each GPU that this process may use; none on a machine without.

    These are the entries of the outer CUDA_VISIBLE_DEVICES, as CUDA reads it, or the UUIDs that the driver tells. A
    GPU that is cut into slices (MIG) counts once where CUDA_VISIBLE_DEVICES does not name its slices.
    """
    given = (os.environ if outer is None else outer).get(VISIBLE)
    if given is None:
        return [gpu["uuid"] for gpu in environment.gpus()]
    found: list[str] = []
    for entry in (part.strip() for part in given.split(",")):
        wrong = not entry or (entry.lstrip("-").isdigit() and int(entry) < 0)
        if wrong or entry in found:  # CUDA goes no further than to the first that is none
            return [] if entry in found else found
        found.append(entry)
    return found


def environment_of(gpu: str | None, threads: int) -> dict[str, str]:
    """Of a worker's process: its one GPU, and its share of the cores."""
    own = {} if gpu is None else {VISIBLE: gpu}
    return own | (dict.fromkeys(THREADS, str(threads)) if threads else {})


def share_of_threads(workers: int) -> int:
    """Threads for each of so many workers of this machine; 0 for a single one, which is left as it is."""
    if workers < 2:
        return 0
    given = os.environ.get(THREADS[0], "").partition(",")[0].strip()
    return max(1, (int(given) if given.isdigit() and int(given) > 0 else environment.cores()) // workers)


def kind(gpu: str | None, threads: int = 0) -> str:
    """What computes: the name of the GPU (without one named the first that there is), else the CPU with its threads."""
    return kinds([gpu], threads)[0]


def kinds(some: Sequence[str | None], threads: int = 0) -> list[str]:
    """As `kind`, of several at once: the driver takes its time to answer."""
    known = environment.gpus()
    names = {str(i): gpu["name"] for i, gpu in enumerate(known)} | {gpu["uuid"]: gpu["name"] for gpu in known}
    first = next(iter(visible()), None) if None in some else None
    cpu = f"{environment.cpu_name()}, {threads or environment.cores()} threads"
    chosen = [first if gpu is None else gpu for gpu in some]
    return [cpu if gpu is None else names.get(gpu, "a GPU") for gpu in chosen]
