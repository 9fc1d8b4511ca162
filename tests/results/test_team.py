"""Results in a team's PostgreSQL. What needs one runs where DECODATHLON_TEST_POSTGRES names a database that may be
emptied, and DuckDB has its extension."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from decodathlon.harness.cells import CellSpec, Outcome
from decodathlon.harness.commands.command import main
from decodathlon.harness.errors import MissingError, SpecError, StoreError
from decodathlon.harness.results import environment, shards, store, team

duckdb = pytest.importorskip("duckdb")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setenv(environment.RESULTS_VARIABLE, str(tmp_path / "results.duckdb"))
    return tmp_path


def test_a_connection_stands_for_a_mirror_that_knows_it(here):
    mirror = team.path_of("postgres:host=db dbname=bench")
    assert mirror.parent == here
    assert team.of(mirror) == "host=db dbname=bench"
    assert team.path_of("postgres:host=db dbname=bench") == mirror
    assert team.path_of("postgresql://db/bench") != mirror
    assert team.of(team.path_of("postgresql://db/bench")) == "postgresql://db/bench"
    assert team.path_of("plain.duckdb").name == "plain.duckdb"
    assert team.of(here / "plain.duckdb") is None


@pytest.mark.parametrize("text", ["postgres:host=db password=hunter2", "postgres://me:hunter2@db/bench"])
def test_a_password_is_refused_and_not_repeated(here, text, capsys):
    with pytest.raises(SpecError, match="leave the password out") as caught:
        team.path_of(text)
    assert "hunter2" not in str(caught.value)
    with pytest.raises(SystemExit):
        main(["list", "runs", "--results", text])
    assert "leave the password out" in capsys.readouterr().err
    assert not list(here.iterdir())


def has_extension():
    with duckdb.connect(config={"autoinstall_known_extensions": "false"}) as connection:
        try:
            connection.execute("LOAD postgres")
        except duckdb.Error:
            return False
        return True


def test_without_the_extension_the_remedy_is_told_before_a_run(here):
    if has_extension():
        pytest.skip("the extension is installed here")
    mirror = team.path_of("postgres:host=127.0.0.1 port=1 dbname=x")
    with pytest.raises(MissingError, match=r"DuckDB's extension of that name.*INSTALL postgres"):
        store.check(mirror)


def test_messages_are_without_the_connection():
    told = team._told('IO Error: Unable to connect to Postgres at "host=db user=me": refused', "host=db user=me")
    assert told == 'IO Error: Unable to connect to Postgres at "...": refused'
    assert "hunter2" not in team._told("postgres://me:hunter2@db failed, password=hunter2", "other")


@pytest.fixture
def database(here):
    dsn = os.environ.get("DECODATHLON_TEST_POSTGRES")
    if not dsn or not has_extension():
        pytest.skip("DECODATHLON_TEST_POSTGRES is not set, or DuckDB has no extension postgres")
    with duckdb.connect() as connection:
        connection.execute("LOAD postgres")
        connection.execute(f"ATTACH '{dsn}' AS door (TYPE postgres)")
        drop = f"DROP SCHEMA IF EXISTS {team.SCHEMA} CASCADE"
        connection.execute("CALL postgres_execute('door', ?, use_transaction = false)", [drop])
    return team.path_of(f"postgres:{dsn}")


def run_of(folder, run_id, seeds=(0, 1), **values):
    record = {
        "run_id": run_id, "started": "2026-11-21T10:00:00.000+00:00", "git_commit": "abc", "git_dirty": False,
        "environment": {"cpu": "a CPU", "cores": 2, "gpus": []}, "options": {"scale": "smoke"},
    }  # fmt: skip
    shards.write(folder / run_id / shards.RUN_FILE, record)
    for seed in seeds:
        spec = CellSpec("wikitext2", 1, "all", "top-p", "m", "smoke", seed)
        metric = {"metric": "ppl", "value": float("inf"), "unit": "1", "better": "lower", "ci_low": None,
                  "ci_high": None, "n": 5, "baseline": None}  # fmt: skip
        decoder = {"name": "top-p", "spec": "top-p", "params": {"p": 0.9}}
        samples = [{"row": "a", "data": {"text": "with a \u0000 in it"}}]
        known = {"metrics": [metric], "samples": samples, "decoder": decoder, "notes": ["it's quoted"]}
        outcome = Outcome(spec, run_id, **(known | values))
        shards.write(folder / run_id / f"{spec.cell_id}.json", outcome.as_shard())
    return folder / run_id


def query(path, sql):
    with store.connect(path) as connection:
        return connection.execute(sql).fetchall()


def test_rows_go_to_the_database_and_come_back(database, here):
    store.check(database)
    first = run_of(here / "runs", "r1")
    assert store.ingest(database, [first])[:2] == (2, 0)
    assert store.ingest(database, [first])[:2] == (0, 0)
    assert query(database, "SELECT count(*), max(value) FROM results") == [(2, float("inf"))]
    assert query(database, "SELECT hardware FROM run") == [("a CPU, 2 threads",)]
    plain = here / "plain.duckdb"
    store.ingest(plain, [first])
    for table in ("run", "cell", "metric", "sample"):
        columns = ", ".join(store.rows.TABLES[table])
        assert query(database, f"SELECT {columns} FROM {table} ORDER BY ALL") == query(
            plain, f"SELECT {columns} FROM {table} ORDER BY ALL"
        )
    # what another machine adds is there at the next look, and a file can be added as a whole
    other = here / "other.duckdb"
    store.ingest(other, [run_of(here / "more", "r2")])
    assert store.ingest(database, [other])[:2] == (2, 0)
    assert query(database, "SELECT count(DISTINCT run_id) FROM cell") == [(2,)]
    again = run_of(here / "again", "r1", seeds=(0,), attempts=[{"status": "crashed"}])
    assert store.ingest(database, [again])[:2] == (0, 1)
    assert query(database, "SELECT count(*) FROM cell WHERE json_array_length(attempts) = 1") == [(1,)]


def test_a_database_of_an_older_schema_gets_what_is_new(database, here):
    store.check(database)
    with duckdb.connect() as connection:
        connection.execute("LOAD postgres")
        connection.execute(f"ATTACH '{team.of(database)}' AS door (TYPE postgres)")
        for older in (
            f"ALTER TABLE {team.SCHEMA}.cell DROP COLUMN place, DROP COLUMN hardware",
            f"DELETE FROM {team.SCHEMA}.migration",
            f"INSERT INTO {team.SCHEMA}.migration VALUES (5)",
        ):
            connection.execute("CALL postgres_execute('door', ?)", [older])
    with pytest.raises(StoreError, match="has no schema 6 of ours yet"):
        query(database, "FROM cell")
    assert store.ingest(database, [run_of(here / "runs", "r1")])[0] == 2
    assert query(database, "SELECT count(*) FROM cell WHERE hardware IS NULL") == [(2,)]


def test_what_is_there_and_says_something_else_is_told(database, here):
    store.ingest(database, [run_of(here / "a", "r1")])
    found = store.ingest(database, [run_of(here / "b", "r1", reason="other")])
    assert (found.added, found.replaced, len(found.conflicts)) == (0, 0, 2)


def test_many_writers_lose_nothing(database, here):
    folders = [run_of(here / "runs", f"r{i}") for i in range(6)]
    code = (
        "import sys; from pathlib import Path; from decodathlon.harness.results import store;"
        "print(store.ingest(Path(sys.argv[1]), [Path(p) for p in sys.argv[2:]])[0])"
    )

    def write(some):
        time.sleep(0.2)  # so that all begin together
        words = [sys.executable, "-c", code, str(database), *map(str, some)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-1000:]
        return done.stdout

    with ThreadPoolExecutor(4) as pool:
        added = sum(int(out) for out in pool.map(write, [folders, folders[:3], folders[3:], folders]))
    assert added == 12
    assert query(database, "SELECT count(*) FROM cell") == [(12,)]


def test_a_database_that_is_gone_or_newer_is_told(database, here):
    gone = team.path_of("postgres:host=127.0.0.1 port=1 dbname=x")
    with pytest.raises(StoreError, match="Connection refused"):
        store.check(gone)
    store.check(database)
    with pytest.raises(StoreError, match="takes rows of runs alone"):
        store.update(database, lambda connection: None)
    with duckdb.connect() as connection:
        connection.execute("LOAD postgres")
        connection.execute(f"ATTACH '{team.of(database)}' AS door (TYPE postgres)")
        newer = f"INSERT INTO {team.SCHEMA}.migration (version) VALUES (99)"
        connection.execute("CALL postgres_execute('door', ?)", [newer])
    with pytest.raises(StoreError, match="written by newer code"):
        store.check(database)


def test_a_run_and_the_commands_take_it(database, here, capsys):
    store.ingest(database, [run_of(here / "runs", "r1")])
    named = f"postgres:{team.of(database)}"
    assert main(["list", "runs", "--results", named]) == 0
    assert "r1" in capsys.readouterr().out
    assert main(["plan", "--decoder", "greedy", "--suite", "math500", "--results", named]) == 0
    assert json.loads(database.with_suffix(team.LINK).read_text())["state"]
