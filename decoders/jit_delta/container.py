"""The files of a packed model: one for each file of the original, and `packing.json`, which says what is in them.

A packed file is a safetensors file: plane `code` of tensor `a.weight` is its tensor `a.weight:code`, of bytes. What is
compressed is so in independent frames of zstd, so that a layer or an expert is read without the others. The header of
the original lies in it too, as `:header`, because a file is given back byte for byte (docs/format.md).

It is written from front to back, with room left for its own header, and a journal beside it that says which tensors are
done; who is interrupted goes on behind the last of them.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import zlib
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from decodathlon.decoders.jit_delta import frames
from decodathlon.decoders.jit_delta.schemes import COMPRESSED, FIRST_BITS, Packed
from decodathlon.harness.errors import MissingError, SpecError
from decodathlon.harness.lazy import torch

VERSION = 2
#: Says of a folder what is being packed into it.
BEGUN = "packing.begun"
MANIFEST = "packing.json"
#: Room in a header for one plane, and for anything.
ENTRY, ROOM = 160, 4096
KINDS = (
    ("uint8", "U8", 1), ("int16", "I16", 2), ("int32", "I32", 4), ("int64", "I64", 8), ("float32", "F32", 4),
)  # fmt: skip
TYPES = {name: kind for name, kind, _ in KINDS}
#: Planes that have a row for each 256 numbers, by form, and how long one may be: what kernels read without looking
#: whether it is there.
BY_BLOCK: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {
    "nested": {
        "code": ("U8", (128,)), "first": ("U8", (32,)), "second": ("U8", (32,)), "middle": ("U8", (128,)),
        "last": ("U8", (32,)), "before": ("I16", ()),
    },
    "fixed12": {"code": ("U8", (128,)), "rest": ("U8", (256,))},
    "int4-delta": {
        "code": ("U8", (128,)), "scales": ("I16", (4, 8)), "low": ("U8", (256,)), "before": ("I16", ()),
    },
}  # fmt: skip
#: What torch calls the types of safetensors that a model's tensors may have.
NAMES = {
    "BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64", "BOOL": "bool", "U8": "uint8",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


class Source:
    """A safetensors file, its bytes mapped."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            MissingError: it is not there, or is torn or no such file.
        """
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            size = int.from_bytes(self._map[:8], "little")
            self.header = self._map[: 8 + size]
            found = json.loads(self.header[8:])
            found.pop("__metadata__", None)
            self.begin = 8 + size
            #: By name: dtype, shape and data_offsets; in the order in which the bytes lie.
            self.tensors: dict[str, dict[str, Any]] = dict(sorted(found.items(), key=lambda i: i[1]["data_offsets"]))
            end = max((t["data_offsets"][1] for t in self.tensors.values()), default=0)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise MissingError(f"{path} is no safetensors file, or torn: {error}") from error
        if self.begin + end != len(self._map):
            raise MissingError(
                f"{path} is torn: its header speaks of {self.begin + end} bytes, it has {len(self._map)}"
            )

    def data(self, name: str) -> Any:
        """(bytes,) uint8 of a tensor, as they lie in the file."""
        begin, end = (self.begin + at for at in self.tensors[name]["data_offsets"])
        return _tensor(np.frombuffer(self._map, np.uint8, end - begin, begin))


class Cast(Source):
    """A file as it would be with its floating-point numbers in bfloat16, rounded to even."""

    WIDER: ClassVar[dict[str, str]] = {"F16": "float16", "F32": "float32", "F64": "float64"}

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._own, made, at = self.tensors, {}, 0
        for name, told in self.tensors.items():
            begin, end = told["data_offsets"]
            wider = told["dtype"] in self.WIDER
            size = 2 * math.prod(told["shape"]) if wider else end - begin
            dtype = "BF16" if wider else told["dtype"]
            made[name] = {"dtype": dtype, "shape": told["shape"], "data_offsets": [at, at + size]}
            at += size
        text = json.dumps({"__metadata__": {"format": "pt"}, **made}, separators=(",", ":")).encode()
        text = text.ljust(-(-len(text) // 8) * 8)
        self.header, self.tensors = len(text).to_bytes(8, "little") + text, made

    def data(self, name: str) -> Any:
        begin, end = (self.begin + at for at in self._own[name]["data_offsets"])
        raw, kind = _tensor(np.frombuffer(self._map, np.uint8, end - begin, begin)), self._own[name]["dtype"]
        if kind not in self.WIDER:
            return raw
        return raw.clone().view(getattr(torch, self.WIDER[kind])).to(torch.bfloat16).view(torch.uint8)


def _tensor(array: Any) -> Any:
    """Without a copy; nobody writes into it."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


