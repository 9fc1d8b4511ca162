"""The store: shards into `results.duckdb`, by one writer at a time, without ever blocking a reader.

Shards are added to a copy of the file, which is then put in its place. A reader that has the old file open goes on
reading it; the next one opens the new file.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decodathlon.harness.errors import MissingError, StoreError
from decodathlon.harness.locks import file_lock
from decodathlon.harness.results import shards
from decodathlon.harness.results.environment import hardware_name

if TYPE_CHECKING:
    import duckdb

#: Number of the newest migration; schema.sql creates a file at this version.
SCHEMA_VERSION = 1
#: The format on disk, so that DuckDB 1.4 reads what 2.0 writes.
STORAGE_VERSION = "v1.2.0"
SCHEMA = Path(__file__).with_name("schema.sql")

_TABLES = {
    "run": ["run_id", "started", "hardware", "git_commit", "git_dirty", "environment", "options"],
    "cell": [
        "run_id", "cell_id", "started", "suite", "suite_version", "slice", "scale", "decoder", "family", "params",
        "claim", "model", "dtype", "device", "dataset", "data", "sizes", "seed", "status", "reason", "error", "seconds",
        "notes",
    ],
    "metric": ["run_id", "cell_id", "metric", "value", "unit", "better", "ci_low", "ci_high", "n", "baseline"],
    "sample": ["run_id", "cell_id", "place", "row", "data"],
}  # fmt: skip


def available() -> bool:
    """Whether DuckDB is installed; without it a run still leaves its shards."""
    import importlib.util

    return importlib.util.find_spec("duckdb") is not None


def check(path: Path) -> None:
    """Look at a results file before a run begins.

    Raises:
        StoreError: its folder is missing or cannot be written, or the file is not one of ours, or newer than this code.
    """
    folder = path.resolve().parent
    if not folder.is_dir():
        raise StoreError(f"--results {path}: the folder {folder} does not exist; create it")
    if path.suffix == ".shards":
        raise StoreError(f"--results {path}: .shards is the ending of the folder beside it; use {path.stem}.duckdb")
    if path.is_dir():
        raise StoreError(f"--results {path} is a folder; name a file such as {path / 'results.duckdb'}")
    if not os.access(folder, os.W_OK):
        raise StoreError(f"--results {path}: the folder {folder} cannot be written; name another place")
    if path.exists() and available():
        with connect(path):
            return


@contextmanager
def connect(path: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A read-only connection, closed at the end of the block.

    Raises:
        StoreError: not a results file of ours, damaged, or written by newer code.
        MissingError: DuckDB is not installed.
    """
    if not available():
        raise MissingError("reading results needs the package duckdb: pip install duckdb")
    import duckdb

    if not path.is_file():
        raise StoreError(f"there are no results at {path}; run `pytest suites/ --benchmark` first")
    try:
        connection = duckdb.connect(str(path), read_only=True)
    except duckdb.Error as error:
        first = str(error).splitlines()[0]
        remedy = "; close the program that has it open for writing" if "lock" in first else ""
        raise StoreError(f"{path} cannot be opened: {first}{remedy}") from error
    try:
        _check_version(connection, path)
        yield connection
    finally:
        connection.close()


def ingest(path: Path, folders: Sequence[Path]) -> int:
    """Add the shards of these run folders; what is already there stays as it is. Returns the number of new cells.

    Raises:
        StoreError: the file is not ours, or a shard is damaged.
        MissingError: DuckDB is not installed.
    """
    if not available():
        raise MissingError("ingesting needs the package duckdb: pip install duckdb")
    import duckdb

    rows = _rows(folders)
    with file_lock(path.with_name(f".{path.name}.lock"), timeout=60):
        copy = path.with_name(f".{path.name}.next")
        _remove(copy)  # a writer that was killed may have left one, and a log that would be replayed into ours
        try:
            if path.exists():
                with connect(path):
                    shutil.copyfile(path, copy)
            else:
                _create(copy)
            with duckdb.connect(str(copy)) as connection:
                before = _count(connection)
                connection.begin()
                for table, columns in _TABLES.items():
                    _insert(connection, table, columns, rows[table], copy)
                connection.commit()
                connection.execute("CHECKPOINT")
                added = _count(connection) - before
            os.replace(copy, path)
        except (duckdb.Error, OSError) as error:
            raise StoreError(f"{path} was left as it is: {str(error).splitlines()[0]}") from error
        finally:
            _remove(copy)
    return added


