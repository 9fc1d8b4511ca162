"""The page Tasks: what an equal budget buys, what cannot be told, and every answer with its question where it is."""

import json
import math
import shutil

import pytest

pytest.importorskip("streamlit")
from board_pages import said
from made_results import asked, demo

from decodathlon.harness.commands.command import main
from decodathlon.harness.results import answers, budgets, store
from decodathlon.leaderboard import queries, tasks


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return asked(tmp_path_factory.mktemp("tasks") / "r.duckdb")


@pytest.fixture(scope="module")
def cells(results, tmp_path_factory):
    copy = tmp_path_factory.mktemp("copy") / "copy.duckdb"
    store.snapshot(results, copy, queries.prepare)
    import duckdb

    with duckdb.connect(str(copy)) as connection:
        ((setting, _),) = queries.settings(connection)
        (column,) = tasks.columns_of_tasks(queries.columns(connection, setting))
        found = queries.cells(connection, setting, None, "", column)
        samples = {c.key: answers.grades(connection, *c.key) for c in found}
        whole = {c.key: answers.samples(connection, *c.key) for c in found}
    assert {k: budgets.graded(s) for k, s in samples.items()} == {k: budgets.graded(s) for k, s in whole.items()}
    return found, samples


def at(cells, budget, choice="pass_at_k"):
    return {o.cell.decoder: o for o in tasks.at_budget(*cells, "answer_tokens", budget, choice)}


def test_an_equal_budget_buys_the_cheap_decoder_more_answers(cells):
    found = at(cells, 100)
    assert {d: (o.bought.answers, o.bought.cost) for d, o in found.items()} == {
        "temperature": (1, 100.0), "thrifty": (4, 100.0), "greedy": (1, 50.0),
    }  # fmt: skip
    # one answer in two is right to ten of twelve problems; four answers always hold a right one
    assert found["temperature"].number.estimate.value == pytest.approx(10 / 12 / 2)
    assert found["thrifty"].number.estimate.value == pytest.approx(10 / 12)
    assert list(found) == ["thrifty", "temperature", "greedy"], "best first"
    assert found["thrifty"].mark == "best"
    assert found["temperature"].mark is None, "told apart at this budget"


def test_a_budget_for_four_of_each_says_who_had_no_more_answers(cells):
    found = at(cells, 400)
    assert found["temperature"].bought.answers == 4
    assert found["thrifty"].bought.more, "the budget buys sixteen, four were drawn"
    assert not found["greedy"].bought.more, "greedy search would say the same again"


def test_who_cannot_pay_for_one_answer_has_no_line(cells):
    assert set(at(cells, 30)) == {"thrifty"}
    remark = tasks.remark(list(at(cells, 30).values()), cells[0], "answer_tokens", 30)
    assert remark.endswith("Dearer, or silent about its cost, its likelihoods or some questions: greedy, temperature.")


def test_what_twelve_questions_cannot_tell_is_said(cells):
    two = [c for c in cells[0] if c.decoder != "thrifty"]
    offers = tasks.at_budget(two, cells[1], "answer_tokens", 100, "maj_at_k")
    assert [o.mark for o in offers] == [None, None]
    assert "Cannot tell: 12 questions show no difference below" in tasks.remark(offers, two, "answer_tokens", 100)


def test_the_curve_has_a_point_per_number_of_answers(cells):
    rows = tasks.curve(*cells, "answer_tokens", "maj_at_k")
    assert sorted((r["decoder"], r["answers"], r["cost"]) for r in rows) == [
        ("greedy", 1, 50.0), *(("temperature", k, 100.0 * k) for k in (1, 2, 3, 4)),
        *(("thrifty", k, 25.0 * k) for k in (1, 2, 3, 4)),
    ]  # fmt: skip


def test_the_page_opens_and_says_at_equal_what(opened, results):
    page = opened(
        results, "tasks", suite="math500", cost="answer_tokens", quality="pass_at_k", budget="100 per question"
    )
    assert not page.exception
    assert "Equal is answer_tokens: at most 100 new tokens of the answers given per question" in said(page)
    assert "thrifty" in said(page)
    assert "exact McNemar" in said(page)


def texts(page):
    return [element.value for element in page.text]


def test_every_answer_can_be_read_with_its_question(opened, results):
    page = opened(results, "tasks", answers="temperature", question="math-3")
    assert not page.exception
    assert "What is 3 + 7 - 3? <b>Think</b>" in texts(page), "as it was asked, and as text"
    assert [t for t in texts(page) if "says" in t] == [f"temperature says {k} to 3" for k in range(4)]
    assert "Right answer: **7**" in said(page)


def test_without_the_lines_of_the_run_the_answers_are_there_and_the_question_is_not(opened, results, tmp_path):
    shutil.copy(results, tmp_path / "alone.duckdb")
    page = opened(tmp_path / "alone.duckdb", "tasks", answers="temperature", question="math-3")
    assert not page.exception
    assert "temperature says 0 to 3" in texts(page)
    assert "The question itself is not here" in said(page)


def test_two_decoders_beside_one_another_and_what_one_does_better(opened, results):
    page = opened(results, "tasks", answers="temperature", beside="thrifty", kind="better", question="math-9")
    assert not page.exception
    assert {"temperature says 0 to 9", "thrifty says 3 to 9"} <= set(texts(page))
    assert "better (10)" in str(page.get("segmented_control") or page.get("button_group"))


def test_a_file_without_questions_says_how_to_ask_some(opened, tmp_path):
    page = opened(demo(tmp_path / "r.duckdb"), "tasks")
    assert not page.exception
    assert "--suite math500" in said(page)


def test_samples_are_exported_with_their_problem_one_line_each(results, capsys):
    assert main(["export", "--samples", "--suite", "math500", "--results", str(results)]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(found) == 12 * 9
    one = next(x for x in found if x["decoder"] == "temperature" and x["row"] == "math-3/0")
    assert one["problem"].startswith("What is 3 + 7")
    assert {"ground_truth", "response", "correct"} <= set(one)
    assert next(x for x in found if x["decoder"] == "thrifty")["problem"] is None


def test_who_lost_some_samples_has_no_line(cells):
    """Without its wrong answers a decoder would look right."""
    (thrifty,) = [c for c in cells[0] if c.decoder == "thrifty"]
    fewer = {k: v for k, v in cells[1][thrifty.key].items() if not k.startswith(("math-10/", "math-11/"))}
    found = tasks.at_budget(cells[0], cells[1] | {thrifty.key: fewer}, "answer_tokens", 100, "pass_at_k")
    assert {o.cell.decoder for o in found} == {"greedy", "temperature"}


def test_grades_of_several_kinds_are_not_mixed():
    judged = [tasks.Sample("turn 1, judge", {"grade": 5}), tasks.Sample("turn 2, judge", {"grade": 7}),
              tasks.Sample("against greedy", {"points": 1.0})]  # fmt: skip
    assert tasks.grade(judged) == pytest.approx(0.6)
    assert tasks.grade([tasks.Sample("mc1", {"score": 1.0}), tasks.Sample("mc2", {"score": 0.4})]) == 1.0
    assert tasks.grade([tasks.Sample("mc1", {"score": None}), tasks.Sample("0", {"response": "x"})]) is None


def test_choices_of_which_little_is_known_are_shown():
    sample = tasks.Sample("mc1", {"log_probs": [-1.0, "-Infinity", None], "labels": [1]})
    assert tasks.choices(sample, ["yes"]) == [("yes", 1, -1.0), ("choice 2", None, -math.inf), ("choice 3", None, None)]
