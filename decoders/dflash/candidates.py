"""The founding note's ideas on more than one block for a cycle, as it has them or as near as is exact.

All are trees of the guesses of one block, and `ddtree` has the best such tree if places are independent: these are to
be held against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from decodathlon.decoders.dflash import packing
from decodathlon.decoders.dflash.block import BLOCK_BOUNDS, PAPER
from decodathlon.decoders.dflash.drafter import BlockDrafter
from decodathlon.decoders.dflash.trees import NEEDS, BlockTree, as_tree, no_tree
from decodathlon.decoders.speculative.base import claim
from decodathlon.decoders.speculative.drafter import Draft, Drafter, Stopping
from decodathlon.harness.decoder import decoder
from decodathlon.harness.errors import SpecError
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@decoder(
    "dflash-tree",
    claim=claim,
    family="dflash",
    bounds={**BLOCK_BOUNDS, "candidates": "[1, 64]"},
    sweep={"candidates": [2, 4, 8]},
    needs=NEEDS,
    paper=PAPER,
)
class PackedBlocks(BlockTree):
    """The `candidates` likeliest whole blocks, packed into one tree where their beginnings are the same."""

    candidates: int = 4

    @property
    def widest(self) -> int:
        return self.k * self.candidates

    def drafter(self, target: Any, context: Any, prompts: Sequence[Sequence[int]]) -> Drafter:
        def grow(values: packing.Values, tokens: packing.Tokens) -> packing.Nodes:
            return packing.packed(packing.likeliest(values, tokens, self.candidates))

        return self.plant(target, context, prompts, grow=grow, ranks=self.candidates)


@decoder(
    "dflash-candidates",
    claim=claim,
    family="dflash",
    bounds={
        **BLOCK_BOUNDS, "branch_depth": "[1, 64]", "branch_top_k": "[2, 64]", "max_candidates": "[1, 64]",
        "branch_margin_threshold": "[-1, 1]", "prefix": "[1, 64]", "positions": "[1, 64]",
    },
    sweep={"mode": ["beam", "prefix-rank", "sparse-rank"]},
    needs=NEEDS,
    paper=PAPER,
)  # fmt: skip
class Candidates(BlockTree):
    """Several whole blocks that differ where the drafter was unsure, packed into one tree: the founding note's
    candidate solutions.

    `beam`: at the first `branch_depth` places whose margin between the two likeliest tokens is at most
    `branch_margin_threshold` (-1: at all of them) the `branch_top_k` likeliest, the best `max_candidates` of them by
    score. `prefix-rank`: behind the first `prefix` tokens of the block, the text's last one among them, the r-th
    candidate has the r-th likeliest token everywhere. `sparse-rank`: each candidate changes one token behind that
    prefix, to one of the `branch_top_k`, at one of the `positions` places of the least margin.
    The note verifies them side by side, in rows with a copy of the memory each, which keeps the same text.
    """

    mode: Literal["beam", "prefix-rank", "sparse-rank"] = "beam"
    branch_depth: int = 6
    branch_top_k: int = 2
    max_candidates: int = 4
    branch_margin_threshold: float = -1.0
    prefix: int = 2
    positions: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        takes = {
            "beam": {"branch_depth", "branch_top_k", "branch_margin_threshold"},
            "prefix-rank": {"prefix"},
            "sparse-rank": {"prefix", "positions", "branch_top_k", "branch_margin_threshold"},
        }
        for name in sorted(set().union(*takes.values()) - takes[self.mode]):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise SpecError(f"{self.info.name}: mode={self.mode} has no {name}")

    @property
    def widest(self) -> int:
        return self.k * self.max_candidates

    def drafter(self, target: Any, context: Any, prompts: Sequence[Sequence[int]]) -> Drafter:
        ranks = self.max_candidates if self.mode == "prefix-rank" else self.branch_top_k
        return self.plant(target, context, prompts, grow=self.grow, ranks=max(2, ranks))

    def grow(self, values: packing.Values, tokens: packing.Tokens) -> packing.Nodes:
        margins = [torch.tensor(row[:2]).exp().tolist() for row in values]
        gaps = [two[0] - two[-1] if len(two) > 1 else 1.0 for two in margins]
        count, threshold = self.max_candidates, self.branch_margin_threshold
        if self.mode == "beam":
            found = packing.beam(
                values, tokens, depth=self.branch_depth, top=self.branch_top_k, count=count, threshold=threshold,
                margins=gaps,
            )  # fmt: skip
        elif self.mode == "prefix-rank":
            found = packing.by_rank(tokens, prefix=self.prefix, count=count)
        else:
            found = packing.sparsely(
                values, tokens, prefix=self.prefix, places=self.positions, top=self.branch_top_k, count=count,
                threshold=threshold, margins=gaps,
            )  # fmt: skip
        return packing.packed(found)


@decoder(
    "dflash-tree-lite",
    claim=claim,
    family="dflash",
    bounds={**BLOCK_BOUNDS, "choices": "[2, 16]", "depth": "[1, 64]"},
    sweep={"depth": [5, 6], "refine": [False, True]},
    needs=NEEDS,
    paper=PAPER,
)
class TreeLite(BlockTree):
    """A small tree: the likeliest block of 8, and at each of its first `depth` places the second choice with the
    likeliest tokens behind it.

    With `refine` a second pass of the drafter reads each second choice in the place of its mask, and guesses anew what
    is behind it.
    """

    block: int = 8
    choices: int = 2
    depth: int = 5
    refine: bool = False

    @property
    def widest(self) -> int:
        return self.k * (1 + self.depth * (self.choices - 1))

    def drafter(self, target: Any, context: Any, prompts: Sequence[Sequence[int]]) -> Drafter:
        def grow(values: packing.Values, tokens: packing.Tokens) -> packing.Nodes:
            return packing.packed(packing.branches(tokens, depth=self.depth, top=self.choices))

        if not self.refine:
            return self.plant(target, context, prompts, grow=grow, ranks=self.choices)
        found: Drafter = self.drafting(Refined, target, context, prompts, depth=self.depth, top=self.choices)
        return found


class Refined(BlockDrafter):
    """A small tree whose branches were guessed anew, each with its own beginning in the block."""

    def __init__(self, *given: Any, depth: int, top: int, **more: Any) -> None:
        super().__init__(*given, **more)
        self.depth, self.top = depth, top

    def propose(self, texts: Sequence[Sequence[int]], want: Sequence[int], stopping: Stopping, u: Tensor) -> Draft:
        laws = self.laws(texts, want)
        if laws is None:
            return no_tree(len(texts))
        ranked = laws.topk(min(self.top, laws.shape[2]), dim=-1).indices.tolist()
        candidates = [packing.branches(ranked[b][:w], depth=self.depth, top=self.top) for b, w in enumerate(want)]
        self._guess_anew(texts, candidates)
        return as_tree([packing.packed(row) for row in candidates])

    def _guess_anew(self, texts: Sequence[Sequence[int]], candidates: list[list[list[int]]]) -> None:
        """Replace what stands behind the branch of each candidate but the first, in one pass over all of them."""
        mask = self.network.config.mask_token_id
        which = [(b, i) for b, row in enumerate(candidates) for i in range(1, len(row))]
        if not which:
            return
        width = self.whole or max(len(row[0]) for row in candidates)
        parts = [_parts_at(candidates[b][i], candidates[b][0]) for b, i in which]
        known = [candidates[b][i][: at + 1] for (b, i), at in zip(which, parts, strict=True)]
        block = torch.tensor(
            [[texts[b][-1], *k, *[mask] * (width - len(k))] for (b, _), k in zip(which, known, strict=True)]
        )
        memory = self.memory.copied([b for b, _ in which], 1 + width)
        self.calls += 1
        self.positions += block.numel() // len(texts)
        again = self.read_out(memory.draft(self.embedded(block))).argmax(-1).tolist()
        for (b, i), at, row in zip(which, parts, again, strict=True):
            candidates[b][i][at + 1 :] = row[at + 1 : len(candidates[b][i])]


def _parts_at(candidate: Sequence[int], first: Sequence[int]) -> int:
    return next(place for place, (one, other) in enumerate(zip(candidate, first, strict=True)) if one != other)
