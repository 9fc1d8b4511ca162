"""Packing a model and giving it back: `decodathlon pack`, `verify`, `unpack`, `inspect`."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from decodathlon.decoders.jit_delta import against, schemes
from decodathlon.decoders.jit_delta.container import (
    BEGUN,
    MANIFEST,
    VERSION,
    Cast,
    Reader,
    Record,
    Source,
    Writer,
    checksum,
)
from decodathlon.decoders.jit_delta.q4 import BLOCK, GROUP, Q4File
from decodathlon.harness import progress
from decodathlon.harness.errors import MissingError, SpecError
from decodathlon.harness.lazy import torch

Say = Callable[[str], None]
#: What goes along with the weights: everything small that is neither weights nor somebody else's form of them.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
#: Bits per number that a scheme is expected to take on disk, to ask for room; what is left free besides.
EXPECTED, SPARE = {"nested": 11.2, "fixed12": 11.2, "int4-delta": 13.5}, 64 << 20


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
    if told.get("quantization_config"):
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
    if folder / "model.safetensors" in found:  # what others there are is not the model
        return [folder / "model.safetensors"]
    if not found:
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        if pickles:
            raise MissingError(
                f"{folder} has its weights in {pickles[0]}, a pickle, which may run anything; save them as safetensors "
                "first (save_pretrained does)"
            )
        raise MissingError(f"{folder} has no .safetensors file")
    return found


class Weights:
    """The tensors of a model in a folder, packed or not, as bytes.

    Raises:
        SpecError, MissingError: as `sources`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._packed = Reader(folder) if (folder / MANIFEST).is_file() else None
        files = [] if self._packed else [Source(path) for path in sources(folder)]
        self._where = {name: file for file in files for name in file.tensors}

    def kind(self, name: str) -> tuple[str, list[int]] | None:
        """Type and shape of a tensor; None where there is none."""
        if self._packed is not None:
            record = self._packed.records.get(name)
            return None if record is None else (record.dtype, record.shape)
        told = self._where[name].tensors[name] if name in self._where else None
        return None if told is None else (told["dtype"], told["shape"])

    def data(self, name: str) -> Any:
        """(bytes,) uint8.

        Raises:
            MissingError: there is no such tensor.
        """
        if self.kind(name) is None:
            raise MissingError(f"{self.folder} has no tensor {name}")
        return restored(self._packed, name) if self._packed is not None else self._where[name].data(name)


def pack(
    folder: Path,
    out: Path,
    scheme: str,
    say: Say,
    base: Path | None = None,
    *,
    cast: bool = False,
    q4: Path | None = None,
) -> Reader:
    """Pack the weights in `folder` into `out`; goes on where an earlier run was interrupted.

    Args:
        base: a model of which only differences are to be stored.
        cast: round to bfloat16 what has more bits; what comes back is that.
        q4: a GGUF file whose numbers in Q4_0 are the base of `int4-delta`.

    Raises:
        SpecError, MissingError: as `sources`; `out` holds something else, or has no room; `q4` is of another model, or
            has nothing in Q4_0.
    """
    if q4 is not None and (scheme != "int4-delta" or base is not None):
        raise SpecError(
            f"{q4} can be the base of int4-delta alone; pack with --scheme int4-delta, and without --against"
        )
    files = [Cast(path) if cast else Source(path) for path in sources(folder)]
    twice = [name for name, count in Counter(n for file in files for n in file.tensors).items() if count > 1]
    if twice:
        raise SpecError(f"{folder} has {twice[0]} in two of its files; leave those of one model there")
    other = None if base is None else Weights(base)
    if other is not None and not any(
        other.kind(n) == (told["dtype"], told["shape"]) for file in files for n, told in file.tensors.items()
    ):
        raise SpecError(f"{base} has no tensor of the name, type and shape of one of {folder}: it is no base of it")
    given = None if q4 is None else Q4File(q4)
    if given is not None:
        large = ((n, f) for f in files for n in f.tensors if _form(f, n, scheme) == "int4-delta")
        given.compare((n, f.tensors[n]["shape"], f.data(n)) for n, f in large)
    how = scheme + (", cast" if cast else "") + ("" if base is None else f", against {_stamped(base)}")
    how += "" if q4 is None else f", on {_stamp(q4)}"
    _claim(out, folder, how)
    if (out / MANIFEST).is_file():
        found = Reader(out)
        for original in found.files:
            found.header(original)
        for name in progress.told(list(found.records), "tensors checked", say):
            found.read(name, check=True)
        say(f"{out} is packed already")
        return found
    _check_room(out, files, scheme)
    records: dict[str, Record] = {}
    told: dict[str, dict[str, str]] = {}
    work = [(file, name) for file in files for name in file.tensors]
    writer: Writer | None = None
    try:
        for file, name in progress.told(work, "tensors", say, lambda one: math.prod(one[0].tensors[one[1]]["shape"])):
            packed = out / f"{file.path.stem}.packed.safetensors"
            if writer is None or writer.path != packed:
                writer = _next(writer)
                writer = Writer(packed, list(file.tensors), file.header)
            if name not in writer.done:
                _add(writer, file, name, scheme, other, given)
            records[name] = writer.done[name]
            told[file.path.name] = {"packed": packed.name, "header": hashlib.sha256(file.header).hexdigest()}
        _next(writer)
        for path in sorted(folder.iterdir()):
            if path.is_file() and not path.name.endswith(WEIGHTS):
                shutil.copy2(path, out / path.name)
        manifest = {
            "version": VERSION, "scheme": scheme, "files": told, "tensors": {n: vars(r) for n, r in records.items()},
        }  # fmt: skip
        if base is not None:
            manifest["against"] = str(base.resolve())
        if cast:
            manifest["cast"] = "bfloat16"
        if given is not None:
            manifest["q4"] = given.path.name
            say(_stood(given, records))
        part = out / f"{MANIFEST}.part"
        part.write_text(json.dumps(manifest | {"sha256": checksum(manifest)}))
        os.replace(part, out / MANIFEST)
        for journal in out.glob("*.journal"):
            journal.unlink()
    except OSError as error:
        raise MissingError(
            f"{out} cannot be written: {error.strerror}. What is done is kept; run again to go on"
        ) from error
    return Reader(out)


