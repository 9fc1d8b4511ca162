"""Rows, of shards or of another results file, into the tables: staged beside them, then merged by run and cell."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decodathlon.harness.results import shards

if TYPE_CHECKING:
    import duckdb

TABLES = {
    "run": ["run_id", "started", "hardware", "git_commit", "git_dirty", "environment", "options", "about"],
    "cell": [
        "run_id", "cell_id", "started", "suite", "suite_version", "slice", "scale", "decoder", "family", "params",
        "claim", "model", "dtype", "device", "dataset", "data", "sizes", "seed", "status", "reason", "error", "seconds",
        "notes", "attempts", "log", "conditions", "protocol", "weights", "decoder_sha256", "shard_sha256",
        "hardware", "place",
    ],
    "metric": ["run_id", "cell_id", "metric", "value", "unit", "better", "ci_low", "ci_high", "n", "baseline", "units"],
    "sample": ["run_id", "cell_id", "place", "row", "data"],
    "gate": ["run_id", "gate", "decoder", "cell_id", "outcome", "detail", "judged"],
}  # fmt: skip
#: What rows of a table that wait in one line have in common, and the name of the others in that line.
_KEYS = {"run": ("run_id",), "gate": ("run_id",)} | dict.fromkeys(("cell", "metric", "sample"), ("run_id", "cell_id"))
ROWS = "rows"
#: Tables whose rows belong to a cell and go with it when a later attempt takes its place.
_OF_A_CELL = ("cell", "metric", "sample")


def lines_of(folder: Path, table: str) -> Path:
    """Where rows of a table wait, as JSON lines; there is no such file where there is no row."""
    return folder / f"{table}.jsonl"


def stage(connection: duckdb.DuckDBPyConnection, folders: Sequence[Path]) -> None:
    """Put rows that wait in folders into `staged_*` tables; DuckDB takes single rows slowly, files quickly."""
    for table, columns in TABLES.items():
        connection.execute(
            f"CREATE OR REPLACE TEMP TABLE staged_{table} AS SELECT {_names(columns)} FROM {table} LIMIT 0"
        )
        files = [f"'{quoted(file)}'" for folder in folders if (file := lines_of(folder, table)).exists()]
        if not files:
            continue
        types = dict(
            connection.execute(
                "SELECT column_name, data_type FROM duckdb_columns() WHERE table_name = ? AND NOT internal", [table]
            ).fetchall()
        )
        key = [c for c in columns if c in _KEYS[table]]
        row = ", ".join(f"{c} {types[c]}" for c in columns if c not in key)
        spec = ", ".join([*(f"{c}: '{types[c]}'" for c in key), f"{ROWS}: 'STRUCT({row})[]'"])
        names = ", ".join(c if c in key else f"one.{c}" for c in columns)
        connection.execute(
            f"INSERT INTO staged_{table} SELECT {names} FROM ("
            f"SELECT {_names(key)}, unnest({ROWS}) AS one FROM read_json([{', '.join(files)}], "
            f"format = 'newline_delimited', columns = {{{spec}}}, maximum_object_size = 268435456))"
        )


def stage_attached(connection: duckdb.DuckDBPyConnection, catalogue: str, path: Path) -> None:
    """Put the rows of an attached results file into `staged_*` tables.

    Raises:
        StoreError: a row is not what such a row says; the file and the cell are named.
    """
    for table, columns in TABLES.items():
        connection.execute(
            f"CREATE OR REPLACE TEMP TABLE staged_{table} AS SELECT {_names(columns)} FROM {catalogue}.{table}"
        )
    _check_staged(connection, path)


#: What a record has under another roof than its row.
_IN_SPEC = ("suite", "suite_version", "slice", "decoder", "model", "scale", "seed")


def _check_staged(connection: duckdb.DuckDBPyConnection, path: Path) -> None:
    from decodathlon.harness.results import records

    def check(table: str, names: Sequence[str], kind: type[records.Record]) -> None:
        found = connection.execute(f"SELECT {', '.join(names)} FROM staged_{table}")
        while some := found.fetchmany(10_000):
            for values in some:
                row = dict(zip(names, values, strict=True))
                where = (
                    path
                    / table
                    / "/".join(str(row.get(k)) for k in ("run_id", "cell_id", "metric", "gate") if k in row)
                )
                records.check(_as_record(row), kind, where)

    check("run", TABLES["run"], records.RunRecord)
    check("cell", [c for c in TABLES["cell"] if c not in ("data", "weights")], records.CellRecord)
    check("metric", TABLES["metric"], records.Metric)
    check("gate", TABLES["gate"], records.Verdict)


def _as_record(row: dict[str, Any]) -> dict[str, Any]:
    """A row as its shard said it."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if name in _JSON and isinstance(value, str):
            found[name] = shards.restored(json.loads(value))
        elif hasattr(value, "isoformat"):
            found[name] = value.isoformat()
        elif value is not None or name in ("ci_low", "ci_high", "n", "git_dirty"):
            found[name] = value
    if "suite" in row:
        found["spec"] = {k: row[k] for k in _IN_SPEC}
        found["decoder"] = {"params": found.pop("params", {})}
        found.pop("model", None)
    return found


