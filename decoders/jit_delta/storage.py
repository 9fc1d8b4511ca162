"""Where the bytes of a packed model are while it runs: on the device that computes, in the memory of the host, or on
disk; from there the next layer comes while one is read."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal, NamedTuple

from decodathlon.decoders.jit_delta.container import Reader, Record
from decodathlon.decoders.jit_delta.schemes import Packed, drafts
from decodathlon.harness.lazy import torch

#: Planes that the first 4, 5 and 6 bits of a weight lie in, by scheme.
ESCAPES = ("code", "escapes", "before", "spans", "means")
FIRST = {
    "nested": {4: ESCAPES, 5: (*ESCAPES, "first"), 6: (*ESCAPES, "first", "second")},
    "int4-delta": {4: ("code", "scales")},
}
#: A layer, and in it perhaps an expert: what is read from disk at once.
UNIT = re.compile(r"^(.*?\.\d+\.)(.*?experts\.\d+\.)?")


def wanted(form: str, bits: int) -> tuple[str, ...] | None:
    """The planes of a tensor that a draft of so many bits reads; None: all of them."""
    return FIRST[form][bits] if drafts(form, bits) else None


def size(record: Record, bits: int = 0, where: Literal["bytes", "stored"] = "bytes") -> int:
    """Bytes of what is read of a tensor: in memory, or as they are stored on disk."""
    only = wanted(record.form, bits)
    return sum(told[where] for plane, told in record.planes.items() if only is None or plane in only)


def unit(name: str) -> str:
    """What is read together with a tensor: its layer, its expert, or else itself."""
    found = UNIT.match(name)
    return found.group() if found else name


def layer_of(name: str) -> str:
    """The unit of the layer that an expert is in; of any other unit itself."""
    found = UNIT.match(name)
    return found.group(1) if found else name


class Asked(NamedTuple):
    """What is read at once: a unit, and how many first bits of its weights (0: all)."""

    unit: str
    bits: int


class Storage(ABC):
    """The planes of the tensors of a packed model, on the device that puts them together.

    Args:
        names: of the tensors that it is for.
        bits: how many first bits of a weight are wanted; 0: all of it.
        room: bytes of planes that may be on the device, where not all of them are.
    """

    def __init__(
        self, reader: Reader, names: Iterable[str], bits: int = 0, device: str = "cpu", room: int | None = None
    ) -> None:
        self.reader, self.own, self.device = reader, bits, device
        #: How many first bits matrices are to be made of now.
        self.bits = bits
        self.names = list(names)
        #: Bytes of planes that were handed out so far: what rebuilding had to read.
        self.handed = 0
        #: Units that were there or on their way when they were asked for, units that were not, and bytes that were
        #: brought here, in vain or not; of planes that are here for good, none.
        self.hits = self.misses = self.fetched = 0
        self._checked: set[tuple[str, int]] = set()

    @contextmanager
    def drafting(self, bits: int) -> Iterator[None]:
        """Meanwhile matrices are made of so many first bits."""
        before, self.bits = self.bits, bits
        try:
            yield
        finally:
            self.bits = before

    def planes(self, name: str, bits: int, share: float = 1.0) -> Packed:
        """The planes of a tensor that so many bits need, which its caller reads before it asks for others.

        Args:
            share: how much of them it is going to look at.
        """
        self.handed += int(share * size(self.reader.records[name], bits))
        return self._planes(name, bits)

    @abstractmethod
    def _planes(self, name: str, bits: int) -> Packed: ...

    @classmethod
    @abstractmethod
    def need(cls, reader: Reader, names: Iterable[str], bits: int = 0) -> int:
        """The most bytes of planes that are on the device at a time."""

    def _read(self, name: str, bits: int) -> Packed:
        """From disk to memory of our own; the first time, planes are held against their checksums."""
        record = self.reader.records[name]
        check = (name, bits) not in self._checked
        found = self.reader.read(name, only=wanted(record.form, bits), check=check, device=self.device)
        self._checked.add((name, bits))
        own = {  # what was compressed is ours already; the others are mapped
            plane: tensor.to(self.device, copy="frames" not in record.planes[plane])
            for plane, tensor in found.planes.items()
        }
        return replace(found, planes=own)


class Resident(Storage):
    """All planes in the memory of the device."""

    def __init__(
        self, reader: Reader, names: Iterable[str], bits: int = 0, device: str = "cpu", room: int | None = None
    ) -> None:
        super().__init__(reader, names, bits, device)
        self._all = {name: self._read(name, bits) for name in self.names}

    def _planes(self, name: str, bits: int) -> Packed:
        return self._all[name]

    @classmethod
    def need(cls, reader: Reader, names: Iterable[str], bits: int = 0) -> int:
        return sum(size(reader.records[name], bits) for name in names)


class OnDisk(Storage):
    """Units (layers, experts) in memory as long as there is room, those that were not read for the longest time given
    up first; and what is likely to be read next on its way.

    A step of a model reads its layers in the same order again and again, so what comes next is known after the first.
    Which experts it reads is not; those that a draft of the same tokens was routed to are likely. A wrong guess costs
    time. Layers that fit beside the one that is read and the one on its way stay for good.

    Args:
        room: bytes of planes in memory; at least two units.
    """

    def __init__(
        self, reader: Reader, names: Iterable[str], bits: int = 0, device: str = "cpu", room: int | None = None
    ) -> None:
        super().__init__(reader, names, bits, device)
        self.units: dict[str, list[str]] = defaultdict(list)
        for name in self.names:
            self.units[unit(name)].append(name)
        self._sizes: dict[Asked, int] = {}
        least = self.need(reader, self.names, bits)
        self.room = max(least, room or 0)
        self._stay = self._staying(self.room - least)
        #: Read or on their way, by when they were asked for last.
        self._kept: OrderedDict[Asked, Future[dict[str, Packed]]] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="planes")
        self._now, self._planes_now = Asked("", bits), dict[str, Packed]()
        #: What was asked for behind each unit the last time; the experts that a draft was routed to, by layer.
        self._behind: dict[Asked, Asked] = {}
        self._routed: dict[str, list[str]] = defaultdict(list)

    def _planes(self, name: str, bits: int) -> Packed:
        asked = Asked(unit(name), bits)
        whole = Asked(asked.unit, self.own)
        asked = whole if whole in self._kept else asked
        if asked != self._now:
            self._turn_to(asked, drafting=bits != self.own)
        return self._planes_now[name]

    def _turn_to(self, asked: Asked, *, drafting: bool) -> None:
        self._behind[self._now] = asked
        self._planes_now = {}
        there = asked in self._kept
        self.hits, self.misses = self.hits + there, self.misses + (not there)
        if not there:
            self._begin(asked)
        self._kept.move_to_end(asked)
        try:
            self._planes_now = self._kept[asked].result()
        except BaseException:
            self._now = Asked("", self.own)
            del self._kept[asked]  # it may do better next time
            raise
        self._now = asked
        likely = self._likely(asked, drafting=drafting)
        for at, guess in enumerate(likely):  # what is needed sooner stays
            if guess not in self._kept:
                self._begin(guess, beside=(asked, *likely[:at]))

    def _likely(self, asked: Asked, *, drafting: bool) -> list[Asked]:
        """What may be asked for next."""
        layer = layer_of(asked.unit)
        if drafting and layer != asked.unit:
            self._routed[layer].append(asked.unit)
        routed = [] if drafting else [Asked(e, asked.bits) for e in dict.fromkeys(self._routed.pop(asked.unit, []))]
        return routed or [self._behind.get(asked, asked)]

    def _begin(self, asked: Asked, beside: Sequence[Asked] = ()) -> None:
        """Have a unit read; not if there is no room for it beside others and those that stay."""
        size = self._size(asked)
        fixed = {a for a in self._kept if a in beside or a in self._stay}
        if beside and size + sum(map(self._size, fixed)) > self.room:
            return
        used = sum(map(self._size, self._kept))
        for old in [a for a in self._kept if a not in fixed]:
            if used + size <= self.room:
                break
            self._kept.pop(old).result()  # one on its way fills its memory before that is free
            used -= self._size(old)
        self.fetched += self._brought(asked)
        self._kept[asked] = self._thread.submit(self._whole, asked)

    def _size(self, asked: Asked) -> int:
        if asked not in self._sizes:
            self._sizes[asked] = sum(size(self.reader.records[name], asked.bits) for name in self.units[asked.unit])
        return self._sizes[asked]

    def _brought(self, asked: Asked) -> int:
        """Bytes that come from the disk when it is read."""
        return sum(size(self.reader.records[name], asked.bits, "stored") for name in self.units[asked.unit])

    def _staying(self, spare: int) -> set[Asked]:
        """Units that stay: layers in their order, without their experts."""
        found = set()
        for name in self.units:
            asked = Asked(name, self.own)
            if layer_of(name) == name and self._size(asked) <= spare:
                found.add(asked)
                spare -= self._size(asked)
        return found

    def _whole(self, asked: Asked) -> dict[str, Packed]:
        return {name: self._read(name, asked.bits) for name in self.units[asked.unit]}

    @classmethod
    def need(cls, reader: Reader, names: Iterable[str], bits: int = 0) -> int:
        sizes: dict[str, int] = defaultdict(int)
        for name in names:
            sizes[unit(name)] += size(reader.records[name], bits)
        return sum(sorted(sizes.values())[-2:])


class OnHost(OnDisk):
    """All planes in pinned memory of the host; those of two units on the device. On a CPU it is `Resident`."""

    def __init__(
        self, reader: Reader, names: Iterable[str], bits: int = 0, device: str = "cuda", room: int | None = None
    ) -> None:
        super().__init__(reader, names, bits, device, room)
        self._side = torch.cuda.Stream(device)
        self._all = {}
        for name in self.names:
            found = reader.read(name, only=wanted(reader.records[name].form, bits), check=True)
            self._all[name] = replace(found, planes={p: tensor.pin_memory() for p, tensor in found.planes.items()})

    def _brought(self, asked: Asked) -> int:
        return self._size(asked)

    def _whole(self, asked: Asked) -> dict[str, Packed]:
        found = {}
        with torch.cuda.stream(self._side):
            for name in self.units[asked.unit]:
                own = self._all[name]
                only = wanted(own.form, asked.bits)
                some = {p: tensor for p, tensor in own.planes.items() if only is None or p in only}
                there = {p: tensor.to(self.device, non_blocking=True) for p, tensor in some.items()}
                for tensor in there.values():  # read by another stream than the one that it was made by
                    tensor.record_stream(torch.cuda.default_stream(self.device))
                found[name] = replace(own, planes=there)
        self._side.synchronize()
        return found


def kind(where: str, device: str) -> type[Storage]:
    """Of storage, that `where` names: resident, host or disk."""
    if where == "disk":
        return OnDisk
    return OnHost if where == "host" and device != "cpu" else Resident
