"""Shards land whole, ingesting is idempotent, readers and writers never meet, foreign files are left alone."""

import json
import math
import os
import subprocess
import sys
import threading

import duckdb
import pytest

from decodathlon.harness.cells import CellSpec, Outcome
from decodathlon.harness.errors import StoreError
from decodathlon.harness.results import shards, store


def outcome(run_id, seed=0, **values):
    spec = CellSpec(
        suite="wikitext2", suite_version=1, slice="all", decoder="top-p", model="m", scale="smoke", seed=seed
    )
    metric = {
        "metric": "ppl", "value": math.inf, "unit": "1", "better": "lower", "ci_low": None, "ci_high": None, "n": 5,
        "baseline": None,
    }  # fmt: skip
    known = {
        "metrics": [metric, {**metric, "metric": "coverage", "value": 0.5, "ci_low": 0.4, "ci_high": 0.6}],
        "samples": [{"row": "pair-0", "data": {"seconds": [1.5, 2.5]}}],
        "decoder": {"name": "top-p", "spec": "top-p", "family": "top-p", "params": {"p": 0.95}, "claim": "shaped"},
        "model": {"name": "m", "dtype": "float32", "device": "cpu"},
        "data": {"dataset": "wikitext-2-raw-v1", "split": "test"},
    }
    return Outcome(spec, run_id, **(known | values))


def make_run(folder, run_id, outcomes):
    record = {
        "run_id": run_id, "started": "2026-11-21T10:00:00.000+00:00", "git_commit": "abc", "git_dirty": False,
        "environment": {"cpu": "a CPU", "cores": 2, "gpus": []}, "options": {"scale": "smoke"},
    }  # fmt: skip
    shards.write(folder / run_id / shards.RUN_FILE, record)
    for o in outcomes:
        shards.write(folder / run_id / f"{o.spec.cell_id}.json", o.as_shard())
    return folder / run_id


def query(path, sql):
    with store.connect(path) as connection:
        return connection.execute(sql).fetchall()


def test_a_run_becomes_rows_of_the_view(tmp_path):
    run = make_run(
        tmp_path, "r1", [outcome("r1"), outcome("r1", 1, status="failed", reason="why", metrics=[], samples=[])]
    )
    path = tmp_path / "results.duckdb"
    assert store.ingest(path, [run]).added == 2
    rows = query(
        path, "SELECT metric, value, ci_low, n, status, reason, hardware, seed FROM results ORDER BY seed, metric"
    )
    assert rows == [
        ("coverage", 0.5, 0.4, 5, "ok", "", "a CPU, 2 threads", 0),
        ("ppl", math.inf, None, 5, "ok", "", "a CPU, 2 threads", 0),
        (None, None, None, None, "failed", "why", "a CPU, 2 threads", 1),
    ]
    assert query(path, "SELECT data->'$.seconds[1]' FROM sample") == [("2.5",)]
    columns = [d[0] for d in query(path, "DESCRIBE results")]
    promised = (
        "run_id cell_id started suite scale decoder family params claim audit model dataset metric value unit better "
        "ci_low ci_high n baseline seed status reason hardware git_commit"
    )
    assert set(promised.split()) <= set(columns)


def test_ingesting_twice_adds_nothing(tmp_path):
    run = make_run(tmp_path, "r1", [outcome("r1")])
    path = tmp_path / "results.duckdb"
    assert [store.ingest(path, [run]).added for _ in range(3)] == [1, 0, 0]
    assert query(path, "SELECT count(*) FROM metric") == [(2,)]


def test_a_stated_storage_version_that_duckdb_1_4_reads(tmp_path):
    path = tmp_path / "results.duckdb"
    store.ingest(path, [make_run(tmp_path, "r1", [outcome("r1")])])
    store.ingest(path, [make_run(tmp_path, "r2", [outcome("r2")])])
    with store.connect(path) as connection:
        tags = connection.execute("SELECT tags FROM duckdb_databases() WHERE NOT internal").fetchone()[0]
    assert "v1.2.0" in tags["storage_version"]


def test_readers_and_writers_do_not_block_each_other(tmp_path):
    path = tmp_path / "results.duckdb"
    store.ingest(path, [make_run(tmp_path, "r1", [outcome("r1")])])
    code = (
        "import duckdb, sys; c = duckdb.connect(sys.argv[1], read_only=True); print('open', flush=True); input();"
        "print(c.execute('select count(*) from cell').fetchone()[0])"
    )
    command = [sys.executable, "-c", code, path]
    reader = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert reader.stdout.readline() == "open\n"
    assert store.ingest(path, [make_run(tmp_path, "r2", [outcome("r2")])]).added == 1
    assert reader.communicate("\n")[0] == "1\n"  # the old file, to its end
    assert query(path, "SELECT count(*) FROM cell") == [(2,)]


