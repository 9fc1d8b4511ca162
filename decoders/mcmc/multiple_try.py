"""Multiple-try p-NCG: several proposals per step, one of them chosen by its weight, and a test that makes it exact.

Liu, Liang and Wong 2000 for symmetric lambda; the acceptance used here holds for any positive weight w(y | x):

    min(1, [pi(y) T(y, x) w(x | y) / sum_l w(z_l | y)] / [pi(x) T(x, y) w(y | x) / sum_l w(y_l | x)])

with tries y_1..y_k from T(x, .), y one of them drawn by weight, references z_1..z_(k-1) from T(y, .), and z_k = x.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import TYPE_CHECKING, Literal

from decodathlon.decoders.mcmc.gradient import SIZES, AllAtOnce, Point, metropolis, rest_stays
from decodathlon.decoders.mcmc.proposals import log_density
from decodathlon.harness import law
from decodathlon.harness.chain import by_start
from decodathlon.harness.decoder import decoder
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from decodathlon.harness.targets.base import Target

Weight = Literal["lam1", "iw", "lb", "sqrt-pi", "pi"]
#: Entries of tables over the vocabulary that are held at once, where every try has one of its own.
MOST_NUMBERS = 1 << 22
#: Sums of the other tries' weights that are told apart in a transition matrix; beyond, one in so much is no difference.
MOST_SUMS, FINENESS = 1 << 13, 300
#: Weights that ask how likely the way back is, and so take a gradient at every try and every reference.
_LOOKS_BACK = ("lam1", "lb")


@decoder(
    "mt-pncg",
    claim=by_start,
    bounds={"alpha": "(0, 1e6]", "tries": "[1, 1024]", "steps": "[1, 1000000]", "burn_in": "[0, 1000000]"},
    sweep={"tries": [4, 8, 16, 32], "alpha": SIZES, "weight": ["lam1", "lb", "sqrt-pi", "pi"]},
    needs=["gradient"],
    paper="Liu, Liang, Wong 2000, The Multiple-Try Method; Du et al. 2023 for the proposal",
)
class MultipleTryPNCG(AllAtOnce):
    """p-NCG with several tries per step. The weight says which try is taken up.

    `iw` is pi(y) / T(x, y) and needs two gradients per step however many tries, as do `sqrt-pi` and `pi`; `lam1` is
    pi(y) T(y, x); `lb` is locally balanced, the root of the Metropolis-Hastings ratio.
    """

    alpha: float = 4.0
    tries: int = 4
    weight: Weight = "iw"
    p: Literal[1, 2] = 2
    steps: int = 200
    burn_in: int = 0
    bos: bool = True
    label_term: bool = True

    def uniforms(self, length: int) -> int:
        return (2 * self.tries - 1) * length + 2

    def transition(self, target: Target, state: Point, u: Tensor) -> Point:
        k, N = self.tries, state.tokens.shape[1]
        B, rows = len(u), torch.arange(len(u), device=u.device)
        table = self.log_proposal(state)
        tries = several(table, u[:, : k * N].view(B, k, N))
        weights = self.log_weights(target, state, table, tries)
        chosen = law.draw(weights.log_softmax(1), u[:, -2])
        proposed = self.at(target, state, tries[rows, chosen])
        back = self.log_proposal(proposed)
        references = torch.cat([several(back, u[:, k * N : -2].view(B, k - 1, N)), state.tokens[:, None]], 1)
        ratio = self.log_ratio_of(target, state, table, weights, chosen, proposed, back, references)
        return metropolis(state, proposed, ratio, u[:, -1])

    def log_weights(self, target: Target, state: Point, table: Tensor, tries: Tensor) -> Tensor:
        """(B, k) log w(y | x) of the tries (B, k, N) from the state x."""
        B, k, N = tries.shape
        heads = state.sequences[:, None, : state.free].expand(B, k, -1)
        sequences = torch.cat([heads, tries], 2).view(B * k, -1)
        if self.weight not in _LOOKS_BACK:
            pi = target.score(sequences, state.free).view(B, k)
            if self.weight == "iw":
                return pi - log_density(table[:, None].expand(B, k, -1, -1), tries)
            return pi if self.weight == "pi" else 0.5 * (pi - state.score[:, None])
        mine = state.tokens[:, None].expand(B, k, N).reshape(B * k, N)
        at_once = max(1, MOST_NUMBERS // (N * table.shape[-1]))
        parts = (part.split(at_once) for part in (sequences, mine, state.alpha.repeat_interleave(k)))
        with target.spent.one_call():
            found = [self._way_back(target, state, *some) for some in zip(*parts, strict=True)]
        pi, back = (torch.cat(values).view(B, k) for values in zip(*found, strict=True))
        if self.weight == "lam1":
            return pi + back
        forth = log_density(table[:, None].expand(B, k, -1, -1), tries)
        return 0.5 * (pi + back - state.score[:, None] - forth)

    def _way_back(
        self, target: Target, state: Point, sequences: Tensor, tokens: Tensor, alpha: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(n,) scores of sequences (n, L), and log T(y, x) from each to free tokens (n, N) at step sizes (n,)."""
        pi, change = target.local_changes(sequences, state.free, label_term=self.label_term)
        return pi, log_density(self._table(change, state.distances(sequences[:, state.free :]), alpha), tokens)

    def log_ratio_of(
        self,
        target: Target,
        x: Point,
        table: Tensor,
        weights: Tensor,
        chosen: Tensor,
        y: Point,
        back: Tensor,
        z: Tensor,
    ) -> Tensor:
        """(B,) log of the acceptance ratio.

        Args:
            x, y: the present and the chosen state.
            table, back: their proposals (B, N, V).
            weights: (B, k) log w(y_l | x); chosen: (B,) which of them is y.
            z: (B, k, N) references, x itself the last.
        """
        away = self.log_weights(target, y, back, z)
        forth = x.score + log_density(table, y.tokens) + weights.gather(1, chosen[:, None])[:, 0] - weights.logsumexp(1)
        return y.score + log_density(back, x.tokens) + away[:, -1] - away.logsumexp(1) - forth

    def transitions(self, target: Target, state: Point) -> Tensor:
        """See `Chain.transitions`. A try y is taken up with probability

            k T(x, y) E[w(y | x) / A min(1, C A / B)],   A = w(y | x) + others,   B = w(x | y) + others' weights from y,

        and only the sums of k - 1 other weights are random. Up to `MOST_SUMS` of them are enumerated; of more, those
        that are nearly equal are merged, which leaves the balance exact and the gap known to one in ten thousand.
        """
        M, k, log_q = len(state.score), self.tries, self.proposals(state)
        log_w = self.log_weights(target, state, self.log_proposal(state), state.tokens.expand(M, -1, -1))
        top = log_w.max(1).values
        w = (log_w - top[:, None]).exp()
        sums, chances = _sums_of_others(log_q, w, k - 1)
        flow = state.score[:, None] + log_q + log_w
        scale = (flow.T - flow + top[:, None] - top).clamp(max=700.0).exp()
        moves = torch.zeros(M, M, dtype=torch.float64)
        for y in range(M):
            here, there = 1 / (w[:, y, None] + sums), scale[:, y, None] / (w[y, :, None] + sums[y])
            moves[:, y] = k * log_q[:, y].exp() * w[:, y] * _mean_of_smaller(here, chances, there, chances[y])
        return rest_stays(moves)


