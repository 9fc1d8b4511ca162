"""Charts are valid, say the same in words, and use no colour alone; tables escape what strangers wrote."""

import re
from html.parser import HTMLParser

import pytest
from made_results import QUICK

from decodathlon.leaderboard import charts, findings, queries
from decodathlon.leaderboard.tables import Field, link, table


@pytest.fixture(scope="module")
def points(asked):
    axes = findings.leads(queries.columns(asked, QUICK), queries.suites(asked), queries.metrics(asked))
    found, _ = findings.points(queries.cells(asked, QUICK), axes[0], axes[1], queries.baselines(asked, QUICK))
    return found, axes[0], axes[1]


def test_the_trade_off_is_drawn_with_intervals_and_said_in_words(points):
    found, x, y = points
    spec = charts.trade_off(found, x, y).to_dict()  # validates against Vega-Lite's schema
    assert len(spec["layer"]) == 5
    dots = spec["layer"][3]["encoding"]
    assert (dots["color"]["field"], dots["shape"]["field"]) == ("family", "claim")
    words = charts.trade_off_in_words(found, x, y)
    assert "turbo at 1.299" in words
    assert re.search(r"temperature at .* on the front in \d+% of resamples", words)


def test_what_is_infinite_is_named_instead_of_drawn(points):
    from dataclasses import replace

    from decodathlon.harness.results import measured

    found, x, y = points
    cut = [replace(found[0], y=measured.exactly(float("inf"), better="lower")), *found[1:]]
    spec = charts.trade_off(cut, x, y).to_dict()
    drawn = {row["decoder"] for row in spec["data"]["values"]}
    assert found[0].decoder not in drawn
    assert f"Not drawn, because infinite or no number: {found[0].decoder}." in charts.trade_off_in_words(cut, x, y)
    assert charts.trade_off([], x, y).to_dict()


def test_an_axis_that_spans_much_is_logarithmic(points):
    from dataclasses import replace

    from decodathlon.harness.results import measured

    found, x, y = points
    far = [replace(found[0], y=measured.exactly(2000.0, better="lower")), *found[1:]]
    scales = [charts.trade_off(p, x, y).to_dict()["layer"][3]["encoding"]["y"]["scale"] for p in (found, far)]
    assert [s.get("type", "linear") for s in scales] == ["linear", "log"]


def test_sweeps_and_histories(asked):
    rows = next(iter(findings.sweeps(queries.cells(asked, QUICK), "ppl_epsilon").values()))
    assert charts.sweep(rows, "p", "ppl_epsilon").to_dict()["layer"][2]["encoding"]["x"]["type"] == "quantitative"
    assert charts.sweep([r | {"at": str(r["at"])} for r in rows], "p", "x").to_dict()["layer"][2]["encoding"]["x"][
        "type"
    ] == "nominal"  # fmt: skip
    assert "0.5: " in charts.series_in_words(rows, "ppl_epsilon", "p")
    past = queries.history(asked, QUICK, "top-p", "ratio_to_greedy")
    assert charts.over_time(past, "ratio_to_greedy").to_dict()


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def test_what_strangers_wrote_is_text():
    evil = '"><script>alert(1)</script>'
    made = table([evil], [[Field(evil, small=evil, href=link("decoder", decoder=evil)), evil]], evil)
    reader = _Reader()
    reader.feed(made)
    assert {tag for tag, _ in reader.tags} == {
        "div", "table", "caption", "thead", "tr", "th", "tbody", "td", "a", "small",
    }  # fmt: skip
    (address,) = [a["href"] for t, a in reader.tags if t == "a"]
    assert address.startswith("decoder?decoder=%22%3E%3Cscript")
    assert reader.text.count(evil) == 5, "caption, head, name, its reason and the second field"
    assert "<script" not in table(["a"], [[Field("x", href=evil)]], "Addresses, too")


def test_a_table_can_be_read_aloud_and_reached_by_keyboard():
    made = table(["decoder", Field("x", small="↑")], [["a", Field("1", look="best", number=True)]], "Decoders")
    assert 'tabindex="0"' in made
    assert '<th scope="col">' in made
    assert '<th scope="row"' in made
    assert 'aria-label="best"' in made


def test_text_of_others_is_shown_letter_by_letter():
    """Each sign that means something to Streamlit's Markdown is escaped; code stays code where that is asked."""

    from decodathlon.leaderboard.parts import plain

    evil = "![x](http://a/b.png) <b>$1$</b> *a_b* :smile: `c` [p=0.5](d) \\"
    assert re.sub(r"\\(.)", r"\1", plain(evil)) == evil
    assert not re.search(r"(?<!\\)[!\[\]()<>$*_:`]", plain(evil).replace("\\\\", ""))
    assert plain("keeps `top_p` of a*b", code=True) == r"keeps `top_p` of a\*b"
