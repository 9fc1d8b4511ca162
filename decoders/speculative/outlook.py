"""What a stopping rule may look at: the law that a token is drafted from, whatever token that turns out to be."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class Outlook:
    """The law that a token is drafted from, by row; its summaries are made when they are asked for.

    There is no token in it. A rule that saw one and then dropped it would change what is drawn: with the laws
    p = (.5, .3, .15, .05) and q = (.1, .2, .3, .4), dropping drafts of q(x) < .25 makes of p (.55, .19, .195, .065).
    """

    def __init__(self, log_q: Tensor, position: int, state: Tensor | None = None) -> None:
        """
        Args:
            log_q: (B, V) natural log-probabilities.
            position: how many tokens were drafted before in this cycle.
            state: (B, E) the drafter's residual stream that the law was made from, where somebody asked for it.
        """
        self._log_q, self.position, self._state = log_q, position, state

    @cached_property
    def entropy(self) -> list[float]:
        """In nats."""
        p = self._log_q.exp()
        return torch.special.entr(p).sum(-1).tolist()

    @cached_property
    def norm(self) -> list[float]:
        """Root mean square of the residual stream; zeros where nobody asked for it."""
        if self._state is None:
            return [0.0] * len(self._log_q)
        return self._state.float().square().mean(-1).sqrt().tolist()

    @cached_property
    def _two(self) -> list[list[float]]:
        return self._log_q.topk(min(2, self._log_q.shape[-1]), dim=-1).values.exp().tolist()

    @cached_property
    def top(self) -> list[float]:
        """The greatest probability."""
        return [row[0] for row in self._two]

    @cached_property
    def margin(self) -> list[float]:
        """By how much it exceeds the second."""
        return [row[0] - (row[1] if len(row) > 1 else 0.0) for row in self._two]
