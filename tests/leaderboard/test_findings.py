"""What the numbers say: the right metric leads, doubts never win, sentences claim no more than intervals do."""

import pytest
from made_results import QUICK, SPEED, TEXT

from decodathlon.harness.results import measured
from decodathlon.leaderboard import findings, queries
from decodathlon.leaderboard.findings import Axis


@pytest.fixture(scope="module")
def cells(asked):
    return queries.cells(asked, QUICK)


@pytest.fixture(scope="module")
def axes(asked):
    return findings.leads(queries.columns(asked, QUICK), queries.suites(asked), queries.metrics(asked))


@pytest.fixture(scope="module")
def table(cells, axes):
    return findings.lines(cells, axes, {"ratio_to_greedy": "greedy"})


def line(table, decoder):
    return next(x for x in table if x.decoder == decoder)


def test_the_leading_metric_is_the_first_of_the_suites_table_that_ranks(axes):
    assert [(a.column.suite, a.column.dataset, a.metric) for a in axes] == [
        ("throughput", "wikitext-2-raw-v1", "ratio_to_greedy"),
        ("wikitext2", "wikitext-2-raw-v1", "ppl_epsilon"),
        ("wikitext2", "prose", "ppl_epsilon"),
    ], "what was measured on stand-in data comes last"


def test_every_decoder_has_a_line_and_every_gap_a_reason(table):
    assert len(table) == 11
    for one in table:
        for entry in one.entries:
            assert (entry.number is None) == bool(entry.reason)
    speed, text, _ = line(table, "hf-generate").entries
    assert (text.text, text.reason) == ("unsupported", "needs a next-token law")
    assert speed.reason == "not measured in this setting"
    crashed = line(table, "boom[x=1]").entries[0]
    assert (crashed.text, crashed.reason) == ("failed", "ValueError: <b>boom</b>"), "it died before it knew its data"


def test_a_baseline_is_one_against_itself(table):
    entry = line(table, "greedy").entries[0]
    assert (entry.text, entry.number.estimate.value, entry.best) == ("1 (baseline)", 1.0, False)


def test_stars_go_to_the_best_and_what_cannot_be_told_apart(table):
    assert [x.decoder for x in table if x.entries[1].best] == ["temperature"]
    entry = line(table, "mine").entries[1]
    assert (entry.doubts, entry.best) == (("changed code",), False), "it leads by half a nat, but its code was changed"


def test_times_and_sizes_get_no_star(cells):
    axes = [Axis(SPEED, m) for m in ("tokens_per_s", "peak_memory_bytes")]
    assert not any(e.best for x in findings.lines(cells, axes, {}) for e in x.entries)


def test_the_order_is_best_first_and_gaps_last(table):
    names = [x.decoder for x in findings.ordered(table, 0)]
    assert names[:3] == ["mine", "turbo", "greedy"]
    assert set(names[-4:]) == {"boom[x=1]", "hf-generate", "late", "typical"}
    assert findings.ordered(table, 1)[0].decoder == "mine"


def test_what_is_doubted_takes_part_in_no_front_and_no_sentence(table, cells, axes):
    points, lacking = findings.points(cells, axes[0], axes[1], {"ratio_to_greedy": "greedy"})
    on = {p.decoder: p.probability for p in points if p.on_front}
    assert set(on) == {"turbo", "temperature"}, "turbo beats greedy in both, temperature top-p"
    assert on["turbo"] > 0.99
    assert on["temperature"] > 0.99
    (mine,) = [p for p in points if p.decoder == "mine"]
    assert (mine.on_front, mine.probability, mine.doubts) == (False, None, ("changed code",))
    assert {x.decoder for x in lacking} == {"boom[x=1]", "hf-generate", "late", "typical"}
    said = str(findings.summary(table, axes, {"ratio_to_greedy": "greedy"}))
    assert "mine" not in said
    assert "faster than greedy: turbo" in said
    assert "not told apart from it: temperature" in said
    assert "slower: " in said


def test_the_sentence_says_no_more_than_the_intervals(cells, asked):
    """A decoder one per cent from greedy, with noise of one per cent against itself, is not called slower."""
    speed = [Axis(SPEED, "ratio_to_greedy")]
    two = [c for c in cells if c.decoder in ("temperature", "greedy")]
    table = findings.lines(two, speed, {"ratio_to_greedy": "greedy"})
    ((_, said),) = findings.summary(table, speed, {"ratio_to_greedy": "greedy"})
    assert said.endswith("none is shown to be faster than greedy; not told apart from it: temperature.")


def test_the_leader_of_a_column_is_named_with_its_equals(cells):
    text = [Axis(TEXT, "ppl_epsilon")]
    sound = [c for c in cells if c.decoder in ("temperature", "top-p", "greedy")]
    ((where, said),) = findings.summary(findings.lines(sound, text, {}), text, {})
    assert where == "wikitext2 joined (ppl_epsilon)"
    assert "temperature leads with" in said
    assert said.endswith("ahead of all others.")


def test_sweeps_hold_everything_else_equal(cells):
    found = findings.sweeps(cells, "ppl_epsilon")
    assert set(found) == {(TEXT, "p")}
    rows = found[TEXT, "p"]
    assert [r["at"] for r in rows] == [0.5, 0.8, 0.9]
    assert [r["decoder"] for r in rows] == ["top-p[p=0.5]", "top-p[p=0.8]", "top-p"]
    assert rows[0]["value"] > rows[1]["value"] > rows[2]["value"]


def test_numbers_are_said_as_people_say_them():
    assert findings.text_of(measured.exactly(0.0123, unit="s")) == "12.3 ms"
    assert findings.text_of(measured.exactly(float("inf"))) == "∞"
    assert findings.listed(list("abcdefgh")) == "a, b, c, d, e, f and 2 more"
