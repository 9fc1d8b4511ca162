"""Decoders that make a tree of one block's guesses, of which the target follows the way that it draws itself.

A block says for each place, independently of the others, how likely every token is. So trees cost no further pass of
the drafter, and all that is asked is which of the many ways on are worth a node. `ddtree` has the answer for places
that are independent; the others are the founding note's ideas, as it has them or as near as is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from decodathlon.decoders.dflash import packing
from decodathlon.decoders.dflash.block import BLOCK_BOUNDS, PAPER, BlockSpeculative
from decodathlon.decoders.dflash.drafter import BlockDrafter
from decodathlon.decoders.speculative.base import LOOKING, claim
from decodathlon.decoders.speculative.clocks import Budget
from decodathlon.decoders.speculative.controllers import Seconds
from decodathlon.decoders.speculative.drafter import Draft, Drafter, Stopping
from decodathlon.decoders.speculative.trees import from_marginals, without_replacement
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


@decoder(
    "dflash-multiround",
    claim=claim,
    family="dflash",
    bounds={**BLOCK_BOUNDS, "rounds": "[1, 16]"},
    sweep={"rounds": [2, 3], "diverse": [False, True]},
    needs=NEEDS,
    paper="Miao et al. 2023, SpecInfer (arXiv 2305.09781); Chen et al. 2024, Sequoia (arXiv 2402.12374), for `diverse`",
)
class MultiRound(BlockTree):
    """Several draws for each place: who is refused leaves the residual law to the next one.

    The first of each place goes on to the next place. Draws are independent, or with `diverse` all different. At
    temperature 0 nothing is drawn, and the likeliest tokens are tried in their order.
    """

    rounds: int = 2
    diverse: bool = False
    proposal: Literal["sample", "guess"] = "sample"

    @property
    def draws(self) -> bool:
        return self.temperature > 0 and self.proposal == "sample"

    @property
    def widest(self) -> int:
        return self.k * self.rounds

    @property
    def numbers(self) -> tuple[int, int]:
        return self.k * self.rounds, (self.k + 1) * (self.rounds + 1)

    def drafter(self, target: Any, context: Any, prompts: Sequence[Sequence[int]]) -> Drafter:
        if not self.draws:

            def grow(values: packing.Values, tokens: packing.Tokens) -> packing.Nodes:
                return packing.comb(tokens)

            return self.plant(target, context, prompts, grow=grow, ranks=self.rounds)
        found: Drafter = self.drafting(Rounds, target, context, prompts, rounds=self.rounds, diverse=self.diverse)
        return found


class Rounds(BlockDrafter):
    """Draws `rounds` tokens for each place; the first one of a place has those of the next place as its children."""

    def __init__(self, *given: Any, rounds: int, diverse: bool, **more: Any) -> None:
        super().__init__(*given, **more)
        self.rounds, self.diverse = rounds, diverse

    def propose(self, texts: Sequence[Sequence[int]], want: Sequence[int], stopping: Stopping, u: Tensor) -> Draft:
        width, R = max(want), self.rounds
        laws = self.laws(texts, want)
        if laws is None:
            return no_tree(len(texts))
        numbers = u[:, : width * R].to(laws.device).unflatten(1, (width, R))
        if self.diverse:
            drawn = [without_replacement(laws[:, place], numbers[:, place]) for place in range(width)]
        else:
            drawn = [
                torch.stack([law.draw(laws[:, place], numbers[:, place, r]) for r in range(R)], 1)
                for place in range(width)
            ]
        parents = torch.tensor([(place - 1) * R if place else -1 for place in range(width) for _ in range(R)])
        # the law of the children of the text, and of each place's first node; the others have none
        behind = torch.full((len(texts), 1 + width * R, laws.shape[2]), float("-inf"), device=laws.device)
        behind[:, 0] = laws[:, 0]
        behind[:, 1 : 1 + (width - 1) * R : R] = laws[:, 1:]
        return Draft(
            torch.cat(drawn, 1), [w * R for w in want], behind, parents.expand(len(texts), -1),
            replaced=not self.diverse,
        )  # fmt: skip
