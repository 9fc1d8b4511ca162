"""Trees of guesses: the likeliest beginnings, parents first, and texts that they leave alone."""

import itertools
import math

import pytest
import torch

from decodathlon.decoders.speculative import trees
from decodathlon.decoders.speculative.clocks import Budget
from decodathlon.decoders.speculative.controllers import Seconds
from decodathlon.harness import decoder as decoders
from decodathlon.harness.decoder import Limits
from decodathlon.harness.errors import SpecError
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.targets import toy
from tests.text_laws import chi_square

load_builtins()
PROMPTS = [[0, 2, 3, 2, 3], [0, 4, 5], [0, 2]]


@pytest.fixture(scope="module")
def target():
    return toy.enumerable_lm(8)


def beginnings(draft, b):
    """Each node of row b as the tokens from the text to it."""
    found = []
    for token, parent in zip(draft.tokens[b].tolist(), draft.parents[b].tolist(), strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found[: draft.counts[b]]


def test_a_tree_of_marginals_holds_the_likeliest_beginnings():
    log_q = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(-1)
    draft = trees.from_marginals(log_q, 7, 5, [3, 2])
    for b, depth in ((0, 3), (1, 2)):
        worth = {
            text: sum(float(log_q[b, i, token]) for i, token in enumerate(text))
            for n in range(1, depth + 1)
            for text in itertools.product(range(5), repeat=n)
        }
        best = sorted(worth, key=lambda text, worth=worth: -worth[text])[:7]
        assert beginnings(draft, b) == best
    assert trees.from_marginals(log_q, 1, 5, [3, 3]).tokens.tolist() == log_q[:, 0].argmax(-1, keepdim=True).tolist()
    assert trees.from_marginals(log_q, 7, 5, [0, 0]).counts == [0, 0]
    uneven = trees.from_marginals(log_q, 4, 1, [3, 1])
    assert uneven.counts == [3, 1]


def test_a_grown_tree_holds_likely_beginnings_of_the_drafter(target):
    """With as many branches as tokens all beginnings are looked at, so the best of them are proposed."""
    context = target.open([[0, 2]], capacity=32)
    own = context.lent(target.lean)
    drafter = trees.Branching(own, lambda x: x.log_softmax(-1), branches=8, budget=Budget(6, 24))
    draft = drafter.propose([[0, 2, 3]], [2], None, None)
    first = target.open([[0, 2, 3]], capacity=32).next_logits[0].log_softmax(-1)
    second = torch.stack([target.open([[0, 2, 3, t]], capacity=32).next_logits[0].log_softmax(-1) for t in range(8)])
    worth = {(a,): float(first[a]) for a in range(8)} | {
        (a, b): float(first[a] + second[a, b]) for a in range(8) for b in range(8)
    }
    # of the second level the eight likeliest are looked at
    level = sorted((text for text in worth if len(text) == 2), key=lambda text: -worth[text])[:8]
    seen = [*level, *((a,) for a in range(8))]
    best = sorted(seen, key=lambda text: -worth[text])[:6]
    assert set(beginnings(draft, 0)) == set(best)


@pytest.mark.parametrize(
    "more",
    [
        "branches=2,k=3",
        "branches=3,k=4,budget=5",
        "branches=2,k=2,budget=1",
        "branches=8,k=2",
        "branches=3,k=3,budget=0",
    ],
)
@pytest.mark.parametrize("spec", ["quantised-self", "early-exit", "layer-skip"])
def test_trees_leave_the_text_alone(target, spec, more):
    limits = Limits(20, ignore_eos=True, trace=True)
    for temperature, alone in ((0, "greedy"), (0.8, "temperature[temperature=0.8]")):
        ours = decoders.build(f"{spec}[{more},temperature={temperature},proposal=guess]").generate(
            target, PROMPTS, limits, RowRandom(0, range(3))
        )
        theirs = decoders.build(alone).generate(target, PROMPTS, limits, RowRandom(0, range(3)))
        assert [a.tokens for a in ours] == [a.tokens for a in theirs]
        assert [a.log_prob for a in ours] == pytest.approx([a.log_prob for a in theirs], abs=1e-9)


def stays_on(shape, stays):
    """The nodes of a tree that are expected to stay."""
    worth, ranks = {-1: 1.0}, {}
    for i, (parent, _) in enumerate(shape):
        rank = ranks[parent] = ranks.get(parent, -1) + 1
        worth[i] = worth[parent] * stays * (1 - stays) ** rank
    return sum(worth.values()) - 1


@pytest.mark.parametrize(("depth", "branches", "nodes"), [(3, 2, 5), (2, 3, 4), (4, 2, 6), (1, 3, 2), (5, 1, 3)])
@pytest.mark.parametrize("stays", [0.3, 0.5, 0.8])
def test_no_tree_of_that_size_keeps_more(depth, branches, nodes, stays):
    """All trees, by adding nodes one by one."""

    def grown(shape, last):
        yield shape
        if len(shape) < nodes:
            for parent in range(-1, len(shape)):
                level = 0 if parent < 0 else shape[parent][1] + 1
                crowd = sum(p == parent for p, _ in shape)
                if level < depth and crowd < branches and parent >= last:  # each tree in one order is enough
                    yield from grown([*shape, (parent, level)], parent)

    found, worth, passes = trees.by_levels(stays, depth, branches, nodes)
    assert sum(worth) == pytest.approx(stays_on(found, stays))
    assert worth == sorted(worth, reverse=True)
    assert passes[-1] == 1 + found[-1][1]
    assert [level for _, level in found] == sorted(level for _, level in found)
    best = max(stays_on(shape, stays) for shape in grown([], -1))
    assert stays_on(found, stays) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize(
    "spec",
    [
        "early-exit[k=2,branches=4,budget=12,layers=1", "early-exit[k=3,branches=3,budget=0",
        "layer-skip[k=3,branches=2,top_k=4",
    ],
)  # fmt: skip
def test_what_stays_of_a_drawn_tree_has_the_law_of_the_target(target, spec):
    """Chi-square over all texts of four tokens."""
    chi, cells = chi_square(target, decoders.build(f"{spec},temperature=1]"), [0, 2], 4, rows=1000, runs=20)
    assert cells > 20
    assert chi < cells + 4.5 * math.sqrt(2 * cells)


def test_a_law_that_runs_out_of_tokens_has_no_more_children(target):
    drawn = trees.without_replacement(torch.tensor([[0.5, 0.0, 0.5]]).log(), torch.tensor([[0.1, 0.7, 0.3]]))
    assert drawn.tolist() == [[0, 2, -1]]
    limits = Limits(12, ignore_eos=True)
    found = decoders.build("early-exit[branches=3,k=3,budget=9,top_k=1,temperature=1]").generate(
        target, PROMPTS, limits, RowRandom(0, range(3))
    )
    greedy = decoders.build("greedy").generate(target, PROMPTS, limits, RowRandom(0, range(3)))
    assert [a.tokens for a in found] == [a.tokens for a in greedy]


def test_a_tree_accepts_no_less_than_its_first_branch(target):
    def calls(spec):
        limits = Limits(24, ignore_eos=True)
        found = decoders.build(spec).generate(target, PROMPTS, limits, RowRandom(0, range(3)))
        return sum(a.cost.target_calls for a in found)

    assert calls("early-exit[k=3,branches=3,budget=20]") < calls("early-exit[k=3]")


def test_a_tree_never_reaches_beyond_the_context(target):
    """The target reads 32 tokens."""
    prompts, limits = [[0, 2, 3, 2, 3, 2, 3], [0, 2]], Limits(25, ignore_eos=True)
    for spec in ("early-exit[branches=3,k=6,budget=20]", "quantised-self[branches=8,k=8,budget=64]"):
        ours = decoders.build(spec).generate(target, prompts, limits, RowRandom(0, range(2)))
        greedy = decoders.build("greedy").generate(target, prompts, limits, RowRandom(0, range(2)))
        assert [a.tokens for a in ours] == [a.tokens for a in greedy]


def test_a_stopping_rule_does_not_go_with_a_tree():
    with pytest.raises(SpecError, match="controller=svip stops chains, and a tree"):
        decoders.build("quantised-self[branches=2,controller=svip]")


def test_trees_that_make_no_sense_are_named():
    for parents in ([[1, 0]], [[0, -1]], [[-2, 0]]):
        with pytest.raises(ValueError, match="parents before their children"):
            trees.ancestors(torch.tensor(parents))
    assert trees.ancestors(torch.tensor([[-1, 0, 0, 2, -1]]))[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0], [1, 1, 0, 1, 1, 0],
        [1, 0, 0, 0, 0, 1],
    ]  # fmt: skip


