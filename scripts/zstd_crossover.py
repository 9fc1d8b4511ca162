"""From which size on a GPU unpacks zstd faster than the host does and copies: nvCOMP beside zstandard.

    pip install nvidia-nvcomp-cu12
    python scripts/zstd_crossover.py      # milliseconds by size; what they say belongs into MANY of jit_delta/frames.py

Bytes are the exponent codes of normal weights, as `decodathlon pack` compresses them; both begin with frames in the
memory of the host and end with bytes on the GPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from decodathlon.decoders.jit_delta import frames
from decodathlon.harness.commands.command import say
from decodathlon.harness.results.table import aligned
from decodathlon.kernels.delta import reference


def milliseconds(work: Callable[[], Any], turns: int) -> float:
    """The median of some turns, after one that does not count."""
    found = []
    for _ in range(turns + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize()
        found.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(found[1:])


def codes(count: int) -> torch.Tensor:
    """(count,) uint8."""
    part = min(count, 1 << 20)
    weights = 0.02 * torch.randn(2 * part, generator=torch.Generator().manual_seed(0))
    planes = reference.nested(weights.to(torch.bfloat16).view(torch.int16))
    return planes.code.flatten().repeat(-(-count // part))[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    if not torch.cuda.is_available() or frames.nvcomp() is None:
        parser.error("this needs a CUDA device and nvCOMP: pip install nvidia-nvcomp-cu12")
    lines = [["MB", "by the host", "by the GPU", "host / GPU"]]
    for power in range(18, 29):
        raw = codes(1 << power)
        made = list(frames.pieces(raw.numpy(), compressed=True))
        stored, sizes = torch.frombuffer(bytearray(b"".join(made)), dtype=torch.uint8), list(map(len, made))
        assert torch.equal(frames.by_gpu(stored, sizes, len(raw), "cuda", "here").cpu(), raw)
        of = stored, sizes, len(raw)
        host = milliseconds(lambda of=of: frames.by_cpu(*of, "here").cuda(), options.turns)
        gpu = milliseconds(lambda of=of: frames.by_gpu(*of, "cuda", "here"), options.turns)
        lines.append([f"{(1 << power) / 1e6:.1f}", f"{host:.2f}", f"{gpu:.2f}", f"{host / gpu:.2f}"])
    say(f"{torch.cuda.get_device_name()}, nvCOMP {frames.nvcomp().__version__}")
    for line in aligned(lines):
        say(line)


if __name__ == "__main__":
    main()
