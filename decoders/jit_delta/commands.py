"""`decodathlon pack`, `verify`, `inspect` and `unpack`."""

from __future__ import annotations

import argparse
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from decodathlon.decoders.jit_delta import pack, schemes
from decodathlon.decoders.jit_delta.container import MANIFEST, Reader, Record
from decodathlon.harness import models
from decodathlon.harness.commands.command import Command, say
from decodathlon.harness.errors import SpecError
from decodathlon.harness.registry import registry
from decodathlon.harness.results.table import DASH, aligned

#: Bits of a number by its type.
BITS = {name: 8 * width for name, width in schemes.WIDTH.items()} | {"F64": 64}


def _pack_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a folder with safetensors, a hub id, or a name that --model takes")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the packed model; an interrupted one goes on")
    parser.add_argument("--cast", choices=["bfloat16"], help="round what has more bits; what comes back is that")
    parser.add_argument("--against", metavar="BASE", help="store what it differs in from this model (folder or name)")
    parser.add_argument("--q4", type=Path, metavar="GGUF", help="a Q4_0 file of the model as the base of int4-delta")
    parser.add_argument("--scheme", choices=schemes.SCHEMES, default="nested", help="of BF16 weights (default nested)")


def _pack(options: argparse.Namespace) -> int:
    folder = _folder(options.model)
    base = None if options.against is None else _folder(options.against, packed=True)
    begin = time.monotonic()
    reader = pack.pack(folder, options.out, options.scheme, say, base, cast=options.cast is not None, q4=options.q4)
    seconds = time.monotonic() - begin
    for line in summary(list(reader.records.values())):
        say(line)
    if reader.scheme != "fixed12" and any(r.form == "bytes" for r in reader.records.values()):
        say("numbers of more bits than BF16 have gained little: --cast bfloat16 rounds them first, to another model")
    say(f"packed in {seconds:.0f} s into {options.out}; decodathlon verify {options.out} proves that it comes back")
    return 0


def _folder(text: str, *, packed: bool = False) -> Path:
    """Where the safetensors of a model are, or the folder of a packed one."""
    if packed and (Path(text).expanduser() / MANIFEST).is_file():
        return Path(text).expanduser()
    if (Path(text).expanduser() / MANIFEST).is_file():
        raise SpecError(f"{text} is packed already")
    model = models.resolve(text)
    if model.kind not in ("folder", "hub", "embedded"):
        raise SpecError(f"{text} has no safetensors to pack; give a folder, a hub id or a name that has")
    models.check(model, "cpu")
    return Path(models.fetch(model, say))


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("packed", type=Path, metavar="PACKED", help="a packed model")
    parser.add_argument("--every", action="store_true", help="a line per tensor, not per kind of tensor")


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("packed", type=Path, metavar="PACKED", help="a packed model")
    parser.add_argument("--base", type=Path, help="where the model lies now that it was packed against")


def _verify(options: argparse.Namespace) -> int:
    count = pack.verify(options.packed, say, options.base)
    rounded = ", as they were rounded to bfloat16" if Reader(options.packed, options.base).cast else ""
    say(f"all {count} tensors come back bit for bit{rounded}")
    return 0


def _unpack_arguments(parser: argparse.ArgumentParser) -> None:
    _verify_arguments(parser)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the original, which must be empty")


def _unpack(options: argparse.Namespace) -> int:
    for path in pack.unpack(options.packed, options.out, say, options.base):
        say(f"{path}")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    reader = Reader(options.packed)
    groups: dict[str, list[Record]] = defaultdict(list)
    for name, record in reader.records.items():
        groups[name if options.every else re.sub(r"\d+", "*", name)].append(record)
    say(
        f"{options.packed}: scheme {reader.scheme}"
        + (f", against {reader.base}" if reader.base else "")
        + (f", on {reader.q4}" if reader.q4 else "")
    )
    for line in aligned(table(groups)):
        say(line)
    for line in summary(list(reader.records.values())):
        say(line)
    return 0


def table(groups: dict[str, list[Record]]) -> list[list[str]]:
    """A line per group of tensors: bits per number as the original has them, in memory, on disk, and the entropy of
    their patterns, below which no code goes that looks at one number at a time."""
    lines = [["tensor", "of them", "numbers", "type", "form", "bits", "in memory", "on disk", "floor"]]
    for name, some in groups.items():
        count = sum(r.count for r in some)
        if not count:
            continue
        floors = [(r.floor, r.count) for r in some if r.floor is not None]
        floor = f"{sum(f * n for f, n in floors) / sum(n for _, n in floors):.2f}" if floors else DASH
        lines.append(
            [name, str(len(some)), f"{count:,}", "/".join(sorted({r.dtype for r in some})),
             "/".join(sorted({r.form for r in some})), str(BITS.get(some[0].dtype, DASH)),
             f"{8 * sum(r.memory for r in some) / count:.2f}", f"{8 * sum(r.disk for r in some) / count:.2f}", floor]
        )  # fmt: skip
    return lines


def summary(records: Sequence[Record]) -> list[str]:
    """What packing brought, by type."""
    found = []
    for dtype in sorted({r.dtype for r in records}):
        some = [r for r in records if r.dtype == dtype and r.count]
        count = sum(r.count for r in some)
        if not count:
            continue
        disk, memory = (8 * sum(getattr(r, what) for r in some) / count for what in ("disk", "memory"))
        bits = BITS.get(dtype)
        saved = f", {1 - disk / bits:.1%} less than {bits}" if bits else ""
        against = any(r.form == "against" for r in some)
        rest = "beside the base, which is needed too" if against else f"{memory:.2f} in memory"
        found.append(f"{dtype}: {count:,} numbers, {disk:.2f} bits each on disk{saved}; {rest}")
    return found


for name, command in {
    "pack": Command("compress a model without loss", _pack_arguments, _pack),
    "verify": Command("prove that a packed model comes back bit for bit", _verify_arguments, _verify),
    "inspect": Command("bits per weight of a packed model, by tensor", _inspect_arguments, _inspect),
    "unpack": Command("give the original of a packed model back", _unpack_arguments, _unpack),
}.items():
    registry.add("command", name, command, __file__)
