"""`Chain`: the form of a Markov chain over whole sequences. Many chains run side by side as rows."""

from __future__ import annotations

import dataclasses
import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from decodathlon.harness.decoder import Claim, Completion, Cost, Decoder, Limits
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from decodathlon.harness.randomness import RowRandom
    from decodathlon.harness.targets.base import Target

#: One entry per step, of whatever is worth a look at it.
Trace = Sequence[Mapping[str, Any]]
#: Uniform numbers per chain that are drawn in one go.
_UNIFORMS_AHEAD = 4096


@dataclass(frozen=True)
class State:
    """Where B chains stand. A subclass adds what a transition needs of a sequence and is dear to compute."""

    #: (B, L), the prompt included; what stands behind a stop token means nothing.
    sequences: Tensor
    #: The first position that may change.
    free: int
    #: (B,) float64 log of the chain's law at the sequence, up to a constant.
    score: Tensor
    #: (B,) how many moves were accepted so far.
    accepted: Tensor

    @property
    def tokens(self) -> Tensor:
        """(B, N) the free tokens."""
        return self.sequences[:, self.free :]

    @property
    def log_prob(self) -> Tensor:
        """(B,) log-probability of the free tokens under the target, up to a constant."""
        return self.score

    def where(self, accept: Tensor, other: State) -> Self:
        """The rows of `other` where `accept` (B,) says so, the own ones elsewhere."""
        taken: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if isinstance(mine, torch.Tensor):
                taken[f.name] = torch.where(accept.view(-1, *[1] * (mine.dim() - 1)), theirs, mine)
        return dataclasses.replace(self, **taken | {"accepted": self.accepted + accept})

    def rows(self, chosen: Tensor) -> Self:
        """Some of its rows, in this order; one may come several times."""
        every = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        taken: dict[str, Any] = {name: v[chosen] for name, v in every if isinstance(v, torch.Tensor)}
        return dataclasses.replace(self, **taken)


