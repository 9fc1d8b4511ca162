"""Trees of guesses: several ways on at once, of which the target follows the one that it draws.

A tree of N nodes costs the target a pass over N tokens. It pays where that is hardly dearer than a pass over the k
tokens of a chain (`suites/test_verify_cost.py`), and where the drafter's second guess is often the right one.

Dimensions: B rows, D places of a draft, N nodes, V vocabulary.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from decodathlon.decoders.speculative.drafter import Draft, SharedMemory, Stopping
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def from_marginals(log_q: Tensor, nodes: int, branches: int, depths: Sequence[int]) -> Draft:
    """The likeliest `nodes` beginnings of texts whose places are drawn independently, as one tree per row.

    Best first: a beginning is worth the product of its tokens' probabilities, so a node comes before its children and
    before its next sibling, and a heap finds them in order.

    Args:
        log_q: (B, D, V) the law of each place.
        branches: how many of the likeliest tokens of a place are looked at.
        depths: by row, how many places are of use.
    """
    best = log_q.topk(min(branches, log_q.shape[2]), dim=-1)
    values, indices = best.values.tolist(), best.indices.tolist()
    rows = [_best_first(values[b], indices[b], nodes, min(depths[b], log_q.shape[1])) for b in range(len(log_q))]
    width = max((len(row) for row in rows), default=0)
    padded = [row + [(0, -1)] * (width - len(row)) for row in rows]
    tokens = torch.tensor([[token for token, _ in row] for row in padded], dtype=torch.long).view(len(rows), width)
    parents = torch.tensor([[parent for _, parent in row] for row in padded], dtype=torch.long).view(len(rows), width)
    return Draft(tokens, [len(row) for row in rows], parents=parents)


def _best_first(values: list[list[float]], indices: list[list[int]], nodes: int, depth: int) -> list[tuple[int, int]]:
    """(token, parent) of each node; `values` and `indices` are by place and rank."""
    found: list[tuple[int, int]] = []
    # by falling worth: the worth of the parent, the parent, the place, the rank among its siblings
    waiting = [(-values[0][0], 0.0, -1, 0, 0)] if depth and values else []
    while waiting and len(found) < nodes:
        less, above, parent, place, rank = heapq.heappop(waiting)
        number = len(found)
        found.append((indices[place][rank], parent))
        if rank + 1 < len(values[place]):
            heapq.heappush(waiting, (-(above + values[place][rank + 1]), above, parent, place, rank + 1))
        if place + 1 < depth:
            heapq.heappush(waiting, (less - values[place + 1][0], -less, number, place + 1, 0))
    return found


def ancestors(parents: Tensor) -> Tensor:
    """(B, 1 + N, 1 + N) who is an ancestor of whom, the text's last token being the first; `parents` is (B, N).

    Raises:
        ValueError: a parent comes after its child, or there is none such.
    """
    B, N = parents.shape
    number = torch.arange(N, device=parents.device)
    if bool(((parents >= number) | (parents < -1)).any()):
        raise ValueError("a tree lists parents before their children, and -1 for the text")
    mask = torch.zeros(B, N + 1, N + 1, dtype=torch.bool, device=parents.device)
    mask[:, :, 0] = True
    row = torch.arange(B, device=parents.device)
    for i in range(N):
        mask[:, i + 1] = mask[row, parents[:, i] + 1]
        mask[:, i + 1, i + 1] = True
    return mask


class Branching(SharedMemory):
    """A form of the target that drafts a tree, level by level: of each level the likeliest `branches` beginnings are
    drafted on, each with as many of its likeliest tokens, and of all nodes the likeliest `nodes` are proposed.

    EAGLE-2 (Li et al. 2024, arXiv 2406.16858) grows its trees so. What was drafted is read anew at each level, because
    nothing of it is kept.
    """

    def __init__(self, context: Any, law: Any, *, branches: int, nodes: int) -> None:
        super().__init__(context, law, sampled=False, watched=False)
        self.branches, self.nodes = branches, nodes

    def propose(self, texts: Sequence[Sequence[int]], want: Sequence[int], stopping: Stopping, u: Tensor) -> Draft:
        self.context.follow()
        B, w = len(texts), self.branches
        # the last level's parents are read in one pass: the text's last token, and w for each level above it
        room = self.context.capacity - int(self.context.lengths.max()) - 1
        depth = min(max(want), 1 + room // w)
        empty = torch.zeros(B, 0, dtype=torch.long)
        if not depth:
            return Draft(empty, [0] * B, parents=empty)
        pending = torch.tensor([[text[-1]] for text in texts])
        law = self._laws(pending, None, 1)  # (B, 1, V) behind the text
        tokens, parents, worth = empty, empty, torch.zeros(B, 0)
        above, place = torch.zeros(B, 1), torch.full((B, 1), -1)
        for level in range(depth):
            best = law.topk(min(w, law.shape[2]), dim=-1)
            every = (above[:, :, None] + best.values).flatten(1)
            chosen = every.topk(min(w, every.shape[1]), dim=-1)
            parent = place.gather(1, chosen.indices // best.values.shape[2])
            place = tokens.shape[1] + torch.arange(chosen.indices.shape[1]).expand(B, -1)
            tokens = torch.cat([tokens, best.indices.flatten(1).gather(1, chosen.indices)], 1)
            parents, above = torch.cat([parents, parent], 1), chosen.values
            worth = torch.cat([worth, above], 1)
            if level + 1 < depth:
                law = self._laws(torch.cat([pending, tokens], 1), ancestors(parents), place.shape[1])
        return self._best(tokens, parents, worth, want)

    def _laws(self, tokens: Tensor, tree: Tensor | None, last: int) -> Tensor:
        """(B, last, V) laws behind the last nodes."""
        self.calls += 1
        self.positions += tokens.shape[1]
        found = self.context.extend(tokens, tree=tree).logits[:, -last:]
        return self.law(found.flatten(0, 1)).view_as(found).cpu()

    def _best(self, tokens: Tensor, parents: Tensor, worth: Tensor, want: Sequence[int]) -> Draft:
        """The likeliest nodes, in their order: a parent is worth more than its children, so it is among them."""
        count = min(self.nodes, tokens.shape[1])
        # of equals the earlier one: a parent whose child is certain
        kept = worth.argsort(dim=1, descending=True, stable=True)[:, :count].sort(1).values
        number = torch.full((len(tokens), tokens.shape[1] + 1), -1)
        number[:, 1:].scatter_(1, kept, torch.arange(count).expand(len(tokens), -1))
        return Draft(
            tokens.gather(1, kept),
            [count if w else 0 for w in want],
            parents=number.gather(1, parents.gather(1, kept) + 1),
        )