def test_many_writers_lose_nothing(tmp_path):
    path = tmp_path / "results.duckdb"
    runs = [make_run(tmp_path, f"r{i}", [outcome(f"r{i}", s) for s in range(3)]) for i in range(6)]
    threads = [threading.Thread(target=store.ingest, args=(path, [run])) for run in runs]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert query(path, "SELECT count(*), count(DISTINCT run_id) FROM cell") == [(18, 6)]


def test_foreign_damaged_and_newer_files_are_named_and_left_alone(tmp_path):
    run = make_run(tmp_path, "r1", [outcome("r1")])
    foreign = tmp_path / "foreign.duckdb"
    with duckdb.connect(str(foreign)) as c:
        c.execute("CREATE TABLE t (x INTEGER)")
    damaged = tmp_path / "damaged.duckdb"
    damaged.write_bytes(b"not a database" * 1000)
    newer = tmp_path / "newer.duckdb"
    store.ingest(newer, [run])
    with duckdb.connect(str(newer)) as c:
        c.execute("INSERT INTO migration (version) VALUES (99)")
    for path, message in [(foreign, "not one of Decodathlon's"), (damaged, "cannot be opened"), (newer, "newer code")]:
        before = path.read_bytes()
        with pytest.raises(StoreError, match=message):
            store.ingest(path, [run])
        with pytest.raises(StoreError, match=message):
            store.check(path)
        assert path.read_bytes() == before
    assert not list(tmp_path.glob(".*.next*"))


def test_places_that_cannot_hold_results_are_refused_before_a_run(tmp_path):
    with pytest.raises(StoreError, match="does not exist; create it"):
        store.check(tmp_path / "none" / "r.duckdb")
    with pytest.raises(StoreError, match="is a folder; name a file"):
        store.check(tmp_path)
    with pytest.raises(StoreError, match="there are no results"), store.connect(tmp_path / "r.duckdb"):
        pass


def test_a_torn_shard_is_named_and_the_file_stays_as_it_was(tmp_path):
    path = tmp_path / "results.duckdb"
    store.ingest(path, [make_run(tmp_path, "r1", [outcome("r1")])])
    run = make_run(tmp_path, "r2", [outcome("r2")])
    torn = next(shards.cells(run))
    torn.write_text(torn.read_text()[:40])
    before = path.read_bytes()
    with pytest.raises(StoreError, match="is not a whole shard"):
        store.ingest(path, [run])
    assert path.read_bytes() == before


def test_a_full_disk_leaves_no_half_shard(tmp_path, monkeypatch):
    whole = tmp_path / "a.json"
    shards.write(whole, {"x": 1})

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        shards.write(whole, {"x": 2})
    assert json.loads(whole.read_text()) == {"x": 1}
    assert list(tmp_path.iterdir()) == [whole]


def test_infinities_survive_the_shard(tmp_path):
    path = tmp_path / "a.json"
    shard = {"arrays": {"a": [math.inf, -math.inf, 1.5]}, "metrics": [{"value": math.inf}], "samples": ["NaN"]}
    shards.write(path, shard)
    assert shards.read(path) == shard  # the answer "NaN" stays a text


def test_an_outcome_survives_its_shard_without_the_users_folders(tmp_path):
    o = outcome("r1")
    private = Outcome(
        CellSpec(**{**vars(o.spec), "data": "/home/somebody/data", "decoder_files": ("/home/x/d.py",)}), "r1"
    )
    assert "somebody" not in json.dumps(private.as_shard())
    assert private.spec.cell_id == o.spec.cell_id
    shards.write(tmp_path / "a.json", o.as_shard())
    back = Outcome.from_shard(shards.read(tmp_path / "a.json"))
    assert (back.metrics, back.spec.cell_id, back.status) == (o.metrics, o.spec.cell_id, "ok")


def test_what_a_killed_writer_left_is_not_replayed(tmp_path):
    """A log of an unfinished copy must not slip rows into the next one."""
    path, copy = tmp_path / "results.duckdb", tmp_path / ".results.duckdb.next"
    store.ingest(path, [make_run(tmp_path, "r1", [outcome("r1")])])
    code = (
        "import duckdb, os, shutil, sys; shutil.copy(sys.argv[1], sys.argv[2]); c = duckdb.connect(sys.argv[2]);"
        "c.execute(\"INSERT INTO cell (run_id, cell_id) VALUES ('ghost', 'ghost')\"); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, path, copy], check=False)
    assert copy.with_name(f"{copy.name}.wal").exists()
    copy.unlink()
    assert store.ingest(path, [make_run(tmp_path, "r2", [outcome("r2")])]).added == 1
    assert query(path, "SELECT run_id FROM cell ORDER BY 1") == [("r1",), ("r2",)]
    assert sorted(p.name for p in tmp_path.glob(".*.next*")) == []
