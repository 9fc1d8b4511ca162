"""What the numbers say: the right metric leads, doubts never win, sentences claim no more than intervals do."""

from dataclasses import replace

import pytest
from made_results import QUICK, SPEED, TEXT

from decodathlon.harness.measure.observations import Observations
from decodathlon.harness.measure.statistics import Estimate
from decodathlon.harness.results import measured
from decodathlon.harness.results.measured import Measured, Number
from decodathlon.harness.results.metrics import Metric
from decodathlon.leaderboard import findings, queries
from decodathlon.leaderboard.findings import Axis
from decodathlon.leaderboard.queries import Cell


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
    assert (entry.text, entry.number.estimate.value, entry.mark) == ("1 (baseline)", 1.0, None)


def test_stars_go_to_the_best_and_what_cannot_be_told_apart(table):
    assert [x.decoder for x in table if x.entries[1].mark] == ["temperature"]
    entry = line(table, "mine").entries[1]
    assert (entry.doubts, entry.mark) == (("changed code",), None), "it leads by half a nat, but its code was changed"


def test_times_and_sizes_get_no_star(cells):
    axes = [Axis(SPEED, m) for m in ("tokens_per_s", "peak_memory_bytes")]
    assert not any(e.mark for x in findings.lines(cells, axes, {}) for e in x.entries)


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
    assert said.endswith("none is shown to be faster than greedy; not told apart from it: temperature (contended).")


def test_the_leader_of_a_column_is_named_with_its_equals(cells):
    text = [Axis(TEXT, "ppl_epsilon")]
    sound = [c for c in cells if c.decoder in ("temperature", "top-p", "greedy")]
    ((where, said),) = findings.summary(findings.lines(sound, text, {}), text, {})
    assert where == "wikitext2 joined (ppl_epsilon)"
    assert "temperature leads with" in said
    assert said.endswith("ahead of all that count.")


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
    assert findings.listed(list("abcdefgh"), 6) == "a, b, c, d, e, f and 2 more"


# --- On cells made by hand -----------------------------------------------------------------------------------------


def timed(logs):
    units = Observations.each([f"pair-{i}" for i in range(len(logs))], logs, scale="exp")
    return Number(units.estimate(), "1", "higher", units)


def scored(values, better="lower"):
    units = Observations([f"w{i}" for i in range(len(values))], values, [1] * len(values))
    return Number(units.estimate(), "1", better, units)


def made(decoder, column, *, doubts=(), params=None, **numbers):
    one = Measured(
        f"{decoder}-{column.suite}-{column.version}-{column.slice}-{column.dataset}", column.suite, column.version,
        column.slice, "quick", decoder, "tiny", "float32", "cpu", column.dataset or None, 0, "ok", "", numbers,
    )  # fmt: skip
    return Cell("r", column, decoder, "shaped", None, params or {}, one, tuple(doubts), ())


SPREAD = [-0.005 + 0.001 * i for i in range(10)]


def speed_of(decoder, log, own=0.0, **more):
    """A decoder `exp(log)` times as fast as the baseline that measured itself `exp(own)` times as fast as itself."""
    found = {"ratio_to_greedy": timed([log + s for s in SPREAD]), "ratio_to_self": timed([own + s for s in SPREAD])}
    return made(decoder, SPEED, **found, **more)


def test_a_decoder_that_differs_as_much_from_itself_is_called_neither_faster_nor_slower():
    axes = [Axis(SPEED, "ratio_to_greedy")]
    for log, alike in ((0.05, True), (-0.05, True), (0.2, False), (-0.2, False)):
        table = findings.lines([speed_of("it", log, own=0.1)], axes, {})
        ((_, said),) = findings.summary(table, axes, {"ratio_to_greedy": "greedy"})
        assert ("not told apart from it: it" in said) == alike, log
        assert (("faster than greedy: it" in said) or ("slower: it" in said)) != alike


def test_a_doubt_on_either_axis_keeps_a_decoder_off_the_front():
    axes = (Axis(SPEED, "ratio_to_greedy"), Axis(TEXT, "ppl_epsilon"))
    quality = scored([10 + s for s in SPREAD])
    for where in (0, 1):
        doubts = [(), ()]
        doubts[where] = ("stand-in data",)
        cells = [speed_of("it", 0.3, doubts=doubts[0]), made("it", TEXT, ppl_epsilon=quality, doubts=doubts[1])]
        (point,), _ = findings.points(cells, *axes, {})
        assert (point.on_front, point.probability, point.doubts) == (False, None, ("stand-in data",))
        (line,) = findings.with_front(findings.lines(cells, axes, {}), axes, axes)
        assert not line.pareto
        assert not line.grey, "its other number stands"
    both = [speed_of("it", 0.3, doubts=["x"]), made("it", TEXT, ppl_epsilon=quality, doubts=["x"])]
    assert findings.lines(both, axes, {})[0].grey


