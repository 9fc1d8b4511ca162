"""Sets of answers to one prompt: each row an exact draw, together as even as can be; or without replacement."""

import math

import numpy as np
import pytest
import torch

from decodathlon.decoders.reservoir.spatial import merged
from decodathlon.decoders.without_replacement import below, log_chance
from decodathlon.harness import decoder as decoders
from decodathlon.harness.decoder import Limits
from decodathlon.harness.measure import exactness, sets
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.targets.toy import Ising, enumerable_lm, law_of

load_builtins()
DESIGNS = ["lattice", "merge", "systematic", "independent"]


@pytest.fixture(scope="module")
def lm():
    return enumerable_lm(4)


@pytest.mark.parametrize("design", DESIGNS)
def test_each_place_of_a_set_has_the_model_s_law(lm, design):
    """One row of each of 1,500 sets of 5, each place in turn: chi-square at one in a thousand."""
    decoder, law = decoders.build(f"reservoir-spatial[design={design}]"), law_of(lm, [0], 3)
    found = []
    for number in range(1500):
        answers = decoder.generate(lm, [[0]] * 5, Limits(3), RowRandom(8, [f"{number}-{i}" for i in range(5)]))
        found.append(tuple(answers[number % 5].tokens))
    counts, p = exactness.counted(found, law)
    assert exactness.p_value(counts, p) > 1e-3


def test_on_the_lattice_every_text_comes_as_often_as_it_should_to_within_one(lm):
    decoder, law = decoders.build("reservoir-spatial"), law_of(lm, [0], 3)
    for seed in range(20):
        answers = decoder.generate(lm, [[0]] * 24, Limits(3), RowRandom(seed, range(24)))
        for text, p in law.items():
            n = sum(tuple(a.tokens) == text for a in answers)
            assert math.floor(24 * p - 1e-9) <= n <= math.ceil(24 * p + 1e-9)


@pytest.mark.parametrize("design", ["merge", "systematic"])
def test_a_node_gives_each_token_as_often_as_it_should_to_within_one(lm, design):
    decoder = decoders.build(f"reservoir-spatial[design={design}]")
    p = lm.open([[0]]).next_logits[0].softmax(-1)
    for seed in range(20):
        answers = decoder.generate(lm, [[0]] * 13, Limits(1), RowRandom(seed, range(13)))
        counts = torch.bincount(torch.tensor([a.tokens[0] for a in answers]), minlength=4)
        assert bool(((counts >= (13 * p - 1e-9).floor()) & (counts <= (13 * p + 1e-9).ceil())).all())


@pytest.mark.parametrize("n", [2, 30])
def test_merging_gives_n_and_each_as_often_as_its_weight_says(n):
    """4,000 mergings; means within five standard errors, of which there are at most 1/2 over the root of 4,000."""
    generator = torch.Generator().manual_seed(n)
    for K in (1, 3, 64):
        p = torch.rand(K, generator=generator, dtype=torch.float64) ** 3
        weights = p / p.sum() * n
        counts = torch.zeros(K, dtype=torch.float64)
        for _ in range(4000):
            taken = merged(weights, n, torch.rand(K, generator=generator, dtype=torch.float64))
            assert len(taken) == n
            one = torch.bincount(taken, minlength=K)
            assert bool(((one >= (weights - 1e-9).floor()) & (one <= (weights + 1e-9).ceil())).all())
            counts += one
        assert float((counts / 4000 - weights).abs().max()) < 5 * 0.5 / math.sqrt(4000)


def test_rows_with_the_same_beginning_are_read_once(lm):
    decoder = decoders.build("reservoir-spatial[design=independent]")
    before = lm.spent.positions
    answers = decoder.generate(lm, [[0, 2, 3]] * 6 + [[0]] * 2, Limits(4), RowRandom(1, range(8)))
    read = lm.spent.positions - before
    assert sum(a.cost.target_positions for a in answers) <= read <= sum(a.cost.target_positions for a in answers) + 2
    # the last token of an answer is not read; equal beginnings count once
    beginnings = {
        (prompt, tuple(a.tokens[:n]))
        for prompt, a in zip("AAAAAABB", answers, strict=True)
        for n in range(1, len(a.tokens))
    }
    assert sum(a.cost.target_positions for a in answers) == 3 + 1 + len(beginnings)


def test_sets_are_told_apart_by_prompt_and_rows(lm):
    decoder = decoders.build("reservoir-spatial")
    together = decoder.generate(lm, [[0], [0, 2], [0], [0, 2]], Limits(4), RowRandom(1, "abcd"))
    alone = decoder.generate(lm, [[0, 2]] * 2, Limits(4), RowRandom(1, "bd"))
    assert [a.tokens for a in alone] == [together[1].tokens, together[3].tokens]


