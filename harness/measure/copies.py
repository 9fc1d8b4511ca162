"""Scores a sampler whose law is itself random: a particle filter over its state.

The law of a text is then a mean over all that the state could have been: p(x_1) p(x_2 | x_1) ..., and p(x_t | x_<t)
averages the law over the states that agree with the earlier tokens. So copies of the state follow the real text side by
side, the mean of their laws is the prediction, and behind each token those that expected it are copied in the place of
those that did not (Gordon, Salmond and Smith 1993). Where no copy could have drawn the token it tells nothing of the
state, and all of them go on. As with every filter, predictions carry a bias of one over the number of copies; only
where the state is forgotten from token to token are they unbiased.

There are two filters with random numbers of their own, so that what depends on these numbers can be told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from decodathlon.harness.candidates import CandidateSampler
from decodathlon.harness.law import check

if TYPE_CHECKING:
    from torch import Tensor

    from decodathlon.harness.decoder import Sampler
    from decodathlon.harness.measure.statistics import Array

#: Copies of each of the two filters.
COPIES = 32
#: Where in each window a law is checked to be one.
CHECKED = 0


class CopiesJudge:
    """Two filters that follow a text over its windows.

    What it gives for a window of n tokens: the log of the mean prediction (n,), that of either filter (2, n), and the
    sum over all tokens of the product of the filters' laws (n,), for that of the squared law: as the filters have
    random numbers of their own, the noise of either does not add to it.
    """

    def __init__(self, sampler: Sampler, seed: int = 0, copies: int = COPIES) -> None:
        self.sampler, self.copies = sampler, copies
        self._generator = torch.Generator().manual_seed(seed)
        self._state = sampler.start(2 * copies)

    def __call__(self, logits: Tensor, real: Tensor) -> tuple[Array, Array, Array]:
        predicted, concentration = [], []
        for number, (row, token) in enumerate(zip(logits, real, strict=True)):
            mean, own = self._step(row, token, checked=number == CHECKED)
            predicted.append(own.view(2, -1).mean(1))
            concentration.append((mean[0] * mean[1]).sum())
            self._follow(own.view(2, -1), token)
        each = torch.stack(predicted, 1).double()
        both = each.mean(0).log()
        return both.cpu().numpy(), each.log().cpu().numpy(), torch.stack(concentration).double().cpu().numpy()

    def _step(self, row: Tensor, token: Tensor, *, checked: bool) -> tuple[Tensor, Tensor]:
        """The mean law of either filter (2, V), and each copy's probability of the token (2 * copies,)."""
        rows, V = 2 * self.copies, len(row)
        u = torch.rand(rows, self.sampler.uniforms, generator=self._generator, dtype=torch.float64).to(row.device)
        logits = row.expand(rows, V)
        if isinstance(self.sampler, CandidateSampler):
            found, self._state = self.sampler.candidates(logits, self._state, u)
            if checked:
                check(found.law(V), logits, self.sampler.spec)
            p = found.log_weights.double().softmax(1)
            own = torch.where(found.tokens == token, p, 0.0).sum(1)
            mean = torch.zeros(2, V, dtype=torch.float64, device=row.device)
            mean.scatter_add_(1, found.tokens.reshape(2, -1), p.reshape(2, -1) / self.copies)
            return mean, own
        log_law, self._state = self.sampler.next_law(logits.clone(), self._state, u)
        if checked:
            check(log_law, logits, self.sampler.spec)
        p = log_law.double().exp()
        return p.view(2, self.copies, V).mean(1), p[:, token]

    def _follow(self, own: Tensor, token: Tensor) -> None:
        """Advance all states by the real token, and draw anew among the copies of each filter (systematically)."""
        self._state = self.sampler.advance(self._state, token.expand(2 * self.copies))
        places = (torch.arange(self.copies) + torch.rand(2, 1, generator=self._generator, dtype=torch.float64)).to(own)
        total = own.sum(1, keepdim=True)
        weights = torch.where(total > 0, own, torch.ones_like(own)).cumsum(1)
        chosen = torch.searchsorted(weights, places / self.copies * weights[:, -1:], right=True)
        chosen = chosen.clamp_(max=self.copies - 1) + torch.tensor([[0], [self.copies]], device=own.device)
        self._state = rows_of(self._state, chosen.flatten())


def rows_of(state: Any, rows: Tensor) -> Any:
    """These rows of a state that is a tensor, or a tuple of such, or None."""
    if state is None:
        return None
    if isinstance(state, torch.Tensor):
        alike = state.stride(0) == 0 and len(state) == len(rows)  # one row in memory, which has no order
        return state if alike else state[rows.to(state.device)]
    if isinstance(state, tuple):
        parts = [rows_of(part, rows) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    raise TypeError(f"a state of {type(state).__name__} has no rows to be copied; make it a tensor or a tuple of such")
