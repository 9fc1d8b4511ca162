"""Randomness by row: the same seed gives the same tokens, and no row depends on its neighbours."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Generator, Tensor


class RowRandom:
    """One random stream per row, named by the seed and the row's own key (not by its place in the batch)."""

    def __init__(self, seed: int, keys: Sequence[object]) -> None:
        """
        Args:
            seed: of the cell.
            keys: one name per row, such as the id of its prompt; equal keys give equal streams.
        """
        self.seed = seed
        self.keys = tuple(keys)
        self._generators: list[Generator] = [self._stream(k) for k in self.keys]

    def _stream(self, key: object) -> Generator:
        digest = hashlib.blake2b(f"{self.seed}/{key}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)

    def __len__(self) -> int:
        return len(self.keys)

    def row(self, b: int) -> Generator:
        """The CPU generator of row b, for draws that are not uniforms."""
        return self._generators[b]

    def uniforms(self, *shape: int, rows: Sequence[int] | None = None) -> Tensor:
        """(rows, *shape) float64 uniforms in [0, 1); each row draws from its own stream. `rows` asks for some only."""
        chosen = self._generators if rows is None else [self._generators[b] for b in rows]
        return torch.stack([torch.rand(*shape, generator=g, dtype=torch.float64) for g in chosen])
