"""p-NCG and its relatives: all positions move at once along the gradient, and one test accepts or rejects the whole.

Sources: Du, Amini, Torroba Hennigen, Yu, Eisner, Lee and Cotterell 2023 (arXiv 2312.17710), p-NCG; Zhang, Liu and Liu
2022 (arXiv 2206.09914), the discrete Langevin proposal; Grathwohl et al. 2021 (arXiv 2102.04509), Gibbs with gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from decodathlon.decoders.mcmc.proposals import Distances, drawn, log_density
from decodathlon.harness import law
from decodathlon.harness.chain import Chain, State, by_start
from decodathlon.harness.decoder import decoder
from decodathlon.harness.errors import SpecError
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from decodathlon.harness.targets.base import Target


#: Step sizes of a sweep and of a burn-in: ten from 0.05 to 64, evenly spaced in their logarithm.
SIZES = [float(f"{0.05 * 1280 ** (i / 9):.3g}") for i in range(10)]


@dataclass(frozen=True)
class Point(State):
    """A state with what a gradient proposal needs of it; computed once per sequence."""

    #: (B, N, V): to first order, by how much the log-probability changes if one position takes another token.
    change: Tensor
    #: Of the embeddings; the same object along a walk.
    distances: Distances
    #: (B,) step sizes; of a burn-in how many transitions it has seen, and (B, sizes) how far each size has jumped.
    alpha: Tensor
    age: int
    jumps: Tensor


class GradientChain(Chain):
    """What the gradient chains share: the state, and the corrections of the language model's gradient."""

    p: int
    label_term: bool
    alpha: float

    def begin(self, target: Target, sequences: Tensor, free: int, *, stops: frozenset[int] = frozenset()) -> Point:
        score, change = target.local_changes(sequences, free, label_term=self.label_term)
        accepted = torch.zeros(len(sequences), dtype=torch.float64, device=score.device)
        alpha, jumps = accepted + self.alpha, accepted.new_zeros(len(sequences), len(SIZES))
        return Point(sequences, free, score, accepted, change, Distances(target.embeddings, self.p), alpha, 0, jumps)

    def at(self, target: Target, state: Point, tokens: Tensor) -> Point:
        """The state with other free tokens (B, N): one forward and one backward pass."""
        sequences = torch.cat([state.sequences[:, : state.free], tokens], dim=1)
        score, change = target.local_changes(sequences, state.free, label_term=self.label_term)
        return replace(state, sequences=sequences, score=score, change=change)


def metropolis(state: Any, proposed: Any, log_ratio: Tensor, u: Tensor) -> Any:
    """Row by row the proposed state where u < exp(log_ratio), else the old one; counts what was accepted."""
    accept = u.log() < log_ratio
    return state.where(accept, proposed)


def rest_stays(moves: Tensor) -> Tensor:
    """The transition matrix (M, M) of a chain that stays where it is unless it moves to another state."""
    moves = moves.clone().fill_diagonal_(0.0)
    return moves + torch.diag(1.0 - moves.sum(1))


def by_one_token(state: Point, log_q: Tensor) -> Tensor:
    """The transition matrix (M, M) of a chain that changes one token and tests that; see `Chain.transitions`.

    Args:
        log_q: (M, N, V) log-probability of proposing that place and token; -inf for the present one.
    """
    (M, N, V), tokens = log_q.shape, state.tokens[..., None]
    weight = V ** torch.arange(N - 1, -1, -1)[:, None]
    there = torch.arange(M)[:, None, None] + (torch.arange(V) - tokens) * weight
    back = log_q[there, torch.arange(N)[:, None], tokens]
    ratio = state.score[there] - state.score[:, None, None] + back - log_q
    p = torch.where(torch.arange(V) == tokens, 0.0, (log_q + ratio.clamp(max=0.0)).exp())
    return rest_stays(p.new_zeros(M, M).scatter_add_(1, there.flatten(1), p.flatten(1)))


