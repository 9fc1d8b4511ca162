"""Packing a model and giving it back: `decodathlon pack`, `verify`, `unpack`, `inspect`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from decodathlon.decoders.jit_delta import schemes
from decodathlon.decoders.jit_delta.container import MANIFEST, VERSION, Reader, Record, Source, Writer
from decodathlon.harness import progress
from decodathlon.harness.errors import MissingError, SpecError
from decodathlon.harness.lazy import torch

Say = Callable[[str], None]
#: What goes along with the weights: everything small that is neither weights nor somebody else's form of them.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
#: Bits per number that a scheme is expected to take on disk, to ask for room; what is left free besides.
EXPECTED, SPARE = {"nested": 11.2, "fixed12": 11.2}, 64 << 20


def sources(folder: Path) -> list[Path]:
    """The files of a model's weights.

    Raises:
        MissingError: there are none, one that the index names is not there, or they are pickles.
        SpecError: they are quantised already.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise MissingError(f"{folder} is no model: it has no config.json")
    try:
        told = json.loads(config.read_text())
    except ValueError as error:
        raise MissingError(f"{config} is torn") from error
    if "quantization_config" in told:
        method = told["quantization_config"].get("quant_method", "some method")
        raise SpecError(f"{folder} is quantised already ({method}); pack the weights that it was made of")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise MissingError(f"{index} is torn") from error
        lacking = [name for name in names if not (folder / name).is_file()]
        if lacking:
            raise MissingError(f"{index} names {lacking[0]}, which is not there")
        return [folder / name for name in names]
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        if pickles:
            raise MissingError(
                f"{folder} has its weights in {pickles[0]}, a pickle, which may run anything; save them as safetensors "
                "first (save_pretrained does)"
            )
        raise MissingError(f"{folder} has no .safetensors file")
    return found


def pack(folder: Path, out: Path, scheme: str, say: Say) -> Reader:
    """Pack the weights in `folder` into `out`; goes on where an earlier run was interrupted.

    Raises:
        SpecError, MissingError: as `sources`; `out` holds something else, or has no room.
    """
    files = [Source(path) for path in sources(folder)]
    _claim(out, folder, scheme)
    _check_room(out, files, scheme)
    records: dict[str, Record] = {}
    told: dict[str, dict[str, str]] = {}
    work = [(file, name) for file in files for name in file.tensors]
    writer: Writer | None = None
    try:
        for file, name in progress.told(work, "tensors", say):
            packed = out / f"{file.path.stem}.packed.safetensors"
            if writer is None or writer.path != packed:
                writer = _next(writer)
                writer = Writer(packed, list(file.tensors), file.header)
            if name not in writer.done:
                _add(writer, file, name, scheme)
            records[name] = writer.done[name]
            told[file.path.name] = {"packed": packed.name}
        _next(writer)
    except OSError as error:
        raise MissingError(
            f"{out} cannot be written: {error.strerror}. What is done is kept; run again to go on"
        ) from error
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.endswith(WEIGHTS):
            shutil.copy2(path, out / path.name)
    manifest = {
        "version": VERSION, "scheme": scheme, "files": told, "tensors": {n: vars(r) for n, r in records.items()},
    }  # fmt: skip
    part = out / f"{MANIFEST}.part"
    part.write_text(json.dumps(manifest))
    os.replace(part, out / MANIFEST)
    for journal in out.glob("*.journal"):
        journal.unlink()
    return Reader(out)


def _next(writer: Writer | None) -> None:
    if writer is not None:
        writer.finish()


def _add(writer: Writer, file: Source, name: str, scheme: str) -> None:
    told, digest = file.tensors[name], hashlib.sha256()
    packed = schemes.encode(file.data(name), told["dtype"], scheme, lambda part: digest.update(part.numpy()))
    writer.add(name, told["dtype"], told["shape"], packed, digest.hexdigest())


def _claim(out: Path, folder: Path, scheme: str) -> None:
    """Make the folder ours, and see that what lies in it was begun with the same weights."""
    stamps = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in sources(folder)]
    own = {"of": str(folder.resolve()), "scheme": scheme, "files": stamps}
    begun = out / "packing.begun"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if begun.exists():
            if json.loads(begun.read_text()) != own:
                raise SpecError(f"{out} holds what was packed of other weights, or otherwise; take another folder")
        elif any(out.iterdir()):
            raise SpecError(f"{out} is not empty; take another folder")
        else:
            begun.write_text(json.dumps(own))
    except ValueError as error:
        raise SpecError(f"{begun} is torn; remove {out} and begin anew") from error
    except OSError as error:
        raise MissingError(f"{out} cannot be written: {error.strerror}") from error


def _check_room(out: Path, files: list[Source], scheme: str) -> None:
    """
    Raises:
        MissingError: there is less room than the packed weights are expected to take.
    """
    need = SPARE
    for file in files:
        for told in file.tensors.values():
            begin, end = told["data_offsets"]
            packed = told["dtype"] == "BF16"
            need += int((end - begin) * (EXPECTED[scheme] / 16 if packed else 1))
    need -= sum(p.stat().st_size for p in out.glob("*.safetensors")) + sum(p.stat().st_size for p in out.glob("*.part"))
    free = shutil.disk_usage(out).free
    if need > free:
        raise MissingError(f"{out} has {free / 1e9:.1f} GB free, and about {need / 1e9:.1f} GB are needed")


def restored(reader: Reader, name: str) -> Any:
    """(bytes,) uint8 of a tensor as the original has them.

    Raises:
        MissingError: what comes out is not what went in.
    """
    record = reader.records[name]
    packed = reader.read(name, check=True)
    out = torch.empty(record.facts["count"] * 2 if "count" in record.facts else record.memory, dtype=torch.uint8)
    schemes.decode(packed, out)
    if hashlib.sha256(out.numpy()).hexdigest() != record.sha256:
        raise MissingError(f"{name} in {reader.folder} does not come back as it was; pack the model again")
    return out


def verify(folder: Path, say: Say) -> int:
    """Every tensor against the checksum of the original's. Returns how many there are.

    Raises:
        MissingError: a tensor does not come back as it was, which is named.
    """
    reader = Reader(folder)
    for name in progress.told(list(reader.records), "tensors", say):
        restored(reader, name)
    return len(reader.records)


def unpack(folder: Path, out: Path, say: Say) -> list[Path]:
    """Give the files of the original back, byte for byte, with what lies beside them."""
    reader = Reader(folder)
    if out.exists() and any(out.iterdir()):
        raise SpecError(f"{out} is not empty; take another folder")
    made = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for original in reader.files:
            header = reader.header(original)
            told = json.loads(header[8:])
            told.pop("__metadata__", None)
            names = sorted(told, key=lambda name: told[name]["data_offsets"])
            part = out / f"{original}.part"
            with part.open("wb") as file:
                file.write(header)
                for name in progress.told(names, f"{original}: tensors", say):
                    file.write(restored(reader, name).numpy())
            os.replace(part, out / original)
            made.append(out / original)
        for path in sorted(folder.iterdir()):
            ours = path.name == MANIFEST or path.name.endswith(".packed.safetensors") or path.name == "packing.begun"
            if path.is_file() and not ours:
                shutil.copy2(path, out / path.name)
    except OSError as error:
        raise MissingError(f"{out} cannot be written: {error.strerror}") from error
    return made
