"""From an audit to the board: the verdict in SQL and in Python, what it greys, and the page Exactness."""

import pytest

pytest.importorskip("streamlit")
from board_pages import said
from made_results import QUICK, cell, day, speed_metrics, write_run

from decodathlon.harness.results import audited, store
from decodathlon.harness.results.metrics import METRICS
from decodathlon.leaderboard import audit_queries, charts, queries

LAW = {"outcomes": [[1], [2, 1], [2, 2]], "counts": [600, 250, 140, 10], "law": [0.6, 0.25, 0.15, 0.0]}


def number(name, value):
    return {"metric": name, "value": value, "unit": "1", "better": METRICS[name].better, "ci_low": None,
            "ci_high": None, "n": 1000, "baseline": None, "units": None}  # fmt: skip


def audit(run, decoder, p, visible=0.04, source="one", own=0.0, **more):
    draws = more.pop("draws", 12_000)
    metrics = [number("tvd", 0.02), number("tvd_floor", 0.02), number("tvd_floor_ratio", 1.0)]
    if p is not None:
        metrics += [number("goodness_p", p) | {"n": draws}, number("visible_tvd", visible), number("own_law", own)]
    found = cell(run, "audit", decoder, metrics, started=day(20), slice="lm", sizes={"draws": 6000}, data={}, **more)
    found.decoder["source_sha256"] = source
    found.samples = [{"row": "counts", "data": LAW}]
    return found


def gap(found, value):
    """An audit whose shape and definition differ by so much."""
    found.metrics.append(number("definition_gap", value))
    return found


def timed(run, decoder, source="one"):
    found = cell(run, "throughput", decoder, speed_metrics(1, 1.2), started=day(20), slice="batch-1")
    found.decoder["source_sha256"] = source
    return found


@pytest.fixture
def results(tmp_path):
    """One run in which one decoder fails, one hardly, one passes, one sees little, one claims nothing."""
    spins = cell("r-1", "ising", "gibbs", started=day(20), slice="ring-8", data={})
    spins.samples = [
        {"row": f"after-{n}", "data": {"draws": n, "tvd": 2 / n, "independent": 1 / n, "seconds": n / 1000}}
        for n in (10, 100)
    ]
    cells = [
        audit("r-1", "wrong", 1e-9),
        audit("r-1", "nearly", 4e-4),  # below 0.001, but one of seven tests
        audit("r-1", "honest", 0.4),
        audit("r-1", "hasty", 0.5, visible=0.2),
        audit("r-1", "selfish", 0.5, own=1.0),
        gap(audit("r-1", "defined", 0.5), 1e-12),
        gap(audit("r-1", "other-law", 0.5), 1e-3),
        audit("r-1", "free", None, claim="heuristic"),
        audit("r-1", "absent", None, status="unsupported", reason="needs a law that can be enumerated"),
        *(timed("r-1", d) for d in ("wrong", "honest", "free")),
        spins,
    ]
    folder = tmp_path / "runs"
    write_run(folder, "r-1", cells, started=day(20))
    path = tmp_path / "results.duckdb"
    store.ingest(path, [folder / "r-1"])
    return path, cells


def test_sql_and_python_agree_on_the_verdict(results):
    path, cells = results
    expected = {"wrong": "fail", "nearly": "pass", "honest": "pass", "hasty": "weak", "selfish": "self"}
    expected |= {"defined": "pass", "other-law": "fail"}
    assert audited.verdicts(cells) == expected
    with store.connect(path) as connection:
        found = dict(connection.execute("SELECT decoder, audit FROM audited").fetchall())
        beside = connection.execute(
            "SELECT DISTINCT decoder, audit FROM results WHERE metric = 'ratio_to_greedy' ORDER BY 1"
        ).fetchall()
    assert found == expected
    assert beside == [("free", None), ("honest", "pass"), ("wrong", "fail")]


def test_holm_steps_down(tmp_path):
    """Four at 2e-4: the least stringent of Holm's limits that each meets is 1e-3 / 4, so all are rejected."""
    for run, p, expected in (("a", 2e-4, "fail"), ("b", 3e-4, "pass")):
        cells = [audit(run, f"d-{i}", p) for i in range(4)]
        assert set(audited.verdicts(cells).values()) == {expected}
        write_run(tmp_path / "runs", run, cells, started=day(20))
        store.ingest(tmp_path / f"{run}.duckdb", [tmp_path / "runs" / run])
        with store.connect(tmp_path / f"{run}.duckdb") as connection:
            assert connection.execute("SELECT DISTINCT audit FROM audited").fetchall() == [(expected,)]


