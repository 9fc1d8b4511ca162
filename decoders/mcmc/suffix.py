"""Metropolis-Hastings over whole answers: keep a beginning, let the model write the rest anew, accept or not.

Faria, Agrawal, Farinhas, Rei, de Souza and Martins 2024 (arXiv 2406.00049), QUEST; Faria and Smith 2025 (arXiv
2504.03790), QAlign.

An answer y has |y| tokens, its stop token included. A move draws i uniform on 0..|y|-1, keeps y_<i and draws the rest
from the law p of the proposals, so that q(y' | y, i) = p(y') / p(y_<i) / |y|. The way back has the same i, therefore

    log ratio = W(y') - W(y),   W(y) = log law(y) - log p(y) - log |y|.

Several tries y_1..y_k behind one beginning are drawn together with y from a pool that favours none of its places, so a
Metropolised Gibbs step (Liu 1996) over that pool is exact: y_j by weight among the tries, accepted with probability
min(1, sum of the tries' weights / (that sum less w_j plus w(y))). For one try it is the rule above.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from decodathlon.decoders.mcmc.gradient import metropolis
from decodathlon.decoders.mcmc.writing import Desk, Pages, code_of
from decodathlon.harness import law, rewards
from decodathlon.harness.chain import Chain, State
from decodathlon.harness.decoder import decoder
from decodathlon.harness.lazy import torch
from decodathlon.harness.rewards import Answer, Tilted

if TYPE_CHECKING:
    from torch import Tensor

    from decodathlon.harness.targets.base import Target

#: aligned: p(y) exp(r(y) / beta); reward: exp(r(y) / beta) over all that the model could write.
Law = Literal["aligned", "reward"]
_PAPER_QUEST = "Faria et al. 2024, QUEST: Quality-Aware Metropolis-Hastings Sampling for Machine Translation"
_PAPER_QALIGN = "Faria and Smith 2025, Sample, Don't Search: Rethinking Test-Time Alignment for Language Models"
_BOUNDS = {"beta": "(0, 1e6]", "steps": "[1, 1000000]", "temperature": "[0.01, 100]"}


@dataclass(frozen=True)
class Written(State):
    """Where B chains over answers stand. `score` is the log of their law, up to a constant."""

    pages: Pages
    #: (B,) what the log of the law has beyond log p(y), and how much of that counts: 1, except on a way (smc_quest.py).
    tilt: Tensor
    level: Tensor
    #: Where answers are written; the same object along a walk.
    desk: Desk

    @property
    def log_prob(self) -> Tensor:
        """(B,) log p(y), the law of the proposals."""
        return self.pages.terms.sum(-1)

    def where(self, accept: Tensor, other: State) -> Written:
        assert isinstance(other, Written)
        return replace(super().where(accept, other), pages=_merged(accept, self.pages, other.pages))

    def rows(self, chosen: Tensor) -> Written:
        return replace(super().rows(chosen), pages=_taken(self.pages, chosen))


def joined(states: Sequence[Written]) -> Written:
    """The rows of several states that are written at one desk, those of the first one first."""
    first = states[0]
    tensors = [f.name for f in fields(Written) if isinstance(getattr(first, f.name), torch.Tensor)]
    pages = {f.name: torch.cat([getattr(s.pages, f.name) for s in states]) for f in fields(Pages)}
    both: dict[str, Any] = {name: torch.cat([getattr(s, name) for s in states]) for name in tensors}
    return replace(first, **both, pages=Pages(**pages))


def _merged(accept: Tensor, mine: Pages, theirs: Pages) -> Pages:
    def either(name: str) -> Tensor:
        old, new = getattr(mine, name), getattr(theirs, name)
        return torch.where(accept.view(-1, *[1] * (old.dim() - 1)), new, old)

    return Pages(**{f.name: either(f.name) for f in fields(Pages)})


def _taken(pages: Pages, rows: Tensor) -> Pages:
    return Pages(**{f.name: getattr(pages, f.name)[rows] for f in fields(Pages)})


class SuffixChain(Tilted, Chain):
    """What the chains over answers share."""

    reward: str
    beta: float
    tries: int
    diverse: bool
    law: Law

    def log_tilt(self, answers: Sequence[Answer]) -> Tensor:
        """The reward over beta; less log p where the law is to have no factor p."""
        tilt = rewards.build(self.reward)(answers) / self.beta
        own = torch.tensor([a.log_prob for a in answers], dtype=torch.float64)
        return tilt if self.law == "aligned" else tilt - own

    def uniforms(self, length: int) -> int:
        # where to cut, which try, whether; the codes of the tries, the place of the present answer in its own code
        return 3 + self.tries * (length + 1) + 1

    def initial(self, target: Target, heads: Tensor, u: Tensor, *, stops: frozenset[int] = frozenset()) -> Tensor:
        """A draw from the proposals' law."""
        desk = Desk(target, self.shape, stops)
        texts = torch.cat([heads, torch.zeros(u.shape, dtype=torch.long)], 1).to(target.device)
        return desk.write(texts, torch.zeros(len(u), dtype=torch.long).to(target.device), u.to(target.device)).tokens

    def begin(self, target: Target, sequences: Tensor, free: int, *, stops: frozenset[int] = frozenset()) -> Written:
        desk = Desk(target, self.shape, stops)
        pages = desk.read(sequences[:, :free], sequences[:, free:])
        none = torch.zeros(len(sequences), dtype=torch.float64, device=sequences.device)
        return self.judged(target, sequences[:, :free], pages, desk, none + 1.0)

    def judged(self, target: Target, heads: Tensor, pages: Pages, desk: Desk, level: Tensor) -> Written:
        """The state of chains whose answers these are; asks for the reward."""
        log_prob = pages.terms.sum(-1)
        every = zip(heads.tolist(), pages.tokens.tolist(), pages.lengths.tolist(), log_prob.tolist(), strict=True)
        tilt = self.log_tilt([Answer(head, tokens[:n], p, target) for head, tokens, n, p in every]).to(heads.device)
        sequences = torch.cat([heads, pages.tokens], 1)
        score, accepted = log_prob + level * tilt, torch.zeros_like(level)
        return Written(sequences, heads.shape[1], score, accepted, pages, tilt, level, desk)

    def step(self, target: Target, state: Written, u: Tensor) -> Written:
        B, k, N = len(u), self.tries, state.tokens.shape[1]
        cut = (u[:, 0] * state.pages.lengths).long()
        noise = u[:, 4:].view(B, k, N + 1)
        codes = self._lattice(state, cut, u[:, 3]) if self.diverse else noise[:, :, N]
        tries = self.written(target, state, cut, codes, noise[:, :, :N])
        weights = self.log_weight(tries, cut.repeat_interleave(k)).view(B, k)
        chosen = law.draw(weights.log_softmax(1), u[:, 1])
        others = weights.scatter(1, chosen[:, None], -math.inf)
        stay = torch.cat([others, self.log_weight(state, cut)[:, None]], 1)
        ratio = weights.logsumexp(1) - stay.logsumexp(1)
        rows = torch.arange(B, device=u.device) * k + chosen
        state.desk.select(rows)
        return metropolis(state, tries.rows(rows), ratio, u[:, 2])

    def log_weight(self, state: Written, cut: Tensor) -> Tensor:
        """(B,) W(y) of answers whose first `cut` (B,) tokens stay."""
        return state.level * state.tilt - state.pages.lengths.double().log()

    def written(self, target: Target, state: Written, cut: Tensor, codes: Tensor, noise: Tensor) -> Written:
        """B * k answers, k behind the first `cut` tokens of each chain's; `codes` is (B, k), `noise` (B, k, N)."""
        B, k, N = noise.shape
        pages = state.desk.write(state.sequences, cut, noise.reshape(B * k, N), codes.reshape(B * k), copies=k)
        before = (torch.arange(N, device=cut.device) < cut[:, None]).repeat_interleave(k, 0)
        pages = replace(
            pages,
            terms=torch.where(before, state.pages.terms.repeat_interleave(k, 0), pages.terms),
            below=torch.where(before, state.pages.below.repeat_interleave(k, 0), pages.below),
        )
        heads = state.sequences[:, : state.free].repeat_interleave(k, 0)
        return self.judged(target, heads, pages, state.desk, state.level.repeat_interleave(k))

    def _lattice(self, state: Written, cut: Tensor, u: Tensor) -> Tensor:
        """(B, k) codes of the tries: evenly spaced from one of those that stand for the rest of the present answer."""
        steps = torch.arange(1, self.tries + 1, device=u.device, dtype=torch.float64) / (self.tries + 1)
        return (code_of(state.pages, cut, u)[:, None] + steps).remainder(1.0)


