"""Decoders that make a tree of one block's guesses, of which the target follows the way that it draws itself.

A block says for each place, independently of the others, how likely every token is. So trees cost no further pass of
the drafter, and all that is asked is which of the many ways on are worth a node. `ddtree` has the answer for places
that are independent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from decodathlon.decoders.dflash import packing
from decodathlon.decoders.dflash.block import BLOCK_BOUNDS, BlockSpeculative
from decodathlon.decoders.dflash.drafter import BlockDrafter
from decodathlon.decoders.speculative.base import LOOKING, claim
from decodathlon.decoders.speculative.clocks import Budget
from decodathlon.decoders.speculative.controllers import Seconds
from decodathlon.decoders.speculative.drafter import Draft, Drafter, Stopping
from decodathlon.decoders.speculative.trees import from_marginals
from decodathlon.harness import law
from decodathlon.harness.decoder import decoder
from decodathlon.harness.errors import SpecError
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

NEEDS = ("hf-model", "hidden")
#: Nodes of the widest tree, where times decide how many there are.
MOST = 64


@dataclass(frozen=True, kw_only=True)
class BlockTree(BlockSpeculative):
    """A decoder that proposes a tree. Its nodes are guesses: any tree that follows from the past is exact."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block == 1:
            raise SpecError(f"{self.info.name}: block=1 drafts nothing; dflash[block=1] is that loop")
        if self.controller in (*LOOKING, "tapout", "contextual"):
            raise SpecError(
                f"{self.info.name}: controller={self.controller} stops chains; a tree has a size of its own"
            )

    def guide(self, logits: Tensor) -> Tensor:
        """What the target draws is spread by the temperature, so the worth of second choices is too."""
        return law.process(logits, temperature=self.temperature) if self.temperature > 0 else super().guide(logits)

    def plant(self, target: Any, context: Any, prompts: Sequence[Sequence[int]], **more: Any) -> Drafter:
        found: Drafter = self.drafting(TreeDrafter, target, context, prompts, **more)
        return found


class TreeDrafter(BlockDrafter):
    """Makes a tree of the laws of a block's places.

    Args:
        grow: from log-probabilities and tokens by place and rank, of one row, to the nodes.
        ranks: how many of the likeliest tokens of a place it sees.
    """

    def __init__(
        self, *given: Any, grow: Callable[[packing.Values, packing.Tokens], packing.Nodes], ranks: int, **more: Any
    ) -> None:
        super().__init__(*given, **more)
        self.grow, self.ranks = grow, ranks

    def propose(self, texts: Sequence[Sequence[int]], want: Sequence[int], stopping: Stopping, u: Tensor) -> Draft:
        laws = self.laws(texts, want)
        if laws is None:
            return no_tree(len(texts))
        best = laws.topk(min(self.ranks, laws.shape[2]), dim=-1)
        values, tokens = best.values.tolist(), best.indices.tolist()
        return as_tree(
            [self.grow(values[b][:w], tokens[b][:w]) if w else [] for b, w in enumerate(want)]
        )  # fmt: skip


def no_tree(rows: int) -> Draft:
    empty = torch.zeros(rows, 0, dtype=torch.long)
    return Draft(empty, [0] * rows, parents=empty)


def as_tree(rows: Sequence[packing.Nodes]) -> Draft:
    """The nodes of each row, padded to one width."""
    width = max(map(len, rows))
    padded = torch.tensor([[*row, *[(0, -1)] * (width - len(row))] for row in rows], dtype=torch.long)
    padded = padded.view(len(rows), width, 2)
    return Draft(padded[..., 0], [len(row) for row in rows], parents=padded[..., 1])


class BestFirst(BlockDrafter):
    """The likeliest beginnings, as many as pay."""

    def __init__(self, *given: Any, budget: Budget, **more: Any) -> None:
        super().__init__(*given, **more)
        self.budget, self._first = budget, True

    def propose(self, texts: Sequence[Sequence[int]], want: Sequence[int], stopping: Stopping, u: Tensor) -> Draft:
        laws = self.laws(texts, want)
        if laws is None:
            return no_tree(len(texts))
        most = self.budget.fixed or self.budget.most
        draft = from_marginals(laws, most, most, want)
        if self.budget.fixed:
            return draft
        count = self.budget.nodes(_worth(draft, laws))
        return draft.cut(count)

    def timed(self, nodes: int, seconds: Seconds) -> None:
        if nodes and not self._first:  # whose seconds hold the pass over the prompt
            self.budget.timed(nodes, 1, seconds)
        self._first = False


def _worth(draft: Draft, laws: Tensor) -> list[float]:
    """How probable it is that each node stays, the mean over rows."""
    assert draft.parents is not None
    total = [0.0] * draft.tokens.shape[1]
    for b, count in enumerate(draft.counts):
        parents = draft.parents[b, :count].tolist()
        depth: list[int] = []
        for parent in parents:
            depth.append(0 if parent < 0 else depth[parent] + 1)
        chances = laws[b, torch.tensor(depth, dtype=torch.long), draft.tokens[b, :count]].exp().tolist()
        worth: list[float] = []
        for parent, chance in zip(parents, chances, strict=True):
            worth.append(chance if parent < 0 else worth[parent] * chance)
        total = [
            one + other / len(draft.counts) for one, other in zip(total, [*worth, *[0.0] * len(total)], strict=False)
        ]
    return total


@decoder(
    "ddtree",
    claim=claim,
    family="dflash",
    bounds={**BLOCK_BOUNDS, "budget": "[0, 1024]"},
    sweep={"budget": [0, 8, 16, 32, 64]},
    needs=NEEDS,
    paper="Ringel, Romano 2026, DDTree (arXiv 2604.12989)",
)
class DDTree(BlockTree):
    """A block's guesses as the tree of the `budget` likeliest beginnings, if its places are independent."""

    #: Nodes; 0: as many as pay by the times that were measured.
    budget: int = 0

    @property
    def widest(self) -> int:
        return max(self.k, self.budget or MOST)

    def drafter(self, target: Any, context: Any, prompts: Sequence[Sequence[int]]) -> Drafter:
        kept = ("budget", self)
        if not self.remember or kept not in target.kept:
            target.kept[kept] = Budget(self.budget, MOST)
        found: Drafter = self.drafting(BestFirst, target, context, prompts, budget=target.kept[kept])
        return found
