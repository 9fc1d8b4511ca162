"""Frames of zstd: there and back, damaged ones, and what is asked of nvCOMP where it is installed."""

import types

import numpy as np
import pytest
import torch
import zstandard

from decodathlon.decoders.jit_delta import frames
from decodathlon.harness.errors import MissingError


def packed(count):
    raw = np.random.default_rng(0).integers(0, 16, count).astype(np.uint8)
    made = list(frames.pieces(raw, compressed=True))
    return torch.from_numpy(raw), torch.frombuffer(bytearray(b"".join(made)), dtype=torch.uint8), list(map(len, made))


def library(decode):
    """What is used of nvCOMP, on a CPU."""
    seen = {}

    class Codec:
        def __init__(self, **options):
            seen["options"] = options

        def decode(self, arrays, data_type):
            seen["type"] = data_type
            return [decode(array) for array in arrays]

    return seen, types.SimpleNamespace(
        as_array=lambda tensor: tensor, Codec=Codec, BitstreamKind=types.SimpleNamespace(RAW="raw")
    )


def whole(array):
    try:
        found = zstandard.ZstdDecompressor().decompress(bytes(array.tolist()), max_output_size=frames.FRAME)
    except zstandard.ZstdError as error:
        raise RuntimeError("status 10") from error
    return torch.frombuffer(bytearray(found), dtype=torch.uint8)


@pytest.mark.parametrize("count", [1, frames.FRAME, 2 * frames.FRAME + 17])
def test_both_ways_give_the_bytes_back(count, monkeypatch):
    raw, stored, sizes = packed(count)
    assert len(sizes) == -(-count // frames.FRAME)
    assert torch.equal(frames.by_cpu(stored, sizes, count, "here"), raw)
    seen, fake = library(whole)
    monkeypatch.setattr(frames, "nvcomp", lambda: fake)
    assert torch.equal(frames.by_gpu(stored, sizes, count, "cpu", "here"), raw)
    assert seen == {"options": {"algorithm": "Zstd", "bitstream_kind": "raw"}, "type": "|u1"}


@pytest.mark.parametrize("harm", ["a byte", "a frame less", "a frame more", "sizes", "count"])
@pytest.mark.parametrize("way", ["by_cpu", "by_gpu"])
def test_damage_is_told_with_its_place(harm, way, monkeypatch):
    count = 2 * frames.FRAME + 17
    _, stored, sizes = packed(count)
    monkeypatch.setattr(frames, "nvcomp", lambda: library(whole)[1])
    if harm == "a byte":
        stored = stored.clone()
        stored[sizes[0] + 2] ^= 255  # in the header of the second frame
    elif harm == "a frame less":
        stored, sizes = stored[: -sizes[-1]], sizes[:-1]
    elif harm == "a frame more":
        stored, sizes = torch.cat([stored, stored[-sizes[-1] :]]), [*sizes, sizes[-1]]
    elif harm == "count":
        count -= 1
    if harm == "sizes":  # which are looked at before anything is unpacked
        with pytest.raises(MissingError, match="plane code of w is damaged"):
            frames.unpacked(stored, [*sizes[:-1], sizes[-1] - 1], count, "cpu", "plane code of w")
        return
    more = ("cpu",) if way == "by_gpu" else ()
    with pytest.raises(MissingError, match="plane code of w is damaged"):
        getattr(frames, way)(stored, sizes, count, *more, "plane code of w")


def test_nothing_is_no_damage():
    none = torch.empty(0, dtype=torch.uint8)
    assert len(frames.unpacked(none, [], 0, "cpu", "here")) == 0


@pytest.mark.skipif(not torch.cuda.is_available() or frames.nvcomp() is None, reason="needs a GPU and nvCOMP")
def test_a_gpu_unpacks_what_a_cpu_packed():
    raw, stored, sizes = packed(3 * frames.FRAME + 5)
    assert torch.equal(frames.by_gpu(stored, sizes, len(raw), "cuda", "here").cpu(), raw)