@decoder(
    "qalign",
    claim="sharpened",
    bounds=_BOUNDS,
    sweep={"beta": [0.1, 0.5, 1.0, 2.0]},
    paper=_PAPER_QALIGN,
)
class QAlign(SuffixChain):
    """Answers from p(y) exp(r(y) / beta): keep a beginning, write the rest anew, accept by the reward and the lengths.

    p is the model's law at `temperature`, r the reward (`decodathlon list rewards`).
    """

    tries: ClassVar[int] = 1
    diverse: ClassVar[bool] = False
    law: ClassVar[Law] = "aligned"

    reward: str = "log-power"
    beta: float = 1.0
    steps: int = 128
    temperature: float = 1.0


@decoder(
    "quest",
    claim="sharpened",
    bounds=_BOUNDS,
    sweep={"beta": [0.1, 0.5, 1.0, 2.0]},
    paper=_PAPER_QUEST,
)
class Quest(SuffixChain):
    """Answers from exp(r(y) / beta): keep a beginning, write the rest anew, accept by reward, likelihood and lengths.

    With `log-power` as its reward the law is p^(1/beta).
    """

    tries: ClassVar[int] = 1
    diverse: ClassVar[bool] = False
    law: ClassVar[Law] = "reward"

    reward: str = "log-power"
    beta: float = 0.5
    steps: int = 128
    temperature: float = 1.0


@decoder(
    "mt-quest",
    claim="sharpened",
    bounds={**_BOUNDS, "tries": "[1, 1024]"},
    sweep={"tries": [2, 4, 8, 16], "diverse": [False, True]},
    paper=_PAPER_QALIGN + "; Liu 1996, Metropolized Gibbs, for the choice among tries",
)
class MultipleTryQuest(SuffixChain):
    """QAlign with several ways to go on per step, read in one batch; one of them is taken up, by weight.

    `diverse` spreads the tries evenly over the law of the rest, as arithmetic sampling does, from a code of the present
    answer; the chain's law stays the same. `law=reward` leaves the factor p out, as QUEST does.
    """

    tries: int = 8
    diverse: bool = True
    law: Law = "aligned"
    reward: str = "log-power"
    beta: float = 1.0
    steps: int = 64
    temperature: float = 1.0