def _next(writer: Writer | None) -> None:
    if writer is not None:
        writer.finish()


def _add(writer: Writer, file: Source, name: str, scheme: str, base: Weights | None, q4: Q4File | None) -> None:
    told, digest = file.tensors[name], hashlib.sha256()
    each = lambda part: digest.update(part.numpy())  # noqa: E731
    dtype, data = told["dtype"], file.data(name)
    if base is not None and base.kind(name) == (dtype, told["shape"]) and dtype in schemes.WIDTH and len(data):
        packed = against.difference(data, base.data(name), dtype, each)
    else:
        packed = schemes.encode(data, dtype, scheme, each, None if q4 is None else q4.bases.get(name))
    writer.add(name, told["dtype"], told["shape"], packed, digest.hexdigest())


def _stood(q4: Q4File, records: dict[str, Record]) -> str:
    """How much of a model stands on the numbers of a Q4 file, and what that lacks."""
    of = [r for r in records.values() if r.form == "int4-delta"]
    on = [r for r in of if r.planes["scales"]["shape"][-1] * GROUP == BLOCK]
    rest = sum(told["stored"] for r in on for plane, told in r.planes.items() if plane not in ("code", "scales"))
    others = "".join(f"; {n} have their own ({why})" for why, n in q4.others.most_common())
    lacks = f", which lacks {8 * rest / sum(r.count for r in on):.2f} bits per weight of them" if on else ""
    return f"{len(on)} of {len(of)} matrices stand on the numbers of {q4.path.name}{lacks}{others}"


def _form(file: Source, name: str, scheme: str) -> str:
    told = file.tensors[name]
    return schemes.form_of(told["dtype"], math.prod(told["shape"]), scheme)


def _stamped(folder: Path) -> str:
    """A model in a folder: where it is, and what tells its files from later ones."""
    files = [folder / MANIFEST] if (folder / MANIFEST).is_file() else sources(folder)
    return f"{folder.resolve()}: {', '.join(map(_stamp, files))}"


def _stamp(path: Path) -> str:
    return f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}"


def _claim(out: Path, folder: Path, scheme: str) -> None:
    """Make the folder ours, and see that what lies in it was begun with the same weights."""
    own = {"of": _stamped(folder), "scheme": scheme}
    begun = out / BEGUN
    try:
        out.mkdir(parents=True, exist_ok=True)
        if begun.exists():
            if (there := json.loads(begun.read_text())) != own:
                raise SpecError(
                    f"{out} was begun with {there.get('of')}, {there.get('scheme')}, and this is {own['of']}, "
                    f"{own['scheme']}: other weights, or packed otherwise; take another folder"
                )
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
    if record.form == "against":
        assert reader.base is not None
        out = torch.empty(record.count * schemes.WIDTH[record.dtype], dtype=torch.uint8)
        against.applied(packed, base_of(reader).data(name), out, f"{name} in {reader.folder} and {reader.base}")
    else:
        out = torch.empty(record.facts["count"] * 2 if "count" in record.facts else record.memory, dtype=torch.uint8)
        schemes.decode(packed, out)
    if hashlib.sha256(out.numpy()).hexdigest() != record.sha256:
        raise MissingError(
            f"{name} in {reader.folder} does not come back as it was; remove {reader.folder} and pack the model again"
        )
    return out


def base_of(reader: Reader) -> Weights:
    """Of a model that was packed against another one, that.

    Raises:
        MissingError: it is not where it was.
    """
    assert reader.base is not None
    if not reader.base.is_dir():
        raise MissingError(
            f"{reader.folder} was packed against another model, which is not in {reader.base}; say where it is "
            "(base=FOLDER, or --base FOLDER)"
        )
    if reader.other is None:
        reader.other = Weights(reader.base)
    return reader.other


def verify(folder: Path, say: Say, base: Path | None = None) -> int:
    """Every tensor against the checksum of the original's. Returns how many there are.

    Raises:
        MissingError: a tensor does not come back as it was, which is named.
    """
    reader = Reader(folder, base)
    for original in reader.files:
        reader.header(original)
    for name in progress.told(list(reader.records), "tensors", say):
        restored(reader, name)
    return len(reader.records)


def unpack(folder: Path, out: Path, say: Say, base: Path | None = None) -> list[Path]:
    """Give the files of the original back, byte for byte, with what lies beside them."""
    reader = Reader(folder, base)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SpecError(f"{out} is not an empty folder; take another one")
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
            ours = path.name == MANIFEST or path.name.endswith(".packed.safetensors") or path.name == BEGUN
            if path.is_file() and not ours:
                shutil.copy2(path, out / path.name)
    except OSError as error:
        raise MissingError(f"{out} cannot be written: {error.strerror}") from error
    return made
