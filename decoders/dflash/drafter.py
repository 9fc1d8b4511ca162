"""The drafter of a block, as the core of speculative decoding sees one: hidden states in, laws of all places out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from decodathlon.decoders.speculative.drafter import Draft, Drafter, Stopping
from decodathlon.decoders.speculative.outlook import Outlook
from decodathlon.harness import law
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from decodathlon.decoders.dflash.network import Memory, Network


class BlockDrafter(Drafter):
    """Guesses all places of a block in one pass, each by itself.

    What the target read in a cycle is taken up at the beginning of the next one, so that it counts as drafting.

    Args:
        embedding: the target's, (V, E).
        head: its output matrix, or what stands for it.
        context: of the target, with the hidden states of the prompts.
        memory: an empty one, for the prompts' rows.
        law: (B, V) logits to the processed law, as the target's are.
        sampled: whether tokens are drawn from the law, or its likeliest is guessed.
        watched: whether `stopping` wants to see laws.
        whole: guesses in a block, always, or 0: as many as some row wants. What is guessed at a place depends on how
            many places there are, and so would a row's text on its neighbours.
    """

    def __init__(
        self, network: Network, embedding: Tensor, head: Any, context: Any, prompts: Sequence[Sequence[int]], *,
        memory: Memory, law: Any, sampled: bool, watched: bool, whole: int,
    ) -> None:  # fmt: skip
        self.network, self.embedding, self.head, self.law = network, embedding, head, law
        self.sampled, self.watched, self.whole = sampled, watched, whole
        self.hidden = seen_by(network)
        self.memory = memory
        self._pending: list[tuple[Tensor, list[int]]] = [
            (self._beside(context.prompt_hidden), [len(p) for p in prompts])
        ]

    def propose(self, texts: Sequence[Sequence[int]], want: Sequence[int], stopping: Stopping, u: Tensor) -> Draft:
        laws = self.laws(texts, want)
        if laws is None:
            return Draft(torch.zeros(len(texts), 0, dtype=torch.long), [0] * len(texts))
        if not self.sampled:
            tokens = laws.argmax(-1)
        else:
            places = zip(laws.unbind(1), u.to(laws.device).unbind(1), strict=False)
            tokens = torch.stack([law.draw(at, numbers) for at, numbers in places], 1)
        counts = self.lengths(laws, want, stopping) if self.watched else list(want)
        return Draft(tokens, counts, laws if self.sampled else None)

    def laws(self, texts: Sequence[Sequence[int]], want: Sequence[int]) -> Tensor | None:
        """(B, max(want), V) the law of each place behind the text; None where none is wanted."""
        self._take_up()
        width = max(want)
        if not width:
            return None
        return self.read(self.block(texts, self.whole or width), width)

    def read(self, block: Tensor, width: int) -> Tensor:
        """(B, width, V) laws of the first places of a block of tokens."""
        self.calls += 1
        self.positions += block.shape[1]
        outputs = self.memory.draft(self.embedded(block))[:, : 1 + width]
        self.usual, self.trouble = self.usual and self.memory.usual, self.memory.trouble
        return self.read_out(outputs)

    def block(self, texts: Sequence[Sequence[int]], width: int) -> Tensor:
        """(B, 1 + width) the last token and masks."""
        last = torch.tensor([[text[-1]] for text in texts])
        mask = torch.full((len(texts), width), self.network.config.mask_token_id)
        return torch.cat([last, mask], 1)

    def embedded(self, tokens: Tensor) -> Tensor:
        return torch.nn.functional.embedding(tokens.to(self.embedding.device), self.embedding)

    def read_out(self, outputs: Tensor) -> Tensor:
        """Laws of the places behind the first of a block, whose outputs (B, 1 + width, E) are given."""
        rows, width = outputs.shape[0], outputs.shape[1] - 1
        # flat, for a product with a part of three dimensions copies the whole matrix
        logits = self.network.logits(outputs[:, 1:].flatten(0, 1), self.head)
        found: Tensor = self.law(logits).unflatten(0, (rows, width))
        return found

    def lengths(self, laws: Tensor, want: Sequence[int], stopping: Stopping) -> list[int]:
        """By row, how many places a rule that looks at laws leaves."""
        counts, going = [0] * len(want), [w > 0 for w in want]
        for place in range(laws.shape[1]):
            counts = [n + g for n, g in zip(counts, going, strict=True)]
            going = [g and n < w for g, n, w in zip(going, counts, want, strict=True)]
            if not any(going):
                break
            stopped = stopping.stops(Outlook(laws[:, place], place), going)
            going = [g and not s for g, s in zip(going, stopped, strict=True)]
        return counts

    def settle(self, accepted: Sequence[int], hidden: Mapping[int, Tensor]) -> None:
        self._pending.append((self._beside(hidden), [n + 1 for n in accepted]))

    def select(self, rows: Sequence[int]) -> None:
        self.memory.select(rows)
        index = torch.tensor(list(rows))
        self._pending = [(s[index.to(s.device)], [counts[row] for row in rows]) for s, counts in self._pending]

    def _take_up(self) -> None:
        self.usual = True
        for states, counts in self._pending:
            self.memory.append(states, counts)
            self.positions += max(counts, default=0)
        self._pending = []

    def _beside(self, hidden: Mapping[int, Tensor]) -> Tensor:
        """(B, T, F * E)."""
        return torch.cat([hidden[number] for number in self.hidden], -1)


class Nothing(Drafter):
    """Drafts nothing: what a block of one token is."""

    def propose(self, texts: Sequence[Sequence[int]], want: Sequence[int], stopping: Stopping, u: Tensor) -> Draft:
        return Draft(torch.zeros(len(texts), 0, dtype=torch.long), [0] * len(texts))


def seen_by(network: Network) -> tuple[int, ...]:
    """The hidden states of the target that it wants, as `Context.extend` numbers them: 0 are the embeddings, and those
    of the last layer are normed, as transformers has them."""
    last = network.config.num_target_layers - 1
    return tuple(i + 2 if i == last else i + 1 for i in network.config.target_layer_ids)