def test_a_verdict_goes_with_the_source_and_the_newest_counts(tmp_path):
    folder, path = tmp_path / "runs", tmp_path / "results.duckdb"
    runs = {
        "20261101T000000-a": [audit("20261101T000000-a", "mine", 1e-9), timed("20261101T000000-a", "mine")],
        "20261102T000000-b": [audit("20261102T000000-b", "mine", 0.5, source="mended"),
                              timed("20261102T000000-b", "mine", source="mended")],
    }  # fmt: skip
    for run, cells in runs.items():
        store.ingest(path, [write_run(folder, run, cells, started=day(20))])
    with store.connect(path) as connection:
        found = connection.execute(
            "SELECT run_id[8:8], audit FROM results WHERE metric = 'ratio_to_greedy' ORDER BY run_id"
        ).fetchall()
    assert found == [("1", "fail"), ("2", "pass")], "the old numbers stay red, the mended decoder's are not"


def test_a_fail_is_not_washed_off(tmp_path):
    """Neither by an audit of fewer draws nor by one of changed code; by one as large of the same source it is."""
    folder, path = tmp_path / "runs", tmp_path / "results.duckdb"

    def add(number, p, *, dirty=False, **more):
        run = f"2026110{number}T000000-x"
        cells = [audit(run, "mine", p, **more), timed(run, "mine")]
        for c in cells:
            c.started = day(number)
        store.ingest(path, [write_run(folder, run, cells, started=day(number), dirty=dirty)])
        with store.connect(path) as connection:
            return connection.execute("SELECT audit FROM verdict WHERE decoder = 'mine'").fetchone()[0]

    assert add(1, 0.5, dirty=True) == "pass", "there is no other"
    assert add(2, 1e-9) == "fail"
    assert add(3, 0.5, draws=500, visible=0.2) == "fail"
    assert add(4, 0.5, dirty=True) == "fail"
    assert add(5, 0.5) == "pass"
    assert add(6, 0.5, draws=500, visible=0.2) == "pass", "what was shown stays shown"


def test_what_failed_is_greyed_and_does_not_lead(results, opened):
    path, _ = results
    text = said(opened(path, model=QUICK.model))
    assert "audit failed" in text
    assert "audited" in text


def test_the_page_says_who_failed_and_shows_the_law(results, opened):
    at = opened(results[0], "exactness")
    assert not at.exception
    text = said(at)
    assert text.index(">wrong<") < text.index(">honest<")
    assert "fail" in text
    assert "needs a law that can be enumerated" in text
    assert "no claim" in text


def test_the_charts_say_in_words_what_they_show(results):
    with store.connect(results[0]) as connection:
        (one,) = [row for row in audit_queries.audits(connection) if row["decoder"] == "honest"]
        texts = audit_queries.outcomes(connection, one["run_id"], one["cell_id"])
        assert audit_queries.targets(connection) == ["ring-8"]
        curves = audit_queries.curves(connection, "ring-8")
    assert [t["text"] for t in texts] == ["1", "2 1", "2 2", "any other"]
    assert texts[3]["drawn"] == pytest.approx(0.01)
    words = charts.law_in_words(texts, "honest")
    assert "any other: 0 claimed, 0.01 drawn" in words
    assert "gibbs 0.02 after 0.1 seconds, independent draws 0.01" in charts.distances_in_words(curves, "seconds")
    for chart in (charts.law(texts), charts.distances(curves, "draws")):
        assert chart.to_dict()


def test_a_failed_audit_is_a_doubt_on_every_row(results, tmp_path):
    import duckdb

    copy = tmp_path / "copy.duckdb"
    store.snapshot(results[0], copy, queries.prepare)
    with duckdb.connect(str(copy)) as connection:
        doubts = {c.decoder: c.doubts for c in queries.cells(connection, QUICK) if c.column.suite == "throughput"}
    assert doubts == {"wrong": ("audit failed",), "honest": (), "free": ()}
