"""What cells took before: seconds and memory of a cell that is planned, by the rows that are most like it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from decodathlon.harness.results import store

if TYPE_CHECKING:
    from decodathlon.harness.cells import CellSpec

#: What a guess rests on, the nearest first.
BASES = ("this cell", "its decoder with other parameters", "other decoders", "other hardware", "other models")


class Row(NamedTuple):
    """A measured cell."""

    suite: str
    slice: str
    scale: str
    decoder: str
    model: str
    hardware: str
    #: Without what it took to load the model.
    seconds: float
    #: To load the model, where this cell did.
    loading: float
    memory: float | None
    #: Whether it was measured; what is unsupported takes no time, and says nothing of other decoders.
    supported: bool = True


@dataclass(frozen=True)
class Guess:
    """What a cell will take."""

    seconds: float
    basis: str
    #: Measured cells that it rests on.
    n: int


class Past:
    """Rows of measured cells, asked by what a planned cell is."""

    def __init__(self, rows: Iterable[Row], hardware: str = "") -> None:
        """
        Args:
            hardware: where the cells are to run; rows of other hardware count for less.
        """
        self._hardware = hardware
        self._seconds: dict[tuple[str, ...], list[float]] = {}
        self._memory: dict[tuple[str, ...], list[float]] = {}
        self._loading: dict[str, list[float]] = {}
        for row in rows:
            name, here = row.decoder.partition("[")[0], row.hardware
            common = (row.suite, row.slice, row.scale)
            for key in self._keys(common, row.decoder, name, row.model, here):
                if row.supported or key[0] in ("cell", "decoder"):
                    self._seconds.setdefault(key, []).append(row.seconds)
            if row.loading > 1.0:
                self._loading.setdefault(row.model, []).append(row.loading)
            if row.memory is not None:
                for memory_key in ((row.model, row.decoder), (row.model, name), (row.model,)):
                    self._memory.setdefault(memory_key, []).append(row.memory)

    def _keys(
        self, common: tuple[str, ...], decoder: str, name: str, model: str, hardware: str
    ) -> list[tuple[str, ...]]:
        """Places in which a row is found, the nearest first; as many as there are bases."""
        here = hardware if not self._hardware or hardware == self._hardware else "elsewhere"
        if here == "elsewhere":  # only for those that nobody measured here
            return [("hardware", *common, name, model), ("model", *common)]
        return [
            ("cell", *common, decoder, model),
            ("decoder", *common, name, model),
            ("others", *common, model),
            ("hardware", *common, name, model),
            ("model", *common),
        ]

    def of(self, spec: CellSpec) -> Guess | None:
        """What is known of a planned cell; None where nothing like it was ever measured."""
        name, common = spec.decoder.partition("[")[0], (spec.suite, spec.slice, spec.sized)
        keys = [
            ("cell", *common, spec.decoder, spec.model),
            ("decoder", *common, name, spec.model),
            ("others", *common, spec.model),
            ("hardware", *common, name, spec.model),
            ("model", *common),
        ]
        for key, basis in zip(keys, BASES, strict=True):
            if found := self._seconds.get(key):
                return Guess(median(found), basis, len(found))
        return None

    def memory(self, spec: CellSpec) -> float | None:
        """The greatest peak of bytes that the decoder, or else any one, took on this model."""
        name = spec.decoder.partition("[")[0]
        for key in ((spec.model, spec.decoder), (spec.model, name), (spec.model,)):
            if found := self._memory.get(key):
                return max(found)
        return None

    def loading(self, model: str) -> float:
        """Seconds to load a model; 0 where no row tells."""
        return median(self._loading[model]) if self._loading.get(model) else 0.0


def read(path: Path, hardware: str = "") -> Past:
    """What a results file knows; nothing where there is no file.

    Raises:
        StoreError, MissingError: it cannot be read.
    """
    if not path.exists():
        return Past((), hardware)
    with store.connect(path) as connection:
        found: Sequence[tuple[object, ...]] = connection.execute(
            """
            SELECT c.suite, c.slice, c.scale, c.decoder, c.model, c.hardware,
                   greatest(0, (c.seconds->>'total')::DOUBLE - coalesce((c.seconds->>'prepare')::DOUBLE, 0)),
                   coalesce((c.seconds->>'prepare')::DOUBLE, 0), m.value, c.status = 'ok'
            FROM known_cell c
            LEFT JOIN metric m ON (m.run_id, m.cell_id, m.metric) = (c.run_id, c.cell_id, 'peak_memory_bytes')
            WHERE c.status IN ('ok', 'unsupported') AND (c.seconds->>'total') IS NOT NULL
            """
        ).fetchall()
    return Past((Row(*row) for row in found), hardware)  # type: ignore[arg-type]
