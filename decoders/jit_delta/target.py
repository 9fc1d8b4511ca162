"""A packed model as a target: a Hugging Face model whose matrices are put together when they are read."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from decodathlon.decoders.jit_delta import contextual, frames, schemes, storage
from decodathlon.decoders.jit_delta.assembly import Place, placed, restored_tensor, skeleton
from decodathlon.decoders.jit_delta.container import Reader, Record
from decodathlon.decoders.jit_delta.modules import TYPES, Room
from decodathlon.decoders.jit_delta.persona import PersonaTarget
from decodathlon.harness import models
from decodathlon.harness.errors import MissingError, SpecError, UnsupportedError
from decodathlon.harness.targets.base import WeightReads
from decodathlon.harness.targets.transformers import TransformersTarget

#: Matrices that are read in one product, one above the other.
TOGETHER = re.compile(r"(?<=\.)(?:([qkv])_proj|(gate_proj|up_proj)|(w1|w3))\.weight$")


class PackedTarget(TransformersTarget):
    """See `TransformersTarget`; `packing` is what its matrices are put together of."""

    #: What it puts together depends on how many escapes there are, which no graph can know.
    static_loop = False
    counts_drafts = True

    def __init__(self, model: Any, tokenizer: Any, *, name: str, packing: Packing) -> None:
        super().__init__(model, tokenizer, name=name)
        self.packing = packing
        self.parameters = sum(packing.reader.records[n].count for n in (*packing.packed, *packing.plain))
        self.notes += packing.told()
        self.bits_per_weight = packing.bits_per_weight
        packing.room.told = self.happened

    @property
    def weight_reads(self) -> WeightReads:
        """What matrices were put together of, drafts among them, and in each pass what stays as it is."""
        left, storage = self.packing.need("disk")["weights that stay as they are"], self.packing.storage
        read = storage.handed + self.spent.calls * left
        return WeightReads(read, storage.fetched, storage.hits, storage.misses)

    def first_bits(self, bits: int) -> Any:
        """A forward by so many first bits of each weight (0: the usual number), for a context to be read on by
        (`Context.lent`).

        Raises:
            SpecError, UnsupportedError: there are no such bits, or nothing but them.
        """
        bits, storage = self._able(bits), self.packing.storage
        exact = self._lean if self._lean is not None else self._through_transformers

        def forward(*read: Any) -> Any:
            with storage.drafting(bits):
                return exact(*read)

        return forward

    def of_first_bits(self, bits: int) -> Any:
        """What makes of a product of the short forward the one with first bits of its weights; as `first_bits`."""
        return contextual.of_first_bits(self.packing.storage, self._able(bits))

    def _able(self, bits: int) -> int:
        packing = self.packing
        if packing.bits:
            raise UnsupportedError("weights that have more than their first bits", f"{self.name} has no others")
        try:
            return packing.reader.first_bits(bits)
        except SpecError as error:
            raise UnsupportedError("first bits of the model's weights", str(error)) from error

    def narrow(self, share: float, bits: int) -> None:
        """From now on be the model that reads this share of each MLP exactly, for each token those chunks that matter
        most to it, and of the rest the first bits.

        Raises:
            SpecError, UnsupportedError: as `first_bits`; the architecture has no short forward.
        """
        bits = self._able(bits)
        drafted = self.of_first_bits(bits)
        chunks = contextual.calibrated(self, drafted)
        self._lean, self.mixed = contextual.mixed(self.lean, drafted, chunks, share, attention=False)
        self.capabilities -= {"hf-model", "gradient"}  # those are of the exact model
        self.notes += (
            f"contextual: {share:.0%} of the chunks of each MLP exact, by token; of the rest the first {bits} bits. "
            "The text is not that of the exact model",
        )


@dataclass
class Packing:
    """A packed model while it runs."""

    reader: Reader
    room: Room
    #: resident, host or disk.
    where: str
    #: 0: the weights as they were; 4 to 6: what so many first bits of them say.
    bits: int
    #: Whether what matters for a token has to be found out first, which takes copies of a matrix in float32.
    contextual: bool = False
    #: Whether all of it is put together when it is loaded.
    whole: bool = False
    #: Tensors that are put together when they are read, and those that stay as they are.
    packed: list[str] = field(default_factory=list)
    plain: list[str] = field(default_factory=list)
    storage: storage.Storage = field(init=False)

    def need(self, where: str) -> dict[str, int]:
        """The arithmetic of memory: bytes by what they are for."""
        records, wide = self.reader.records, self.room.dtype.itemsize
        together: dict[str, int] = defaultdict(int)
        native = 0
        for name in self.packed:
            record = records[name]
            count = record.count // (record.shape[0] if len(record.shape) == 3 else 1)  # experts come one by one
            together[TOGETHER.sub(_group, name)] += count
            if TYPES[record.dtype] != self.room.dtype or len(record.shape) == 3:
                copied = record.memory // record.shape[0] if len(record.shape) == 3 else 0  # an expert's
                native = max(native, count * TYPES[record.dtype].itemsize + copied)
        kind = storage.kind(where, self.room.device)
        scratch = max((_scratch(records[n], self.room.device) for n in self.packed), default=0)
        return {
            "packed weights": kind.need(self.reader, self.packed, self.bits),
            "weights that stay as they are": sum(records[n].count for n in self.plain) * wide,
            "rebuilt at a time": max(together.values(), default=0) * wide + native + scratch,
            **({"unpacked at a time": unpacked} if (unpacked := frames.scratch(self.room.device)) else {}),
            **({"until it is put together": self._twice()} if self.whole else {}),
            **({"to find out what matters": 24 * max(together.values(), default=0)} if self.contextual else {}),
        }

    def _twice(self) -> int:
        """Bytes that tensors take beside the model that they become, in their type and in the model's."""
        native = [(r.count, TYPES.get(r.dtype, self.room.dtype)) for r in map(self.reader.records.get, self.plain) if r]
        return sum(n * (t.itemsize + (self.room.dtype.itemsize if t != self.room.dtype else 0)) for n, t in native)

    @property
    def bits_per_weight(self) -> float:
        """Of all, in the form that they are read in."""
        count = sum(self.reader.records[n].count for n in (*self.packed, *self.plain))
        kept = storage.Resident.need(self.reader, self.packed, self.bits)
        return 8 * (kept + self.need("disk")["weights that stay as they are"]) / max(count, 1)

    def told(self) -> tuple[str, ...]:
        what = f"the first {self.bits} bits of {self.reader.scheme}" if self.bits else self.reader.scheme
        what += f" on {self.reader.q4}" if self.reader.q4 else ""
        what += ", of weights that were rounded to bfloat16 before" if self.reader.cast else ""
        return (
            f"packed: {what}, {self.bits_per_weight:.2f} bits per weight, {self.where}; "
            f"{sum(self.need(self.where).values()) / 1e6:.0f} MB of weights at a time",
        )


