"""Reservoirs token by token: identities by enumeration, what is claimed, and what is not."""

import itertools
import math

import pytest
import torch

from decodathlon.decoders.reservoir.stream import survivor
from decodathlon.harness import decoder as decoders
from decodathlon.harness.decoder import Limits
from decodathlon.harness.errors import SpecError
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.targets.toy import enumerable_lm

load_builtins()
P = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64)
Q = P.flip(1)


def law_of(sampler, choices, widths, before=None, logits=None):
    """The exact law of a sampler of candidates: the mean over all that its uniforms may mean.

    Args:
        choices: per uniform, numbers in the middle of its ranges; widths: the ranges' probabilities.
    """
    found, mean_weight = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for places in itertools.product(*(range(len(c)) for c in choices)):
        u = torch.tensor([[c[i] for c, i in zip(choices, places, strict=True)]], dtype=torch.float64)
        chance = math.prod(float(w[i]) for w, i in zip(widths, places, strict=True))
        candidates, _ = sampler.candidates(P.log() if logits is None else logits, before, u)
        law = candidates.law(4)[0].exp()
        found += chance * law
        # the unbiased contribution weight of each token, times its chance to be taken
        mean_weight += chance * law * candidates.log_weights.exp().sum() / P[0]
    return found, mean_weight


def ranges(law):
    """Middles and widths of the ranges of a uniform number that draw each token."""
    upper = law.cumsum(0)
    return (upper - law / 2).tolist(), law.tolist()


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_resampling_integrates_exactly_and_has_another_law(m):
    sampler = decoders.build(f"reservoir-ris[m={m}]")
    choices, widths = zip(*[ranges(Q[0])] * m, strict=True)
    law, weight = law_of(sampler, choices, widths, before=Q.log())
    # our weights are p / q; Talbot's have 1 / m before that
    assert torch.allclose(weight / m, torch.ones(4, dtype=torch.float64), atol=1e-12)
    assert float((law - P[0]).abs().sum() / 2) > 0.2


def test_more_candidates_come_nearer():
    distances = []
    for m in (1, 2, 3, 4, 5):
        choices, widths = zip(*[ranges(Q[0])] * m, strict=True)
        law, _ = law_of(decoders.build(f"reservoir-ris[m={m}]"), choices, widths, before=Q.log())
        distances.append(float((law - P[0]).abs().sum() / 2))
    assert distances == sorted(distances, reverse=True)


@pytest.mark.parametrize("m", [1, 2, 3])
def test_a_canonical_candidate_keeps_the_integral_and_helps_the_law(m):
    sampler = decoders.build(f"reservoir-mis[m={m}]")
    choices, widths = zip(*[ranges(Q[0])] * m, ranges(P[0]), strict=True)
    law, weight = law_of(sampler, choices, widths, before=Q.log())
    assert torch.allclose(weight, torch.ones(4, dtype=torch.float64), atol=1e-12)
    choices, widths = zip(*[ranges(Q[0])] * m, strict=True)
    without, _ = law_of(decoders.build(f"reservoir-ris[m={m}]"), choices, widths, before=Q.log())
    assert (law - P[0]).abs().sum() < (without - P[0]).abs().sum()


@pytest.mark.parametrize("m", [1, 2, 3])
def test_a_move_of_the_chain_leaves_the_law_alone(m):
    sampler = decoders.build(f"reservoir-imh[m={m},moves=1,begin=target]")
    assert sampler.claim == "exact"
    choices, widths = zip(ranges(P[0]), *[ranges(Q[0])] * m, strict=True)
    law, _ = law_of(sampler, choices, widths, before=Q.log())
    assert torch.allclose(law, P[0], atol=1e-12)
    begun_elsewhere = decoders.build(f"reservoir-imh[m={m},moves=1]")
    choices, widths = zip(ranges(Q[0]), *[ranges(Q[0])] * m, strict=True)
    law, _ = law_of(begun_elsewhere, choices, widths, before=Q.log())
    assert begun_elsewhere.claim == "heuristic"
    assert (law - P[0]).abs().sum() > 0.1


def test_so_do_two_moves():
    """The number that picks after the first move takes 400 even steps, which leave so much of a rounding."""
    sampler = decoders.build("reservoir-imh[m=1,moves=2,begin=target]")
    steps = [(i + 0.5) / 400 for i in range(400)]
    even = (steps, [1 / 400] * 400)
    choices, widths = zip(ranges(P[0]), ranges(Q[0]), even, ranges(Q[0]), strict=True)
    law, _ = law_of(sampler, choices, widths, before=Q.log())
    assert torch.allclose(law, P[0], atol=1 / 400)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_a_reservoir_of_one_keeps_each_token_with_its_share_in_any_order(order):
    """Over all patterns of who enters: the i-th does with probability w_i / (w_1 + ... + w_i)."""
    w = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)[list(order)]
    enters = w / w.cumsum(0)
    found = torch.zeros(4, dtype=torch.float64)
    for pattern in itertools.product((True, False), repeat=3):
        u = torch.tensor([[0.999, *(e * 0.5 if x else (1 + e) / 2 for x, e in zip(pattern, enters[1:], strict=True))]])
        chance = math.prod(float(e if x else 1 - e) for x, e in zip(pattern, enters[1:], strict=True))
        found[int(survivor(w.log()[None], u)[0])] += chance
    assert torch.allclose(found, w, atol=1e-12)


