"""Quality at equal cost, against enumeration and by hand."""

import itertools

import pytest

from decodathlon.harness.measure.accuracy import Graded
from decodathlon.harness.results import budgets

RIGHT = {"a": [1, 1, 0, 0], "b": [0, 0, 0, 0], "c": [1, 1, 1, 1], "d": [0, 1, 0, 0]}


def questions(confidence=lambda k: -0.1 * k):
    """Wrong answers all differ, right ones are the same."""
    return {
        q: [Graded(q, bool(r), 0 if r else 1 + k, confidence(k)) for k, r in enumerate(right)]
        for q, right in RIGHT.items()
    }


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_any_right_answer_is_the_mean_over_all_choices_of_k(k):
    found = budgets.quality(questions(), k, "pass_at_k")
    for question, value in zip(found.rows, found.sums, strict=True):
        choices = list(itertools.combinations(RIGHT[question], k))
        assert value == pytest.approx(sum(any(c) for c in choices) / len(choices))


@pytest.mark.parametrize("choice", budgets.CHOICES)
def test_one_answer_is_pass_at_1_however_it_is_chosen(choice):
    found = budgets.quality(questions(), 1, choice)
    assert found.sums == pytest.approx([sum(r) / 4 for r in RIGHT.values()])


def test_the_most_frequent_and_the_likeliest_by_hand():
    # pairs of a: (right, right), (wrong, another wrong); of d: (wrong, right) is a tie, (wrong, another wrong)
    assert budgets.quality(questions(), 2, "maj_at_k").sums == [0.5, 0, 1, 0.25]
    assert budgets.quality(questions(), 4, "maj_at_k").sums == [1, 0, 1, 0.25]
    assert budgets.quality(questions(), 2, "best_of_k").sums == [0.5, 0, 1, 0]
    assert budgets.quality(questions(), 4, "best_of_k").sums == [1, 0, 1, 0]
    assert budgets.quality(questions(lambda k: None), 2, "best_of_k") is None


def test_samples_become_graded_answers_again():
    samples = {
        "set/a/0": {"correct": True, "says": 0, "tokens": 10, "log_prob": -5.0},
        "set/a/1": {"correct": False},
        "set/a/judge": {"grade": 3},
        "validation": {"rows": [0, 3]},
    }
    assert budgets.graded(samples) == {"set/a": [Graded("set/a", True, 0, -0.5), Graded("set/a", False, None, None)]}
    assert budgets.answers_of(budgets.graded(samples)) == 2
    assert budgets.answers_of({}) == 0


def test_budgets_double_from_what_the_dearest_pays_for_one_answer():
    assert budgets.budgets([100, 25], 4) == [100, 400]
    assert budgets.budgets([10, 10], 8) == [10, 20, 40, 80]
    assert budgets.budgets([10], 1) == [10]
    assert budgets.budgets([], 1) == []


def test_samples_of_others_do_not_break_the_table():
    samples = {
        "q/0": {"correct": True, "tokens": None, "log_prob": "-Infinity"},
        "q/1": {"correct": False, "tokens": 3, "log_prob": "NaN"},
        "q/2": [1, 2],
    }
    assert [g.confidence for g in budgets.graded(samples)["q"]] == [None, None]