def _scratch(record: Record, device: str) -> int:
    """Bytes that putting a tensor together takes besides, in the form that is used for it here."""
    from decodathlon.kernels.delta import dispatch

    return record.count * dispatch.scratch(record.form, device) if record.form in schemes.SCHEMES else 0


def _group(found: re.Match[str]) -> str:
    return "qkv" if found.group(1) else "gate_up"


def planned(
    folder: Path, name: str, *, device: str, dtype: str, where: str, bits: int, budget: int | None, base: Path | None
) -> tuple[Packing, Any, list[Place] | str]:  # fmt: skip
    """How a packed folder would run: its weights, the model without them, and where they go; or, of weights that can
    only be put together as a whole, why. Nothing but headers is read.

    Raises:
        MissingError: files are missing or torn.
        SpecError: its weights take more memory than `budget`; or `bits` of weights that have no such.
        UnsupportedError: weights that can only be put together as a whole are to lie elsewhere.
    """
    reader = Reader(folder, base)
    packing = Packing(reader, Room(getattr(torch, dtype), device), where, 0, where == "contextual")
    model = skeleton(reader, packing.room.dtype)
    places: list[Place] | str
    try:
        places = f"its weights differ from {reader.base}" if reader.base is not None else placed(model, reader)
    except LookupError as error:
        places = f"the model has {error}"
    if isinstance(places, str):
        packing.plain = sorted(reader.records)
        if where not in ("auto", "resident"):
            raise UnsupportedError(f"weights={where}", f"{name} can be put together as a whole only: {places}")
        packing.where, packing.whole = "resident", True
        within(packing, budget, other=False)
        return packing, model, places
    packing.packed = sorted({n for place in places for n in place.names if place.made})
    packing.plain = sorted({n for place in places for n in place.names if not place.made})
    if where == "base":
        packing.bits = reader.first_bits(bits)
    packing.where = within(packing, budget)
    return packing, model, places


