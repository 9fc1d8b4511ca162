"""Shares of solved questions: Wilson's interval, McNemar's exact test, a paired bootstrap, and what cannot be told."""

import math

import numpy as np
import pytest
from made_results import cell, day, metric_row

from decodathlon.harness.measure import statistics
from decodathlon.harness.measure.observations import Observations, compared, p_value, visible
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.results import measured, table
from decodathlon.harness.results.changes import change_of


def solved(count, n=30, first=0):
    """A decoder that solves `count` of n problems, from problem `first` on."""
    right = [float(first <= i < first + count) for i in range(n)]
    return Observations.questions([f"problem-{i}" for i in range(n)], right)


def outcome(decoder, found, suite="aime25"):
    data = {"dataset": "aime25", "split": "test", "source": "folder"}
    return cell("r", suite, decoder, [metric_row("pass_at_1", found)], started=day(1), data=data)


def change(a, b):
    x, y = measured.of_outcomes([outcome("a", a), outcome("b", b)])
    return change_of("pass_at_1", x, y), measured.differ("pass_at_1", x, y)


def test_the_interval_is_wilsons_even_where_nothing_was_solved():
    assert solved(0).estimate() == statistics.wilson(0, 30)
    assert solved(0).estimate().high == pytest.approx(0.1135, abs=1e-4)  # 30 problems, none solved
    assert solved(11).estimate() == statistics.wilson(11, 30)


def test_several_answers_to_a_question_are_no_new_evidence():
    names = [f"problem-{i}" for i in range(30)]
    twice = Observations.questions(names, [4.0] * 11 + [0.0] * 19, [4.0] * 30)
    assert twice.estimate() == statistics.wilson(11, 30)._replace(n=120)
    mixed = Observations.questions(names, [4.0] * 10 + [2.0] + [0.0] * 19, [4.0] * 30)
    assert mixed.estimate() == statistics.clustered_share(mixed.sums, mixed.counts)
    assert Observations.from_json(mixed.as_json()) == mixed


@pytest.mark.parametrize(("more", "told_apart"), [(5, False), (6, True), (12, True)])
def test_six_problems_on_one_side_alone_are_needed(more, told_apart):
    """Exact McNemar: 2 * 0.5 ** 5 = 0.0625, 2 * 0.5 ** 6 = 0.03125."""
    found, differs = change(solved(10), solved(10 + more))
    assert differs is told_apart
    assert p_value(solved(10 + more), solved(10)) == 2 * 0.5**more
    assert found.verdict.startswith("B is better (p = 0.0" if told_apart else "cannot tell: 30 questions")
    assert found.p == 2 * 0.5**more


def test_the_interval_of_the_difference_is_that_of_agresti_and_min():
    assert compared(solved(12, first=4), solved(10), "difference") == statistics.paired_share_difference(6, 6, 4, 14)


def test_where_the_data_cannot_decide_it_is_said_with_what_they_could_have_shown():
    found, _ = change(solved(10), solved(12, first=4))
    smallest, questions = visible(solved(10), solved(12, first=4))
    # 10 of 30 differ: standard deviation 0.58; (2.045 + 0.854) * 0.58 / sqrt(30)
    assert (questions, smallest) == (30, pytest.approx(0.309, abs=0.003))
    assert found.verdict == "cannot tell: 30 questions show no difference below 31 points"
    assert change(solved(3), solved(3))[0].verdict.startswith("the same here; cannot tell: 30 questions show")
    assert change(solved(1, 4), solved(2, 4))[0].verdict == "cannot tell: 4 questions are too few for any difference"


def test_several_answers_let_smaller_differences_be_seen():
    names = [f"problem-{i}" for i in range(30)]
    none = Observations.questions(names, [0.0] * 30, [4.0] * 30)
    some = Observations.questions(names, [1.0] * 6 + [0.0] * 24, [4.0] * 30)
    assert visible(none, none)[0] == 6 / 4 / 30
    assert p_value(some, none) == 2 * 0.5**6, "five points, and seen"
    few = Observations.questions(names[:4], [0.0] * 4, [4.0] * 4)
    assert visible(few, few)[0] == math.inf, "four questions never reach 5 %"