class AllAtOnce(GradientChain):
    """One proposal for all positions, and one test.

    In a burn-in every chain tries the step sizes in turn, and keeps for good the one by which it jumped furthest: the
    most tokens changed per step. Acceptance is no aim, because a frozen chain accepts everything.
    """

    def __post_init__(self) -> None:
        if self.burn_in % (2 * len(SIZES)):
            raise SpecError(
                f"{self.info.name}: burn_in={self.burn_in} is no multiple of {2 * len(SIZES)}: in each half every one "
                f"of {len(SIZES)} step sizes gets as many turns"
            )

    def uniforms(self, length: int) -> int:
        return length + 1

    def log_proposal(self, state: Point) -> Tensor:
        """(B, N, V) log q(. | x) of each position."""
        return self._table(state.change, state.distances(state.tokens), state.alpha)

    def _table(self, change: Tensor, distances: Tensor, alpha: Tensor) -> Tensor:
        """Half the change that each token would make, less its distance over 2 alpha, as log-laws per position."""
        return (0.5 * change - distances / (2 * alpha.to(distances)[:, None, None])).log_softmax(-1)

    def step(self, target: Target, state: Point, u: Tensor) -> Point:
        if state.age >= self.burn_in:
            return self.transition(target, state, u)
        size = state.age % len(SIZES)
        moved = self.transition(target, replace(state, alpha=torch.full_like(state.alpha, SIZES[size])), u)
        jumps = moved.jumps.clone()
        if 2 * state.age >= self.burn_in:  # the first half leads away from where the chain began
            jumps[:, size] += (moved.tokens != state.tokens).sum(-1)
        age = state.age + 1
        best = torch.tensor(SIZES, dtype=torch.float64, device=jumps.device)[jumps.argmax(-1)]
        chosen = torch.where(jumps.sum(-1) > 0, best, self.alpha)  # who never jumped has learnt nothing
        return replace(moved, age=age, jumps=jumps, alpha=chosen if age == self.burn_in else state.alpha)

    def transition(self, target: Target, state: Point, u: Tensor) -> Point:
        """One step at the state's own step sizes."""
        table = self.log_proposal(state)
        proposed = self.at(target, state, drawn(table, u[:, :-1]))
        return metropolis(state, proposed, self.log_ratio(state, table, proposed), u[:, -1])

    def log_ratio(self, state: Point, table: Tensor, proposed: Point) -> Tensor:
        """(B,) log of the Metropolis-Hastings ratio of whole sequences."""
        there = log_density(table, proposed.tokens)
        back = log_density(self.log_proposal(proposed), state.tokens)
        return proposed.score - state.score + back - there

    def proposals(self, state: Point) -> Tensor:
        """(M, M) log-probability of proposing each text from each; see `transitions`."""
        M, table = len(state.score), self.log_proposal(state)
        return torch.stack([log_density(one.expand(M, -1, -1), state.tokens) for one in table])

    def transitions(self, target: Target, state: Point) -> Tensor | None:
        log_q = self.proposals(state)
        ratio = state.score - state.score[:, None] + log_q.T - log_q
        return rest_stays((log_q + ratio.clamp(max=0.0)).exp())


@decoder(
    "pncg",
    claim=by_start,
    bounds={"alpha": "(0, 1e6]", "steps": "[1, 1000000]", "burn_in": "[0, 1000000]"},
    sweep={"alpha": SIZES},
    needs=["gradient"],
    paper="Du et al. 2023, Principled Gradient-Based MCMC for Conditional Sampling of Text",
)
class PNCG(AllAtOnce):
    """p-NCG: all tokens at once, by the gradient and the p-norm to the present ones; then one Metropolis test.

    Its law is the target's once the chain has mixed. `scan=single` moves one random position per step instead (the
    paper's Gibbs with Langevin). `bos=False` leaves the start token before an empty prompt out, so that the first token
    counts as uniform. `label_term` adds by how much a token's own probability changes, which the gradient of the inputs
    misses. `burn_in` steps come first, in which the step size is tuned.
    """

    alpha: float = 4.0
    p: Literal[1, 2] = 2
    steps: int = 200
    burn_in: int = 0
    scan: Literal["all", "single"] = "all"
    bos: bool = True
    label_term: bool = True

    def uniforms(self, length: int) -> int:
        return 3 if self.scan == "single" else super().uniforms(length)

    def transition(self, target: Target, state: Point, u: Tensor) -> Point:
        return self._single(target, state, u) if self.scan == "single" else super().transition(target, state, u)

    def log_single(self, state: Point) -> Tensor:
        """(B, N, V) log q of one position's new token, given that it is this position's turn: never the present one."""
        tokens = state.tokens
        scores = state.change - state.distances(tokens) / state.alpha.to(state.change)[:, None, None]
        return scores.scatter(-1, tokens[..., None], float("-inf")).log_softmax(-1)

    def transitions(self, target: Target, state: Point) -> Tensor | None:
        if self.scan == "all":
            return super().transitions(target, state)
        return by_one_token(state, self.log_single(state).double() - math.log(state.tokens.shape[1]))

    def _single(self, target: Target, state: Point, u: Tensor) -> Point:
        table, tokens = self.log_single(state), state.tokens
        B, N, _ = table.shape
        rows, turn = torch.arange(B, device=tokens.device), (u[:, 0] * N).long().to(tokens.device)
        new = law.draw(table[rows, turn], u[:, 1])
        proposed = self.at(target, state, tokens.index_put((rows, turn), new))
        there = table[rows, turn, new].double()
        back = self.log_single(proposed)[rows, turn, tokens[rows, turn]].double()
        return metropolis(state, proposed, proposed.score - state.score + back - there, u[:, 2])


