"""What is damaged, foreign or impossible in the files of a run is named, and never becomes a row."""

import json

import pytest
from made_results import cell, day, speed_metrics, write_run

from decodathlon.harness.errors import StoreError
from decodathlon.harness.results import records, shards, store

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
]  # fmt: skip
RUN = [
    ("run_id", ""), ("started", None), ("started", "infinity"), ("git_dirty", "no"), ("environment", []),
    ("environment", {}), ("environment.cpu", "delete"), ("environment.packages", ["torch"]), ("options", []),
    ("about", [1]), ("about.decoders.it", {"text": "x"}), ("about.suites.throughput", "x"),
    ("about.metrics", [1]), ("about.metrics.mine", {}),
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
    way = [p for p in at.split(".") if not p.isdigit()]
    assert path.name in str(told.value)
    assert any(p.rstrip("s") in str(told.value) for p in way), told.value
    assert not results.exists()


@pytest.mark.parametrize("text", ["{half", "[1]", "[" * 100_000, "\x00", '{"a": "' + "\\ud800"])
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
    run = a_run(tmp_path)
    path = next(shards.cells(run))
    broken(path, "metrics.0.value", "Infinity")
    broken(path, "metrics.0.units.sums.0", "Infinity")
    records.check(shards.read(path), records.CellRecord, path)
    assert store.ingest(tmp_path / "r.duckdb", [run]).added == 1
