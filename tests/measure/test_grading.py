"""Boxes, mathematics that is the same in other words, and answers over which a grader would hang."""

import os
import time

import pytest

from decodathlon.harness.measure import grading
from decodathlon.harness.measure.grading import Grader, last_box


@pytest.fixture(scope="module")
def grader():
    with Grader(timeout=2.0) as one:
        yield one


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so it is \boxed{7}", ("7", "")),
        (r"\boxed{7}, no, \boxed{\frac{1}{2}}.", (r"\frac{1}{2}", "")),
        (r"\boxed{\{1, 2\}}", (r"\{1, 2\}", "")),
        (r"\fbox{x^{2}}", ("x^{2}", "")),
        (r"\boxed {4}", ("4", "")),
        ("the answer is 7", (None, "no box")),
        ("", (None, "no box")),
        (r"\boxed 7", (None, "no box")),
        (r"\boxed{7} and \boxed{8", (None, "unclosed box")),
        (r"\boxed{ }", (None, "empty box")),
        (r"\boxedanswer{7}", (None, "no box")),
    ],
)
def test_the_last_box_counts(text, found):
    assert last_box(text) == found


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("073", "73", True),
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac{1}{2}", r"\dfrac12", True),
        ("5", "x=5", True),
        ("0.5", r"50\%", True),
        ("1<x<2", "(1,2)", True),
        ("(1,2)", "1<x<2", False),
        ("(1,2)", "[1,2]", False),
        ("x^2-1", "(x-1)(x+1)", True),
        ("7", "8", False),
    ],
)
def test_the_same_in_other_words_is_right(grader, gold, answer, right):
    assert grader.grade(gold, rf"Thus \boxed{{{answer}}}.").correct is right


def test_two_boxes_are_not_read_as_a_set(grader):
    assert not grader.grade("7", r"\boxed{7} \boxed{8}").correct
    assert grader.grade("8", r"\boxed{7} \boxed{8}").correct


def test_an_answer_that_hangs_is_a_timeout_and_the_next_one_is_graded(grader):
    began = time.monotonic()
    hung = grader.same("2", "9^{9^{9^{9^{9}}}}")
    assert hung == (False, "9^{9^{9^{9^{9}}}}", grading.TIMEOUT)
    assert time.monotonic() - began < 10
    assert grader.same("2", "2").correct


def test_a_hundred_kilobytes_of_digits_are_too_long(grader):
    verdict = grader.grade("2", rf"\boxed{{{'1' * 100_000}}}")
    assert (verdict.correct, verdict.trouble) == (False, "too long")
    assert len(verdict.extracted) == grading.MOST_CHARACTERS


@pytest.mark.parametrize("answer", [r"\frac{", "}{", "$$$", "\x00", "é" * 50, r"\begin{matrix}", "what?"])
def test_what_no_parser_reads_is_wrong_and_no_error(grader, answer):
    assert not grader.same("2", answer).correct


def test_a_grader_that_dies_is_started_again(grader):
    assert grader.same("2", "2").correct
    os.kill(grader._process.pid, 9)
    assert grader.same("2", "2").correct, "who killed it said nothing of the answer"


def test_an_idle_grader_that_dies_is_started_again():
    with Grader() as one:
        assert one.same("2", "2").correct
        process = one._process
    process.kill()  # as it waits for the next cell
    with Grader() as another:
        assert another.same("2", "2").correct
        assert not another.same("2", "3").correct


def test_an_answer_that_takes_the_grader_with_it_twice_is_a_timeout(monkeypatch):
    one = Grader()
    started = grading._started

    def doomed():
        process = started()
        real = Grader._reply

        def reply(self, its, request, seconds):
            if request["answer"] == "bomb":
                its.kill()
                its.wait()
            return real(self, its, request, seconds)

        monkeypatch.setattr(Grader, "_reply", reply)
        return process

    monkeypatch.setattr(grading, "_started", doomed)
    monkeypatch.setattr(Grader, "_idle", [])
    with one:
        assert one.same("2", "bomb").trouble == grading.TIMEOUT
        assert one.same("2", "2").correct


def test_a_missing_math_verify_is_named(monkeypatch):
    monkeypatch.setattr(grading.sys, "executable", "/bin/false")
    monkeypatch.setattr(Grader, "_idle", [])
    with pytest.raises(RuntimeError, match="pip install math-verify"), Grader() as one:
        one.same("1", "1")


def test_five_hundred_answers_are_graded_in_seconds(grader):
    grader.same("1", "1")
    began = time.monotonic()
    for i in range(500):
        assert grader.same(rf"\frac{{{i}}}{{7}}", rf"\dfrac{{{i}}}{{7}}").correct
    assert time.monotonic() - began < 5