@decoder(
    "dlp",
    claim=by_start,
    bounds={"alpha": "(0, 1e6]", "steps": "[1, 1000000]", "burn_in": "[0, 1000000]"},
    sweep={"alpha": [0.25, 1.0, 4.0, 16.0]},
    needs=["gradient"],
    paper="Zhang, Liu, Liu 2022, A Langevin-like Sampler for Discrete Distributions",
)
class DLP(AllAtOnce):
    """The discrete Langevin proposal with its Metropolis test (DMALA): p-NCG with the squared Euclidean norm."""

    p: ClassVar[int] = 2
    alpha: float = 4.0
    steps: int = 200
    burn_in: int = 0
    bos: bool = True
    label_term: bool = True


@decoder(
    "dula",
    claim="heuristic",
    bounds={"alpha": "(0, 1e6]", "steps": "[1, 1000000]"},
    sweep={"alpha": [0.25, 1.0, 4.0, 16.0]},
    needs=["gradient"],
    paper="Zhang, Liu, Liu 2022, A Langevin-like Sampler for Discrete Distributions",
)
class DULA(AllAtOnce):
    """The discrete Langevin proposal without a test: every move is taken, so its law is only near the target's."""

    p: ClassVar[int] = 2
    alpha: float = 1.0
    steps: int = 200
    bos: bool = True
    label_term: bool = True

    def transition(self, target: Target, state: Point, u: Tensor) -> Point:
        moved = self.at(target, state, drawn(self.log_proposal(state), u[:, :-1]))
        return replace(moved, accepted=state.accepted + 1)

    def transitions(self, target: Target, state: Point) -> Tensor:
        return self.proposals(state).exp()


@decoder(
    "gwg",
    claim=by_start,
    bounds={"steps": "[1, 1000000]"},
    needs=["gradient"],
    paper="Grathwohl, Swersky, Hashemi, Duvenaud, Maddison 2021, Oops I Took A Gradient",
)
class GWG(GradientChain):
    """Gibbs with gradients: one position takes one other token, both drawn by half the change that it would make."""

    p: ClassVar[int] = 2
    alpha: ClassVar[float] = 1.0  # it has no step size
    steps: int = 200
    bos: bool = True
    label_term: bool = True

    def uniforms(self, length: int) -> int:
        return 2

    def log_flips(self, state: Point) -> Tensor:
        """(B, N * V) log-law over which position takes which token; the present tokens have none."""
        tokens = state.tokens
        return (0.5 * state.change).scatter(-1, tokens[..., None], float("-inf")).flatten(1).log_softmax(-1)

    def step(self, target: Target, state: Point, u: Tensor) -> Point:
        tokens, V = state.tokens, state.change.shape[-1]
        there = self.log_flips(state)
        flip = law.draw(there, u[:, 0])
        rows, turn = torch.arange(len(tokens), device=tokens.device), flip // V
        proposed = self.at(target, state, tokens.index_put((rows, turn), flip % V))
        back = self.log_flips(proposed)[rows, turn * V + tokens[rows, turn]].double()
        ratio = proposed.score - state.score + back - there[rows, flip].double()
        return metropolis(state, proposed, ratio, u[:, 1])

    def transitions(self, target: Target, state: Point) -> Tensor:
        return by_one_token(state, self.log_flips(state).double().view_as(state.change))