def test_log_probabilities_are_the_model_s(lm):
    for spec in ("reservoir-spatial", "gumbel-top"):
        answers = decoders.build(spec).generate(lm, [[0]] * 6, Limits(3), RowRandom(1, range(6)))
        law = law_of(lm, [0], 3)
        assert [a.log_prob for a in answers] == pytest.approx([math.log(law[tuple(a.tokens)]) for a in answers])


# --- Without replacement -----------------------------------------------------------------------------------------


def test_keys_below_their_parent_have_its_maximum_and_their_law():
    """The maximum is the parent's; over 20,000 draws each child is it as often as its share."""
    generator = torch.Generator().manual_seed(0)
    log_p = torch.tensor([0.5, 0.3, 0.2, 0.0]).double().log().expand(20_000, 4)
    u = torch.rand(20_000, 4, generator=generator, dtype=torch.float64)
    parent = -(-torch.rand(20_000, 1, generator=generator, dtype=torch.float64).log()).log()
    keys = below(log_p - (-u.log()).log(), parent)
    assert torch.allclose(keys.amax(1, keepdim=True), parent)
    first = torch.bincount(keys.argmax(1), minlength=4) / 20_000
    assert torch.allclose(first, torch.tensor([0.5, 0.3, 0.2, 0.0]), atol=4 * 0.0036)
    assert bool((keys[:, 3] == -math.inf).all())


def test_without_replacement_by_enumeration(lm):
    """The first two of 4,000 sets against p(a) p(b) / (1 - p(a)), ordered pairs of 12 texts: chi-square at 1/1,000."""
    decoder, law = decoders.build("gumbel-top"), law_of(lm, [0], 2)
    found = []
    for seed in range(4000):
        pair = decoder.generate(lm, [[0]] * 2, Limits(2), RowRandom(seed, "ab"))
        found.append((*pair[0].tokens, -1, *pair[1].tokens))
        assert pair[0].tokens != pair[1].tokens
    pairs = {(*a, -1, *b): p * q / (1 - p) for a, p in law.items() for b, q in law.items() if a != b}
    counts, p = exactness.counted(found, pairs)
    assert exactness.p_value(counts, p) > 1e-3


def test_importance_weights_estimate_without_bias(lm):
    """The sum of weights times an indicator is on average its probability: 2,000 sets, four standard errors.

    Texts below one in a hundred are indicated together: alone, too few sets have them.
    """
    decoder, law = decoders.build("gumbel-top"), law_of(lm, [0], 3)
    place = {text: i for i, text in enumerate(law)}
    found = torch.zeros(2000, len(law), dtype=torch.float64)
    for seed in range(2000):
        for answer in decoder.generate(lm, [[0]] * 6, Limits(3), RowRandom(seed, range(6))):
            found[seed, place[tuple(answer.tokens)]] += answer.trace[-1]["importance"]
    p = torch.tensor(list(law.values()), dtype=torch.float64)
    often = p >= 0.01
    assert 5 < int(often.sum()) < len(p)
    found = torch.cat([found[:, often], found[:, ~often].sum(1, keepdim=True)], 1)
    p = torch.cat([p[often], p[~often].sum()[None]])
    error = (found.mean(0) - p).abs() / (found.std(0) / math.sqrt(2000))
    assert float(error.max()) < 4


def test_more_rows_than_texts_repeat_the_last_one_at_weight_zero():
    ring = Ising(2, 0.3)
    answers = decoders.build("gumbel-top").generate(ring, [[]] * 6, Limits(2), RowRandom(0, range(6)))
    assert len({tuple(a.tokens) for a in answers}) == 4
    assert [a.trace[-1]["importance"] > 0 for a in answers] == [True] * 4 + [False] * 2
    assert sum(a.trace[-1]["importance"] for a in answers) == pytest.approx(1.0)
    assert log_chance(-3.0, -math.inf) == 0.0


def test_texts_whose_probability_is_no_number_have_weights(lm):
    """2,000 tokens at about a nat each: exp(-2,000) is 0."""
    assert log_chance(-2000.0, -1990.0) == pytest.approx(math.log(-math.expm1(-math.exp(-10.0))))
    assert log_chance(-2000.0, -1900.0) == -100.0

    class Flat(Ising):
        context_length = 2000

        def next_logits_of_all(self, prefixes):
            return torch.zeros(len(prefixes), 2, dtype=torch.float64)

    ring = Flat(2, 0.3)
    ring.context_length = 2000
    answers = decoders.build("gumbel-top").generate(ring, [[]] * 3, Limits(1500), RowRandom(0, range(3)))
    assert all(a.log_prob == pytest.approx(-1500 * math.log(2)) for a in answers)
    assert all(math.isfinite(a.trace[-1]["importance"]) for a in answers)
    with pytest.raises(ValueError, match="at least 1"):
        decoders.build("gumbel-top").generate(ring, [[]], Limits(0), RowRandom(0, [0]))


