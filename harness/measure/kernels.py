"""What the timing of a GPU operation needs: inputs, a cache that is flushed before each round, and its check."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

ROWS, VOCABULARY = 4, 151_936
DEVICE = "cuda"
#: More than the cache of any GPU holds.
FLUSHED_BYTES = 256 << 20
#: What pytest-benchmark's `pedantic` takes: the work, its arguments, and what comes before each round.
Timed = tuple[Callable[[], Any], tuple[()], dict[str, Any], Callable[[], None]]


def logits(rows: int = ROWS, vocabulary: int = VOCABULARY) -> Tensor:
    """Random ones, spread like a language model's."""
    generator = torch.Generator().manual_seed(0)
    return (3 * torch.randn(rows, vocabulary, generator=generator)).cuda()


def uniforms(count: int = 1, rows: int = ROWS) -> Tensor:
    return torch.rand(rows, count, generator=torch.Generator().manual_seed(1), dtype=torch.float64).cuda()


def matrix(rows: int, columns: int, spread: float = 0.02, seed: int = 0) -> Tensor:
    """(rows, columns) normal numbers in bfloat16."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (spread * torch.randn(rows, columns, generator=generator, device=DEVICE)).to(torch.bfloat16)


def nothing() -> Timed:
    """The least that a launch takes."""
    one = torch.zeros(1, device="cuda")
    return replayed(lambda: one.add_(1))


def check(works: Mapping[str, Callable[[], Tensor]]) -> None:
    """
    Raises:
        AssertionError: the forms of an operation draw different tokens; then the time of none of them means anything.
    """
    found = {name: work().tolist() for name, work in works.items()}
    assert len(set(map(tuple, found.values()))) == 1, f"the forms draw different tokens: {found}"


def check_product(found: Tensor, x: Tensor, weights: Tensor) -> None:
    """
    Raises:
        AssertionError: x W^T differs from its sum in float64 by more than sums in float32 may.
    """
    exact, size = x.double() @ weights.double().T, x.double().abs() @ weights.double().abs().T
    wrong = int(((found.double() - exact).abs() > 1e-5 * size).sum())
    assert wrong == 0, f"{wrong} of {exact.numel()} products are wrong"


def replayed(work: Callable[[], Any]) -> Timed:
    """The work as the replay of a CUDA graph, as it runs within a decoding step."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return plain(graph.replay)


def plain(work: Callable[[], Any]) -> Timed:
    """The work as it is, launch by launch."""
    buffer = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda")

    def flush() -> None:
        buffer.zero_()
        torch.cuda.synchronize()

    def synchronised() -> None:
        work()
        torch.cuda.synchronize()

    return synchronised, (), {}, flush
