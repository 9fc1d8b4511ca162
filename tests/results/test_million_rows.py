"""What a million rows are ingested and asked by, at a few thousand: nothing is lost, and nothing is added twice."""

import importlib.util
import json
from pathlib import Path

import pytest

from decodathlon.harness.errors import StoreError
from decodathlon.harness.results import metrics, reader, shards, store

pytest.importorskip("duckdb")
SCRIPTS = Path(__file__).parents[2] / "scripts"
ROWS = 3000


@pytest.fixture
def million(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    spec = importlib.util.spec_from_file_location("million_rows", SCRIPTS / "million_rows.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(path):
    """Every table, but for when it was made."""
    with store.connect(path) as connection:
        tables = ("run", "cell", "metric", "sample", "gate")
        return {t: connection.execute(f"SELECT * FROM {t} ORDER BY ALL").fetchall() for t in tables}


def test_as_many_come_out_as_went_in(million, tmp_path):
    made = million.make(tmp_path / "runs", ROWS)
    assert (len(made.folders), made.metrics) == (2, ROWS)
    assert 0 < made.bare < made.cells
    path = tmp_path / "r.duckdb"
    assert store.ingest(path, [tmp_path / "runs"]) == (made.cells, 0, [])
    once = rows_of(path)
    assert {table: len(rows) for table, rows in once.items()} == {
        "run": 2, "cell": made.cells, "metric": ROWS, "sample": made.samples, "gate": made.verdicts,
    }  # fmt: skip
    with store.connect(path) as connection:
        asked = "SELECT count(units), (SELECT count(*) FROM results WHERE metric IS NULL) FROM metric"
        assert connection.execute(asked).fetchone() == (made.units, made.bare)
    assert store.ingest(path, [tmp_path / "runs"]) == (0, 0, [])
    assert rows_of(path) == once


def test_what_is_timed_runs_and_is_told(million, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(million, "QUESTION", 60.0)  # how fast it is, this machine may be too busy to say
    assert million.main(["--rows", str(ROWS), "--keep", str(tmp_path / "kept")]) == 0
    told = capsys.readouterr().out
    assert f"{ROWS:,} metrics" in told
    for what in ("one more run", *million.VIEWS, "gates check", "compare", "What failed", "board: overview"):
        assert what in told
    with pytest.raises(SystemExit):
        million.main(["--keep", str(tmp_path / "kept")])


def test_a_broken_limit_is_an_exit_code(million, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        million, "ingesting", lambda *given: [million.timed("slow", 0.0, lambda: store.ingest(given[1], []))]
    )
    for part in ("asking", "commands", "board"):
        monkeypatch.setattr(million, part, lambda *given: [])
    assert million.main(["--rows", "20", "--keep", str(tmp_path)]) == 1
    assert "TOO SLOW" in capsys.readouterr().out


def test_several_processes_read_what_one_does(million, tmp_path, monkeypatch):
    runs = million.make(tmp_path / "runs", ROWS).folders
    store.ingest(tmp_path / "one.duckdb", runs)
    monkeypatch.setattr(reader, "ENOUGH", 10)
    monkeypatch.setattr(reader, "_cores", lambda: 3)
    store.ingest(tmp_path / "three.duckdb", runs)
    assert rows_of(tmp_path / "three.duckdb") == rows_of(tmp_path / "one.duckdb")


def test_what_is_wrong_is_told_from_another_process_too(million, tmp_path, monkeypatch):
    """A damaged shard, a plugin's metric in another unit than its own, a process that dies: nothing is added."""
    made = million.make(tmp_path / "runs", ROWS)
    monkeypatch.setattr(reader, "ENOUGH", 10)
    monkeypatch.setattr(reader, "_cores", lambda: 2)
    path = tmp_path / "r.duckdb"
    victim = next(p for p in shards.cells(made.folders[1]) if shards.read(p)["metrics"])
    whole = victim.read_text()
    victim.write_text(whole[:-20])
    with pytest.raises(StoreError, match=f"{victim.name} is not a whole shard"):
        store.ingest(path, made.folders)
    content = json.loads(whole)
    content["metrics"][0] |= {"metric": "of_a_plugin", "unit": "s"}
    victim.write_text(json.dumps(content))
    monkeypatch.setitem(metrics.METRICS, "of_a_plugin", metrics.Metric("B", "lower", "", "memory"))
    with pytest.raises(StoreError, match="of_a_plugin has the unit 'B'"):
        store.ingest(path, made.folders)
    victim.write_text(whole)
    monkeypatch.setattr(reader.sys, "executable", "/bin/false")
    with pytest.raises(StoreError, match="ended with exit code 1"):
        store.ingest(path, made.folders)
    assert not path.exists()
