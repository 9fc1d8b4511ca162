"""Shards land whole, ingesting is idempotent, readers and writers never meet, foreign files are left alone."""

import gzip
import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from decodathlon.harness.cells import CellSpec, Outcome
from decodathlon.harness.errors import StoreError
from decodathlon.harness.results import measured, migrations, shards, store

duckdb = pytest.importorskip("duckdb")


def outcome(run_id, seed=0, **values):
    spec = CellSpec(
        suite="wikitext2", suite_version=1, slice="all", decoder="top-p", model="m", scale="smoke", seed=seed
    )
    metric = {
        "metric": "ppl", "value": math.inf, "unit": "1", "better": "lower", "ci_low": None, "ci_high": None, "n": 5,
        "baseline": None,
    }  # fmt: skip
    known = {
        "metrics": [
            metric,
            {**metric, "metric": "coverage", "better": "higher", "value": 0.5, "ci_low": 0.4, "ci_high": 0.6},
        ],
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


@pytest.mark.parametrize("deep", [250, 480, 900, 3000])
def test_a_shard_that_is_nested_too_deep_is_refused(tmp_path, deep):
    path = tmp_path / "deep.json"
    path.write_text('{"samples": ' + "[" * deep + "]" * deep + "}")
    with pytest.raises(StoreError, match="is not a whole shard"):
        shards.read(path)
    path.write_text('{"samples": ' + "[" * 150 + "]" * 150 + "}")
    assert shards.read(path)["samples"]


def test_words_that_are_numbers_are_seen_however_they_are_spelt(tmp_path):
    path = tmp_path / "a.json"
    for spelt in ("NaN", "\\u004eaN"):
        path.write_text(f'{{"metrics": [{{"value": "{spelt}"}}], "log": "Infinity"}}')
        read = shards.read(path)
        assert math.isnan(read["metrics"][0]["value"])
        assert read["log"] == "Infinity"


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


@pytest.fixture
def old_file(tmp_path):
    """A results file as the first published version of the code left it."""
    path = tmp_path / "old.duckdb"
    path.write_bytes(gzip.decompress((Path(__file__).parent / "old" / "schema-1.duckdb.gz").read_bytes()))
    return path


def test_an_older_file_is_read_as_it_is_and_migrated_when_something_is_added(old_file, tmp_path):
    before = old_file.read_bytes()
    store.check(old_file)
    rows = query(old_file, "SELECT decoder, metric, value FROM latest ORDER BY ALL")
    assert len(rows) == 27
    assert query(old_file, "SELECT count(units) FROM metric") == [(0,)]
    assert old_file.read_bytes() == before
    found = store.ingest(old_file, [make_run(tmp_path, "r1", [outcome("r1")])])
    assert found == (1, 0, [])
    assert query(old_file, "SELECT max(version) FROM migration") == [(migrations.NEWEST,)]
    assert query(old_file, "SELECT decoder, metric, value FROM latest WHERE run_id <> 'r1' ORDER BY ALL") == rows
    assert query(old_file, "SELECT count(*) FROM cell") == [(5,)]


def test_a_migrated_file_has_the_schema_of_a_new_one(old_file, tmp_path):
    run = make_run(tmp_path, "r1", [outcome("r1")])
    store.ingest(old_file, [run])
    new = tmp_path / "new.duckdb"
    store.ingest(new, [run])
    columns = "SELECT table_name, column_name, data_type FROM duckdb_columns() WHERE NOT internal ORDER BY ALL"
    assert query(old_file, columns) == query(new, columns)
    views = "SELECT view_name, sql FROM duckdb_views() WHERE NOT internal ORDER BY ALL"
    assert query(old_file, views) == query(new, views)


def test_a_file_of_schema_2_keeps_its_runs_and_gates(tmp_path):
    path = tmp_path / "old.duckdb"
    path.write_bytes(gzip.decompress((Path(__file__).parent / "old" / "schema-2.duckdb.gz").read_bytes()))
    latest = "SELECT decoder, metric, value FROM latest ORDER BY ALL"
    questions = [latest, "SELECT gate, outcome FROM gate ORDER BY ALL"]
    before = [query(path, q) for q in questions]
    store.ingest(path, [make_run(tmp_path, "r1", [outcome("r1")])])
    assert query(path, "SELECT run_id, about FROM run ORDER BY 1")[:2] == [
        ("20261121T072327-5c7399", None),
        ("20261121T100910-c5dc0a", None),
    ]
    others = [q.replace(" ORDER", " WHERE run_id <> 'r1' ORDER") for q in questions]
    assert [query(path, q) for q in others] == before
    assert len(before[0]) == 175
    assert len(before[1]) > 0


def test_files_of_other_machines_are_merged_once_and_conflicts_are_named(old_file, tmp_path):
    here, there = tmp_path / "here.duckdb", tmp_path / "there.duckdb"
    shared = make_run(tmp_path / "a", "shared", [outcome("shared")])
    store.ingest(here, [shared, make_run(tmp_path / "a", "mine", [outcome("mine")])])
    store.ingest(there, [shared, make_run(tmp_path / "b", "theirs", [outcome("theirs"), outcome("theirs", 1)])])
    assert store.ingest(here, [there, old_file]) == (6, 0, [])
    assert store.ingest(here, [there, old_file, tmp_path / "a", tmp_path / "b"]) == (0, 0, [])
    assert query(here, "SELECT count(*) FROM run") == [(4,)]
    assert query(here, "SELECT count(*) FROM sample WHERE run_id = 'theirs'") == [(2,)]

    forged = make_run(tmp_path / "c", "shared", [outcome("shared", reason="said otherwise")])
    found = store.ingest(here, [forged])
    assert (found.added, found.replaced) == (0, 0)
    (line,) = found.conflicts
    assert "run shared, cell wikitext2-" in line
    assert "the old row stayed" in line
    assert query(here, "SELECT reason FROM cell WHERE run_id = 'shared'") == [("",)]


def test_rows_without_hashes_conflict_by_their_numbers(old_file, tmp_path):
    other = tmp_path / "other.duckdb"
    other.write_bytes(old_file.read_bytes())
    with duckdb.connect(str(other)) as c:
        c.execute("UPDATE metric SET value = 2 * value, ci_high = 2 * ci_high WHERE metric = 'ppl_epsilon'")
    found = store.ingest(old_file, [other])
    assert (found.added, len(found.conflicts)) == (0, 1)


def test_a_cell_that_failed_before_it_knew_its_data_gives_way_to_its_success(tmp_path):
    failed = outcome("r1", started="2026-01-01T00:00:00.000+00:00", status="failed", metrics=[], model={}, data={})
    done = outcome("r2", started="2026-01-02T00:00:00.000+00:00")
    path = tmp_path / "r.duckdb"
    store.ingest(path, [make_run(tmp_path, "r1", [failed]), make_run(tmp_path, "r2", [done])])
    assert query(path, "SELECT DISTINCT run_id, status FROM latest") == [("r2", "ok")]


def test_permissions_and_unfolded_logs_survive(tmp_path):
    path = tmp_path / "results.duckdb"
    store.ingest(path, [make_run(tmp_path, "r1", [outcome("r1")])])
    path.chmod(0o600)
    code = (
        "import duckdb, os, sys; c = duckdb.connect(sys.argv[1]);"
        "c.execute(\"INSERT INTO cell (run_id, cell_id) VALUES ('by hand', 'c')\"); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, path], check=False)
    assert path.with_name("results.duckdb.wal").exists()
    assert store.ingest(path, [make_run(tmp_path, "r2", [outcome("r2")])]).added == 1
    assert path.stat().st_mode & 0o777 == 0o600
    assert not path.with_name("results.duckdb.wal").exists()
    assert query(path, "SELECT run_id FROM cell ORDER BY 1") == [("by hand",), ("r1",), ("r2",)]


def test_the_hardware_of_a_run_is_where_its_decoders_ran(tmp_path):
    spec = CellSpec("overheads", 1, "plan", "harness", "harness", "quick", 0)
    own = Outcome(spec, "r1", model={"name": "harness", "dtype": "", "device": "cpu"})
    on_gpu = outcome("r1", model={"name": "m", "dtype": "float32", "device": "cuda:0", "processor": "NVIDIA H200"})
    path = tmp_path / "r.duckdb"
    store.ingest(path, [make_run(tmp_path, "r1", [own, on_gpu])])
    assert query(path, "SELECT hardware FROM run") == [("NVIDIA H200",)]


def test_half_a_character_does_not_cost_the_shard(tmp_path):
    path = tmp_path / "r.duckdb"
    store.ingest(path, [make_run(tmp_path, "r1", [outcome("r1", status="failed", reason="\udcff", metrics=[])])])
    assert query(path, "SELECT reason FROM cell") == [("?",)]


def test_a_later_attempt_takes_the_place_of_an_earlier_one_in_any_order(tmp_path):
    failed = outcome("r1", status="timeout", reason="late", metrics=[], samples=[])
    done = outcome("r1", attempts=[failed.as_attempt()])
    early, late = make_run(tmp_path / "a", "r1", [failed]), make_run(tmp_path / "b", "r1", [done])
    for order in ([early, late], [late, early]):
        path = tmp_path / f"{order[0].parent.name}.duckdb"
        assert [sum(store.ingest(path, [run])[:2]) for run in order] == [1, 1 if order[0] is early else 0]
        assert query(path, "SELECT status, json_array_length(attempts) FROM cell") == [("ok", 1)]
        assert query(path, "SELECT count(*) FROM metric") == [(2,)]
        both = tmp_path / f"both-{order[0].parent.name}.duckdb"
        store.ingest(both, order)
        assert query(both, "SELECT status FROM cell") == [("ok",)]


def test_units_and_gates_reach_the_store(tmp_path):
    metric = {
        "metric": "ppl_mixture", "value": math.exp(3), "unit": "1", "better": "lower", "ci_low": 19.0, "ci_high": 21.0,
        "n": 9, "baseline": None, "units": {"rows": ["a"], "sums": [3.0], "counts": [1], "kind": "mean", "scale": "exp",
                                    "share": False},
    }  # fmt: skip
    run = make_run(tmp_path, "r1", [outcome("r1", metrics=[metric])])
    verdict = {
        "gate": "a: b >= 1",
        "decoder": "top-p",
        "cell_id": "c",
        "outcome": "pass",
        "detail": "1.2",
        "judged": "2026-01-01T00:00:00.000+00:00",
    }
    shards.write(run / shards.GATES_FILE, {"run_id": "r1", "verdicts": [verdict]})
    path = tmp_path / "r.duckdb"
    store.ingest(path, [run])
    later = {**verdict, "outcome": "fail", "judged": "2026-01-02T00:00:00.000+00:00"}
    for judged in (later, verdict):  # judged again; then an older copy comes along
        shards.write(run / shards.GATES_FILE, {"run_id": "r1", "verdicts": [judged]})
        store.ingest(path, [run])
        assert query(path, "SELECT gate, outcome FROM gate") == [("a: b >= 1", "fail")]
    (found,) = measured.of_run(path, "last")
    assert found.metrics["ppl_mixture"].units.estimate().value == pytest.approx(math.exp(3))


def test_the_newest_cell_counts_whole(tmp_path):
    """A decoder that lost a metric does not keep the old one beside its new ones."""
    old = outcome("r1", started="2026-01-01T00:00:00.000+00:00")
    new = outcome("r2", started="2026-01-02T00:00:00.000+00:00", metrics=old.metrics[:1])
    path = tmp_path / "r.duckdb"
    store.ingest(path, [make_run(tmp_path, "r1", [old]), make_run(tmp_path, "r2", [new])])
    assert query(path, "SELECT run_id, metric FROM latest") == [("r2", "ppl")]


def test_a_truncated_file_and_a_locked_one_are_named_and_left_alone(tmp_path):
    run = make_run(tmp_path, "r1", [outcome("r1")])
    path = tmp_path / "results.duckdb"
    store.ingest(path, [run])
    path.write_bytes(path.read_bytes()[:5000])
    torn = path.read_bytes()
    with pytest.raises(StoreError, match=r"cannot be opened.*damaged or no DuckDB file; move it away"):
        store.ingest(path, [run])
    assert path.read_bytes() == torn
    path.unlink()
    store.ingest(path, [run])
    code = "import duckdb, sys; c = duckdb.connect(sys.argv[1]); print('open', flush=True); input()"
    writer = subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout.readline() == "open\n"
    with pytest.raises(StoreError, match="close the program that has it open for writing"):
        store.ingest(path, [run])
    writer.communicate("\n")
    assert store.ingest(path, [run]) == (0, 0, [])


def test_what_holds_no_run_is_refused(tmp_path):
    path = tmp_path / "r.duckdb"
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match="holds no run"):
        store.ingest(path, [tmp_path / "empty"])
    with pytest.raises(StoreError, match="there is no such file or folder"):
        store.ingest(path, [tmp_path / "none"])
    store.ingest(path, [make_run(tmp_path, "r1", [outcome("r1")])])
    with pytest.raises(StoreError, match="is the results file itself"):
        store.ingest(path, [path])
    newer = make_run(tmp_path, "r3", [outcome("r3")])
    shard = next(shards.cells(newer))
    shard.write_text(shard.read_text().replace('"schema":2', '"schema":99'))
    with pytest.raises(StoreError, match="written by newer code"):
        store.ingest(path, [newer])


def test_a_folder_that_cannot_be_written_is_refused_before_a_run(tmp_path, monkeypatch):
    def refuse(**options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(store.tempfile, "NamedTemporaryFile", refuse)
    with pytest.raises(StoreError, match=r"cannot be written \(Permission denied\); name another place"):
        store.check(tmp_path / "r.duckdb")


def test_what_is_added_brings_the_views_of_this_code(tmp_path):
    path = tmp_path / "results.duckdb"
    store.ingest(path, [make_run(tmp_path, "r1", [outcome("r1")])])
    with duckdb.connect(str(path)) as c:
        c.execute("CREATE OR REPLACE VIEW sound_cell AS FROM known_cell WHERE false")
    store.ingest(path, [make_run(tmp_path, "r2", [outcome("r2")])])
    assert query(path, "SELECT count(*) FROM sound_cell") == [(2,)]


def test_a_small_file_stays_small(tmp_path):
    path = tmp_path / "results.duckdb"
    store.ingest(path, [make_run(tmp_path, "r1", [outcome("r1")])])
    assert path.stat().st_size < 1_000_000


def test_what_the_overheads_suite_ingests_is_a_run_like_any_other(tmp_path):
    from decodathlon.harness.measure import overheads

    assert overheads.ingest(tmp_path, cells=3, new=2)().added == 2
    assert query(tmp_path / "overheads.duckdb", "SELECT count(*) FROM latest_cell") == [(3,)]


def test_cells_of_several_machines_have_hardware_of_their_own(tmp_path):
    results = tmp_path / "r.duckdb"
    there = {"node": "n1", "hardware": "NVIDIA H200", "gpu_uuid": "GPU-1", "driver_version": "580"}
    folder = make_run(tmp_path / "run", "r1", [outcome("r1", 0, place=there), outcome("r1", 1)])
    store.ingest(results, [folder])
    found = query(results, "SELECT DISTINCT hardware FROM known_cell ORDER BY ALL")
    assert ("NVIDIA H200",) in found
    assert len(found) == 2  # the other cells have their run's
    assert query(results, "SELECT place->>'gpu_uuid' FROM cell WHERE hardware IS NOT NULL") == [("GPU-1",)]
    assert set(query(results, "SELECT DISTINCT hardware FROM results")) == set(found)