def test_the_exact_reservoir_has_the_law_of_top_k():
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for k in (1, 7, 64, 300, 1000):
        ours, theirs = (decoders.build(s).shape(logits) for s in (f"reservoir-exact[top_k={k}]", f"top-k[k={k}]"))
        assert torch.allclose(ours.exp(), theirs.exp(), atol=1e-12)


def test_ties_at_the_end_of_the_likeliest_are_counted_once():
    """In bfloat16 many logits are equal; what is drawn must be what the law says, token for token."""
    logits = torch.zeros(20_000, 8)
    sampler = decoders.build("reservoir-exact[top_k=4]")
    drawn = sampler.draw(logits, RowRandom(0, [0]).uniforms(20_000, 4)[0])
    possible = sampler.shape(logits[:1])[0] > -math.inf
    assert int(possible.sum()) == 4
    counts = torch.bincount(drawn, minlength=8)
    assert int(counts[~possible].sum()) == 0
    # 5,000 each, with a standard deviation of 61: six of them
    assert (counts[possible] - 5000).abs().max() < 370


@pytest.mark.parametrize(
    "spec",
    ["reservoir", "reservoir[reuse=cross,every=2]", "reservoir[fresh=probability,size=8]", "reservoir-exact",
     "reservoir-ris", "reservoir-ris[source=uniform]", "reservoir-mis", "reservoir-imh"],
)  # fmt: skip
def test_rows_do_not_depend_on_their_neighbours(spec):
    lm, sampler = enumerable_lm(8), decoders.build(spec)
    together = sampler.generate(lm, [[0], [0, 3], [0, 4]], Limits(6, ignore_eos=True), RowRandom(5, "abc"))
    alone = [
        sampler.generate(lm, [p], Limits(6, ignore_eos=True), RowRandom(5, key))[0]
        for p, key in (([0], "a"), ([0, 3], "b"), ([0, 4], "c"))
    ]
    assert [a.tokens for a in together] == [a.tokens for a in alone]
    assert len({tuple(a.tokens) for a in together}) > 1


def test_the_grid_of_the_note_has_36_settings():
    assert len(decoders.swept(decoders.build("reservoir"))) == 36


def test_the_first_token_is_uniform_over_the_reservoir_unless_it_enters_with_its_probability():
    logits = P.log().expand(3, 4)
    for fresh, expected in (("one", [1 / 2, 1 / 2, 0, 0]), ("probability", [0.5 / 0.8, 0.3 / 0.8, 0, 0])):
        sampler = decoders.build(f"reservoir[size=2,top_k=3,fresh={fresh}]")
        law, _ = sampler.next_law(logits, sampler.start(3), torch.zeros(3, 2))
        assert law.exp()[1].tolist() == pytest.approx(expected, abs=1e-6)


def test_without_reuse_every_token_is_like_the_first():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    control, top = decoders.build("reservoir[size=8,reuse=none,fresh=probability]"), decoders.build("top-k[k=8]")
    state = control.start(3)
    for step in range(3):
        law, state = control.next_law(logits * (step + 1), state, torch.full((3, 8), 0.5))
        assert torch.allclose(law.exp().float(), top.shape(logits * (step + 1)).exp(), atol=1e-6)
    with pytest.raises(SpecError, match="with reuse=none there is nothing to keep for every=2 steps"):
        decoders.build("reservoir[reuse=none,every=2]")


def test_more_candidates_than_can_ever_enter_change_nothing():
    """Free slots take the likeliest tokens that are not stored: with top_k of twice the size there are always enough.

    So of the note's 36 settings 16 are different samplers.
    """
    logits = torch.randn(30, 4, 500, generator=torch.Generator().manual_seed(0)).cumsum(0)

    def tokens(spec):
        sampler, found = decoders.build(spec), []
        state = sampler.start(4)
        for step, law in enumerate(logits):
            u = torch.rand(4, 1 + sampler.uniforms, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            drawn, state = sampler.choose(law, state, u)
            found.append(drawn)
        return torch.stack(found).tolist()

    for rest in ("", ",every=2", ",reuse=cross"):
        assert tokens(f"reservoir[size=8,top_k=16{rest}]") == tokens(f"reservoir[size=8,top_k=128{rest}]")
    assert tokens("reservoir[size=32,top_k=32]") != tokens("reservoir[size=32,top_k=64]")
