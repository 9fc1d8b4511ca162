"""A model that others were packed against: it becomes any of them, and itself again, without being loaded anew."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from decodathlon.decoders.jit_delta import against
from decodathlon.decoders.jit_delta.container import NAMES, Reader
from decodathlon.decoders.jit_delta.schemes import Packed
from decodathlon.harness import models
from decodathlon.harness.errors import MissingError, UnsupportedError
from decodathlon.harness.targets.transformers import TransformersTarget


class PersonaTarget(TransformersTarget):
    """See `TransformersTarget`; `reader` is of the model that it is now, None for the base."""

    def __init__(self, model: Any, tokenizer: Any, *, name: str, reader: Reader | None) -> None:
        super().__init__(model, tokenizer, name=name)
        self.reader = reader

    def become(self, folder: Path | None) -> None:
        """Be the model in a folder that was packed against the same base, or (None) the base; weights change in place.

        Raises:
            UnsupportedError: tensors of one are no parameters of the model as they are, so not in this type.
            MissingError: the folder was packed against another base. The model is then the one that it was.
        """
        new = None if folder is None else Reader(folder)
        for reader in (self.reader, new):
            self._check(reader)
        undo, change = self._differences(self.reader), self._differences(new)
        if new is not None:
            self._check_base(new, undo)
        for differences, step in ((undo, against.undone), (change, against.changed)):
            for name, patterns in self._patterns(differences):
                packed = differences[name]
                found = against.joined(packed).to(patterns.device)
                patterns.copy_(step(patterns.flatten(), found, packed.facts["way"]).view(patterns.shape))
        own = [new.folder, new.base] if new is not None else [] if self.reader is None else [self.reader.base]
        self.revision = "" if new is None else new.revision
        self.file_bytes = sum(models.file_bytes(folder) for folder in own if folder is not None)
        self.reader = new
        self.release()

    @staticmethod
    def _differences(reader: Reader | None) -> dict[str, Packed]:
        """What a model has that the base has not, by tensor; all of it read and held against its checksums before
        anything is changed."""
        found = {} if reader is None else {name: reader.read(name, check=True) for name in reader.records}
        return {name: packed for name, packed in found.items() if packed.planes}

    def _patterns(self, names: Iterable[str]) -> list[tuple[str, torch.Tensor]]:
        """Parameters as bit patterns; one that has several names, once."""
        own = dict(self.model.named_parameters(remove_duplicate=False))
        once = {id(own[name]): name for name in reversed(list(names))}
        return [(n, own[n].data.view({2: torch.int16, 4: torch.int32}[own[n].itemsize])) for n in once.values()]

    def _check(self, reader: Reader | None) -> None:
        own = dict(self.model.named_parameters(remove_duplicate=False))
        for name, record in (reader.records if reader is not None else {}).items():
            there = own.get(name)
            if there is None or record.form != "against" or getattr(torch, NAMES[record.dtype]) != there.dtype:
                raise UnsupportedError(
                    "weights that can be changed in place",
                    f"{name} is {record.form} {record.dtype} in {reader.folder if reader is not None else ''}, and "
                    + ("no parameter" if there is None else f"{there.dtype}")
                    + f" in {self.name}",
                )

    def _check_base(self, new: Reader, undo: dict[str, Packed]) -> None:
        """Every tensor of the base, as it will be, by its checksum."""
        for name, patterns in self._patterns(new.records):
            base, own = patterns.flatten().cpu(), undo.get(name)
            if own is not None:
                base = against.undone(base, against.joined(own), own.facts["way"])
            found = hashlib.sha256(base.contiguous().view(torch.uint8).numpy()).hexdigest()
            if found != new.records[name].facts["base"]:
                raise MissingError(f"{new.folder} was packed against another model than this: {name} differs")