def load(
    folder: Path, name: str, *, device: str, dtype: str, where: str = "auto", bits: int = 0, budget: int | None = None,
    base: Path | None = None, share: float = 0.0,
) -> TransformersTarget:  # fmt: skip
    """The target in a packed folder.

    Raises:
        MissingError, SpecError, UnsupportedError: as `planned`.
    """
    packing, model, places = planned(folder, name, device=device, dtype=dtype, where=where, bits=bits, budget=budget,
                                     base=base)  # fmt: skip
    tokenizer = _tokenizer(folder)
    if isinstance(places, str):
        return _whole_model(model, tokenizer, name, packing, places)
    need = packing.need(packing.where)
    room = None if budget is None else budget - sum(need.values()) + need["packed weights"]
    packing.storage = storage.kind(packing.where, device)(packing.reader, packing.packed, packing.bits, device, room)
    for place in places:
        place.fill(packing)
    target = PackedTarget(model, tokenizer, name=name, packing=packing)
    target.revision, target.file_bytes = packing.reader.revision, models.file_bytes(folder)
    if where == "contextual":
        target.narrow(share, bits)
    return target


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise MissingError(f"the tokenizer in {folder} cannot be read: {str(error).splitlines()[0]}") from error


def _whole_model(model: Any, tokenizer: Any, name: str, packing: Packing, why: str) -> TransformersTarget:
    """The model put together once, when it is loaded: its tensors are not called as its parameters are."""
    reader = packing.reader
    state = {n: restored_tensor(reader, n) for n in packing.plain}
    made, loaded = type(model).from_pretrained(
        None, config=model.config, state_dict=state, dtype=packing.room.dtype, output_loading_info=True
    )
    gaps = sorted(map(str, [*loaded["missing_keys"], *loaded["mismatched_keys"]]))
    if gaps:
        raise MissingError(f"the packed model in {reader.folder} lacks {len(gaps)} weights, among them {gaps[0]}")
    made.generation_config = model.generation_config
    made = made.to(packing.room.device)
    target: TransformersTarget = (
        PersonaTarget(made, tokenizer, name=name, reader=reader)
        if reader.base is not None
        else TransformersTarget(made, tokenizer, name=name)
    )
    folders = [reader.folder, *([reader.base] if reader.base is not None else [])]
    target.revision, target.file_bytes = reader.revision, sum(map(models.file_bytes, folders))
    target.notes += (f"packed: put together as a whole when loaded, for {why}",)
    return target


def within(packing: Packing, budget: int | None, *, other: bool = True) -> str:
    """Where the weights are to be.

    Args:
        other: whether they could be elsewhere.

    Raises:
        SpecError: they take more than the budget, with the arithmetic.
    """
    asked = {"auto": ["resident", "disk"], "base": ["resident"], "contextual": ["resident"]}.get(
        packing.where, [packing.where]
    )
    if budget is None:
        return asked[0]
    for where in asked:
        if sum(packing.need(where).values()) <= budget:
            return where
    need = packing.need(asked[-1])
    parts = " + ".join(f"{what} {size / 1e6:.1f} MB" for what, size in need.items())
    less = sum(packing.need("disk").values())
    able = other and asked[-1] != "disk" and not packing.bits and not packing.contextual
    remedy = f"; weights=disk needs {-(-less // 10**5) / 10:.1f}MB" if able else ""
    raise SpecError(
        f"memory={budget / 1e6:.1f} MB is too little for {packing.reader.folder} with weights={asked[-1]}: {parts}, "
        f"which needs memory={-(-sum(need.values()) // 10**5) / 10:.1f}MB{remedy}"
    )
