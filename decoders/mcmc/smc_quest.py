"""A bridge from drawing to aligning: sequential Monte Carlo over answers, with the moves of QUEST and of p-NCG.

Del Moral, Doucet and Jasra 2006, Sequential Monte Carlo Samplers. M particles begin as draws from p, the law at level 0
of log p(y) + level r(y) / beta. The level rises as far as the effective sample size allows, the particles are weighted
and resampled, and moves that leave the new law alone spread them again; at level 1 one of them is the answer.

At finite M its law is near the tilted one, not equal to it: the moves carry it there. With few particles and moves it
therefore claims nothing; with more the audit says how near it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from decodathlon.decoders.mcmc.gradient import metropolis
from decodathlon.decoders.mcmc.proposals import drawn, log_density
from decodathlon.decoders.mcmc.suffix import QAlign, Written
from decodathlon.harness.chain import Trace, side_by_side
from decodathlon.harness.decoder import Completion, Limits, decoder
from decodathlon.harness.errors import UnsupportedError
from decodathlon.harness.lazy import torch
from decodathlon.harness.rewards import Answer, Tilted

if TYPE_CHECKING:
    from torch import Tensor

    from decodathlon.harness.randomness import RowRandom
    from decodathlon.harness.targets.base import Target

#: Particles times moves from which on an audit of 12,000 draws sees no difference from the tilted law.
ENOUGH = 64
#: Halvings by which the next level is found.
HALVINGS = 40


@decoder(
    "smc-quest",
    claim=lambda self: "sharpened" if self.particles * self.moves >= ENOUGH else "heuristic",
    bounds={
        "beta": "(0, 1e6]",
        "particles": "[2, 4096]",
        "moves": "[1, 1000]",
        "gradient_moves": "[0, 1000]",
        "alpha": "(0, 1e6]",
        "ess": "(0, 1)",
        "temperature": "[0.01, 100]",
    },
    sweep={"particles": [4, 16, 64], "moves": [1, 4, 16]},
    paper="Del Moral, Doucet, Jasra 2006, Sequential Monte Carlo Samplers; the moves of QUEST, Faria et al. 2024",
)
class SMCQuest(Tilted):
    """Answers from p(y) exp(r(y) / beta): particles drawn from p, weighted by the reward level by level, and moved.

    At each level `moves` suffixes are written anew, and `gradient_moves` times all tokens are exchanged at once by
    p-NCG, which keeps the length. `ess` is the share of the particles that stay effective from level to level.
    """

    reward: str = "log-power"
    beta: float = 1.0
    particles: int = 16
    moves: int = 4
    gradient_moves: int = 0
    alpha: float = 16.0
    ess: float = 0.5
    temperature: float = 1.0

    @property
    def chain(self) -> QAlign:
        """The chain whose moves these are."""
        return QAlign(reward=self.reward, beta=self.beta, temperature=self.temperature)

    def log_tilt(self, answers: Sequence[Answer]) -> Tensor:
        return self.chain.log_tilt(answers)

    def check(self, target: Target) -> None:
        super().check(target)
        if self.gradient_moves and "gradient" not in target.capabilities:
            raise UnsupportedError("gradient", f"gradient_moves={self.gradient_moves}, and {target.name} has none")

    def generate(
        self, target: Target, prompts: Sequence[Sequence[int]], limits: Limits, rng: RowRandom
    ) -> list[Completion]:
        heads = self.chain.heads(target, prompts)

        def bridge(rows: Sequence[int]) -> tuple[Tensor, Sequence[Trace]]:
            return self._bridge(target, torch.tensor([heads[b] for b in rows]).view(len(rows), -1), limits, rng, rows)

        return side_by_side(target, heads, limits, bridge)

    def _bridge(
        self, target: Target, heads: Tensor, limits: Limits, rng: RowRandom, rows: Sequence[int]
    ) -> tuple[Tensor, Sequence[Trace]]:
        """One answer (P, N) per head (P, H), and a trace; the particles of a head are M rows beside one another."""
        (P, H), M, N = heads.shape, self.particles, limits.max_new_tokens
        stops = frozenset() if limits.ignore_eos else target.stop_tokens
        heads = heads.repeat_interleave(M, 0)
        begun = self.chain.initial(target, heads, rng.uniforms(M, N, rows=rows).view(P * M, N), stops=stops)
        state = self.chain.begin(target, torch.cat([heads.to(target.device), begun], 1), H, stops=stops)
        state = replace(state, level=torch.zeros_like(state.level))
        going = torch.ones(P, dtype=torch.bool, device=target.device)
        traces: list[list[dict[str, float]]] = [[] for _ in rows]
        while bool(going.any()):
            active = [row for row, on in zip(rows, going.tolist(), strict=True) if on]
            everyone = torch.zeros(P, M, self._uniforms_per_level(N), dtype=torch.float64)
            everyone[going.cpu()] = rng.uniforms(M, self._uniforms_per_level(N), rows=active)
            u, mine = everyone.to(target.device), going.repeat_interleave(M)
            level, weights = self._raised(state, going)
            for p in going.nonzero()[:, 0].tolist():
                share = float(1 / weights[p].square().sum() / M)
                traces[p].append({"level": float(level[p]), "ess": share})
            state = self._resampled(state, weights, level, going, u[:, 0, 0])
            state = self._moved(target, state, mine, u.view(P * M, -1)[:, 1:])
            going = going & (level < 1.0)
        one = (rng.uniforms(1, rows=rows).to(target.device)[:, 0] * M).long()
        return state.tokens[torch.arange(P, device=target.device) * M + one], traces

    def _uniforms_per_level(self, length: int) -> int:
        return 1 + self.moves * self.chain.uniforms(length) + self.gradient_moves * (length + 1)

    def _raised(self, state: Written, going: Tensor) -> tuple[Tensor, Tensor]:
        """The highest level (P,) of each prompt that leaves the particles effective, and their weights (P, M)."""
        tilt, now = state.tilt.view(-1, self.particles), state.level.view(-1, self.particles)[:, 0]
        low, high = now, torch.ones_like(now)
        level = high
        for _ in range(HALVINGS):
            weights = ((level - now)[:, None] * tilt).softmax(1)
            enough = 1 / weights.square().sum(1) >= self.ess * self.particles
            low, high = torch.where(enough, level, low), torch.where(enough, high, level)
            level = torch.where(low >= 1.0, low, (low + high) / 2)
        level = torch.where(going, torch.where(low > now, low, 1.0), now)  # where nothing is enough, all at once
        return level, ((level - now)[:, None] * tilt).softmax(1)

    def _resampled(self, state: Written, weights: Tensor, level: Tensor, going: Tensor, u: Tensor) -> Written:
        """Systematic resampling, one uniform (P,) per prompt; the rows of those that have arrived stay."""
        P, M = weights.shape
        comb = (torch.arange(M, device=u.device) + u[:, None]) / M
        cumulative = weights.cumsum(1)
        parents = torch.searchsorted(cumulative / cumulative[:, -1:], comb, right=True).clamp_(max=M - 1)
        parents = torch.where(going[:, None], parents, torch.arange(M, device=u.device))
        rows = (parents + torch.arange(P, device=u.device)[:, None] * M).view(-1)
        state.desk.select(rows)
        taken = state.rows(rows)
        levels = level.repeat_interleave(M)
        return replace(taken, level=levels, score=taken.log_prob + levels * taken.tilt)

    def _moved(self, target: Target, state: Written, mine: Tensor, u: Tensor) -> Written:
        """The moves of one level, of the rows `mine` (B,)."""
        each, N = self.chain.uniforms(state.tokens.shape[1]), state.tokens.shape[1]
        for move in range(self.moves):
            state = state.where(mine, self.chain.step(target, state, u[:, move * each : (move + 1) * each]))
        rest = u[:, self.moves * each :]
        for move in range(self.gradient_moves):
            state = state.where(mine, self._exchanged(target, state, rest[:, move * (N + 1) : (move + 1) * (N + 1)]))
        return state

    def _exchanged(self, target: Target, state: Written, u: Tensor) -> Written:
        """All tokens at once by p-NCG, tested by the law of the level; stop tokens and what is behind them stay."""
        there = self._exchange(target, state)
        tokens = drawn(there, u[:, :-1])
        heads = state.sequences[:, : state.free]
        proposed = self.chain.judged(target, heads, state.desk.read(heads, tokens), state.desk, state.level)
        back = self._exchange(target, proposed)
        ratio = proposed.score - state.score + log_density(back, state.tokens) - log_density(there, proposed.tokens)
        return metropolis(state, proposed, ratio, u[:, -1])

    def _exchange(self, target: Target, state: Written) -> Tensor:
        """(B, N, V) log-laws of each position's new token."""
        _, change = target.local_changes(state.sequences, state.free)
        table = 0.5 * change - state.desk.distances(state.tokens) / (2 * self.alpha)
        own = torch.zeros_like(table, dtype=torch.bool).scatter_(-1, state.tokens[..., None], True)
        place = torch.arange(state.tokens.shape[1], device=table.device)
        stop = state.desk.is_stop(torch.arange(table.shape[-1], device=table.device))
        ended = state.desk.is_stop(state.tokens)
        fixed = (place >= state.pages.lengths[:, None]) | ended
        return table.masked_fill(torch.where(fixed[..., None], ~own, stop), float("-inf")).log_softmax(-1)