#: Columns that hold JSON.
_JSON = (
    "environment",
    "options",
    "about",
    "params",
    "seconds",
    "notes",
    "attempts",
    "conditions",
    "protocol",
    "place",
    "sizes",
    "units",
)


def merge(connection: duckdb.DuckDBPyConnection) -> tuple[int, int, list[str]]:
    """Staged rows, of which none has a run and cell twice, into the tables: cells added, cells replaced, conflicts.

    A cell that is there stays, unless the staged one has more attempts behind it. Where both have as many and are not
    the same, the one that is there stays and the conflict is told.
    """
    tries = "coalesce(json_array_length({}.attempts), 0)"
    connection.execute(
        f"""
        CREATE OR REPLACE TEMP TABLE incoming AS
        SELECT s.run_id, s.cell_id, {tries.format("s")} AS tries, s.shard_sha256 AS sha,
               c.run_id IS NOT NULL AS again, {tries.format("c")} AS before, c.shard_sha256 AS old
        FROM staged_cell s LEFT JOIN cell c USING (run_id, cell_id)
        """
    )
    connection.execute("CREATE OR REPLACE TEMP TABLE chosen AS FROM incoming WHERE NOT again OR tries > before")
    # A file of schema 1 has no hashes; there the metrics must do.
    conflicts = connection.execute(
        """
        SELECT run_id, cell_id FROM incoming WHERE again AND tries = before AND (
            sha <> old OR ((sha IS NULL OR old IS NULL) AND EXISTS (
                FROM staged_metric s JOIN metric m USING (run_id, cell_id, metric)
                WHERE s.run_id = incoming.run_id AND s.cell_id = incoming.cell_id AND s.value IS DISTINCT FROM m.value
            ))
        ) ORDER BY ALL
        """
    ).fetchall()
    runs = connection.execute(
        """
        SELECT DISTINCT run_id FROM staged_run s JOIN run r USING (run_id)
        WHERE (s.git_commit, s.git_dirty) IS DISTINCT FROM (r.git_commit, r.git_dirty) ORDER BY 1
        """
    ).fetchall()
    added, replaced = _counts(connection)
    # Two transactions, because a key that was deleted may not come back within one. This is a copy: nobody looks.
    for table in _OF_A_CELL:
        connection.execute(f"DELETE FROM {table} t USING chosen c WHERE t.run_id = c.run_id AND t.cell_id = c.cell_id")
    for table in _OF_A_CELL:
        names = _names(TABLES[table])
        connection.execute(
            f"INSERT INTO {table} ({names}) SELECT {_names(TABLES[table], 's')} FROM staged_{table} s "
            "JOIN chosen c ON s.run_id = c.run_id AND s.cell_id = c.cell_id"
        )
    names = _names(TABLES["run"])
    connection.execute(f"INSERT OR IGNORE INTO run ({names}) SELECT {names} FROM staged_run")
    # The gates of a resumed run have been judged again: all verdicts of the newer judgement, none of the older.
    connection.execute(
        """
        CREATE OR REPLACE TEMP TABLE judged_anew AS
        SELECT run_id FROM (SELECT run_id, max(judged) AS judged FROM staged_gate GROUP BY run_id) s
        LEFT JOIN (SELECT run_id, max(judged) AS before FROM gate GROUP BY run_id) t USING (run_id)
        WHERE before IS NULL OR judged > before
        """
    )
    connection.execute("DELETE FROM gate t USING judged_anew j WHERE t.run_id = j.run_id")
    names = _names(TABLES["gate"])
    connection.execute(
        f"INSERT OR IGNORE INTO gate ({names}) SELECT {names} FROM staged_gate SEMI JOIN judged_anew USING (run_id)"
    )
    told = [f"run {r}, cell {c}: is there with other content; the old row stayed" for r, c in conflicts]
    told += [f"run {r}: is there with another commit; the old record stayed" for (r,) in runs]
    return added, replaced, told


def _counts(connection: duckdb.DuckDBPyConnection) -> tuple[int, int]:
    row = connection.execute("SELECT count(*) FILTER (NOT again), count(*) FILTER (again) FROM chosen").fetchone()
    return (int(row[0]), int(row[1])) if row else (0, 0)


def _names(columns: Sequence[str], table: str = "") -> str:
    return ", ".join(f"{table}.{c}" if table else c for c in columns)


def quoted(path: Path) -> str:
    return str(path).replace("'", "''")
