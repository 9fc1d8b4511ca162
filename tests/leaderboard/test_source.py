"""The board's snapshots: fresh, complete, and never in a writer's way."""

import gzip
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from made_results import cell, day, demo, speed_metrics, write_run

from decodathlon.harness.errors import StoreError
from decodathlon.harness.locks import file_lock
from decodathlon.harness.results import shards, store
from decodathlon.leaderboard import queries
from decodathlon.leaderboard.source import Source

duckdb = pytest.importorskip("duckdb")

OLD = Path(__file__).parents[1] / "results" / "old"


def decoders(snapshot):
    return {d for (d,) in snapshot.cursor().execute("SELECT DISTINCT decoder FROM board").fetchall()}


def one_cell(run, decoder="new"):
    return cell(run, "throughput", decoder, speed_metrics(1, 1.0), started=day(21), slice="batch-1")


def test_a_snapshot_holds_until_something_is_written(tmp_path):
    source = Source(demo(tmp_path / "r.duckdb"))
    first = source.current()
    assert source.current() is first
    assert not source.changed(first.version)
    store.ingest(tmp_path / "r.duckdb", [write_run(tmp_path / "x", "r9", [one_cell("r9")], started=day(21))])
    assert source.changed(first.version)
    second = source.current()
    assert "new" in decoders(second)
    assert "new" not in decoders(first), "who still reads the old one is not disturbed"


def test_a_run_is_seen_while_it_measures(tmp_path):
    """Shards that nobody has ingested are on the board, and the file itself stays as it is."""
    results = demo(tmp_path / "r.duckdb")
    before = results.read_bytes()
    source = Source(results)
    assert source.progress() == []
    folder = results.with_suffix(".shards")
    live = write_run(folder, "live", [one_cell("live")], started=day(21), planned=3)
    seen = source.current()
    assert "new" in decoders(seen)
    with file_lock(live / shards.LOCK_FILE):
        (run,) = source.progress()
    assert [r.live for r in source.progress()] == [False], "whoever measured it is gone"
    assert (run.run_id, run.done, run.planned, run.live) == ("live", 1, 3, True)
    second = one_cell("live", "newer")
    shards.write(folder / "live" / f"{second.spec.cell_id}.json", second.as_shard())
    assert source.changed(seen.version)
    assert {"new", "newer"} <= decoders(source.current())
    assert results.read_bytes() == before


def test_before_the_first_run_has_ended_its_shards_are_all_there_is(tmp_path):
    results = tmp_path / "r.duckdb"
    with pytest.raises(StoreError, match="run `pytest suites/ --benchmark` first"):
        Source(results).current()
    write_run(results.with_suffix(".shards"), "live", [one_cell("live")], started=day(21), planned=2)
    assert decoders(Source(results).current()) == {"new"}
    assert not results.exists()


def test_a_change_that_leaves_the_size_is_seen(tmp_path):
    results = demo(tmp_path / "r.duckdb")
    source = Source(results)
    first = source.current()
    size = results.stat().st_size
    store.update(results, lambda c: c.execute("UPDATE cell SET reason = reason"))
    assert results.stat().st_size == size, "else this test says nothing"
    assert source.changed(first.version)


def test_only_a_run_with_work_left_has_progress(tmp_path):
    results = demo(tmp_path / "r.duckdb")
    folder = results.with_suffix(".shards")
    write_run(folder, "done", [one_cell("done")], started=day(21), planned=1)
    old = write_run(folder, "old", [one_cell("old")], started=day(21), planned=4)
    (run,) = Source(results).progress()
    assert (run.run_id, run.done, run.planned, run.live) == ("old", 1, 4, False)
    for damaged in ("{half", "[]", '{"cells": 5}', "[" * 100_000):
        (old / shards.PLAN_FILE).write_text(damaged)
        assert Source(results).progress() == []