class Chain(Decoder):
    """A Markov chain over whole sequences, on any target with an energy.

    A subclass defines `uniforms` and `step`, and `begin` where a state holds more than a score. Transitions use no
    randomness but the uniforms that they are handed, so that a test can enumerate them.
    """

    #: Transitions before the sequence is taken as the answer; a subclass may make a parameter of it.
    steps: ClassVar[int] = 1000
    #: Transitions before the first state that counts.
    burn_in: ClassVar[int] = 0
    #: Whether an empty prompt is read as the target's start token, where it has one.
    bos: ClassVar[bool] = True

    @abstractmethod
    def uniforms(self, length: int) -> int:
        """How many uniform numbers a transition of a chain of so many free tokens takes."""

    @abstractmethod
    def step(self, target: Target, state: Any, u: Tensor) -> Any:
        """One transition of every chain; `u` is (B, uniforms) in [0, 1)."""

    def begin(self, target: Target, sequences: Tensor, free: int, *, stops: frozenset[int] = frozenset()) -> State:
        """The state of chains that stand at `sequences` (B, L).

        Args:
            stops: tokens that end a text, for chains to which length matters.
        """
        score = target.score(sequences, free)
        return State(sequences, free, score, torch.zeros_like(score))

    def transitions(self, target: Target, state: Any) -> Tensor | None:
        """(M, M) probabilities of a step from each of M texts to each, where they can be worked out; None where not.

        They give exact spectral gaps and an audit without draws; some moves are held against them.

        Args:
            state: of all texts of one length behind one head, in the order of their tokens read as digits.
        """
        return None

    def initial(self, target: Target, heads: Tensor, u: Tensor, *, stops: frozenset[int] = frozenset()) -> Tensor:
        """(B, N) tokens to start from behind the heads, by default uniform over the vocabulary; `u` is (B, N)."""
        return (u * target.vocab_size).long()

    def walk(
        self, target: Target, prompts: Sequence[Sequence[int]], limits: Limits, rng: RowRandom, rows: Sequence[int]
    ) -> Iterator[Any]:
        """Every state of chains that begin behind prompts of equal length, the first one included; without end.

        The states of the burn-in are left out, and what was accepted in it does not count.

        Args:
            limits: how many free tokens there are, and whether any of them ends the text.
            rows: which rows of `rng` the chains draw from.
        """
        length = limits.max_new_tokens
        heads = torch.tensor([list(p) for p in prompts], dtype=torch.long).view(len(prompts), -1)
        stops = frozenset() if limits.ignore_eos else target.stop_tokens
        begun = self.initial(target, heads, rng.uniforms(length, rows=rows), stops=stops)
        sequences = torch.cat([heads.to(target.device), begun.to(target.device)], dim=1)
        state = self.begin(target, sequences, heads.shape[1], stops=stops)
        noise = self._noise(length, rng, rows)
        for u in itertools.islice(noise, self.burn_in):
            state = self._stepped(target, state, u.to(target.device))
        state = dataclasses.replace(state, accepted=torch.zeros_like(state.accepted))
        yield state
        for u in noise:
            state = self._stepped(target, state, u.to(target.device))
            yield state

    def _stepped(self, target: Target, state: Any, u: Tensor) -> Any:
        moved = self.step(target, state, u)
        if not isinstance(moved, State):
            raise TypeError(f"{self.spec}: step() gave {type(moved).__name__}, not the State that it moved to")
        return moved

    def _noise(self, length: int, rng: RowRandom, rows: Sequence[int]) -> Iterator[Tensor]:
        """(B, uniforms) numbers for one transition after the other."""
        each = self.uniforms(length)
        ahead = max(1, _UNIFORMS_AHEAD // max(1, each))
        while True:
            yield from rng.uniforms(ahead, each, rows=rows).unbind(1)

    def generate(
        self, target: Target, prompts: Sequence[Sequence[int]], limits: Limits, rng: RowRandom
    ) -> list[Completion]:
        """One chain per prompt; what stands behind a stop token is left out, which leaves the law of the rest alone."""
        heads = self.heads(target, prompts)

        def last(rows: Sequence[int]) -> tuple[Tensor, Sequence[Trace]]:
            walk = self.walk(target, [heads[b] for b in rows], limits, rng, rows)
            return next(itertools.islice(walk, self.steps, None)).tokens, [()] * len(rows)

        return side_by_side(target, heads, limits, last)

    def heads(self, target: Target, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """What stands before the first free token: the prompt, or where it is empty the start token."""
        starts = [] if target.start_token is None or not self.bos else [target.start_token]
        return [list(p) or starts for p in prompts]


def by_start(chain: Any) -> Claim:
    """The claim of an exact chain: without the start token the first token counts as uniform, in another law."""
    return "exact" if chain.bos else "heuristic"


def side_by_side(
    target: Target,
    heads: Sequence[Sequence[int]],
    limits: Limits,
    run: Callable[[Sequence[int]], tuple[Tensor, Sequence[Trace]]],
) -> list[Completion]:
    """Completions of prompts of any length by something that takes many of equal length at once.

    Args:
        heads: what stands before each answer.
        run: numbers of b heads of equal length to their answers (b, N), in which what stands behind a stop token means
            nothing, and a trace of each.

    Raises:
        ValueError: an answer is to have no token.
    """
    if limits.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {limits.max_new_tokens}: a text has a token")
    answers: dict[int, Completion] = {}
    for size in sorted({len(h) for h in heads}):
        rows = [b for b, h in enumerate(heads) if len(h) == size]
        before = dataclasses.replace(target.spent)
        tokens, traces = run(rows)
        spent = target.spent.since(before)
        cost = Cost(target_calls=spent.calls, target_positions=round(spent.positions / len(rows)))
        for b, answer, trace in zip(rows, tokens.tolist(), traces, strict=True):
            answers[b] = _completion(answer, target, limits, cost, trace)
    return [answers[b] for b in range(len(heads))]


def _completion(tokens: list[int], target: Target, limits: Limits, cost: Cost, trace: Trace) -> Completion:
    stops = [] if limits.ignore_eos else [i for i, t in enumerate(tokens) if t in target.stop_tokens]
    kept = tokens[: stops[0] + 1] if stops else tokens
    text = target.decode(kept) if "text" in target.capabilities else ""
    return Completion(kept, "stop" if stops else "length", text=text, cost=cost, trace=[dict(entry) for entry in trace])
