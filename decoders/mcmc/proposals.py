"""Proposals that move every position at once: a law over the vocabulary per position (Du et al. 2023).

Notation: B chains, N free positions, V tokens, E the width of the embeddings. Nothing here ever holds (B, N, V, E).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from decodathlon.harness import law
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

#: Rows of distances that are kept per target; at V = 50,000 in float32 800 MB.
MOST_ROWS = 4096
#: Up to so many tokens the distances of all of them are worked out once.
SMALL = 1024


class Distances:
    """The p-norms to the p between every token's embedding and those of given tokens, row by row as they occur."""

    def __init__(self, embeddings: Tensor, p: int) -> None:
        """
        Args:
            embeddings: (V, E).
            p: 1 or 2.
        """
        self._table = embeddings.detach().to(torch.promote_types(embeddings.dtype, torch.float32))
        self._p = p
        self._squares = self._table.square().sum(-1)
        self._rows: dict[int, Tensor] = {}

    def __call__(self, tokens: Tensor) -> Tensor:
        """(B, N) tokens to (B, N, V) distances."""
        if len(self._table) <= SMALL:
            return self._all()[tokens]
        distinct, place = tokens.unique(return_inverse=True)
        return torch.stack([self._row(t) for t in distinct.tolist()])[place]

    def _all(self) -> Tensor:
        if -1 not in self._rows:
            self._rows[-1] = self._to(self._table)
        return self._rows[-1]

    def _row(self, token: int) -> Tensor:
        if token not in self._rows:
            if len(self._rows) >= MOST_ROWS:
                self._rows.pop(next(iter(self._rows)))
            self._rows[token] = self._to(self._table[token : token + 1])[0]
        return self._rows[token]

    def _to(self, of: Tensor) -> Tensor:
        """(n, V): one row per embedding of `of`."""
        if self._p == 1:
            return torch.cdist(of, self._table, p=1)
        square = of.square().sum(-1, keepdim=True) + self._squares - 2 * of @ self._table.T
        return square.clamp_(min=0.0)


def drawn(table: Tensor, u: Tensor) -> Tensor:
    """(B, N) tokens from a (B, N, V) table of log-laws; `u` is (B, N)."""
    B, N, V = table.shape
    return law.draw(table.reshape(B * N, V), u.reshape(B * N)).view(B, N)


def log_density(table: Tensor, tokens: Tensor) -> Tensor:
    """(...,) log-probability of whole proposals: tokens (..., N) under tables (..., N, V)."""
    return table.gather(-1, tokens[..., None])[..., 0].double().sum(-1)
