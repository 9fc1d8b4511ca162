"""pass@k, majorities and the best of k against enumeration; intervals over problems."""

import itertools

import numpy as np
import pytest

from decodathlon.harness.measure import accuracy, statistics
from decodathlon.harness.measure.accuracy import Graded


def graded(question, *answers, gold="1"):
    return [Graded(question, a == gold, None if a is None else answers.index(a), None) for a in answers]


@pytest.mark.parametrize(("n", "correct", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 2), (6, 5, 2), (4, 1, 4)])
def test_pass_at_k_is_the_share_of_all_choices(n, correct, k):
    answers = [1] * correct + [0] * (n - correct)
    choices = list(itertools.combinations(answers, k))
    assert accuracy.pass_at_k(n, correct, k) == pytest.approx(sum(any(c) for c in choices) / len(choices))


def test_the_majority_counts_equal_answers_and_leaves_unreadable_ones_out():
    assert accuracy.majority(graded("q", "1", "1", "2")) == 1
    assert accuracy.majority(graded("q", "2", "2", "1")) == 0
    assert accuracy.majority(graded("q", "2", "1", None)) == 0.5, "a tie is shared"
    assert accuracy.majority(graded("q", None, None)) == 0


def test_the_best_is_the_likeliest_per_token():
    answers = [Graded("q", False, 0, -0.5), Graded("q", True, 1, -0.1)]
    assert accuracy.best(answers) == 1
    assert accuracy.best(answers[:1]) == 0
    assert accuracy.best([*answers, Graded("q", True, 1, None)]) is None
    sure = [Graded("q", False, 0, -0.1), Graded("q", True, 1, 0.0)]
    assert accuracy.best(sure) == 1, "a probability of one is the likeliest, not the unlikeliest"
    assert accuracy.best([*sure, Graded("q", False, 2, 0.0)]) == 0.5, "a tie is shared"


def test_metrics_of_a_set():
    found = accuracy.metrics(graded("a", "1", "2") + graded("b", "3", None))
    assert found["pass_at_1"].estimate().value == 0.25
    assert found["answered"].estimate().value == 0.75
    assert found["pass_at_k"].estimate().value == 0.5
    assert found["maj_at_k"].estimate().value == 0.25
    assert found["samples"].value == 2
    assert "best_of_k" not in found
    assert set(accuracy.metrics(graded("a", "1"))) == {"pass_at_1", "answered", "samples"}


def test_intervals_are_over_problems_and_not_over_answers():
    """Ten equal answers to each of 40 problems say no more than one each."""
    rng = np.random.default_rng(0)
    right = rng.random(40) < 0.5
    once = [Graded(f"q{i}", bool(r), 0) for i, r in enumerate(right)]
    tenfold = [one for one in once for _ in range(10)]
    a, b = (accuracy.metrics(g)["pass_at_1"].estimate() for g in (once, tenfold))
    assert (a.value, a.low, a.high) == pytest.approx((b.value, b.low, b.high))
    assert a == statistics.wilson(int(right.sum()), 40)
