"""Where cells run, by the name that --executor has for it: each makes the workers of a run, and starts nothing yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from decodathlon.harness.errors import SpecError
from decodathlon.harness.results import environment
from decodathlon.harness.workers import gpus, ray
from decodathlon.harness.workers.base import Orders, Worker
from decodathlon.harness.workers.local import InlineWorker, LocalWorker


def local(orders: Orders) -> Sequence[Worker]:
    """One process per GPU of this machine, each with its share of the cores; one on a CPU, unless more are asked for.

    Raises:
        SpecError: there are fewer GPUs, or cores, than workers asked for.
    """
    mine = [] if orders.device == "cpu" else gpus.visible()
    count = orders.workers or max(1, len(mine))
    if count > (len(mine) or environment.cores()):
        there = f"{len(mine)} GPUs" if mine else f"{environment.cores()} cores"
        raise SpecError(f"--workers {count}: this machine has {there}, and two workers never share one")
    if count == 1:
        # What the process sees stays as it is; of several GPUs it takes the first, as torch does.
        return [LocalWorker(orders)]
    threads = gpus.share_of_threads(count)
    each: list[str | None] = [*mine[:count]] if mine else [None] * count
    return [
        LocalWorker(orders, f"{'gpu' if mine else 'worker'} {i}", gpu=gpu, threads=threads, kind=kind)
        for i, (gpu, kind) in enumerate(zip(each, gpus.kinds(each, threads), strict=True))
    ]


def inline(orders: Orders) -> Sequence[Worker]:
    """This process."""
    if (orders.workers or 1) > 1:
        raise SpecError(f"--workers {orders.workers}: --executor inline measures in one process")
    return [InlineWorker(orders)]


EXECUTORS: dict[str, Callable[[Orders], Sequence[Worker]]] = {
    "local": local,
    "inline": inline,
    "ray": ray.workers,
}
