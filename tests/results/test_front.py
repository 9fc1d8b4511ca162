"""The Pareto front against enumeration, and its probabilities against closed forms."""

import math

import numpy as np
import pytest

from decodathlon.harness.measure.observations import Observations
from decodathlon.harness.measure.statistics import Estimate
from decodathlon.harness.results import measured
from decodathlon.harness.results.front import Contestant, members, on_front, probabilities
from decodathlon.harness.results.measured import Number


def fixed(x, y, better=("higher", "lower")):
    return Contestant(measured.exactly(x, better=better[0]), measured.exactly(y, better=better[1]))


def mean(values, better="higher", rows=None):
    units = Observations(rows or [f"u{i}" for i in range(len(values))], list(values), [1] * len(values))
    return Number(units.estimate(), "1", better, units)


def logs(values, better="higher"):
    units = Observations.each([f"p{i}" for i in range(len(values))], list(values), scale="exp")
    return Number(units.estimate(), "1", better, units)


@pytest.mark.parametrize("better", [("higher", "higher"), ("higher", "lower"), ("lower", "higher"), ("lower", "lower")])
def test_the_front_is_what_nobody_dominates(better):
    """Against the definition, pair by pair, on random points with ties and infinities."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        x, y = rng.integers(0, 4, (2, 1, 9)).astype(float)
        y[0, 0] = math.inf
        signs = [1 if b == "higher" else -1 for b in better]
        u, v = signs[0] * x[0], signs[1] * y[0]
        expected = [
            not any(u[j] >= u[i] and v[j] >= v[i] and (u[j] > u[i] or v[j] > v[i]) for j in range(9)) for i in range(9)
        ]
        assert on_front(x, y, *better)[0].tolist() == expected


def test_members_by_values_alone():
    assert members([fixed(1, 20), fixed(2, 25), fixed(1.5, 30), fixed(0.5, math.inf)]) == [True, True, False, False]
    assert members([fixed(1, 20), fixed(1, 20)]) == [True, True]
    assert members([]) == []


def test_no_number_is_on_no_front():
    assert on_front(np.array([[1.0, math.nan, 3.0]]), np.array([[3.0, 9.0, 1.0]]), "higher", "higher").tolist() == [
        [True, False, True]
    ]


def test_what_does_not_vary_is_certain():
    assert probabilities([fixed(1, 20), fixed(2, 25), fixed(1.5, 30)]) == [1.0, 1.0, 0.0]


def test_the_probability_is_that_of_the_bootstrap():
    """Two decoders, equal in y: B is on the front if its mean beats A's. By the central limit that is known."""
    rng = np.random.default_rng(1)
    a = rng.normal(0, 1, 400)
    d = rng.normal(0.05, 1, 400)
    y = measured.exactly(1.0)
    found = probabilities([Contestant(mean(a), y), Contestant(mean(a + d), y)], resamples=4000)
    z = d.mean() / (d.std() / math.sqrt(400))
    expected = 0.5 * (1 + math.erf(z / math.sqrt(2)))
    assert found[1] == pytest.approx(expected, abs=0.03)
    assert found[0] == pytest.approx(1 - expected, abs=0.03)


def test_shared_units_are_drawn_together():
    """A text that is hard for both moves neither past the other; drawn apart, B would win only three times in four."""
    hard = np.random.default_rng(2).normal(0, 10, 50)
    y = measured.exactly(1.0)
    together = probabilities([Contestant(mean(hard), y), Contestant(mean(hard + 1), y)])
    assert together == [0.0, 1.0]
    names = [f"other{i}" for i in range(50)]
    apart = probabilities([Contestant(mean(hard), y), Contestant(mean(hard + 1, rows=names), y)])
    assert 0.5 < apart[1] < 0.9


def test_a_speed_carries_the_decoders_own_error():
    """Ten per cent faster by its pairs, but as far from itself: then it is no longer sure."""
    pairs = logs([0.1 + 0.001 * i for i in range(-5, 6)])
    greedy, y = Contestant(measured.exactly(1.0), measured.exactly(1.0)), measured.exactly(1.0)
    quiet = logs([0.001 * i for i in range(-5, 6)])
    noisy = logs([0.2 * (-1) ** i for i in range(11)])
    assert probabilities([greedy, Contestant(pairs, y, (quiet, None))])[1] == 1.0
    assert probabilities([greedy, Contestant(pairs, y, (noisy, None))])[1] < 0.8


def test_the_median_of_a_resample_is_numpys():
    from decodathlon.harness.results.front import _recomputed

    rng = np.random.default_rng(3)
    for n in (7, 8):
        values = rng.normal(size=n)
        units = Observations.each([str(i) for i in range(n)], list(values))
        weights = rng.multinomial(n, [1 / n] * n, size=200)
        expected = [np.median(np.repeat(values, w)) for w in weights]
        assert np.allclose(_recomputed(units, weights), expected)


def test_few_units_get_no_probability_and_infinities_stay():
    few = mean([1.0, 2.0])
    y = measured.exactly(1.0)
    assert probabilities([Contestant(few, y), fixed(5, 1, ("higher", "higher"))]) == [None, 1.0]
    assert probabilities([Contestant(y, few), fixed(5, 1, ("higher", "higher"))]) == [None, 1.0]
    paired = logs([0.1 + 0.001 * i for i in range(8)])
    unsure = Contestant(paired, y, (logs([0.3, -0.3]), None))
    assert probabilities([unsure, fixed(5, 1, ("higher", "higher"))]) == [None, 1.0], "how noisy it is nobody knows"
    cut = Observations(["a"] * 8, [math.inf] * 8, [1] * 8, scale="exp")
    number = Number(Estimate(math.inf), "1", "lower", cut)
    assert probabilities([Contestant(y, number), Contestant(y, measured.exactly(3.0, better="lower"))]) == [0.0, 1.0]


def test_many_contestants_fit_into_memory():
    rng = np.random.default_rng(4)
    crowd = [Contestant(mean(rng.normal(i, 1, 8)), measured.exactly(float(-i))) for i in range(300)]
    found = probabilities(crowd, resamples=200)
    assert len(found) == 300
    assert 0 <= min(found) <= max(found) <= 1
