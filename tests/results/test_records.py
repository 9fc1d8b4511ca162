"""What is damaged, foreign or impossible in the files of a run is named, and never becomes a row."""

import json

import pytest
from made_results import cell, day, speed_metrics, text_metrics, write_run

from decodathlon.harness.errors import StoreError
from decodathlon.harness.results import shards, store

duckdb = pytest.importorskip("duckdb")

VERDICT = {"gate": "g", "decoder": "d", "cell_id": "c", "outcome": "pass", "detail": "", "judged": day(1)}


def a_run(folder, run="good"):
    outcome = cell(run, "throughput", "it", speed_metrics(1, 1.1), started=day(1), slice="batch-1")
    return write_run(folder, run, [outcome], started=day(1), verdicts=[VERDICT])


def broken(path, at, value):
    """Put `value` at a dotted place of a JSON file; `delete` takes the place away."""
    content = json.loads(path.read_text())
    *way, last = [int(p) if p.isdigit() else p for p in at.split(".")]
    part = content
    for step in way:
        part = part[step]
    if value == "delete":
        del part[last]
    else:
        part[last] = value
    path.write_text(json.dumps(content))


CELL = [
    ("schema", "2"), ("run_id", "delete"),
    ("spec.suite", ""), ("spec.suite_version", "2"), ("spec.seed", 2**70), ("spec.decoder", None),
    ("status", None), ("status", "<b>fine</b>"), ("started", None), ("started", "infinity"), ("started", "not a date"),
    ("started", "12026-01-01T00:00:00+00:00"), ("started", "2026-01-01T00:00:00"), ("seconds", [1]),
    ("seconds.total", "abc"), ("notes", {"a": 1}), ("notes", [1]), ("decoder", None), ("decoder.spec", None),
    ("decoder.params", [1]), ("model.dtype", None), ("data.dataset", 3), ("samples", 3), ("metrics", "x"),
    ("metrics.0.metric", ""), ("metrics.0.metric", "tokens_per_s"), ("metrics.0.value", None), ("metrics.0.n", 2**70),
    ("metrics.0.n", -1), ("metrics.0.better", "sideways"), ("metrics.0.unit", None), ("metrics.0.ci_low", None),
    ("metrics.0.units", "{}"), ("metrics.0.units.sums", [1.0]), ("metrics.0.units.counts.0", 0),
    ("metrics.0.units.sums.0", None), ("metrics.0.units.rows.0", "pair-1"), ("metrics.0.units.more", 1),
    ("metrics.0.units.scale", "log"),
    ("metrics.0.better", "lower"), ("metrics.0.value", 7.0), ("metrics.0.ci_low", 5.0), ("metrics.0.ci_high", "NaN"),
    ("metrics.1.baseline", "top-p"), ("spec.decoder", "[x]"),
    ("samples", [{"row": "a", "data": 1, "place": 1}]), ("samples", [{"data": 1}]),
    ("started", "2026-W47-6T10:00:00+00:00"), ("started", "20261121T100000Z"), ("started", "9999-12-31T23:59:59-23:00"),
    ("started", "2026-11-21T10:00:00,123+00:00"), ("started", "2100-01-01T00:00:00+00:00"),
]  # fmt: skip
RUN = [
    ("run_id", ""), ("started", None), ("started", "infinity"), ("git_dirty", "no"), ("environment", []),
    ("environment", {}), ("environment.cpu", "delete"), ("environment.packages", ["torch"]), ("options", []),
    ("about", [1]), ("about.decoders.it", {"text": "x"}), ("about.suites.throughput", "x"),
    ("about.metrics", [1]), ("about.metrics.mine", {}), ("started", "0001-01-01T00:00:00+23:00"),
]  # fmt: skip
GATES = [
    ("verdicts", [1, 2]), ("verdicts.0.outcome", "perhaps"), ("verdicts.0.judged", None), ("verdicts.0.gate", None),
    ("verdicts", [VERDICT, VERDICT]), ("verdicts", "delete"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("file", "at", "value"),
    [(f, *c) for f, cases in (("cell", CELL), (shards.RUN_FILE, RUN), (shards.GATES_FILE, GATES)) for c in cases],
)
def test_the_place_that_is_wrong_is_named(tmp_path, file, at, value):
    run = a_run(tmp_path)
    path = next(shards.cells(run)) if file == "cell" else run / file
    broken(path, at, value)
    results = tmp_path / "r.duckdb"
    with pytest.raises(StoreError, match="good") as told:
        store.ingest(results, [run])
    way = [p for p in at.split(".") if not p.isdigit()] + ["interval"]
    assert path.name in str(told.value)
    assert any(p.rstrip("s") in str(told.value) for p in way), told.value
    assert not results.exists()


@pytest.mark.parametrize(
    "text", ["{half", "[1]", "[" * 100_000, '{"a": ' + "[" * 800 + "]" * 800 + "}", "\x00", '{"a": "' + "\\ud800"]
)
@pytest.mark.parametrize("file", [shards.RUN_FILE, shards.GATES_FILE, "throughput-x.json"])
def test_what_is_no_json_of_ours_is_named(tmp_path, file, text):
    run = a_run(tmp_path)
    (run / file).write_text(text)
    with pytest.raises(StoreError, match=file):
        store.ingest(tmp_path / "r.duckdb", [run])


def test_a_cell_of_another_run_is_no_part_of_it(tmp_path):
    run = a_run(tmp_path)
    broken(next(shards.cells(run)), "run_id", "another")
    with pytest.raises(StoreError, match=r"is of run good, its throughput-.* of another"):
        store.ingest(tmp_path / "r.duckdb", [run])


def test_a_cell_that_two_shards_claim_is_named(tmp_path):
    run = a_run(tmp_path)
    one = next(shards.cells(run))
    one.with_name("throughput-other.json").write_text(one.read_text())
    with pytest.raises(StoreError, match=r"is damaged: more than one of its shards is of cell throughput-"):
        store.ingest(tmp_path / "r.duckdb", [run])


def test_what_newer_code_adds_is_let_through(tmp_path):
    run = a_run(tmp_path)
    broken(run / shards.RUN_FILE, "environment.more", [1])
    broken(next(shards.cells(run)), "metrics.0.more", "x")
    assert store.ingest(tmp_path / "r.duckdb", [run]).added == 1


def test_a_bad_run_costs_the_reader_that_run_only(tmp_path):
    results = tmp_path / "r.duckdb"
    folder = results.with_suffix(".shards")
    a_run(folder)
    for number, (at, value) in enumerate(CELL):
        run = a_run(folder, f"bad{number}")
        broken(next(shards.cells(run)), at, value)
    told = store.snapshot(results, tmp_path / "copy.duckdb", lambda _: None)
    assert len(told) == len(CELL)
    with duckdb.connect(str(tmp_path / "copy.duckdb")) as connection:
        assert connection.execute("SELECT run_id FROM run").fetchall() == [("good",)]
        assert connection.execute("SELECT DISTINCT run_id FROM metric").fetchall() == [("good",)]


def test_a_number_of_infinity_travels(tmp_path):
    outcome = cell("r", "wikitext2", "it", text_metrics(1), started=day(1), slice="joined")
    run = write_run(tmp_path, "r", [outcome], started=day(1))
    path = next(shards.cells(run))
    for at, value in (("value", "Infinity"), ("ci_low", None), ("ci_high", None), ("units.sums.0", "Infinity")):
        broken(path, f"metrics.0.{at}", value)
    assert store.ingest(tmp_path / "r.duckdb", [run]).added == 1


def test_nobody_writes_into_the_run_of_another(tmp_path):
    """A guest's gates and metrics name somebody else's run: they stay the guest's own."""
    results = tmp_path / "r.duckdb"
    store.ingest(results, [a_run(tmp_path)])
    guest = a_run(tmp_path, "guest")
    broken(guest / shards.GATES_FILE, "verdicts.0.run_id", "good")
    broken(guest / shards.GATES_FILE, "verdicts.0.outcome", "fail")
    broken(guest / shards.GATES_FILE, "verdicts.0.judged", day(9))
    (mine,) = [p.stem for p in shards.cells(tmp_path / "good")]
    path = next(shards.cells(guest))
    for part, at in (("metrics", "run_id"), ("samples", "run_id")):
        if part == "samples":
            broken(path, "samples", [{"row": "a", "data": 1}])
        else:
            broken(path, f"{part}.0.{at}", "good")
            broken(path, f"{part}.0.cell_id", mine)
            broken(path, f"{part}.0.baseline", None)
    store.ingest(results, [guest])
    with duckdb.connect(str(results)) as connection:
        assert connection.execute("SELECT outcome FROM gate WHERE run_id = 'good'").fetchall() == [("pass",)]
        assert connection.execute("SELECT outcome FROM gate WHERE run_id = 'guest'").fetchall() == [("fail",)]
        counts = connection.execute("SELECT run_id, count(*) FROM metric GROUP BY 1 ORDER BY 1").fetchall()
        assert counts == [("good", 4), ("guest", 4)]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ('UPDATE metric SET units = \'{"rows": [], "sums": [], "counts": [0], "kind": "nonsense"}\'', "units"),
        ("UPDATE metric SET ci_low = NULL WHERE ci_low IS NOT NULL", "two ends"),
        ("UPDATE metric SET value = 9999 WHERE metric = 'tokens_per_s'", "metric/good"),
        ("UPDATE cell SET notes = '{}'", "notes"),
        ("UPDATE cell SET params = '[1]'", "params"),
        ("UPDATE run SET about = '[]'", "about"),
        ("UPDATE gate SET outcome = 'perhaps'", "outcome"),
    ],
)
def test_rows_of_another_file_are_checked_like_shards(tmp_path, change, named):
    other = tmp_path / "other.duckdb"
    store.ingest(other, [a_run(tmp_path)])
    assert store.ingest(tmp_path / "whole.duckdb", [other]).added == 1
    with duckdb.connect(str(other)) as connection:
        connection.execute(change)
    with pytest.raises(StoreError, match=named):
        store.ingest(tmp_path / "r.duckdb", [other])
    assert not (tmp_path / "r.duckdb").exists()
