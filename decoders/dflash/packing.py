"""Several ways on as one tree: candidates that share beginnings, and the founding note's ways to make them.

Pure functions on what the drafter says of each place: its likeliest tokens by rank and their log-probabilities, for one
row. D places, R ranks.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence

Values, Tokens = Sequence[Sequence[float]], Sequence[Sequence[int]]
#: (token, parent) by node, parents first, -1 for the text.
Nodes = list[tuple[int, int]]


def packed(candidates: Sequence[Sequence[int]]) -> Nodes:
    """One tree that has each candidate as a path from the text; equal beginnings are there once."""
    number: dict[tuple[int, ...], int] = {(): -1}
    nodes: Nodes = []
    for candidate in candidates:
        for end in range(1, len(candidate) + 1):
            begin = tuple(candidate[:end])
            if begin not in number:
                number[begin] = len(nodes)
                nodes.append((begin[-1], number[begin[:-1]]))
    return nodes


def comb(tokens: Tokens) -> Nodes:
    """All ranks at each place, of which the first goes on to the next place."""
    nodes: Nodes = []
    first = -1
    for row in tokens:
        start = len(nodes)
        nodes += [(token, first) for token in row]
        first = start
    return nodes


def likeliest(values: Values, tokens: Tokens, count: int) -> list[list[int]]:
    """The so many likeliest blocks, if places are independent; best first.

    Each is a rank for each place. From one the next worse ones raise one rank at a place no earlier than the last that
    was raised, so a heap finds all in order and none twice.
    """
    first = (0,) * len(values)
    waiting = [(-sum(at[0] for at in values), first, 0)]
    found: list[list[int]] = []
    while waiting and len(found) < count:
        less, ranks, last = heapq.heappop(waiting)
        found.append([tokens[place][rank] for place, rank in enumerate(ranks)])
        for place in range(last, len(values)):
            rank = ranks[place] + 1
            if rank < len(values[place]):
                worse = less - values[place][rank] + values[place][rank - 1]
                heapq.heappush(waiting, (worse, (*ranks[:place], rank, *ranks[place + 1 :]), place))
    return found


def beam(
    values: Values, tokens: Tokens, *, depth: int, top: int, count: int, threshold: float, margins: Sequence[float]
) -> list[list[int]]:
    """The note's candidate solutions: at the first `depth` places whose margin is at most `threshold` (negative: at
    all) the `top` likeliest tokens, as a beam of `count`; elsewhere the likeliest. The likeliest block is the first."""
    places = [p for p in range(min(depth, len(values))) if threshold < 0 or margins[p] <= threshold]
    best = [row[0] for row in tokens]
    beams: list[tuple[float, dict[int, int]]] = [(0.0, {})]
    for place in places:
        grown = [
            (score + values[place][rank], {**chosen, place: tokens[place][rank]})
            for score, chosen in beams
            for rank in range(min(top, len(values[place])))
        ]
        beams = sorted(grown, key=lambda one: -one[0])[:count]
    found = [best]
    for _, chosen in beams:
        candidate = [chosen.get(place, token) for place, token in enumerate(best)]
        if candidate not in found:
            found.append(candidate)
    return found[:count]


def by_rank(tokens: Tokens, *, prefix: int, count: int) -> list[list[int]]:
    """The note's fixed prefix: the likeliest token at the first places, and behind them, in the r-th candidate, the
    r-th likeliest at every place. `prefix` counts the text's last token, as there."""
    fixed = min(max(prefix, 1) - 1, len(tokens))
    ranks = min([count, *(len(row) for row in tokens[fixed:])]) if tokens[fixed:] else 1
    return [[row[0] if place < fixed else row[rank] for place, row in enumerate(tokens)] for rank in range(ranks)]


def sparsely(
    values: Values,
    tokens: Tokens,
    *,
    prefix: int,
    places: int,
    top: int,
    count: int,
    threshold: float,
    margins: Sequence[float],
) -> list[list[int]]:
    """The note's sparse ranks: each candidate changes one token of the likeliest block, at one of the so many places
    behind the prefix where the two likeliest are closest; closest first, then the better alternative."""
    best = [row[0] for row in tokens]
    able = [p for p in range(max(prefix, 1) - 1, len(tokens)) if threshold < 0 or margins[p] <= threshold]
    chosen = sorted(able, key=lambda p: values[p][0] - values[p][min(1, len(values[p]) - 1)])[:places]
    changes = [(p, rank) for p in chosen for rank in range(1, min(top, len(tokens[p])))]
    changes.sort(key=lambda one: (values[one[0]][0] - values[one[0]][1], -values[one[0]][one[1]]))
    found = [best]
    for place, rank in changes[: max(0, count - 1)]:
        found.append([*best[:place], tokens[place][rank], *best[place + 1 :]])
    return found


def branches(tokens: Tokens, *, depth: int, top: int) -> list[list[int]]:
    """The likeliest block, and at each of its first `depth` places the other ones of the `top` likeliest, each followed
    by the likeliest tokens of the places behind it."""
    best = [row[0] for row in tokens]
    found = [best]
    for place, rank in itertools.product(range(min(depth, len(tokens))), range(1, top)):
        if rank < len(tokens[place]):
            found.append([*best[:place], tokens[place][rank], *best[place + 1 :]])
    return found
