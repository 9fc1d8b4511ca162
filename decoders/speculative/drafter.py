"""What a drafter is: something that guesses how a text goes on, for a verifier to look at all guesses in one pass.

A drafter serves one request, that is, a batch of rows, from the first token to the last. It knows nothing of the
rule by which its tokens stay, and nothing of who decides how many it draws; it must only say truly from which law
each was drawn.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from decodathlon.decoders.speculative.outlook import Outlook
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from decodathlon.decoders.speculative.controllers import Seconds


@dataclass
class Draft:
    """What one cycle proposes. B rows, N tokens in the widest of them, V vocabulary."""

    #: (B, N) int64; what stands behind a row's count is padding.
    tokens: Tensor
    #: How many of them are meant, by row.
    counts: list[int]
    #: Natural log-probabilities, (B, N, V), of the law that each was drawn from; None for guesses that were not drawn.
    #: In a tree (B, 1 + N, V): of the law that the children of the text and of each node were drawn from, in their
    #: order. A child that is negative is none, because its law had no more tokens.
    log_q: Tensor | None = None
    #: (B, N) of a tree, the parent of each node, -1 for the text; parents before children. None for a chain.
    parents: Tensor | None = None
    #: Whether siblings of a tree that were drawn were drawn with replacement.
    replaced: bool = False

    def places(self, tree: Tensor | None) -> list[int]:
        """By row, how far ahead its tokens reach: as far as there are of a chain, and in a tree its levels. `tree` is
        its ancestor mask (B, 1 + N, 1 + N), as `trees.ancestors` has it."""
        if tree is None:
            return self.counts
        depth = tree.sum(-1) - 1
        return [int(depth[b, : 1 + n].max()) for b, n in enumerate(self.counts)]

    def cut(self, nodes: int) -> Draft:
        """The first so many tokens of each row. What is left out goes by its place, not by what it is."""
        if self.tokens.shape[1] <= nodes:
            return self
        return Draft(
            self.tokens[:, :nodes],
            [min(n, nodes) for n in self.counts],
            None if self.log_q is None else self.log_q[:, : nodes + (self.parents is not None)],
            None if self.parents is None else self.parents[:, :nodes],
            self.replaced,
        )


class Stopping(Protocol):
    """Who decides how many tokens are drafted. It sees laws, never a token (`controllers.py`)."""

    def stops(self, outlook: Outlook, going: Sequence[bool]) -> list[bool]:
        """By row, whether nothing shall be drafted behind the token that this law is for; who does not go on anyway is
        not asked."""


class Drafter(ABC):
    """Guesses for one request."""

    #: Hidden states of the target that it wants to see, as in `Context.extend`.
    hidden: Sequence[int] = ()
    #: What it has computed so far: calls of its model, and token positions that each row's share of them read.
    calls: int = 0
    positions: int = 0
    #: Whether the last draft took the time that drafts take: one that does what comes once says nothing of the others.
    usual: bool = True
    #: What went otherwise than meant, for the row.
    trouble: str = ""

    @abstractmethod
    def propose(self, texts: Sequence[Sequence[int]], want: Sequence[int], stopping: Stopping, u: Tensor) -> Draft:
        """Guess how the rows go on.

        Args:
            texts: by row, the prompt and all tokens so far; the target has not read the last one yet.
            want: by row, the most tokens that are of use; may be 0.
            stopping: is asked behind each token whether to go on, by a drafter that has the law it came from.
            u: (B, max(want)) uniforms in [0, 1) for its draws.
        """

    def settle(self, accepted: Sequence[int], hidden: Mapping[int, Tensor]) -> None:  # noqa: B027 - most need not know
        """
        Args:
            accepted: by row, how many of the drafted tokens stayed.
            hidden: what `hidden` asked for, (B, 1 + P, E) each: behind the text's last token, and behind each drafted
                one of a chain, or of the path that stayed in a tree.
        """

    def state(self, row: int) -> dict[str, float | str]:
        """What a trace shows of how the last draft of a row was made."""
        return {}

    def timed(self, nodes: int, seconds: Seconds) -> None:  # noqa: B027 - chains have controllers for that
        """What the cycle took in which the target looked at so many of its tokens per row."""

    def select(self, rows: Sequence[int]) -> None:  # noqa: B027 - most keep nothing by row
        """Only these rows go on, in this order."""


class Autoregressive(Drafter):
    """A model that drafts token by token: one with a memory of its own, or one that shares the target's.

    Args:
        context: of the drafting model, with the same rows as the target's.
        law: (B, V) logits to the processed law, as the target's are.
        sampled: whether tokens are drawn from the law, or its likeliest is guessed.
        watched: whether `stopping` wants to see laws; where it does not, none is made for guesses.
        normed: whether it wants to see how large the drafter's activations are.
    """

    def __init__(self, context: Any, law: Any, *, sampled: bool, watched: bool, normed: bool = False) -> None:
        self.context, self.law, self.sampled, self.watched = context, law, sampled, watched
        self.rows = context.rows
        self._wanted = [context.deepest] if normed and context.deepest is not None else []
        self._state: Tensor | None = None

    def propose(self, texts: Sequence[Sequence[int]], want: Sequence[int], stopping: Stopping, u: Tensor) -> Draft:
        from decodathlon.harness import law

        B = len(texts)
        counts, going = [0] * B, [w > 0 for w in want]
        tokens, laws = [], []
        while any(going):
            j = len(tokens)
            if j == 0:
                self._read_up(texts)
            else:
                self._read(tokens[-1][:, None], [1] * B)
            logits = self.context.next_logits
            log_q = self.law(logits) if self.sampled or self.watched else None
            if self.sampled and log_q is not None:
                tokens.append(law.draw(log_q, u[:, j].to(log_q.device)))
                laws.append(log_q)
            else:
                tokens.append(logits.argmax(-1))
            counts = [n + g for n, g in zip(counts, going, strict=True)]
            going = [g and n < w for g, n, w in zip(going, counts, want, strict=True)]
            if log_q is not None and self.watched and any(going):
                stopped = stopping.stops(Outlook(log_q, j, self._state), going)
                going = [g and not s for g, s in zip(going, stopped, strict=True)]
        if not tokens:
            return Draft(torch.zeros(B, 0, dtype=torch.long), counts)
        return Draft(torch.stack(tokens, 1), counts, torch.stack(laws, 1) if laws else None)

    def _read_up(self, texts: Sequence[Sequence[int]]) -> None:
        """Let the context read what the rows have gained since."""
        have = [int(n) for n in self.context.lengths.tolist()]
        missing = [list(t[n:]) for t, n in zip(texts, have, strict=True)]
        width = max(map(len, missing))
        padded = torch.tensor([m + [0] * (width - len(m)) for m in missing])
        self._read(padded, [len(m) for m in missing])

    def _read(self, tokens: Tensor, counts: list[int]) -> None:
        step = self.context.extend(tokens, hidden=self._wanted)
        self.context.keep(counts)
        for state in step.hidden.values():
            self._state = state[torch.arange(len(counts)), [n - 1 for n in counts]]
        self.calls += 1
        self.positions += tokens.shape[1]


class OwnMemory(Autoregressive):
    """A model that has read the texts itself."""

    def __init__(self, context: Any, law: Any, **more: bool) -> None:
        super().__init__(context, law, **more)
        self.calls, self.positions = 1, int(context.lengths.max())

    def propose(self, texts: Sequence[Sequence[int]], want: Sequence[int], stopping: Stopping, u: Tensor) -> Draft:
        self._lengths = [len(t) for t in texts]
        room = self.context.capacity - max(self._lengths)  # its context may be the shorter one
        return super().propose(texts, [min(w, max(0, room)) for w in want], stopping, u)

    def settle(self, accepted: Sequence[int], hidden: Mapping[int, Tensor]) -> None:
        have = self.context.lengths.tolist()
        self.context.rewind([min(n, size + a) for n, size, a in zip(have, self._lengths, accepted, strict=True)])

    def select(self, rows: Sequence[int]) -> None:
        self.context.select(list(rows))


class SharedMemory(Autoregressive):
    """A form of the target itself that reads on from the target's own keys and values (`Context.lent`)."""

    def propose(self, texts: Sequence[Sequence[int]], want: Sequence[int], stopping: Stopping, u: Tensor) -> Draft:
        self.context.follow()
        return super().propose(texts, want, stopping, u)
