"""The page Arena: blind, one vote after the other, and the result only for who has judged them all."""

import json

import pytest

pytest.importorskip("streamlit")
from board_pages import said
from made_results import demo

from decodathlon.harness.arena import pairs
from decodathlon.harness.arena.pairs import Pair


@pytest.fixture
def results(tmp_path):
    path = demo(tmp_path / "r.duckdb")
    some = [Pair(f"p{i}", f"Why {i}?", "own", "stem", (f"one-{i}", f"other-{i}")) for i in range(3)]
    pairs.save(pairs.home(path) / "mine", decoders=["top-p", "min-p"], model="m", pairs=some, more={})
    return path


def texts(at):
    return [element.value for element in at.text]


def test_without_a_set_the_page_says_how_to_make_one(opened, tmp_path):
    at = opened(demo(tmp_path / "r.duckdb"), "arena")
    assert not at.exception
    assert "decodathlon arena build" in said(at)


def test_nobody_votes_without_a_name(opened, results):
    at = opened(results, "arena")
    assert not at.exception
    assert "Enter a name" in said(at)
    assert not at.button


def test_three_votes_by_button_and_then_the_result(opened, results):
    at = opened(results, "arena", annotator="ann", set="mine")
    arena = pairs.load(pairs.home(results) / "mine")
    for number, choice in enumerate(("left", "tie", "right")):
        assert not at.exception
        pair = arena.left("ann")[0]
        assert texts(at) == [pair.prompt, *arena.shown(pair, "ann")]
        assert "top-p" not in said(at), "it is blind"
        assert at.get("progress")[0].proto.text == f"{number} of 3 judged"
        at = at.button(key=f"{choice}-{pair.id}").click().run()
    assert not at.exception
    assert "You have judged them all" in " ".join(e.value for e in at.success)
    assert "top-p" in said(at)
    assert [v.annotator for v in arena.votes()] == ["ann"] * 3
    assert len(opened(results, "arena", annotator="bob", set="mine").button) == 4, "bob has judged nothing yet"


def test_a_vote_that_was_cast_elsewhere_is_not_cast_again(opened, results):
    at = opened(results, "arena", annotator="ann", set="mine")
    arena = pairs.load(pairs.home(results) / "mine")
    arena.vote("p0", "ann", "tie")  # in another window
    at = at.button(key="left-p0").click().run()
    assert not at.exception
    assert "ann has judged p0 already" in said(at)
    assert len(arena.votes()) == 1


def test_an_edited_set_is_refused_with_its_reason(opened, results):
    path = pairs.home(results) / "mine" / pairs.PAIRS
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["answers"][0] = "better"
    at = opened(results, "arena", annotator="ann", set="mine")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    at = at.button(key="left-p0").click().run()
    assert not at.exception
    assert "is not what the set was made with" in said(at)


def test_what_answers_hold_is_shown_letter_by_letter(opened, tmp_path):
    path = demo(tmp_path / "r.duckdb")
    evil = "# big\n<script>alert(1)</script> ![x](http://y) $x$"
    pairs.save(
        pairs.home(path) / "mine", decoders=["a", "b"], model="m", pairs=[Pair("p", evil, "", "", (evil, ""))], more={}
    )
    at = opened(path, "arena", annotator="ann", set="mine")
    assert not at.exception
    assert texts(at).count(evil) == 2, "the prompt and an answer, as plain text"
    assert "(nothing)" in texts(at)