def test_the_front_knows_how_far_a_decoder_strays_from_itself():
    """Two per cent faster by its pairs and ten per cent from itself: it may be behind just as well."""
    axes = (Axis(SPEED, "ratio_to_greedy"), Axis(TEXT, "ppl_epsilon"))
    quality = scored([10 + s for s in SPREAD])
    for own, sure in ((0.0, True), (0.1, False)):
        cells = [c for d, log in (("slow", 0.0), ("fast", 0.02))
                 for c in (speed_of(d, log, own), made(d, TEXT, ppl_epsilon=quality))]  # fmt: skip
        found = {p.decoder: p.probability for p in findings.points(cells, *axes, {})[0]}
        assert (found["fast"] > 0.99) == sure, found


def test_the_best_of_a_column_is_sought_on_its_own_data():
    other = replace(TEXT, dataset="prose")
    better, worse = (scored([at + s for s in SPREAD]) for at in (5.0, 10.0))
    cells = [made("a", TEXT, ppl_epsilon=worse), made("b", TEXT, ppl_epsilon=scored([11 - s for s in SPREAD])),
             made("c", other, ppl_epsilon=better)]  # fmt: skip
    table = findings.lines(cells, [Axis(TEXT, "ppl_epsilon")], {})
    assert [x.decoder for x in table if x.entries[0].mark] == ["a"], "c is lower, on another text"


def test_versions_of_a_suite_are_columns_of_their_own():
    newer = replace(TEXT, version=2)
    number = scored([10 + s for s in SPREAD])
    (line,) = findings.lines([made("a", TEXT, ppl_epsilon=number)], [Axis(newer, "ppl_epsilon")], {})
    assert line.entries[0].reason == "not measured in this setting"


def test_order_and_leader_follow_the_metrics_direction():
    for better, first in (("lower", "small"), ("higher", "large")):
        axes = [Axis(TEXT, "score")]
        cells = [made("small", TEXT, score=scored([1 + s for s in SPREAD], better)),
                 made("large", TEXT, score=scored([2 + s for s in SPREAD], better)),
                 made("none", TEXT)]  # fmt: skip
        table = findings.lines(cells, axes, {})
        assert [x.decoder for x in findings.ordered(table, 0)] == [first, *({"small", "large"} - {first}), "none"]
        ((_, said),) = findings.summary(table, axes, {})
        assert said.startswith(f"{first} leads with")


@pytest.mark.parametrize(("better", "sign"), [("lower", 1), ("higher", -1)])
def test_a_leader_is_named_with_all_that_cannot_be_told_apart_from_it(better, sign):
    noisy = [0.2 * (-1) ** i for i in range(10)]  # around nothing
    cells = [made("first", TEXT, score=scored([sign * (1 + s) for s in SPREAD], better)),
             made("second", TEXT, score=scored([sign * (1.01 + s) for s in noisy], better)),
             made("third", TEXT, score=scored([sign * (3 + s) for s in SPREAD], better))]  # fmt: skip
    axes = [Axis(TEXT, "score")]
    ((_, said),) = findings.summary(findings.lines(cells, axes, {}), axes, {})
    assert said.startswith("first leads with")
    assert said.endswith("; not told apart from it: second.")


def test_a_baseline_competes_as_exactly_one():
    """Who is shown to be slower than it gets no mark, however little; the baseline leads where nobody is faster."""
    greedy = made("greedy", SPEED, ratio_to_self=timed(SPREAD))
    for logs, marks in (
        ({"slow": -0.2, "level": 0.0}, {"greedy": "best", "slow": None, "level": "tied"}),
        ({"slow": -0.2, "fast": 0.3}, {"fast": "best", "greedy": None, "slow": None}),
        ({"level": 0.002, "slow": -0.2}, {"level": "best", "greedy": "tied", "slow": None}),
        ({"level": 0.0}, {"greedy": None, "level": None}),
    ):
        cells = [greedy, *(speed_of(d, log) for d, log in logs.items())]
        axes = [Axis(SPEED, "ratio_to_greedy")]
        table = findings.lines(cells, axes, {"ratio_to_greedy": "greedy"})
        assert {x.decoder: x.entries[0].mark for x in table} == marks


