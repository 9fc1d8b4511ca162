"""Drafts from what is there already: the text that followed the last few tokens when they came up before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from decodathlon.decoders.speculative.base import BOUNDS, Speculative, claim
from decodathlon.decoders.speculative.drafter import Draft, Drafter, Stopping
from decodathlon.harness.decoder import decoder
from decodathlon.harness.errors import SpecError
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class Lookup(Drafter):
    """What followed the newest earlier occurrence of the text's last n tokens, the longest n first.

    An index by n-gram grows with the text, so that a look costs as much at the end of a long text as at its beginning.

    Args:
        longest: the most tokens that are compared.
        shortest: the fewest; fewer say little of what follows.
        begins: from where on the text is searched, by row: 0, or the prompt's length.
        per_match: the most tokens that are copied for each token that was found; 0: as many as are wanted.
    """

    def __init__(self, rows: int, longest: int, shortest: int, begins: Sequence[int], per_match: int = 0) -> None:
        self.sizes, self.per_match = range(longest, shortest - 1, -1), per_match
        #: By row: where each n-gram ended last, and the time before.
        self._last: list[dict[tuple[int, ...], int]] = [{} for _ in range(rows)]
        self._before: list[dict[tuple[int, ...], int]] = [{} for _ in range(rows)]
        self._read = list(begins)
        self._begins = list(begins)

    def propose(self, texts: Sequence[Sequence[int]], want: Sequence[int], stopping: Stopping, u: Tensor) -> Draft:
        found = []
        for b, (text, w) in enumerate(zip(texts, want, strict=True)):
            self.index(b, text)
            found.append(self.after(b, text, (), w))
        width = max(map(len, found))
        return Draft(torch.tensor([f + [0] * (width - len(f)) for f in found]).long(), [len(f) for f in found])

    def index(self, b: int, text: Sequence[int]) -> None:
        """Take up what the text of a row has gained."""
        last, before = self._last[b], self._before[b]
        for end in range(self._read[b] + 1, len(text) + 1):
            for n in self.sizes:
                if end - n >= self._begins[b]:
                    gram = tuple(text[end - n : end])
                    if gram in last:
                        before[gram] = last[gram]
                    last[gram] = end
        self._read[b] = len(text)

    def after(self, b: int, text: Sequence[int], tail: Sequence[int], count: int) -> list[int]:
        """What followed the last n tokens when they came up before; nothing where they did not. A copy that reaches the
        end of the text goes on with itself, as a loop would.

        Args:
            text: of row b, taken up.
            tail: tokens behind it that are no part of it yet, and are not searched.
        """
        whole = [*text, *tail]
        earlier = self._last[b] if tail else self._before[b]  # a text's own end is its last occurrence
        for n in self.sizes:
            begin = earlier.get(tuple(whole[-n:]))
            if begin is not None:
                period = len(whole) - begin
                most = min(count, n * self.per_match) if self.per_match else count
                return [whole[begin + i % period] for i in range(most)]
        return []

    def select(self, rows: Sequence[int]) -> None:
        for part in (self._last, self._before, self._read, self._begins):
            part[:] = [part[row] for row in rows]  # type: ignore[index, call-overload]


@decoder(
    "prompt-lookup",
    claim=claim,
    family="speculative",
    headline="prompt-lookup",
    bounds={**BOUNDS, "longest": "[1, 16]", "shortest": "[1, 16]", "per_match": "[0, 64]"},
    sweep={"k": [2, 4, 8, 16], "controller": ["static", "ewma", "break-even", "tapout"]},
    paper="Saxena 2023, Prompt Lookup Decoding; Yang et al. 2023, Inference with Reference (arXiv 2304.04487)",
)
class PromptLookup(Speculative):
    """Drafts what followed the last tokens when they came up before, in the prompt or in the answer so far."""

    longest: int = 3
    shortest: int = 1
    k: int = 8
    #: The most tokens that are copied for each that matched, for one that matched says little of eight to come; 0: k
    #: whatever matched.
    per_match: int = 3
    has_laws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shortest > self.longest:
            raise SpecError(f"shortest={self.shortest} exceeds longest={self.longest}")

    def drafter(self, target: Any, context: Any, prompts: Sequence[Sequence[int]]) -> Drafter:
        return Lookup(len(prompts), self.longest, self.shortest, [0] * len(prompts), self.per_match)


@decoder(
    "retrieval",
    claim=claim,
    family="speculative",
    bounds={**BOUNDS, "longest": "[1, 16]", "shortest": "[1, 16]", "per_match": "[0, 64]"},
    sweep={"k": [2, 4, 8, 16]},
    paper="He et al. 2023, REST: Retrieval-Based Speculative Decoding (arXiv 2311.08252)",
)
class Retrieval(PromptLookup):
    """As `prompt-lookup`, but only from what the answer itself has said so far."""

    def drafter(self, target: Any, context: Any, prompts: Sequence[Sequence[int]]) -> Drafter:
        return Lookup(len(prompts), self.longest, self.shortest, [len(p) for p in prompts], self.per_match)