def _sums_of_others(log_q: Tensor, w: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(M, S) sums of `count` independent weights, row x of w (M, M) by row x of q, and their probabilities (M, S)."""
    M = len(w)
    if math.comb(M + count - 1, count) > MOST_SUMS:
        every = [_merged_sums(q, row, count) for q, row in zip(log_q.exp(), w, strict=True)]
        sums, chances = (torch.nn.utils.rnn.pad_sequence(list(part), True) for part in zip(*every, strict=True))
        return sums + (chances == 0), chances  # a sum without a chance must only not be 0
    kinds = [Counter(chosen) for chosen in itertools.combinations_with_replacement(range(M), count)]
    times = torch.tensor([[kind[y] for y in range(M)] for kind in kinds], dtype=torch.float64)
    ways = math.lgamma(count + 1) - torch.lgamma(times + 1).sum(1)
    return w @ times.T, (ways + torch.special.xlogy(times, log_q.exp()[:, None]).sum(-1)).exp()


def _merged_sums(q: Tensor, w: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The same for one row, one weight after the other; sums that differ by less than one in `FINENESS` are merged."""
    w = w.clamp(min=1e-300)
    sums, chances = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for _ in range(count):
        sums, chances = (sums[:, None] + w).flatten(), (chances[:, None] * q).flatten()
        place = ((sums.log() - w.min().log()) * FINENESS).long()
        together, weighted = place.bincount(chances), place.bincount(chances * sums)
        some = together > 0
        sums, chances = weighted[some] / together[some], together[some]
    return sums, chances


def _mean_of_smaller(a: Tensor, p: Tensor, b: Tensor, q: Tensor) -> Tensor:
    """(R,) E min(A, B) of independent A and B: row by row A is a (R, S) with probability p (R, S), B is b by q (S,)."""
    b, order = b.sort(1)
    q = q[order]
    nothing = torch.zeros_like(b[:, :1])
    below = torch.cat([nothing, (q * b).cumsum(1)], 1)
    above = 1.0 - torch.cat([nothing, q.cumsum(1)], 1)
    place = torch.searchsorted(b, a.contiguous(), right=True)
    return (p * (below.gather(1, place) + a * above.gather(1, place))).sum(1)


def several(table: Tensor, u: Tensor) -> Tensor:
    """(B, k, N) independent proposals from one table (B, N, V); `u` is (B, k, N)."""
    (B, k, N), V = u.shape, table.shape[-1]
    tokens = law.draw_several(table.reshape(B * N, V), u.transpose(1, 2).reshape(B * N, k))
    return tokens.view(B, N, k).transpose(1, 2)
