"""The audit's statistics against closed forms, simulation and the numbers of the literature."""

import math

import numpy as np
import pytest

from decodathlon.harness.measure import exactness
from decodathlon.harness.targets import toy


def test_distances_by_hand():
    law = np.array([0.5, 0.25, 0.25])
    assert exactness.tvd(np.array([5, 5, 0]), law) == pytest.approx(0.25)
    assert exactness.tvd(np.array([2, 1, 1]), law) == 0.0


def test_the_floor_is_that_of_independent_draws():
    """For a coin E|X/n - 1/2| is known exactly."""
    n = 100
    exact = sum(math.comb(n, k) / 2**n * abs(k / n - 0.5) for k in range(n + 1))
    found = exactness.floor(np.array([0.5, 0.5]), n, repeats=20_000)
    assert found.mean == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize(("n", "mean", "spread"), [(4, 0.048, 0.0097), (8, 0.1944, 0.0089)])
def test_the_floor_of_the_ring_is_the_known_one(n, mean, spread):
    """1,000 exact draws of a ring with an energy of -0.21 per bond: what was once reported as an error of chains."""
    law = toy.Ising(n, 0.21).log_law.exp().numpy()
    found = exactness.floor(law, 1000, repeats=4000)
    assert found.mean == pytest.approx(mean, abs=0.001)
    assert found.spread == pytest.approx(spread, abs=0.0006)


def test_honest_draws_are_rejected_as_rarely_as_stated():
    """At one in a thousand, too: 20,000 honest samples of a law with rare outcomes, 20 expected, 40 hardly ever."""
    law = np.array([0.4, 0.3, 0.2, 0.05, 0.03, 0.015, 0.004, 0.0007, 0.0003])
    rng = np.random.default_rng(0)
    found = np.array([exactness.p_value(rng.multinomial(2000, law), law) for _ in range(20_000)])
    for level in (0.001, 0.01, 0.05):
        share, error = (found <= level).mean(), math.sqrt(level * (1 - level) / 20_000)
        assert 0.3 * level < share < level + 4.5 * error, level


def test_a_sharp_law_hides_nothing():
    """Where one outcome has nearly everything, draws that have it less often are seen; the power is no fiction."""
    law = np.array([0.9999, *[0.0001 / 39] * 39])
    off = np.concatenate([[0.4], np.full(39, 0.6 / 39)])
    rng = np.random.default_rng(0)
    assert exactness.p_value(rng.multinomial(6000, off), law) < 1e-12
    assert 0.0001 < exactness.visible_tvd(law, 6000) < 0.01
    assert exactness.p_value(np.array([500, 0, 500]), np.array([0.5, 0.499, 0.001])) < 1e-12
    for seen in (exactness.visible_tvd(law, 6000),):
        shifted = law * (1 - seen) + seen * np.concatenate([[0.0], np.full(39, 1 / 39)])
        rejected = [exactness.p_value(rng.multinomial(6000, shifted), law) < exactness.ALPHA for _ in range(300)]
        assert np.mean(rejected) > exactness.POWER - 0.05


def test_one_right_answer_is_held_to():
    law = np.array([1.0, 0.0])
    assert exactness.p_value(np.array([6000, 0]), law) == 1.0
    assert exactness.p_value(np.array([5999, 1]), law) == 0.0
    assert exactness.visible_tvd(law, 6000) == pytest.approx(1 - 0.1 ** (1 / 6000), rel=0.01)


def test_the_binomial_tail_is_the_sum():
    n, share = 30, 0.2
    pmf = [math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n + 1)]
    assert exactness._tail(n, share) == pytest.approx([sum(pmf[k:]) for k in range(n + 1)], abs=1e-12)
    assert exactness._binomial(12, n, share) == pytest.approx(2 * sum(pmf[12:]))
    assert exactness._binomial(1, n, share) == pytest.approx(2 * sum(pmf[:2]))


def test_what_the_law_forbids_is_fatal():
    assert exactness.p_value(np.array([500, 499, 1]), np.array([0.5, 0.5, 0.0])) == 0.0


@pytest.mark.parametrize("cells", [2, 8, 40, 512])
def test_the_stated_power_is_the_power(cells):
    """Draws from a law at the stated distance are rejected nine times in ten, those from the law itself never more
    than one time in a thousand; the hardest direction is one in proportion to the law."""
    rng = np.random.default_rng(cells)
    law, draws = rng.dirichlet(np.full(cells, 20.0)), 4000 if cells < 100 else 40_000
    seen = exactness.visible_tvd(law, draws)
    order, half = np.argsort(-law), np.zeros(cells, dtype=bool)
    mass = 0.0
    for i in order:  # about half of the mass up, the rest down
        if mass + law[i] <= 0.5 + 1e-9:
            half[i], mass = True, mass + law[i]
    up = np.where(half, seen / mass, -seen / (1 - mass))
    other = law * (1 + up)
    assert 0.5 * np.abs(other - law).sum() == pytest.approx(seen)
    rejected = np.mean([exactness.p_value(rng.multinomial(draws, other), law) < exactness.ALPHA for _ in range(600)])
    assert rejected == pytest.approx(exactness.POWER, abs=0.05)
    # four times the draws, half the distance
    assert exactness.visible_tvd(law, 4 * draws) == pytest.approx(seen / 2, rel=0.02)


def test_sixteen_thousand_draws_see_a_twentieth_among_512_outcomes():
    assert exactness.visible_tvd(np.full(512, 1 / 512), 15_600) == pytest.approx(0.05, abs=0.002)


def test_a_test_that_puts_everything_together_sees_nothing():
    """A ring of 16 spins has 65,536 states; 30,000 draws of them say nothing, and that is what is said."""
    assert exactness.visible_tvd(np.full(1 << 16, 1 / (1 << 16)), 30_000) == 1.0
    law = np.array([0.495, 0.495, *[0.01 / 100] * 100])
    seen = exactness.visible_tvd(law, 5000)
    assert 0.01 < seen < 0.06
    within = np.array([0.495, 0.495, 0.01, *[0.0] * 99])  # moved among the rare ones: a distance of 0.0099
    rng = np.random.default_rng(0)
    found = [exactness.p_value(rng.multinomial(5000, within), law) for _ in range(200)]
    assert np.mean(np.array(found) < exactness.ALPHA) < 0.05


def test_outcomes_are_counted_by_name():
    law = {(1,): 0.5, (2, 1): 0.25, (2, 2): 0.25}
    counts, p = exactness.counted([(1,), (2, 1), (1,), (3,)], law)
    assert counts.tolist() == [2, 1, 0, 1]
    assert p.tolist() == [0.5, 0.25, 0.25, 0.0]


def test_the_interval_of_the_ratio_holds_one_for_honest_draws():
    """95 of 100 times, also where hardly anything but two outcomes ever comes."""
    law = np.array([0.64, 0.23, 0.09, 0.03, 0.01])
    floor, rng = exactness.floor(law, 2000), np.random.default_rng(1)
    ratios = [floor.ratio(exactness.tvd(rng.multinomial(2000, law), law), 2000) for _ in range(1000)]
    assert np.mean([r.low <= 1 <= r.high for r in ratios]) == pytest.approx(0.95, abs=0.02)
    assert ratios[0].low < ratios[0].value < ratios[0].high
