"""Trees of a block's guesses: the functions that make candidates and pack them, against brute force."""

import itertools
import math
import random

import pytest

from decodathlon.decoders.dflash import packing


def drawn(places, ranks, seed):
    """Falling log-probabilities and tokens by place and rank."""
    rng = random.Random(seed)
    values = [sorted((math.log(rng.random()) for _ in range(ranks)), reverse=True) for _ in range(places)]
    return values, [[100 * place + rank for rank in range(ranks)] for place in range(places)]


def paths(nodes):
    """Every beginning that the tree has."""
    found = []
    for token, parent in nodes:
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("places", "ranks", "count"), [(1, 3, 5), (3, 3, 27), (4, 3, 20), (5, 2, 9)])
def test_the_likeliest_blocks_are_those_of_all(places, ranks, count, seed):
    values, tokens = drawn(places, ranks, seed)
    every = sorted(
        itertools.product(range(ranks), repeat=places), key=lambda r: -sum(values[p][rank] for p, rank in enumerate(r))
    )
    wanted = [[tokens[p][rank] for p, rank in enumerate(r)] for r in every[:count]]
    assert packing.likeliest(values, tokens, count) == wanted


@pytest.mark.parametrize("seed", range(8))
def test_a_packed_tree_has_each_beginning_once(seed):
    rng = random.Random(seed)
    candidates = [[rng.randrange(3) for _ in range(rng.randrange(1, 6))] for _ in range(6)]
    nodes = packing.packed(candidates)
    found = paths(nodes)
    assert len(set(found)) == len(found)
    assert set(found) == {tuple(c[:end]) for c in candidates for end in range(1, len(c) + 1)}
    assert all(parent < i for i, (_, parent) in enumerate(nodes))


def test_a_beam_varies_the_first_places_that_are_unsure():
    values, tokens = [[-0.1, -2.4], [-0.6, -0.8], [-0.1, -2.5], [-0.65, -0.75]], [[1, 2], [3, 4], [5, 6], [7, 8]]
    margins = [0.8, 0.1, 0.8, 0.05]

    def beam(depth=6, count=4, threshold=-1.0):
        return packing.beam(values, tokens, depth=depth, top=2, count=count, threshold=threshold, margins=margins)

    assert beam(threshold=0.5) == [[1, 3, 5, 7], [1, 3, 5, 8], [1, 4, 5, 7], [1, 4, 5, 8]]
    assert beam(depth=2, threshold=0.5) == [[1, 3, 5, 7], [1, 4, 5, 7]]
    assert beam(threshold=0.0) == [[1, 3, 5, 7]]
    assert beam(count=1) == [[1, 3, 5, 7]]
    assert beam(depth=1) == [[1, 3, 5, 7], [2, 3, 5, 7]]


def test_ranks_behind_a_fixed_prefix():
    _, tokens = drawn(3, 3, 0)
    assert packing.by_rank(tokens, prefix=2, count=3) == [[0, 100, 200], [0, 101, 201], [0, 102, 202]]
    assert packing.by_rank(tokens, prefix=1, count=2) == [[0, 100, 200], [1, 101, 201]]
    assert packing.by_rank(tokens, prefix=9, count=4) == [[0, 100, 200]]
    assert packing.by_rank(tokens, prefix=2, count=8) == packing.by_rank(tokens, prefix=2, count=3)


def test_sparse_ranks_change_one_token_each():
    values, tokens = [[-0.1, -3.0], [-0.7, -0.8], [-0.5, -0.9]], [[1, 2], [3, 4], [5, 6]]

    def sparse(**more):
        options = {"prefix": 1, "places": 4, "top": 2, "count": 4, "threshold": -1.0, "margins": [0.9, 0.05, 0.2]}
        return packing.sparsely(values, tokens, **(options | more))

    assert sparse() == [[1, 3, 5], [1, 4, 5], [1, 3, 6], [2, 3, 5]]
    assert sparse(prefix=3) == [[1, 3, 5], [1, 3, 6]]
    assert sparse(places=1) == [[1, 3, 5], [1, 4, 5]]
    assert sparse(count=2) == [[1, 3, 5], [1, 4, 5]]
    assert sparse(threshold=0.1) == [[1, 3, 5], [1, 4, 5]]


def test_branches_leave_the_likeliest_block_at_one_place_each():
    _, tokens = drawn(3, 3, 0)
    assert packing.branches(tokens, depth=2, top=2) == [[0, 100, 200], [1, 100, 200], [0, 101, 200]]
    assert len(packing.branches(tokens, depth=9, top=3)) == 1 + 3 * 2


def test_a_comb_goes_on_behind_the_first_of_each_place():
    assert packing.comb([[1, 2], [3, 4], [5, 6]]) == [(1, -1), (2, -1), (3, 0), (4, 0), (5, 2), (6, 2)]