def test_failed_copies_and_those_of_killed_boards_are_thrown_away(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dead = tmp_path / "decodathlon-board-4194305-x"  # above the largest process id there is
    dead.mkdir()
    source = Source(demo(tmp_path / "r.duckdb"))
    assert not dead.exists()
    monkeypatch.setattr(queries, "prepare", lambda connection: connection.execute("SELECT nothing"))
    for _ in range(3):
        with pytest.raises(StoreError, match="could not be copied"):
            source.current()
    assert [p for folder in tmp_path.glob("decodathlon-board-*") for p in folder.iterdir()] == []


def test_what_no_reader_holds_any_more_is_thrown_away(tmp_path):
    results = demo(tmp_path / "r.duckdb")
    source = Source(results)
    first = source.current()
    store.ingest(results, [write_run(tmp_path / "x", "r9", [one_cell("r9")], started=day(21))])
    assert source.current().path.exists()
    assert not first.path.exists()


def test_a_damaged_shard_costs_its_run_and_says_so(tmp_path):
    results = demo(tmp_path / "r.duckdb")
    good = write_run(results.with_suffix(".shards"), "a", [one_cell("a")], started=day(21))
    (good.parent / "b").mkdir()
    shutil.copy(good / shards.RUN_FILE, good.parent / "b")
    (good.parent / "b" / "throughput-x.json").write_text("{half")
    found = Source(results).current()
    assert "new" in decoders(found)
    assert len(found.remarks) == 1
    assert "throughput-x.json is not a whole shard" in found.remarks[0]


def test_the_board_never_blocks_a_writer_nor_is_blocked(tmp_path):
    """Twenty ingests by another process while the board reads on: none waits for it, and it sees each."""
    results = demo(tmp_path / "r.duckdb")
    source = Source(results)
    source.current()
    runs = [write_run(tmp_path / "x", f"w{i}", [one_cell(f"w{i}", f"d{i}")], started=day(21)) for i in range(20)]
    code = f"""
        from pathlib import Path
        from decodathlon.harness.results import store
        for i in range(20):
            store.ingest(Path({str(results)!r}), [Path({str(runs[0].parent)!r}) / f"w{{i}}"])
    """
    writer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    seen = []
    while writer.poll() is None:
        seen.append(len(decoders(source.current())))
        time.sleep(0.01)
    assert writer.returncode == 0
    assert seen == sorted(seen)
    assert len(set(seen)) > 2, "it saw the file grow"
    assert {f"d{i}" for i in range(20)} <= decoders(source.current())
    with duckdb.connect(str(results)):
        """Nobody holds it: it opens for writing in the very process of the board."""


def test_a_locked_file_leaves_the_last_snapshot_with_a_word(tmp_path):
    results = demo(tmp_path / "r.duckdb")
    source = Source(results)
    first = source.current()
    code = f"import duckdb, sys; c = duckdb.connect({str(results)!r}); c.execute('CREATE TABLE x (y INT)'); " \
           "print('held', flush=True); sys.stdin.read()"  # fmt: skip
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        found = source.current()
        assert decoders(found) == decoders(first)
        (remark,) = found.remarks
        assert "close the program that has it open for writing" in remark
        with pytest.raises(StoreError, match="close the program"):
            Source(results).current()
    finally:
        holder.communicate("")
    assert source.current().remarks == ()


@pytest.mark.parametrize("name", ["schema-1.duckdb.gz", "schema-2.duckdb.gz"])
def test_an_older_file_is_shown_and_left_as_it_is(tmp_path, name):
    results = tmp_path / "r.duckdb"
    results.write_bytes(gzip.decompress((OLD / name).read_bytes()))
    before = results.read_bytes()
    assert {"hf-generate", "top-p"} <= decoders(Source(results).current())
    assert results.read_bytes() == before


def test_foreign_and_newer_files_are_named(tmp_path):
    foreign, newer = tmp_path / "foreign.duckdb", demo(tmp_path / "newer.duckdb")
    with duckdb.connect(str(foreign)) as connection:
        connection.execute("CREATE TABLE something (x INT)")
    with duckdb.connect(str(newer)) as connection:
        connection.execute("INSERT INTO migration (version) VALUES (99)")
    with pytest.raises(StoreError, match="not one of Decodathlon's"):
        Source(foreign).current()
    with pytest.raises(StoreError, match="written by newer code"):
        Source(newer).current()