def test_what_cannot_be_compared_is_neither_best_nor_tied():
    """Other units, too few of them, other weights: unlike the others, in no sentence and on no front."""
    few = Observations(["w0", "w1"], [1.0, 1.1], [1, 1])
    strange = replace(made("weights", TEXT, score=scored([0.2 + s for s in SPREAD])).measured, basis=("other",))
    easy = Observations([f"w{i}" for i in range(7)], [0.5 + s for s in SPREAD[:7]], [1] * 7)
    cells = [
        made("good", TEXT, score=scored([1 + s for s in SPREAD])),
        made("bad", TEXT, score=scored([3 - s for s in SPREAD])),
        made("easy", TEXT, score=Number(easy.estimate(), "1", "lower", easy)),
        made("few", TEXT, score=Number(few.estimate(), "1", "lower", few)),
        made("nan", TEXT, score=Number(Estimate(0.1, float("nan"), float("nan"), 10), "1", "lower", easy)),
        replace(made("weights", TEXT), measured=strange),
    ]
    axes = [Axis(TEXT, "score")]
    table = findings.lines(cells, axes, {})
    marks = {x.decoder: x.entries[0].mark for x in table}
    assert marks == {"good": "best", "bad": None, "easy": "unlike", "few": None, "nan": None, "weights": "unlike"}
    ((_, said),) = findings.summary(table, axes, {})
    assert said.startswith("good leads with")
    plane = (Axis(SPEED, "ratio_to_greedy"), axes[0])
    both = [*cells, *(speed_of(c.decoder, 0.1) for c in cells)]
    found = {p.decoder: p.on_front for p in findings.points(both, *plane, {})[0]}
    assert not found["easy"]
    assert not found["weights"]


def test_a_partial_cell_is_on_no_front():
    axes = (Axis(SPEED, "ratio_to_greedy"), Axis(TEXT, "score"))
    half = made("half", TEXT, score=scored([0.1 + s for s in SPREAD]))
    half = replace(half, measured=replace(half.measured, status="partial"))
    cells = [
        half,
        speed_of("half", 0.5),
        made("whole", TEXT, score=scored([1 + s for s in SPREAD])),
        speed_of("whole", 0.1),
    ]
    found = {p.decoder: (p.on_front, p.probability) for p in findings.points(cells, *axes, {})[0]}
    assert found["half"] == (False, None)
    assert found["whole"] == (True, 1.0)


def test_one_reading_of_memory_is_sure_of_nothing():
    peak = lambda b: Number(Estimate(b, None, None, 1), "B", "lower", None)  # noqa: E731
    axes = (Axis(SPEED, "peak_memory_bytes"), Axis(TEXT, "score"))
    cells = []
    for decoder, size, score in (("a", 1e8, 1.0), ("b", 1.0001e8, 0.9)):
        cells.append(made(decoder, SPEED, peak_memory_bytes=peak(size)))
        cells.append(made(decoder, TEXT, score=scored([score + x for x in SPREAD])))
    for point in findings.points(cells, *axes, {})[0]:
        assert (point.probability, point.likely) == (None, False)
    assert not any(x.pareto for x in findings.with_front(findings.lines(cells, axes, {}), axes, axes))


@pytest.mark.parametrize(
    ("unit", "better", "kind", "ranked"),
    [
        ("1", "lower", "quality", True), ("1", "higher", "speed", True), ("1", "none", "quality", False),
        ("s", "lower", "speed", False), ("B", "lower", "memory", False), ("1", "higher", "context", False),
        ("1", "lower", "harness", False),
    ],
)  # fmt: skip
def test_what_decoders_can_be_ranked_by(unit, better, kind, ranked):
    assert findings.ranks(Metric(unit, better, "", kind)) == ranked


def test_a_parameter_of_any_kind_can_be_swept():
    number = scored([1 + s for s in SPREAD])
    cells = [made(f"k{i}", TEXT, params={"k": k}, score=number) for i, k in enumerate((10, "auto", [1], 2))]
    assert [r["at"] for r in findings.sweeps(cells, "score")[TEXT, "k"]] == ["10", "2", "[1]", "auto"]
    assert [r["at"] for r in findings.sweeps([cells[0], cells[3]], "score")[TEXT, "k"]] == [2, 10]
