"""Frames of zstd: made by a CPU, unpacked by a CPU, or by a GPU where nvCOMP is installed (`nvidia-nvcomp-cu12`).

A frame holds 1 MiB and stands alone, so that a GPU has many to unpack side by side.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from decodathlon.harness.errors import MissingError
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

#: Bytes that are compressed together, and how hard: the planes are nibbles of high entropy, and more brings nothing.
FRAME, LEVEL = 1 << 20, 1
#: Bytes, unpacked, from which on a GPU does it. The founding note's guess; scripts/zstd_crossover.py measures it.
MANY = 10 << 20
#: Frames that a GPU unpacks side by side.
TOGETHER = 64


def pieces(raw: Any, *, compressed: bool) -> Iterator[bytes]:
    """Of bytes (n,) uint8 what goes to disk, a frame at a time."""
    import zstandard

    compressor = zstandard.ZstdCompressor(level=LEVEL)
    for at in range(0, len(raw), FRAME):
        piece = raw[at : at + FRAME].tobytes()
        yield compressor.compress(piece) if compressed else piece


def unpacked(stored: Tensor, sizes: Sequence[int], count: int, device: str, where: str) -> Tensor:
    """(count,) uint8 out of frames (bytes,) of these sizes: on the device if that is a GPU which can, else on the host.

    Raises:
        MissingError: they are damaged.
    """
    if sum(sizes) != len(stored) or min(sizes, default=1) < 0:
        raise MissingError(f"{where} is damaged; pack the model again")
    if torch.device(device).type == "cuda" and count >= MANY and nvcomp() is not None:
        return by_gpu(stored, sizes, count, device, where)
    return by_cpu(stored, sizes, count, where)


def by_cpu(stored: Tensor, sizes: Sequence[int], count: int, where: str) -> Tensor:
    """As `unpacked`."""
    import zstandard

    out, at, begin = torch.empty(count, dtype=torch.uint8), 0, 0
    view = memoryview(out.numpy()) if count else memoryview(b"")
    data = memoryview(stored.numpy())
    decompressor = zstandard.ZstdDecompressor()
    for size in sizes:
        try:
            piece = decompressor.decompress(data[begin : begin + size], max_output_size=FRAME)
        except zstandard.ZstdError as error:
            raise MissingError(f"{where} is damaged ({error}); pack the model again") from error
        if at + len(piece) > count:
            raise MissingError(f"{where} is damaged; pack the model again")
        view[at : at + len(piece)] = piece
        at, begin = at + len(piece), begin + size
    if at != count:
        raise MissingError(f"{where} is damaged; pack the model again")
    return out


def by_gpu(stored: Tensor, sizes: Sequence[int], count: int, device: str, where: str) -> Tensor:
    """As `unpacked`, on a CUDA device, some frames at a time; by the host where it does not come to its end, which
    tells damage from anything else that may befall a GPU."""
    library, out, at, begin = nvcomp(), torch.empty(count, dtype=torch.uint8, device=device), 0, 0
    codec = library.Codec(algorithm="Zstd", bitstream_kind=library.BitstreamKind.RAW, **_stream(device))
    try:
        for some in (sizes[i : i + TOGETHER] for i in range(0, len(sizes), TOGETHER)):
            there = stored[begin : begin + sum(some)].to(device)
            begin += sum(some)
            arrays = [library.as_array(piece) for piece in there.split(list(some))]
            for array in codec.decode(arrays, data_type="|u1"):
                piece = torch.as_tensor(array, device=device)
                out[at : at + len(piece)] = piece
                at += len(piece)
    except RuntimeError:
        return by_cpu(stored, sizes, count, where).to(device)
    if at != count:
        raise MissingError(f"{where} is damaged; pack the model again")
    return out


def scratch(device: str) -> int:
    """Bytes on the device that `unpacked` takes besides what it returns."""
    return 2 * TOGETHER * FRAME if torch.device(device).type == "cuda" and nvcomp() is not None else 0


@cache
def nvcomp() -> Any:
    """The library; None where it is not installed."""
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.nvcomp") is None:
        return None
    return importlib.import_module("nvidia.nvcomp")


def _stream(device: str) -> dict[str, int]:
    """Where torch works, so that what it does next comes behind."""
    return {"cuda_stream": torch.cuda.current_stream(device).cuda_stream} if device != "cpu" else {}
