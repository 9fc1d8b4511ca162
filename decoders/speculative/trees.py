"""Trees of guesses: several ways on at once, of which the target follows the one that it draws.

A tree of N nodes costs the target a pass over N tokens. It pays where that is hardly dearer than a pass over the k
tokens of a chain (`suites/test_verify_cost.py`), and where the drafter's second guess is often the right one.

Dimensions: B rows, D places of a draft, N nodes, V vocabulary.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from decodathlon.decoders.speculative.clocks import Budget
from decodathlon.decoders.speculative.controllers import Seconds
from decodathlon.decoders.speculative.drafter import Draft, SharedMemory, Stopping
from decodathlon.harness import law
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


def by_levels(
    stays: float, depth: int, branches: int, nodes: int
) -> tuple[list[tuple[int, int]], list[float], list[int]]:
    """The shape of the tree of so many nodes of which most are expected to stay, if of the siblings at a place each is
    kept with probability `stays` where those before it were not: (parent, level) of each node, by level; how likely the
    nodes are to stay, in falling order; and how many levels the first 1, 2, ... of these have.

    A node is worth the product of stays (1 - stays)^rank along its path, so the best are found best first. Sequoia
    (Chen et al. 2024, arXiv 2402.12374) finds them by dynamic programming, for rates by rank that need not be these.
    """
    ranks = [math.log(stays) + r * math.log1p(-stays) for r in range(branches)]
    places = [list(range(branches)) for _ in range(depth)]
    parents = [parent for _, parent in _best_first([ranks] * depth, places, nodes, depth)]
    levels: list[int] = []
    worth: list[float] = []
    crowd: Counter[int] = Counter()
    for parent in parents:
        levels.append(0 if parent < 0 else levels[parent] + 1)
        worth.append((1.0 if parent < 0 else worth[parent]) * math.exp(ranks[crowd[parent]]))
        crowd[parent] += 1
    order = sorted(range(len(parents)), key=lambda i: levels[i])
    number = {-1: -1, **{old: new for new, old in enumerate(order)}}
    return [(number[parents[i]], levels[i]) for i in order], worth, [1 + n for n in itertools.accumulate(levels, max)]


class DrawnTree(SharedMemory):
    """A form of the target that draws a tree, level by level: the children of a node from one law, without
    replacement. Its shape follows from how often a level of earlier cycles stayed, never from the tokens.

    Sequoia (Chen et al. 2024, arXiv 2402.12374). What was drafted is read anew at each level, because nothing of it is
    kept.
    """

    def __init__(self, context: Any, law: Any, *, branches: int, budget: Budget) -> None:
        super().__init__(context, law, sampled=True, watched=False)
        self.branches, self.budget = branches, budget
        # levels that stayed, and that were tried; as if two cycles had gone before
        self._stayed, self._tried = 1.0, 2.0
        self._first, self._depth, self._passes = 1, 0, 0

    def propose(self, texts: Sequence[Sequence[int]], want: Sequence[int], stopping: Stopping, u: Tensor) -> Draft:
        self.context.follow()
        B = len(texts)
        room = self.context.capacity - int(self.context.lengths.max()) - 1
        self._depth = depth = min(max(want), room)
        if depth < 1:
            none = torch.zeros(B, 0, dtype=torch.long)
            return Draft(none, [0] * B, parents=none)
        most = self.budget.fixed or self.branches * depth
        shape, worth, passes = by_levels(self._rate(), depth, self.branches, min(most, room))
        if not self.budget.fixed:
            shape, *_ = by_levels(self._rate(), depth, self.branches, self.budget.nodes(worth, passes))
        self._passes = 1 + shape[-1][1]
        self._first = sum(parent < 0 for parent, _ in shape)
        parents = torch.tensor([parent for parent, _ in shape]).expand(B, -1)
        tokens = torch.full((B, 1 + len(shape)), -1)
        tokens[:, 0] = torch.tensor([text[-1] for text in texts])
        laws: Tensor | None = None
        for level in range(1 + shape[-1][1]):
            log_q = self._read_tree(tokens[:, : 1 + sum(at < level for _, at in shape)], parents)
            # the laws behind the nodes that are still to come are never asked for
            laws = log_q if laws is None else torch.cat([laws, log_q[:, laws.shape[1] :]], 1)
            for place in {parent: None for parent, at in shape if at == level}:
                mine = [i for i, (parent, _) in enumerate(shape) if parent == place]
                drawn = without_replacement(laws[:, place + 1], u[:, mine].to(laws.device))
                tokens[:, [i + 1 for i in mine]] = drawn.cpu()
        assert laws is not None
        missing = 1 + len(shape) - laws.shape[1]
        laws = torch.nn.functional.pad(laws, (0, 0, 0, missing), value=float("-inf"))
        return Draft(tokens[:, 1:], [len(shape) if w else 0 for w in want], laws, parents)

    def _read_tree(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """(B, 1 + n, V) laws behind the text and the n nodes so far."""
        self.calls += 1
        self.positions += tokens.shape[1]
        tree = ancestors(parents[:, : tokens.shape[1] - 1])
        found = self.context.extend(tokens.clamp(min=0), tree=tree).logits
        return self.law(found.flatten(0, 1)).view_as(found)

    def _rate(self) -> float:
        """How often one of several siblings stays, if a level with as many as the text has stays as often as it did."""
        level = min(max(self._stayed / self._tried, 0.05), 0.95)
        return float(1 - (1 - level) ** (1 / self._first))

    def timed(self, nodes: int, seconds: Seconds) -> None:
        if nodes:
            self.budget.timed(nodes, self._passes, seconds)

    def settle(self, accepted: Sequence[int], hidden: Mapping[int, Tensor]) -> None:
        super().settle(accepted, hidden)
        self._stayed += sum(accepted)
        self._tried += sum(min(n + 1, self._depth) for n in accepted)


def without_replacement(log_q: Tensor, u: Tensor) -> Tensor:
    """(B, n) different tokens, drawn one by one with the numbers u (B, n); -1 where the law (B, V) has no more."""
    left = log_q.exp()
    drawn = []
    for j in range(u.shape[1]):
        total = left.sum(-1)
        token = law.draw(left.where(total[:, None] > 0, 1.0).log(), u[:, j])
        drawn.append(torch.where(total > 0, token, -1))
        left = left.scatter(1, token[:, None], 0.0)
    return torch.stack(drawn, 1)


class Branching(SharedMemory):
    """A form of the target that drafts a tree, level by level: of each level the likeliest `branches` beginnings are
    drafted on, each with as many of its likeliest tokens, and of all nodes the likeliest `nodes` are proposed.

    EAGLE-2 (Li et al. 2024, arXiv 2406.16858) grows its trees so. What was drafted is read anew at each level, because
    nothing of it is kept.
    """

    def __init__(self, context: Any, law: Any, *, branches: int, budget: Budget) -> None:
        super().__init__(context, law, sampled=False, watched=False)
        self.branches, self.budget = branches, budget
        self._passes = 0

    def timed(self, nodes: int, seconds: Seconds) -> None:
        if nodes:
            self.budget.timed(nodes, self._passes, seconds)

    def propose(self, texts: Sequence[Sequence[int]], want: Sequence[int], stopping: Stopping, u: Tensor) -> Draft:
        self.context.follow()
        B, w = len(texts), self.branches
        # the last level's parents are read in one pass: the text's last token, and w for each level above it
        room = self.context.capacity - int(self.context.lengths.max()) - 1
        depth = min(max(want), 1 + room // w)
        empty = torch.zeros(B, 0, dtype=torch.long)
        if not depth:
            return Draft(empty, [0] * B, parents=empty)
        self._passes = depth
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
        # of equals the earlier one: a parent whose child is certain
        order = worth.argsort(dim=1, descending=True, stable=True)
        count = self.budget.nodes(worth.gather(1, order).exp().mean(0).tolist())
        kept = order[:, :count].sort(1).values
        number = torch.full((len(tokens), tokens.shape[1] + 1), -1)
        number[:, 1:].scatter_(1, kept, torch.arange(count).expand(len(tokens), -1))
        return Draft(
            tokens.gather(1, kept),
            [count if w else 0 for w in want],
            parents=number.gather(1, parents.gather(1, kept) + 1),
        )
