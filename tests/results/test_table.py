"""The table in the terminal marks by the same rules as the board, and says when nothing is ranked."""

import pytest
from made_results import cell, day, speed_metrics, text_metrics

from decodathlon.harness.registry import load_builtins
from decodathlon.harness.results import table


@pytest.fixture(autouse=True)
def _suites():
    load_builtins()


def row(lines, decoder):
    return next(line for line in lines if line.startswith(decoder))


def text(decoder, seed, worse, **more):
    return cell("r", "wikitext2", decoder, text_metrics(seed, worse), started=day(1), slice="joined", **more)


def speed(decoder, seed, ratio):
    return cell("r", "throughput", decoder, speed_metrics(seed, ratio), started=day(1), slice="batch-1")


def test_the_best_and_what_is_not_told_apart_have_different_marks():
    lines = table.tables([text("a", 1, 0.0), text("b", 2, 0.0), text("c", 3, 0.5)])
    marks = sorted(row(lines, d).split("]")[1].split()[0] for d in "ab")
    assert marks == ["*", "~"]
    assert " *" not in row(lines, "c")
    assert "* best of its column, ~ not told apart from it" in lines


def test_a_baseline_competes_as_one():
    lines = table.tables([speed("greedy", 1, None), speed("slow", 2, 0.7)])
    assert "1 * (baseline)" in row(lines, "greedy")
    assert "*" not in row(lines, "slow")


def test_stand_in_data_rank_nobody():
    stand_in = {"dataset": "prose", "split": "test", "source": "stand-in"}
    lines = table.tables([text("a", 1, 0.0, data=stand_in), text("b", 2, 0.5, data=stand_in)])
    assert "(nothing is ranked)" in lines
    assert not any(" *" in line for line in lines)


def test_who_fails_its_a_a_test_is_not_ranked_and_named():
    biased = speed("biased", 2, 1.5)
    biased.metrics[0] |= {"value": 1.2, "ci_low": 1.1, "ci_high": 1.3}
    lines = table.tables([speed("greedy", 1, None), biased, speed("slow", 3, 0.7)])
    assert "*" not in row(lines, "biased")
    assert any(line.startswith("! biased: A/A failed") for line in lines)


def test_remarks_on_a_busy_machine_are_one_line_and_do_not_bury_the_others():
    busy = [f"! {name}: contended: other processes used {share}% of the cores" for name, share in (("a", 5), ("b", 71))]
    assert table._together(["! c: throttled", *busy]) == [
        "! c: throttled",
        "! contended: other processes used 71% of the cores at most, beside a, b",
    ]
    assert table._together(busy[:1]) == busy[:1]