@dataclass
class Record:
    """What `packing.json` says of one tensor."""

    file: str
    dtype: str
    shape: list[int]
    form: str
    facts: dict[str, Any]
    #: Of its bytes as the original has them.
    sha256: str
    #: Entropy of its patterns, in bits per number; None where it was not looked at.
    floor: float | None
    #: By plane: type, shape, bytes in memory and in the file, a checksum, and the bytes of each compressed frame.
    planes: dict[str, dict[str, Any]]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def disk(self) -> int:
        return sum(p["stored"] for p in self.planes.values())

    @property
    def memory(self) -> int:
        return sum(p["bytes"] for p in self.planes.values())

    def check(self, name: str) -> None:
        """
        Raises:
            ValueError: planes are not as large as the form has them.
        """
        for plane, told in self.planes.items():
            size = math.prod(told["shape"]) * {kind: width for _, kind, width in KINDS}[told["dtype"]]
            if size != told["bytes"] or min(told["shape"], default=0) < 0:
                raise ValueError(f"plane {plane} of {name} has {told['bytes']} bytes, and its shape {size}")
        if self.form not in BY_BLOCK:
            return
        if self.facts["count"] != self.count:
            raise ValueError(f"{name} has {self.count} numbers, and its form {self.facts['count']}")
        blocks = -(-self.count // 256)
        if "spans" in self.planes and self.planes["spans"]["shape"] != [-(-blocks // 256)]:
            raise ValueError(f"plane spans of {name} is {self.planes['spans']['shape']}, not {[-(-blocks // 256)]}")
        for plane, (dtype, widths) in BY_BLOCK[self.form].items():
            able = [[blocks, width] for width in widths] or [[blocks]]
            if self.planes[plane]["dtype"] != dtype or self.planes[plane]["shape"] not in able:
                raise ValueError(f"plane {plane} of {name} is {self.planes[plane]['shape']}, not {able[0]}")


def checksum(told: Mapping[str, Any]) -> str:
    """Of all that a manifest says, but this."""
    rest = {key: value for key, value in told.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _of(told: Any, key: str, kind: type, folder: Path) -> Any:
    """A field of the manifest.

    Raises:
        MissingError: it is not there, or something else.
    """
    if not isinstance(told, dict) or not isinstance(told.get(key), kind):
        raise MissingError(f"{folder / MANIFEST} is torn, or not made by decodathlon pack: it has no {key}")
    return told[key]


class Writer:
    """One packed file on its way.

    Args:
        path: of the file to be.
        names: of the tensors that it will hold, for the room that their header needs.
    """

    def __init__(self, path: Path, names: list[str], header: bytes) -> None:
        self.path, self.part = path, path.with_suffix(".part")
        self.journal = path.with_suffix(".journal")
        self.room = ROOM + sum(ENTRY * 10 + 10 * len(json.dumps(name)) for name in names)
        #: What is done already, by an earlier run or this one.
        self.done: dict[str, Record] = {}
        self._header_at = (0, 0)
        end = self._taken_up()
        #: Whether an earlier run has put the file under its name.
        self.finished = path.exists()
        if self.finished:
            return
        self._file = self.part.open("r+b" if end else "w+b")
        self._file.truncate(end or 8 + self.room)
        self._file.seek(0, os.SEEK_END)
        self._lines = self.journal.open("a")
        if not end:
            self._header_at = self._put(header)
            self._note({"header": self._header_at, "end": self._file.tell()})

    def add(self, name: str, dtype: str, shape: list[int], packed: Packed, sha256: str) -> Record:
        """Write the planes of a tensor, and have them on disk before it counts as done."""
        planes = {plane: self._plane(plane, tensor) for plane, tensor in packed.planes.items()}
        record = Record(self.path.name, dtype, shape, packed.form, packed.facts, sha256, packed.floor, planes)
        self._note({"name": name, "record": vars(record), "end": self._file.tell()})
        self.done[name] = record
        return record

    def finish(self) -> None:
        """Put the header in its place, and the file under its name."""
        if self.finished:
            return
        entries: dict[str, Any] = {
            ":header": {"dtype": "U8", "shape": [self._header_at[1]], "data_offsets": self._offsets(*self._header_at)}
        }
        for name, record in self.done.items():
            for plane, told in record.planes.items():
                entries[f"{name}:{plane}"] = {
                    "dtype": "U8", "shape": [told["stored"]], "data_offsets": self._offsets(told["at"], told["stored"]),
                }  # fmt: skip
        text = json.dumps(entries, separators=(",", ":")).encode()
        if len(text) > self.room:
            raise AssertionError(f"{self.path}: a header of {len(text)} bytes in room for {self.room}")
        self._file.seek(0)
        self._file.write(self.room.to_bytes(8, "little") + text.ljust(self.room))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()
        os.replace(self.part, self.path)

    def close(self) -> None:
        self._file.close()
        self._lines.close()

    def _taken_up(self) -> int:
        """The end of what an earlier run has finished; 0 where there is none."""
        end = 0
        there = self.path if self.path.exists() else self.part
        if not (there.exists() and self.journal.exists()):
            for left in (self.journal, self.path):  # one without the other says nothing
                left.unlink(missing_ok=True)
            return end
        whole = 0
        for line in self.journal.read_bytes().splitlines(keepends=True):
            try:
                told = json.loads(line)
            except ValueError:
                break  # torn by whoever was interrupted
            if told["end"] > there.stat().st_size or not line.endswith(b"\n"):
                break
            end, whole = told["end"], whole + len(line)
            if "header" in told:
                self._header_at = tuple(told["header"])
            else:
                self.done[told["name"]] = Record(**told["record"])
        if end:
            os.truncate(self.journal, whole)  # what is noted from now on stands behind whole lines
        else:
            self.journal.unlink()
        return end

    def _note(self, told: Mapping[str, Any]) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._lines.write(json.dumps(told) + "\n")
        self._lines.flush()
        os.fsync(self._lines.fileno())

    def _plane(self, name: str, tensor: Any) -> dict[str, Any]:
        raw = tensor.contiguous().view(torch.uint8).flatten().numpy()
        told: dict[str, Any] = {
            "dtype": TYPES[str(tensor.dtype).removeprefix("torch.")], "shape": list(tensor.shape), "bytes": len(raw),
        }  # fmt: skip
        at, crc, stored = self._file.tell(), 0, 0
        sizes: list[int] = []
        for piece in frames.pieces(raw, compressed=name in COMPRESSED or name.startswith("byte")):
            crc, stored = zlib.crc32(piece, crc), stored + len(piece)
            sizes.append(len(piece))
            self._file.write(piece)
        told |= {"at": at, "stored": stored, "crc32": crc}
        if name in COMPRESSED or name.startswith("byte"):
            told["frames"] = sizes
        return told

    def _put(self, data: bytes) -> tuple[int, int]:
        at = self._file.tell()
        self._file.write(data)
        return at, len(data)

    def _offsets(self, at: int, size: int) -> list[int]:
        begin = at - 8 - self.room
        return [begin, begin + size]


class Reader:
    """A packed model on disk.

    Raises:
        MissingError: it is not there, or a file is torn.
        SpecError: it is of another version, or something else.
    """

    def __init__(self, folder: Path, base: Path | None = None) -> None:
        """
        Args:
            base: where the model lies now that this one was packed against; by default, where it lay then.
        """
        self.folder = folder
        try:
            told = json.loads((folder / MANIFEST).read_text())
        except OSError as error:
            if (folder / BEGUN).is_file():
                raise MissingError(
                    f"{folder} is not packed to the end; run the same `decodathlon pack` again"
                ) from error
            raise MissingError(f"{folder} is no packed model: it has no {MANIFEST}") from error
        except ValueError as error:
            raise MissingError(f"{folder / MANIFEST} is torn") from error
        if _of(told, "version", int, folder) != VERSION:
            raise SpecError(
                f"{folder} was packed in version {told.get('version')}; this one reads {VERSION}: remove it and "
                "pack the model again"
            )
        if base is not None and not told.get("against"):
            raise SpecError(f"{folder} was not packed against another model, so it takes no base={base}")
        self.scheme: str = _of(told, "scheme", str, folder)
        #: Whether numbers were rounded to bfloat16 before.
        self.cast = bool(told.get("cast"))
        #: The folder of the model that it was packed against.
        self.base = base or (Path(told["against"]) if told.get("against") else None)
        #: The name of the Q4 file whose numbers are the base.
        self.q4 = str(told.get("q4") or "")
        #: By file of the original: its name here.
        self.files: dict[str, dict[str, str]] = _of(told, "files", dict, folder)
        try:
            self.records = {name: Record(**record) for name, record in _of(told, "tensors", dict, folder).items()}
            for name, record in self.records.items():
                record.check(name)
            names = [*self.files, *(f["packed"] for f in self.files.values()), *(r.file for r in self.records.values())]
            if bad := [name for name in names if Path(name).name != name or name in ("", ".", "..")]:
                raise ValueError(f"it names {bad[0]}, which is no file in it")
            if told.get("sha256") != checksum(told):
                raise ValueError("it is not what was written; remove the folder and pack the model again")
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise MissingError(f"{folder / MANIFEST} is torn, or not made by decodathlon pack: {error}") from error
        #: Its tensors, once they were asked for (`pack.Weights`).
        self.other: Any = None
        self._open: dict[str, Source] = {}

    def read(
        self, name: str, *, only: Container[str] | None = None, check: bool = False, device: str = "cpu"
    ) -> Packed:
        """The planes of a tensor; those that are not compressed are mapped, not read.

        Args:
            only: the planes that are wanted; all of them where it is None.
            check: hold each plane against its checksum.
            device: where they are wanted; large ones that are compressed are unpacked there, if it can.

        Raises:
            MissingError: a plane is not what was written.
        """
        record = self.records[name]
        file = self._file(record.file)
        planes = {}
        for plane, told in record.planes.items():
            if only is not None and plane not in only:
                continue
            stored = file.data(f"{name}:{plane}")
            if len(stored) != told["stored"] or (check and zlib.crc32(stored.numpy()) != told["crc32"]):
                raise MissingError(
                    f"{file.path}: plane {plane} of {name} is damaged; remove {self.folder} and pack the model again"
                )
            raw = stored
            if "frames" in told:
                where = f"{file.path}: plane {plane} of {name}"
                raw = frames.unpacked(stored, told["frames"], told["bytes"], device, where)
            kind = {kind: dtype for dtype, kind in TYPES.items()}[told["dtype"]]
            planes[plane] = raw.view(getattr(torch, kind)).view(told["shape"])
        return Packed(record.form, planes, record.facts, record.floor)

    def first_bits(self, asked: int) -> int:
        """How many first bits of each weight are read, of those that the scheme has; 0 asks for the usual number.

        Raises:
            SpecError: it has no such, or most weights are of a type that no scheme is for.
        """
        if self.base is not None:
            raise SpecError(
                f"{self.folder} is stored as what it differs in from {self.base}, which has no first bits; pack it "
                "without --against"
            )
        have = FIRST_BITS[self.scheme]
        if asked not in (0, *have) or not have:
            remedy = f"take bits={' or '.join(map(str, sorted(have)))}" if have else "pack it by nested"
            raise SpecError(
                f"{self.folder} is packed by {self.scheme}, in which the first {asked or 'few'} bits of a weight say "
                f"nothing alone; {remedy}"
            )
        large = [r for r in self.records.values() if r.form != "raw"]
        other = [r for r in large if r.form != self.scheme]
        if other and 2 * sum(r.count for r in other) > sum(r.count for r in large):
            raise SpecError(
                f"{self.folder} has its weights in {other[0].dtype}, whose bytes are packed as they are and have no "
                "first bits; pack it with --cast bfloat16"
            )
        return asked or have[0]

    def header(self, original: str) -> bytes:
        """That of a file of the original.

        Raises:
            MissingError: it is not what it was.
        """
        found: bytes = self._file(self.files[original]["packed"]).data(":header").numpy().tobytes()
        if hashlib.sha256(found).hexdigest() != self.files[original].get("header"):
            raise MissingError(
                f"{self.folder}: the header of {original} is damaged; remove {self.folder} and pack the model again"
            )
        return found

    @property
    def revision(self) -> str:
        """What tells its weights from others."""
        shas = sorted((n, record.sha256) for n, record in self.records.items())
        return f"packed-sha256-{hashlib.sha256(repr(shas).encode()).hexdigest()[:16]}"

    def _file(self, name: str) -> Source:
        if name not in self._open:
            self._open[name] = Source(self.folder / name)
        return self._open[name]