def _remove(copy: Path) -> None:
    copy.unlink(missing_ok=True)
    copy.with_name(f"{copy.name}.wal").unlink(missing_ok=True)


def _create(path: Path) -> None:
    import duckdb

    with duckdb.connect() as connection:
        connection.execute(f"ATTACH '{_quoted(path)}' AS made (STORAGE_VERSION '{STORAGE_VERSION}')")
        connection.execute("USE made")
        connection.execute(SCHEMA.read_text())
        connection.execute("INSERT INTO migration (version) VALUES (?)", [SCHEMA_VERSION])
        connection.execute("USE memory")
        connection.execute("DETACH made")


def _check_version(connection: duckdb.DuckDBPyConnection, path: Path) -> None:
    import duckdb

    try:
        found = connection.execute("SELECT max(version) FROM migration").fetchone()
    except duckdb.Error as error:
        raise StoreError(f"{path} is a DuckDB file, but not one of Decodathlon's; name another --results") from error
    if found is None or found[0] is None or found[0] > SCHEMA_VERSION:
        raise StoreError(f"{path} was written by newer code (schema {found and found[0]}); update Decodathlon")


def _rows(folders: Sequence[Path]) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {table: [] for table in _TABLES}
    for folder in folders:
        run = shards.read(folder / shards.RUN_FILE)
        found = [shards.read(path) for path in shards.cells(folder)]
        model: dict[str, Any] = next((s["model"] for s in found if s["model"]), {})
        rows["run"].append({**run, "hardware": hardware_name(run["environment"], model)})
        for shard in found:
            _add_cell(rows, shard)
    return rows


def _add_cell(rows: dict[str, list[dict[str, Any]]], shard: dict[str, Any]) -> None:
    key = {"run_id": shard["run_id"], "cell_id": shard["cell_id"]}
    spec, decoder, model = shard["spec"], shard["decoder"], shard["model"]
    rows["cell"].append(
        {
            **key,
            **{k: spec[k] for k in ("suite", "suite_version", "slice", "scale", "seed")},
            **{k: shard[k] for k in ("started", "status", "reason", "error", "seconds", "notes", "data", "sizes")},
            "decoder": decoder.get("spec", spec["decoder"]),
            "family": decoder.get("family"),
            "params": decoder.get("params", {}),
            "claim": decoder.get("claim"),
            "model": model.get("name", spec["model"]),
            "dtype": model.get("dtype", spec["dtype"]),
            "device": model.get("device", spec["device"]),
            "dataset": shard["data"].get("dataset"),
        }
    )
    rows["metric"] += [{**key, **metric} for metric in shard["metrics"]]
    rows["sample"] += [{**key, "place": i, **sample} for i, sample in enumerate(shard["samples"])]


def _insert(
    connection: duckdb.DuckDBPyConnection,
    table: str,
    columns: Sequence[str],
    rows: Sequence[dict[str, Any]],
    copy: Path,
) -> None:
    """Through a file of JSON lines, which DuckDB reads as a whole; it takes single rows slowly."""
    if not rows:
        return
    types = dict(
        connection.execute(
            "SELECT column_name, data_type FROM duckdb_columns() WHERE table_name = ?", [table]
        ).fetchall()
    )
    file = copy.with_name(f"{copy.name}.{table}.jsonl")
    try:
        with file.open("w", encoding="utf-8") as handle:
            for row in rows:
                handle.write(_json_line({c: row.get(c) for c in columns}))
        spec = ", ".join(f"{c}: '{types[c]}'" for c in columns)
        names = ", ".join(columns)
        connection.execute(
            f"INSERT OR IGNORE INTO {table} ({names}) SELECT {names} FROM read_json('{_quoted(file)}', "
            f"format = 'newline_delimited', columns = {{{spec}}}, maximum_object_size = 268435456)"
        )
    finally:
        file.unlink(missing_ok=True)


def _json_line(row: dict[str, Any]) -> str:
    import json

    return json.dumps(shards.plain(row), ensure_ascii=False, allow_nan=False) + "\n"


def _count(connection: duckdb.DuckDBPyConnection) -> int:
    row = connection.execute("SELECT count(*) FROM cell").fetchone()
    return int(row[0]) if row else 0


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")
