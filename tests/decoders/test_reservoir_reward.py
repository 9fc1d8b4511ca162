"""Choosing among whole answers: the law of resampling by enumeration, best of n, and what early stopping saves."""

import itertools
import math

import pytest
import torch

from decodathlon.decoders.best_of import drawn
from decodathlon.harness import decoder as decoders
from decodathlon.harness.decoder import Limits
from decodathlon.harness.measure import draws, exactness
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.targets.toy import enumerable_lm, law_of

load_builtins()


@pytest.fixture(scope="module")
def lm():
    return enumerable_lm(4)


def resampled_law(p, w, m):
    """The law of one of m independent candidates taken by weight, over all m-tuples."""
    found = torch.zeros_like(p)
    for some in itertools.product(range(len(p)), repeat=m):
        chance = math.prod(float(p[i]) for i in some)
        total = sum(float(w[i]) for i in some)
        for i in some:
            found[i] += chance * float(w[i]) / total
    return found


@pytest.mark.parametrize("m", [1, 2, 3])
def test_its_law_is_that_of_resampling_and_nears_the_tilted_one(lm, m):
    """Two tokens, 12 texts, 6,000 answers: the chi-square test against the enumerated law, at one in a thousand."""
    spec = f"reservoir-reward[m={m},reward=log-power,beta=0.5]"
    law = law_of(lm, [0], 2)
    p = torch.tensor(list(law.values()), dtype=torch.float64)
    expected = resampled_law(p, p**2, m)
    tilted = p**3 / (p**3).sum()
    answers = decoders.build(spec).generate(lm, [[0]] * 6000, Limits(2), RowRandom(3, range(6000)))
    counts, _ = exactness.counted([tuple(a.tokens) for a in answers], law)
    assert exactness.p_value(counts, torch.cat([expected, torch.zeros(1)]).numpy()) > 1e-3
    distances = [float((resampled_law(p, p**2, k) - tilted).abs().sum() / 2) for k in range(1, m + 1)]
    assert distances == sorted(distances, reverse=True)
    if m > 1:  # the test sees the difference from the model's own law
        assert exactness.p_value(counts, torch.cat([p, torch.zeros(1)]).numpy()) < 1e-6


def test_the_mean_weight_estimates_the_constant_without_bias(lm):
    """4,000 answers with 4 candidates each; the estimate within four standard errors of the enumerated constant."""
    sampler = decoders.build("reservoir-reward[m=4,beta=0.5]")
    p = torch.tensor(list(law_of(lm, [0], 3).values()), dtype=torch.float64)
    answers = sampler.generate(lm, [[0]] * 4000, Limits(3), RowRandom(1, range(4000)))
    found = torch.tensor([math.exp(a.trace[-1]["log_mean_weight"]) for a in answers], dtype=torch.float64)
    assert abs(float(found.mean() - (p * p**2).sum())) < 4 * float(found.std()) / math.sqrt(4000)


def test_what_it_claims_to_near_is_what_the_audit_measures_against(lm):
    law = draws.claimed_law(decoders.build("reservoir-reward[beta=0.5]"), lm, 2)
    p = torch.tensor(list(law_of(lm, [0], 2).values()), dtype=torch.float64)
    assert list(law.values()) == pytest.approx((p**3 / (p**3).sum()).tolist(), rel=1e-9)


def test_best_of_n_is_the_likeliest_of_its_candidates(lm):
    one = decoders.build("best-of-n[n=8]")
    answers = one.generate(lm, [[0], [0, 2]], Limits(5), RowRandom(4, "ab"))
    again = drawn(one.shape, lm, [[0], [0, 2]], 8, Limits(5), RowRandom(4, "ab"))
    for p, (answer, cost, prompt) in enumerate(zip(answers, again.costs, ([0], [0, 2]), strict=True)):
        mine = again.of(p)
        best = max(mine, key=lambda c: c.log_prob)
        assert answer.tokens == best.tokens
        assert answer.log_prob == pytest.approx(best.log_prob, rel=1e-9)
        # the prompt once, then every token that is read: the last of an answer is not
        assert cost.target_positions == len(prompt) + sum(len(c.tokens) - 1 for c in mine)
        assert answer.cost == cost
    alone = one.generate(lm, [[0, 2]], Limits(5), RowRandom(4, "b"))
    assert alone[0].tokens == answers[1].tokens


def test_candidates_are_drawn_from_the_law(lm):
    one = decoders.build("best-of-n")
    found = drawn(one.shape, lm, [[0]], 8000, Limits(3), RowRandom(9, "a"))
    counts, p = exactness.counted([tuple(c.tokens) for c in found.all], law_of(lm, [0], 3))
    assert exactness.p_value(counts, p) > 1e-3


def test_early_stopping_reads_less_and_still_chooses_among_the_best(lm):
    prompts, limits = [[0]] * 40, Limits(12, ignore_eos=True)
    spent, reached = [], []
    for spec in ("best-of-n[n=1]", "best-of-n[n=16]", "best-of-n[n=16,check_every=3]"):
        answers = decoders.build(spec).generate(lm, prompts, limits, RowRandom(2, range(40)))
        assert all(len(a.tokens) == 12 for a in answers)
        spent.append(sum(a.cost.target_positions for a in answers))
        reached.append(sum(a.log_prob for a in answers) / 40)
    # The last token of an answer is not read, nor are those of candidates that are dropped behind them.
    assert spent == [40 * (1 + 11), 40 * (1 + 16 * 11), 40 * (1 + 16 * 2 + 8 * 3 + 4 * 3 + 2 * 3)]
    assert reached[0] < reached[2] <= reached[1] + 1e-9
    assert reached[2] - reached[0] > 0.5 * (reached[1] - reached[0])


def test_nothing_is_dropped_below_one_candidate(lm):
    answers = decoders.build("best-of-n[n=4,check_every=1,keep=0.01]").generate(
        lm, [[0]] * 5, Limits(6, ignore_eos=True), RowRandom(0, range(5))
    )
    assert all(len(a.tokens) == 6 for a in answers)
    assert all(a.trace[-1]["candidates"] == 1 for a in answers)
