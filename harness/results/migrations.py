"""The schema of a results file and its history: numbered SQL files that are applied in order and never edited."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from decodathlon.harness.errors import StoreError

if TYPE_CHECKING:
    import duckdb

_HERE = Path(__file__).parent
#: Number of the newest schema.
NEWEST = max(int(p.stem.partition("_")[2]) for p in _HERE.glob("schema_*.sql"))


def version(connection: duckdb.DuckDBPyConnection, path: Path) -> int:
    """The schema of an open file.

    Raises:
        StoreError: the file is not one of ours, or newer than this code.
    """
    import duckdb

    try:
        found = connection.execute("SELECT max(version) FROM migration").fetchone()
    except duckdb.Error as error:
        raise StoreError(f"{path} is a DuckDB file, but not one of Decodathlon's; name another --results") from error
    if found is None or found[0] is None:
        raise StoreError(f"{path} states no schema; it is not whole. Name another --results")
    if found[0] > NEWEST:
        raise StoreError(f"{path} was written by newer code (schema {found[0]}, we know {NEWEST}); update Decodathlon")
    return int(found[0])


def migrate(connection: duckdb.DuckDBPyConnection, begin: int) -> None:
    """Bring an open file from schema `begin` (0: empty) to the newest one."""
    for number in range(begin + 1, NEWEST + 1):
        connection.execute((_HERE / f"schema_{number}.sql").read_text(encoding="utf-8"))
        connection.execute("INSERT INTO migration (version) VALUES (?)", [number])
    make_views(connection)


def make_views(connection: duckdb.DuckDBPyConnection) -> None:
    """Make the views of this code in an open file of the newest schema."""
    connection.execute((_HERE / "views.sql").read_text(encoding="utf-8"))