def test_the_paired_bootstrap_covers_the_truth():
    """40 problems of shared difficulty, four answers each: 400 worlds, intervals of 95 % (binomial spread 1.1 %)."""
    rng, covered, worlds = np.random.default_rng(5), 0, 400
    names = [f"problem-{i}" for i in range(40)]
    easy = rng.beta(0.7, 0.7, (worlds, 40))
    for p in easy:
        a, b = (rng.binomial(4, np.clip(p + shift, 0, 1)) for shift in (0.1, 0.0))
        truth = (np.clip(easy + 0.1, 0, 1) - easy).mean()
        found = compared(
            *(Observations.questions(names, [float(x) for x in right], [4.0] * 40) for right in (a, b)), "difference"
        )
        covered += found.low <= truth <= found.high
    assert 0.92 <= covered / worlds <= 0.98


def test_ignoring_that_answers_share_their_problems_would_cover_too_little():
    """The seeded bug: 160 answers taken for 160 problems give an interval that is too short."""
    rng = np.random.default_rng(6)
    right = rng.binomial(4, rng.beta(0.3, 0.3, 40)).astype(float)
    names = [f"problem-{i}" for i in range(40)]
    honest = Observations.questions(names, list(right), [4.0] * 40).estimate()
    naive = statistics.wilson(int(right.sum()), 160)
    assert honest.high - honest.low > 1.5 * (naive.high - naive.low)


def test_the_table_says_what_thirty_problems_cannot():
    load_builtins()
    lines = table.tables([outcome("a", solved(2)), outcome("b", solved(4))])
    assert any("pass_at_1: cannot tell: 30 questions show no difference below 20 points" in line for line in lines)
    told = table.tables([outcome("a", solved(2)), outcome("b", solved(20)), outcome("c", solved(19))])
    assert not any("cannot tell" in line for line in told)
    assert "* best of its column, ~ not told apart from it" in told


def test_three_problems_of_thirty_do_not_decide_however_often_they_were_answered():
    """Four answers each; one right answer to three problems is worth no more than three problems solved."""
    names = [f"problem-{i}" for i in range(30)]
    none = Observations.questions(names, [0.0] * 30, [4.0] * 30)
    some = Observations.questions(names, [1.0] * 3 + [0.0] * 27, [4.0] * 30)
    found, differs = change(none, some)
    assert p_value(some, none) == 2 * 0.5**3
    assert not differs
    assert found.verdict.startswith("cannot tell: 30 questions")
    assert found.estimate.low <= 0, "the interval says the same as the test"


@pytest.mark.parametrize("answers", [1, 4])
def test_among_equals_hardly_ever_one_is_marked(answers):
    """Six identical decoders, 200 worlds: some mark in 5 % of them at most (binomial spread 1.5 %)."""
    rng, alarms, worlds = np.random.default_rng(9), 0, 200
    names = [f"problem-{i}" for i in range(60)]
    for _ in range(worlds):
        easy = rng.beta(0.3, 0.6, 60)
        found = [
            Observations.questions(names, [float(x) for x in rng.binomial(answers, easy)], [float(answers)] * 60)
            for _ in range(6)
        ]
        cells = measured.of_outcomes([outcome(f"d{i}", o) for i, o in enumerate(found)])
        alarms += bool(measured.marks("pass_at_1", cells))
    assert alarms / worlds <= 0.09


def test_without_the_correction_every_fourth_column_would_have_a_false_star():
    """The seeded bug: the leader is chosen afterwards and each comparison made at 5 %."""
    rng, alarms, worlds = np.random.default_rng(9), 0, 150
    names = [f"problem-{i}" for i in range(100)]
    for _ in range(worlds):
        easy = rng.beta(0.5, 0.5, 100)
        found = [Observations.questions(names, [float(x) for x in rng.binomial(1, easy)]) for _ in range(6)]
        cells = measured.of_outcomes([outcome(f"d{i}", o) for i, o in enumerate(found)])
        leader = max(cells, key=lambda c: c.metrics["pass_at_1"].estimate.value)
        alarms += any(measured.differ("pass_at_1", c, leader) for c in cells if c is not leader)
    assert alarms / worlds > 0.15


def test_one_right_answer_more_does_not_make_the_interval_shorter_than_none():
    names = [f"problem-{i}" for i in range(30)]
    one = Observations.questions(names, [1.0] + [0.0] * 29, [4.0] * 30).estimate()
    assert one.value == 1 / 120
    assert one.high > 0.04, "Student's would end at 0.025"
    assert one.low > 0
