"""Drafting that is itself drafted for: a lookup guesses for the quantised target, and that guesses for the target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from decodathlon.decoders.speculative.base import SELF_BOUNDS
from decodathlon.decoders.speculative.base import claim as claim_of_law
from decodathlon.decoders.speculative.drafter import Draft, Drafter, SharedMemory, Stopping
from decodathlon.decoders.speculative.lookup import Lookup
from decodathlon.decoders.speculative.quantised import QuantisedSelf
from decodathlon.harness import law
from decodathlon.harness.decoder import decoder
from decodathlon.harness.errors import SpecError
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class TwoLevels(SharedMemory):
    """A form of the target that reads a lookup's guesses, keeps those that it would have drawn itself, and so drafts
    several tokens per pass. What it drafts has its own law, token by token, whatever was looked up.

    Args:
        ahead: the most guesses per pass.
    """

    def __init__(self, context: Any, shape: Any, *, sampled: bool, lookup: Lookup, ahead: int) -> None:
        super().__init__(context, shape, sampled=sampled, watched=False)
        self.lookup, self.ahead = lookup, ahead

    def propose(self, texts: Sequence[Sequence[int]], want: Sequence[int], stopping: Stopping, u: Tensor) -> Draft:
        self.context.follow()
        B = len(texts)
        drafted: list[list[int]] = [[] for _ in texts]
        laws: list[list[Tensor]] = [[] for _ in texts]
        for b, text in enumerate(texts):
            self.lookup.index(b, text)
        while any(len(d) < w for d, w in zip(drafted, want, strict=True)):
            # a pass is as wide as its longest row, and begins behind the row that has come furthest
            room = self.context.capacity - int(self.context.lengths.max()) - 1
            guesses = [
                self.lookup.after(b, texts[b], drafted[b], max(0, min(self.ahead, w - len(drafted[b]) - 1, room)))
                for b, w in enumerate(want)
            ]
            self._pass(texts, want, drafted, laws, guesses, u)
        width = max(map(len, drafted))
        tokens = torch.tensor([d + [0] * (width - len(d)) for d in drafted], dtype=torch.long).view(B, width)
        counts = [len(d) for d in drafted]
        if not self.sampled or not width:
            return Draft(tokens, counts)
        rows = [torch.stack([*own, *[self._any(laws)] * (width - len(own))]) for own in laws]
        return Draft(tokens, counts, torch.stack(rows))

    def _pass(
        self,
        texts: Sequence[Sequence[int]],
        want: Sequence[int],
        drafted: list[list[int]],
        laws: list[list[Tensor]],
        guesses: Sequence[list[int]],
        u: Tensor,
    ) -> None:
        """Read the last token of each row and the guesses behind it; keep those that are drawn, and one more."""
        width = 1 + max(map(len, guesses))
        lasts = [[(d or list(t))[-1]] for d, t in zip(drafted, texts, strict=True)]
        padded = torch.tensor([last + g + [0] * (width - 1 - len(g)) for last, g in zip(lasts, guesses, strict=True)])
        logits = self.context.extend(padded).logits
        self.calls += 1
        self.positions += width
        log_q = self.law(logits.flatten(0, 1)).view_as(logits) if self.sampled else logits
        kept = []
        for b, guess in enumerate(guesses):
            count = 0
            if len(drafted[b]) < want[b]:
                for j in range(len(guess) + 1):
                    token = self._drawn(log_q[b, j], u[b, len(drafted[b])])
                    drafted[b].append(token)
                    laws[b].append(log_q[b, j])
                    count += 1
                    if j == len(guess) or token != guess[j]:
                        break
            kept.append(count)
        self.context.keep(kept)

    def _drawn(self, log_q: Tensor, u: Tensor) -> int:
        if not self.sampled:
            return int(log_q.argmax())
        return int(law.draw(log_q[None], u[None].to(log_q.device)))

    @staticmethod
    def _any(laws: Sequence[Sequence[Tensor]]) -> Tensor:
        return next(own[0] for own in laws if own)

    def select(self, rows: Sequence[int]) -> None:
        self.lookup.select(rows)


@decoder(
    "multi-level",
    claim=claim_of_law,
    family="speculative",
    bounds={**SELF_BOUNDS, "ahead": "[1, 64]", "longest": "[1, 16]"},
    sweep={"k": [2, 4, 8], "ahead": [2, 4]},
    paper="Georganas et al. 2025, ML-SpecQD: Multi-Level Speculative Decoding with Quantized Drafts (arXiv 2503.13565)",
)
class MultiLevel(QuantisedSelf):
    """As `quantised-self`, whose own drafting is drafted for by a lookup in the text: `ahead` guesses per pass."""

    k: int = 4
    ahead: int = 4
    longest: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.branches > 1 or self.looks:
            raise SpecError("multi-level drafts chains of a length that is known before: no branches, no rule on laws")

    def reading_on(self, target: Any, context: Any, forward: Any) -> Drafter:
        lookup = Lookup(context.rows, self.longest, 1, [0] * context.rows)
        plain = self.autoregressive(SharedMemory, context.lent(forward))
        return TwoLevels(plain.context, plain.law, sampled=plain.sampled, lookup=lookup, ahead=self.ahead)
