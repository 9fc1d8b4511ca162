"""Speculative decoders: the text is the target's own whatever is drafted; rows are independent; bad drafts are told."""

import math
import random
from types import SimpleNamespace

import pytest
import torch

from decodathlon.decoders.speculative import bandits, base, drafter, lookup
from decodathlon.decoders.speculative.base import Speculative
from decodathlon.decoders.speculative.controllers import Controller
from decodathlon.harness import decoder as decoders
from decodathlon.harness import models
from decodathlon.harness.decoder import Limits
from decodathlon.harness.errors import SpecError, UnsupportedError
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.targets import toy
from tests.text_laws import assert_same, chi_square, with_parameter

load_builtins()
PROMPTS = [[0, 2, 3, 2, 3], [0, 4, 5], [0, 2]]
DRAFTERS = [
    "prompt-lookup", "retrieval[longest=2]", "draft-model", "early-exit", "layer-skip", "quantised-self",
    "quantised-self[bits=8]", "quantised-self[form=float]", "quantised-self[form=float,bits=5]",
    "quantised-self[form=float,bits=6]", "multi-level", "multi-level[form=float,k=6,ahead=2]",
    "codebook-self", "mixed-precision-self[budget_bits=2.5]", "mixed-precision-self[by=layer]",
    "sparse-self", "sparse-self[method=sparsegpt,pattern=2:4]", "sparse-self[method=magnitude,sparsity=1]",
]  # fmt: skip
CONTROLLERS = [
    "static", "heuristic", "ewma", "break-even", "confidence", "svip", "adaedl", "margin", "contextual", "tapout",
    "tapout,policy=ucb1-tuned", "tapout,policy=thompson,level=token", "tapout,reward=tokens-per-second,remember=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def target():
    return toy.enumerable_lm(8)


def answers(spec, target, limits, prompts=PROMPTS, seed=0):
    found = decoders.build(spec) if isinstance(spec, str) else spec
    return found.generate(target, prompts, limits, RowRandom(seed, range(len(prompts))))


@pytest.mark.parametrize("limits", [Limits(20), Limits(20, ignore_eos=True), Limits(2), Limits(1)], ids=str)
@pytest.mark.parametrize("spec", DRAFTERS)
def test_greedy_text_is_that_of_greedy_search(target, spec, limits):
    ours = answers(spec, target, limits)
    assert_same(ours, answers("greedy", target, limits))
    assert all(a.cost.target_calls <= len(a.tokens) for a in ours)


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("spec", ["quantised-self[k=5]", "prompt-lookup"])
def test_no_controller_changes_the_text(target, spec, controller):
    if spec == "prompt-lookup" and controller in base.LOOKING:
        with pytest.raises(SpecError, match="this drafter has none; take static, heuristic"):
            decoders.build(with_parameter(spec, f"controller={controller}"))
        return
    for _ in range(2):  # what it has learnt is remembered
        ours = answers(with_parameter(spec, f"controller={controller}"), target, Limits(20, ignore_eos=True))
        assert_same(ours, answers("greedy", target, Limits(20, ignore_eos=True)))


@pytest.mark.parametrize("temperature", [1, 0.6])
@pytest.mark.parametrize("spec", ["prompt-lookup", "layer-skip[proposal=guess]", "quantised-self[proposal=guess,k=5]"])
def test_guesses_leave_the_very_text_that_the_target_draws_alone(target, spec, temperature):
    ours = answers(with_parameter(spec, f"temperature={temperature}"), target, Limits(20))
    assert_same(ours, answers(f"temperature[temperature={temperature}]", target, Limits(20)))


@pytest.mark.parametrize(
    "spec", ["quantised-self[temperature=1,k=3]", "prompt-lookup[temperature=1]", "multi-level[temperature=1]"]
)
def test_a_row_does_not_depend_on_its_neighbours(target, spec):
    together = answers(spec, target, Limits(12))
    alone = [
        decoders.build(spec).generate(target, [p], Limits(12), RowRandom(0, [b]))[0] for b, p in enumerate(PROMPTS)
    ]
    assert [a.tokens for a in together] == [a.tokens for a in alone]


def test_a_drafter_that_is_the_target_has_everything_accepted(target):
    found = answers("draft-model[k=4]", target, Limits(21, ignore_eos=True, trace=True))
    for one in found:
        assert [c["accepted"] for c in one.trace] == [4, 4, 4, 4]
        assert len(one.tokens) == 1 + sum(c["accepted"] + 1 for c in one.trace)
        assert one.cost.target_calls == 5
    drawn = answers("draft-model[k=4,temperature=1]", target, Limits(21, ignore_eos=True, trace=True))
    assert all(c["accepted"] == c["drafted"] for one in drawn for c in one.trace)


def test_a_second_level_drafts_what_the_first_would_draft_alone(target):
    """The same numbers make the same draft, in fewer passes of the drafter."""
    limits = Limits(20, ignore_eos=True)
    for temperature in (0, 1):
        one = answers(f"quantised-self[form=float,head=same,k=6,temperature={temperature}]", target, limits)
        two = answers(f"multi-level[form=float,head=same,k=6,temperature={temperature}]", target, limits)
        assert_same(two, one)
        assert sum(a.cost.draft_calls for a in two) < sum(a.cost.draft_calls for a in one)


def test_the_memory_after_a_cycle_is_that_of_a_fresh_reading(target):
    """What a drafter left in the target's keys and values is written over."""
    spec = decoders.build("quantised-self[form=float,k=4]")
    found = spec.generate(target, PROMPTS, Limits(20, ignore_eos=True), RowRandom(0, range(3)))
    fresh = target.log_prob([p + a.tokens for p, a in zip(PROMPTS, found, strict=True)], [len(p) for p in PROMPTS])
    assert [a.log_prob for a in found] == pytest.approx(fresh.tolist(), abs=1e-9)


def test_the_trace_is_kept_only_when_asked_for_and_adds_up(target):
    quiet = answers("quantised-self[controller=tapout]", target, Limits(15, ignore_eos=True))
    assert all(one.trace == [] for one in quiet)
    for one in answers("quantised-self[controller=tapout]", target, Limits(15, ignore_eos=True, trace=True)):
        made = 1 + sum(c["accepted"] + 1 for c in one.trace)
        assert len(one.tokens) <= made <= len(one.tokens) + 1
        assert all(c["accepted"] <= c["drafted"] <= c["asked"] for c in one.trace)
        assert all(min(c["draft_s"], c["verify_s"], c["keep_s"]) >= 0 and c["arm"] for c in one.trace)


# -- drafters that go wrong ------------------------------------------------------------------------------------


class Fixed(drafter.Drafter):
    def __init__(self, make):
        self.make = make

    def propose(self, texts, want, stopping, u):
        return self.make(len(texts), want)


def of_fixed(make):
    class OfFixed(Speculative):
        info = decoders.build("prompt-lookup").info

        def drafter(self, target, context, prompts):
            return Fixed(make)

    return OfFixed(k=3)


def draft(tokens, counts=None, **more):
    tokens = torch.tensor(tokens)
    return drafter.Draft(tokens, counts or [tokens.shape[1]] * len(tokens), **more)


NO_LAW = torch.full((1, 2, 8), float("nan"))


@pytest.mark.parametrize(
    ("made", "error"),
    [
        (draft([[1, 8]]), "drafted token 8, outside the vocabulary of 8"),
        (draft([[-1]]), "drafted token -1, outside"),
        (draft([[2, 3, 2, 3]]), r"drafted \[4\] tokens where \[3\] were wanted"),
        (draft([[2, 3]], [3]), r"drafted \[3\] tokens in a table of 1 x 2"),
        (draft([[2, 3]], log_q=NO_LAW), "its own law gives no probability, or NaN"),
        (draft([[2, 3]], parents=torch.tensor([[1, 0]])), "parents before their children"),
        (draft([[2, 3]], parents=torch.tensor([[-2, 0]])), "parents before their children"),
    ],
)
def test_a_draft_that_makes_no_sense_is_named(target, made, error):
    with pytest.raises(ValueError, match=error):
        answers(of_fixed(lambda rows, want: made), target, Limits(9, ignore_eos=True), prompts=[[0, 2]])


def test_trees_leave_greedy_text_and_the_text_that_is_drawn(target):
    """Two guesses at each place, one of them drafted on; an empty tree and one node are trees, too."""
    parents = torch.tensor([[-1, -1, 0, 0, 3, 1]])
    for tokens, kin in (([2, 3, 4, 5, 6, 2], parents), ([2], parents[:, :1]), ([], parents[:, :0])):
        made = drafter.Draft(torch.tensor([tokens]).long(), [len(tokens)], parents=kin)
        for temperature, alone in ((0, "greedy"), (1, "temperature")):
            spec = of_fixed(lambda rows, want, made=made: made)
            object.__setattr__(spec, "temperature", float(temperature))
            ours = answers(spec, target, Limits(20, ignore_eos=True), prompts=[[0, 2]])
            assert_same(ours, answers(alone, target, Limits(20, ignore_eos=True), prompts=[[0, 2]]))


def test_a_draft_never_reaches_beyond_the_context(target):
    """The target reads 32 tokens; the last cycles draft what still fits."""
    prompts = [[0, 2, 3, 2, 3, 2, 3], [0, 2]]
    limits = Limits(25, ignore_eos=True)
    assert_same(answers("quantised-self[k=8]", target, limits, prompts), answers("greedy", target, limits, prompts))


# -- lookups ---------------------------------------------------------------------------------------------------


def looked_up(text, count=4, longest=3, shortest=1, begins=0):
    found = lookup.Lookup(1, longest, shortest, [begins])
    made = found.propose([text], [count], None, None)
    return made.tokens[0, : made.counts[0]].tolist()


def test_a_lookup_copies_what_followed_the_longest_and_newest_match():
    assert looked_up([1, 2, 3, 9, 8, 7, 2, 3]) == [9, 8, 7, 2]
    assert looked_up([1, 2, 3, 9, 5, 1, 2, 3, 7, 1, 2, 3]) == [7, 1, 2, 3]  # the newer of two
    assert looked_up([4, 3, 9, 5, 2, 3, 7, 2, 3]) == [7, 2, 3, 7]  # two tokens that match before one
    assert looked_up([5, 6, 5, 6, 5]) == [6, 5, 6, 5]  # a loop goes on
    assert looked_up([1, 2, 3, 4]) == []
    assert looked_up([1, 2, 3, 1], shortest=2) == []
    assert looked_up([1, 2, 3, 1], begins=3) == []
    assert looked_up([1, 2, 1], count=0) == []


def test_a_lookup_copies_no_more_than_its_match_is_worth():
    text = [7, 8, 9, 1, 2, 3, 4, 5, 6, 0, 8, 9]  # the last two came up before, and before 1 2 3 4 5 6 0
    found = lookup.Lookup(1, 3, 1, [0], per_match=2)
    assert found.propose([text], [8], None, None).tokens.tolist() == [[1, 2, 3, 4]]
    alone = lookup.Lookup(1, 3, 1, [0], per_match=2)
    assert alone.propose([[9, 1, 2, 3, 5, 9]], [8], None, None).tokens.tolist() == [[1, 2]]
    assert found.propose([text], [3], None, None).tokens.tolist() == [[1, 2, 3]]


def test_a_lookup_that_grows_finds_what_a_fresh_one_finds():
    torch.manual_seed(0)
    text = torch.randint(0, 3, (60,)).tolist()
    growing, size = lookup.Lookup(1, 3, 1, [0]), 5
    while size < len(text):
        made = growing.propose([text[:size]], [4], None, None)
        assert made.tokens[0, : made.counts[0]].tolist() == looked_up(text[:size])
        size += 1 + size % 3


def test_a_range_of_matches_that_is_empty_is_refused():
    with pytest.raises(SpecError, match="shortest=4 exceeds longest=3"):
        decoders.build("prompt-lookup[shortest=4]")


def test_parameters_outside_their_bounds_are_named():
    for spec, error in (
        ("prompt-lookup[k=0]", "k=0"),
        ("quantised-self[budget=65,branches=2]", "budget=65"),
        ("quantised-self[bits=5]", "form=int has 4 or 8 bits, not 5"),
        ("quantised-self[zeros=true,bits=8]", "zeros=true is of form=int with 4 bits"),
        ("quantised-self[controller=always]", "controller"),
        ("draft-model[model=/nowhere]", "no model '/nowhere'"),
        ("hf-assisted[model=/nowhere]", "no model '/nowhere'"),
        (
            "prompt-lookup[policy=thompson]",
            "prompt-lookup: policy says how a bandit learns; controller=static does not",
        ),
        ("quantised-self[controller=contextual,level=token]", "level says how a bandit learns"),
    ):
        with pytest.raises(SpecError, match=error):
            decoders.build(spec)


@pytest.mark.parametrize("where", ["before", "behind the first"])
@pytest.mark.parametrize("spec", ["quantised-self", "prompt-lookup", "draft-model", "quantised-self[branches=2]"])
def test_a_controller_that_always_stops_makes_greedy_search(target, spec, where, monkeypatch):
    class Stopper(Controller):
        watches = True

        def width(self):
            return 0 if where == "before" else self.longest

        def stops(self, outlook, row):
            return True

    decoder = decoders.build(spec)
    monkeypatch.setattr(type(decoder), "new_controller", lambda self, seed: Stopper(self.k))
    monkeypatch.setattr(type(decoder), "looks", True)
    target.release()  # what controllers have learnt among it
    ours = answers(decoder, target, Limits(12, ignore_eos=True, trace=True))
    assert_same(ours, answers("greedy", target, Limits(12, ignore_eos=True)))
    drafted = [c["drafted"] for a in ours for c in a.trace]
    if where == "before":
        assert set(drafted) == {0}
        assert all(a.cost.target_calls == 12 for a in ours)
    elif spec in ("quantised-self", "draft-model"):
        assert max(drafted) == 1


@pytest.mark.parametrize(
    "spec",
    [
        *(f"quantised-self[form=float,head=same,k=3,controller={c}" for c in ("static", "svip", "ewma", "contextual")),
        "quantised-self[form=float,k=3,controller=tapout,level=token,policy=thompson",
        "early-exit[k=3", "layer-skip[k=2,top_k=5", "structured-self[k=3,share=0.5", "multi-level[form=float,k=3",
        "draft-model[k=3,top_p=0.9", "sparse-self[sparsity=0.6,k=3", "codebook-self[bits=2,k=3",
    ],
)  # fmt: skip
def test_sampled_texts_have_the_law_of_the_target(target, spec):
    """All texts of four tokens. A verdict that reads the draft's own numbers is off by more than fifty deviations."""
    chi, cells = chi_square(target, decoders.build(f"{spec},temperature=1]"), [0, 2], 4, rows=600, runs=12)
    assert chi < cells + 4.5 * math.sqrt(2 * cells)


@pytest.mark.parametrize("temperature", [0, 1])
def test_no_draft_overflows_the_context(target, temperature):
    """Rows of unequal length, to the last token that the target reads, which is its 32nd."""
    source = random.Random(0)
    for spec in ("multi-level[k=12", "draft-model[k=9", "structured-self[k=9", "early-exit[branches=3,k=4,budget=0"):
        decoder = decoders.build(f"{spec},temperature={temperature}]")
        for _ in range(4):
            prompts = [[0, *(source.choice([2, 3]) for _ in range(source.randrange(7)))] for _ in range(3)]
            longest = max(map(len, prompts))
            limits = Limits(32 - longest, ignore_eos=True)
            found = decoder.generate(target, prompts, limits, RowRandom(0, range(3)))
            assert [len(a.tokens) for a in found] == [32 - longest] * 3


@pytest.mark.parametrize("controller", ["break-even", "heuristic", "ewma"])
def test_a_rule_that_counts_sees_the_levels_of_a_tree(target, controller):
    decoder = decoders.build(f"early-exit[k=4,branches=3,budget=12,controller={controller}]")
    target.release()
    found = answers(decoder, target, Limits(24, ignore_eos=True, trace=True))
    assert_same(found, answers("greedy", target, Limits(24, ignore_eos=True)))
    cycles = [c for a in found for c in a.trace]
    assert max(c["drafted"] for c in cycles) <= 4 < max(c["nodes"] for c in cycles)
    assert all(c["accepted"] <= c["drafted"] for c in cycles)  # a batch drafts as far as any row of it asks


def test_a_rule_is_asked_of_rows_that_go_on_and_learns_from_whole_cycles(target, monkeypatch):
    """Bandits by place credit the places that were drafted; a length cut by the end of the text is not the rule's."""
    credited = []
    settle = bandits.TapOut.settle

    def watched(self, drafted, accepted, seconds):
        credited.append((drafted, len(self._pulled)))
        settle(self, drafted, accepted, seconds)

    monkeypatch.setattr(bandits.TapOut, "settle", watched)
    target.release()
    answers("quantised-self[form=float,k=5,controller=tapout,level=token]", target, Limits(20, ignore_eos=True))
    assert credited
    assert all(pulled <= max(1, drafted) for drafted, pulled in credited)
    target.release()
    decoder = decoders.build("quantised-self[form=float,k=8,controller=ewma]")
    answers(decoder, target, Limits(4, ignore_eos=True))
    assert all(tokens.count == 0 for c in target.kept[decoder] for n, (tokens, _) in c.arms.items() if n > 3)


def test_a_target_without_layers_is_told_so():
    ising = models.load(models.resolve("ising[n=4]"), device="cpu", dtype="auto", say=lambda text: None)
    for spec in ("early-exit", "quantised-self", "layer-skip", "sparse-self", "structured-self"):
        with pytest.raises(UnsupportedError, match="parts can be replaced"):
            decoders.build(spec).generate(ising, [[0]], Limits(2), RowRandom(0, [0]))


def test_two_of_four_needs_a_width_that_four_divides(target, monkeypatch):
    wide = SimpleNamespace(weight=torch.zeros(4, 50))
    odd = SimpleNamespace(attention=SimpleNamespace(qkv=wide), mlp=SimpleNamespace(down=wide))
    monkeypatch.setattr(type(target), "lean", SimpleNamespace(layers=[odd]))
    with pytest.raises(SpecError, match="a matrix of 50 inputs, which 4 does not divide"):
        decoders.build("sparse-self[pattern=2:4]").check(target)


def test_a_drafter_of_a_shorter_context_drafts_as_far_as_it_reads(target):
    short = toy.enumerable_lm(8)
    short.context_length = 12
    decoder = decoders.build("draft-model[k=4,model=org/short]")
    target.release()
    target.kept["draft-model", "org/short"] = short
    ours = answers(decoder, target, Limits(20, ignore_eos=True, trace=True))
    assert_same(ours, answers("greedy", target, Limits(20, ignore_eos=True)))
    drafted = [(c["context"], c["drafted"]) for a in ours for c in a.trace]
    assert any(n for at, n in drafted if at < 10)
    assert not any(n for at, n in drafted if at >= 12)