# --- The suite's measures ----------------------------------------------------------------------------------------


def test_measures_of_independent_draws_are_one(lm):
    """Means over 1,500 sets of 8 draws, each within four standard errors of 1."""
    law = sets.known(decoders.build("temperature"), lm, 8)
    generator = torch.Generator().manual_seed(3)
    at = torch.multinomial(torch.tensor(law.p), 1500 * 8, replacement=True, generator=generator).view(1500, 8)
    found = []
    for row in at.tolist():
        answers = [decoders_completion(law.outcomes[i]) for i in row]
        one = sets.judged(answers, law)
        found.append((one.tvd, one.squared_error, one.distinct, one.hits))
    values = torch.tensor(found, dtype=torch.float64)
    error = (values.mean(0) - 1).abs() / (values.std(0) / math.sqrt(1500))
    assert float(error.max()) < 4


def decoders_completion(tokens, weight=None):
    from decodathlon.harness.decoder import Completion

    return Completion(list(tokens), "stop", trace=[] if weight is None else [{"importance": weight}])


def test_the_least_distance_is_that_of_rounding_and_the_lattice_reaches_it(lm):
    law = sets.known(decoders.build("reservoir-spatial"), lm, 16)
    found = [sets.judged(sets.drawn(decoders.build("reservoir-spatial"), lm, law, n, 0), law).tvd for n in range(300)]
    values = torch.tensor(found, dtype=torch.float64)
    least = law.least / law.floor
    assert abs(float(values.mean()) - least) < 4 * float(values.std()) / math.sqrt(300)


def test_who_knows_the_law_weighs_independent_draws_by_it():
    """Three answers of probability .5, .3 and .2, each seen once: weights p / (1 - (1 - p)^3), by hand."""
    law = sets.Known([(0,), (1,), (2,)], np.array([0.5, 0.3, 0.2]), 3, np.array([[1.0, -1.0, 0.5]]), np.ones((1, 3)))
    weights = np.array([0.5 / 0.875, 0.3 / 0.657, 0.2 / 0.488])
    error = float((weights / weights.sum()) @ law.functions[0]) ** 2 * 3
    assert sets.judged([decoders_completion(o) for o in law.outcomes], law).weighted_error == pytest.approx(error)


def test_what_claims_nothing_is_held_against_the_law_at_its_temperature(lm):
    cold, plain = (sets.known(decoders.build(d), lm, 4) for d in ("gumbel-top[temperature=0.5]", "gumbel-top"))
    tempered = law_of(lm, [0], 3, lambda logits: (2 * logits).log_softmax(-1))
    assert cold.outcomes == plain.outcomes == list(tempered)
    assert np.allclose(cold.p, list(tempered.values()))
    assert not np.allclose(cold.p, plain.p)


def test_weights_count(lm):
    law = sets.known(decoders.build("gumbel-top"), lm, 4)
    best = sorted(range(len(law.p)), key=lambda i: -law.p[i])[:4]
    even = sets.judged([decoders_completion(law.outcomes[i]) for i in best], law)
    own = sets.judged([decoders_completion(law.outcomes[i], law.p[i]) for i in best], law)
    assert own.tvd < even.tvd
    assert own.hits == even.hits


@pytest.mark.parametrize("seed", [0, 1])
def test_the_audit_sees_a_design_whose_places_are_not_exact(lm, monkeypatch, seed):
    """Were all answers of a node the likeliest token, a set of one would not show it; a set of four does."""
    from decodathlon.decoders.reservoir import spatial
    from decodathlon.harness.measure import draws

    decoder, law = decoders.build("reservoir-spatial[design=merge]"), law_of(lm, [0], 3)

    def p_value():
        counts, p = exactness.counted(draws.answers(decoder, lm, 600, 3, seed), law)
        return exactness.p_value(counts, p)

    assert p_value() > 1e-3
    monkeypatch.setattr(spatial, "merged", lambda weights, n, u: weights.argmax().repeat(n))
    assert p_value() < 1e-6


def test_a_law_without_a_choice_and_answers_from_elsewhere_are_told(lm):
    from decodathlon.harness.errors import UnsupportedError

    with pytest.raises(UnsupportedError, match="always gives the same one"):
        sets.known(decoders.build("top-k[k=1]"), lm, 8)
    law = sets.known(decoders.build("temperature"), lm, 2)
    with pytest.raises(ValueError, match="no answer that the law knows"):
        sets.judged([decoders_completion((3, 3, 3, 3, 3)), decoders_completion(law.outcomes[0])], law)


def test_the_floor_is_that_of_simulated_draws(lm):
    law = sets.known(decoders.build("temperature"), lm, 16)
    simulated = exactness.floor(law.p, 16, repeats=20_000)
    assert law.floor == pytest.approx(simulated.mean, abs=5 * simulated.spread / math.sqrt(20_000))
