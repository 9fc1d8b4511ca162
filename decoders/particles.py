"""Answers that grow side by side: several to each prompt, which share what the model reads of it.

What has ended or was dropped takes no part in the context any more; one may be copied over another.

Dimensions: P prompts, M particles of each, G of all P M that still grow, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from decodathlon.harness.decoder import Completion, Cost, Limits
from decodathlon.harness.errors import UnsupportedError
from decodathlon.harness.generation import token_log_prob
from decodathlon.harness.lazy import torch
from decodathlon.harness.rewards import Answer

if TYPE_CHECKING:
    from torch import Tensor

    from decodathlon.harness.targets.base import Target


@dataclass
class Particle:
    """An answer to one of the prompts, whole or so far."""

    prompt: int
    tokens: list[int]
    #: Under the law that it is drawn from, and under the model itself.
    log_prob: float = 0.0
    model_log_prob: float = 0.0
    ended: bool = False
    dropped: bool = False
    #: Whether it waits for others, and grows again later.
    waits: bool = False


def check_memory(target: Target, prompts: Sequence[Sequence[int]], each: int, limits: Limits) -> None:
    """
    Raises:
        UnsupportedError: so many particles to each prompt do not fit into the memory that is free now.
    """
    from decodathlon.harness.measure import memory

    longest = max(map(len, prompts)) + limits.max_new_tokens
    # where rows are copied, the old ones and the new ones are there at once
    needed = 2 * len(prompts) * each * target.row_bytes(longest)
    free = memory.free_bytes(str(target.device)) if needed else None
    if free is not None and needed > free:
        raise UnsupportedError(
            f"{needed / 1e9:.3g} GB of memory",
            f"{len(prompts)} times {each} particles of up to {longest} tokens take about that, and {free / 1e9:.3g} GB "
            f"are free; fewer particles, shorter answers or fewer prompts side by side would fit",
        )


class Particles:
    """M particles to each of P prompts, those of the first prompt first.

    In turns: `next_logits` of those that grow, `take` a token for each.
    """

    def __init__(self, target: Target, prompts: Sequence[Sequence[int]], each: int, limits: Limits) -> None:
        """
        Raises:
            ValueError: there is no room for a token.
            UnsupportedError: the particles do not fit into memory.
        """
        if limits.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {limits.max_new_tokens}")
        check_memory(target, prompts, each, limits)
        self.target, self.prompts, self.each = target, prompts, each
        self.all = [Particle(p, []) for p in range(len(prompts)) for _ in range(each)]
        self.costs = [Cost(target_positions=len(p)) for p in prompts]
        self._stops = frozenset() if limits.ignore_eos else target.stop_tokens
        self._most = limits.max_new_tokens
        self._context = target.open(prompts, capacity=max(map(len, prompts)) + limits.max_new_tokens)
        #: Of each particle the row of the context that has read it but for its last token; None where it takes no part.
        self._row: list[int | None] = [one.prompt for one in self.all]
        #: Whether tokens were taken that the context has not read.
        self._begun = False

    @property
    def growing(self) -> list[int]:
        """(G,) the numbers of those that grow."""
        return [i for i in self.unfinished if not self.all[i].waits]

    @property
    def unfinished(self) -> list[int]:
        """The numbers of those that grow, or wait for others that do."""
        return [i for i, one in enumerate(self.all) if self._unfinished(one)]

    def unfinished_of(self, prompt: int) -> list[int]:
        """The same of one prompt; its particles are counted from 0."""
        return [i for i, one in enumerate(self.of(prompt)) if self._unfinished(one)]

    def _unfinished(self, one: Particle) -> bool:
        return not (one.ended or one.dropped) and len(one.tokens) < self._most

    def of(self, prompt: int) -> list[Particle]:
        return self.all[prompt * self.each : (prompt + 1) * self.each]

    def next_logits(self) -> Tensor:
        """(G, V) for those that grow, in their order; reads their last tokens."""
        there, growing = self.unfinished, self.growing
        rows = [self._row[i] for i in there]
        if rows != list(range(self._context.rows)):
            self._context.select([row for row in rows if row is not None])
        self._row = [None] * len(self.all)
        for row, i in enumerate(there):
            self._row[i] = row
        if self._begun:
            tokens = torch.tensor([[self.all[i].tokens[-1]] for i in there], device=self.target.device)
            self._context.extend(tokens)
            self._context.keep([int(not self.all[i].waits) for i in there])
            for i in there:  # those that wait are read as well, to no use
                self.costs[self.all[i].prompt].target_positions += 1
        for p in {self.all[i].prompt for i in growing}:
            self.costs[p].target_calls += 1
        self._begun = True
        logits = self._context.next_logits if growing == there else self._context.next_logits[self._rows_of(growing)]
        if bool(logits.isnan().any()):
            raise ValueError(f"{self.target.name}: the model's logits have NaN; its weights or its dtype are broken")
        return logits

    def _rows_of(self, some: Sequence[int]) -> list[int]:
        return [row for row in (self._row[i] for i in some) if row is not None]

    def take(self, tokens: Tensor, log_law: Tensor, logits: Tensor) -> None:
        """Give each that grows its next token.

        Args:
            tokens: (G,).
            log_law: (G, V) the law that counts as theirs.
            logits: (G, V) of the model itself.
        """
        own = log_law.gather(1, tokens[:, None])[:, 0].double().tolist()
        raw = token_log_prob(logits, tokens).double().tolist()
        for i, token, p, q in zip(self.growing, tokens.tolist(), own, raw, strict=True):
            one = self.all[i]
            one.tokens.append(token)
            one.log_prob += p
            one.model_log_prob += q
            one.ended = token in self._stops

    def copy(self, parents: Sequence[int]) -> None:
        """Make particle i a copy of particle `parents[i]`, which is one of the same prompt."""
        if any(self.all[i].prompt != self.all[k].prompt for i, k in enumerate(parents)):
            raise ValueError("a particle may only be copied over one of its own prompt")
        self.all = [replace(self.all[k], tokens=list(self.all[k].tokens)) for k in parents]
        self._row = [self._row[k] for k in parents]

    def become(self, others: Sequence[Particle]) -> None:
        """Make the particles what these are, of earlier times perhaps; all that they hold is read anew."""
        self.all = [replace(one, tokens=list(one.tokens)) for one in others]
        self._row = [None] * len(self.all)
        there = self.unfinished
        heads = [[*self.prompts[self.all[i].prompt], *self.all[i].tokens[:-1]] for i in there]
        if there:
            self._context = self.target.open(heads, capacity=max(map(len, self.prompts)) + self._most)
        for row, i in enumerate(there):
            self._row[i] = row
            self.costs[self.all[i].prompt].target_positions += len(heads[row])
        for p in {self.all[i].prompt for i in there}:
            self.costs[p].target_calls += 1

    def answers(self, some: Sequence[Particle], *, by_model: bool = False) -> list[Answer]:
        """Particles as a reward sees them; `by_model` with the model's own log-probability, not that of the drawing."""
        prompts = [list(p) for p in self.prompts]
        log_probs = [one.model_log_prob if by_model else one.log_prob for one in some]
        every = zip(some, log_probs, strict=True)
        return [Answer(prompts[one.prompt], list(one.tokens), p, self.target) for one, p in every]

    def completion(self, one: Particle, trace: Sequence[dict[str, Any]]) -> Completion:
        """The answer that was chosen, with what all those to its prompt cost."""
        return Completion(
            tokens=one.tokens,
            stop_reason="stop" if one.ended else "length",
            log_prob=one.model_log_prob,
            text=self.target.decode(one.tokens) if "text" in self.target.capabilities else "",
            cost=self.costs[one.prompt],
            trace=[dict(entry) for entry in trace],
        )