@pytest.mark.parametrize(("per_node", "expected"), [(0.0, 12), (0.3, 3), (5.0, 1)])
def test_a_budget_takes_as_many_nodes_as_pay(per_node, expected):
    """On a machine where a pass over n nodes takes 1 + per_node n seconds, found by trying all n."""
    worth = [0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.1, 0.05, 0.04, 0.03, 0.02, 0.01, 0.01, 0.01]
    rate = {n: (1 + sum(worth[:n])) / (0.2 + 1 + per_node * n) for n in range(1, 13)}
    assert max(rate, key=rate.get) == expected
    budget, taken = Budget(0, 12), []
    for _ in range(200):
        n = budget.nodes(worth)
        taken.append(n)
        budget.timed(n, 2, Seconds(0.1, 1 + per_node * n, 0.1))
    assert set(taken[:4]) == {1, 12}
    assert taken[4:].count(expected) >= 190
    # where each node takes another pass of the drafter, fewer pay
    passes = list(range(1, 15))
    cost = {n: (1 + sum(worth[:n])) / (0.1 + 0.5 * n + 1) for n in range(1, 13)}
    deep = Budget(0, 12)
    for n in (1, 12) * 20:
        deep.timed(n, n, Seconds(0.5 * n, 1.0, 0.1))
    assert deep.nodes(worth, passes) == max(cost, key=cost.get) < 12
    assert Budget(5, 12).nodes(worth) == 5
    assert Budget(5, 12).nodes(worth[:3]) == 3
    assert Budget(0, 12).nodes([]) == 0
