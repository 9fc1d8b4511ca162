"""Results that a team shares: in PostgreSQL, through DuckDB's own extension, with a mirror of them in a file.

`--results postgres:...` stands for that mirror. Whoever reads gets it as it is there now, and everything that reads a
results file reads it; what is ingested goes to the team's database first. Several machines may do so at once.

The connection is libpq's: keywords or an address. A password has no place in it, for it would stand in records and
messages; libpq finds one in PGPASSWORD, in ~/.pgpass or by PGSERVICEFILE.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decodathlon.harness.errors import MissingError, SpecError, StoreError
from decodathlon.harness.results import environment, migrations, rows, shards

if TYPE_CHECKING:
    import duckdb

#: What a connection begins with, on the command line.
PREFIXES = ("postgres:", "postgresql:")
#: Our tables in the team's database.
SCHEMA = "decodathlon"
#: Seconds to reach the server, and to wait for somebody else's ingest.
REACH, WAIT = 10, 60
#: Names our lock among those of the database.
LOCK = 7309453
#: What is kept of the connection beside the mirror.
LINK = ".team.json"
_TYPES = {"DOUBLE": "double precision"}


def path_of(text: str) -> Path:
    """A results file as an option names it; for a team's database the mirror, which then knows where it belongs.

    Raises:
        SpecError: the connection holds a password.
    """
    if not text.startswith(PREFIXES):
        return Path(text)
    dsn = text if "://" in text else text.partition(":")[2].strip()
    plain = urllib.parse.unquote(dsn)
    if re.search(r"passw|secret", plain, re.IGNORECASE) or re.search(r"://[^?]*:[^?]*@", plain):
        raise SpecError("--results: leave the password out; libpq finds it in PGPASSWORD or ~/.pgpass")
    if not re.search(r"\w", dsn.partition("://")[2] or dsn):
        raise SpecError(f"--results {text}: it names no database, as postgres:host=HOST dbname=NAME does")
    name = hashlib.sha256(dsn.encode()).hexdigest()[:6]
    mirror = environment.results_file().resolve().with_name(f"team-{name}.duckdb")
    link = _link(mirror)
    if not link.exists() and mirror.parent.is_dir():
        shards.write(link, {"attach": dsn})
    return mirror


def of(path: Path) -> str | None:
    """The connection of the database that a file mirrors; None for a file of its own."""
    link = _link(path)
    if not link.is_file():
        return None
    found = shards.read(link).get("attach")
    if not isinstance(found, str):
        raise StoreError(f"{link} names no database; remove it, and name the database again")
    return found


def _link(path: Path) -> Path:
    return path.with_suffix(LINK)


def check(dsn: str) -> None:
    """
    Raises:
        MissingError: DuckDB's extension is not installed.
        StoreError: the database cannot be reached, or was written by newer code.
    """
    with _connected(dsn, write=True):
        return


def ingest(dsn: str, stagings: list[Callable[[duckdb.DuckDBPyConnection], None]]) -> list[tuple[int, int, list[str]]]:
    """Merge rows into the team's tables; those of one staging come all or not at all.

    Args:
        stagings: each puts rows into the `staged_*` tables of a connection that has ours.

    Returns:
        What `rows.merge` says of each.
    """
    found = []
    for stage in stagings:
        with _connected(dsn, write=True, prepared=stage) as connection:
            connection.execute("BEGIN")
            try:
                # Before the first look: what is seen is what stood there when the lock was had. Readers do not wait.
                lock = f"SET LOCAL lock_timeout = '{WAIT}s'; LOCK TABLE {SCHEMA}.run IN SHARE ROW EXCLUSIVE MODE"
                connection.execute("CALL postgres_execute('team', ?)", [lock])
                found.append(rows.merge(connection))
                connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(Exception):  # the connection may be what broke; then it is rolled back there
                    connection.execute("ROLLBACK")
                raise
    return found


def refresh(path: Path, dsn: str, create: Callable[[Path], None]) -> None:
    """Bring the mirror up to what the database has, unless it is.

    Args:
        create: makes an empty results file.
    """
    with _connected(dsn, write=False) as connection:
        now = _state(connection)
        link = _link(path)
        known = shards.read(link)
        if path.exists() and known.get("state") == now:
            return
        copy = path.with_name(f".{path.name}.{os.getpid()}")
        copy.unlink(missing_ok=True)
        try:
            create(copy)
            connection.execute(f"ATTACH '{rows.quoted(copy)}' AS mirror")
            connection.execute("BEGIN")
            for table, columns in rows.TABLES.items():
                names = ", ".join(columns)
                connection.execute(f"INSERT INTO mirror.{table} ({names}) SELECT {names} FROM team.{table}")
            connection.execute("COMMIT")
            connection.execute("DETACH mirror")
            os.replace(copy, path)
        finally:
            copy.unlink(missing_ok=True)
        shards.write(link, known | {"state": now})


def _state(connection: duckdb.DuckDBPyConnection) -> list[str]:
    """What changes whenever something is ingested."""
    row = connection.execute(
        "SELECT count(*), max(started), sum(json_array_length(coalesce(attempts, '[]'))), "
        "(SELECT count(*) FROM team.gate), (SELECT max(judged) FROM team.gate), (SELECT count(*) FROM team.run) "
        "FROM team.cell"
    ).fetchone()
    return [str(value) for value in row or ()]


@contextmanager
def _connected(
    dsn: str, *, write: bool, prepared: Callable[[duckdb.DuckDBPyConnection], None] = lambda connection: None
) -> Iterator[duckdb.DuckDBPyConnection]:
    """DuckDB with the team's database attached as `team`; who writes has made our tables there.

    Args:
        prepared: what is done before, with our own tables in memory at hand.
    """
    import duckdb

    os.environ.setdefault("PGCONNECT_TIMEOUT", str(REACH))
    with duckdb.connect(config={"autoinstall_known_extensions": "false"}) as connection:
        try:
            connection.execute("LOAD postgres")
        except duckdb.Error:
            raise MissingError(
                f"--results postgres: needs DuckDB's extension of that name, which DuckDB {duckdb.__version__} has not "
                "installed here; `python -c \"import duckdb; duckdb.sql('INSTALL postgres')\"` fetches it"
            ) from None
        migrations.migrate(connection, 0)
        prepared(connection)
        try:
            connection.execute("SET pg_null_byte_replacement = '\ufffd'")
            only = "" if write else ", READ_ONLY"
            attach = f"ATTACH '{_escaped(dsn)}' AS team (TYPE postgres, SCHEMA '{SCHEMA}'{only})"
            connection.execute(attach)
            version = _version(connection)
            if write and version < migrations.NEWEST:
                made = ";\n".join(_tables(connection, anew=version == 0))
                connection.execute("CALL postgres_execute('team', ?, use_transaction = false)", [made])
                connection.execute("DETACH team")  # it remembers what tables there were
                connection.execute(attach)
            _refuse(version, write)
            if write:
                connection.execute("USE team")
            yield connection
        except duckdb.Error as error:
            raise StoreError(f"--results postgres: {_told(error, dsn)}") from None


def _version(connection: duckdb.DuckDBPyConnection) -> int:
    """The schema of the attached database; 0 where it has none of our tables."""
    import duckdb

    try:
        found = connection.execute("SELECT max(version) FROM team.migration").fetchone()
    except duckdb.CatalogException:
        return 0
    return int(found[0]) if found is not None and found[0] is not None else 0


def _refuse(version: int, write: bool) -> None:
    """
    Raises:
        StoreError: nobody has ingested anything there yet, or newer code has.
    """
    if version > migrations.NEWEST:
        raise StoreError(f"--results postgres: it was written by newer code (schema {version}); update Decodathlon")
    if version < migrations.NEWEST and not write:
        made = "a run, or `decodathlon ingest`, makes it"
        raise StoreError(f"--results postgres: the database has no schema {migrations.NEWEST} of ours yet; {made}")


def _tables(connection: duckdb.DuckDBPyConnection, *, anew: bool) -> list[str]:
    """What makes our tables in PostgreSQL as they are in memory, with their keys, by one process at a time.

    Args:
        anew: there are none yet; else they lack what newer schemas have added.
    """
    keys = dict(
        connection.execute(
            "SELECT table_name, constraint_column_names FROM duckdb_constraints() "
            "WHERE constraint_type = 'PRIMARY KEY' AND database_name = 'memory'"
        ).fetchall()
    )
    columns: dict[str, list[str]] = {}
    for table, name, kind in connection.execute(
        "SELECT table_name, column_name, data_type FROM duckdb_columns() WHERE database_name = 'memory' "
        "AND table_name IN (SELECT table_name FROM duckdb_tables() WHERE database_name = 'memory') "
        "AND NOT internal ORDER BY table_name, column_index"
    ).fetchall():
        default = " DEFAULT now()" if name == "applied" else ""
        columns.setdefault(table, []).append(f'"{name}" {_TYPES.get(kind, kind)}{default}')
    made = [f"SELECT pg_advisory_xact_lock({LOCK})"]
    if anew:
        made.append(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
    else:  # whoever ingests has this lock, and would wait for us with others in his hands
        made.append(f"LOCK TABLE {SCHEMA}.run IN ACCESS EXCLUSIVE MODE")
    for table, parts in columns.items():
        key = [f"PRIMARY KEY ({', '.join(keys[table])})"] if table in keys else []
        made.append(f"CREATE TABLE IF NOT EXISTS {SCHEMA}.{table} ({', '.join([*parts, *key])})")
        if not anew and table != "migration":
            made += [f"ALTER TABLE {SCHEMA}.{table} ADD COLUMN IF NOT EXISTS {part}" for part in parts]
    newest = f"SELECT {migrations.NEWEST} WHERE NOT EXISTS"
    made.append(
        f"INSERT INTO {SCHEMA}.migration (version) {newest} "
        f"(SELECT 1 FROM {SCHEMA}.migration WHERE version >= {migrations.NEWEST})"
    )
    return made


def _escaped(text: str) -> str:
    return text.replace("'", "''")


def _told(error: Any, dsn: str) -> str:
    """DuckDB's words in one line, without the connection, which it repeats."""
    text = " ".join(str(error).replace(dsn, "...").split())
    return re.sub(r"password=\S+|://[^/@\s]*:[^/@\s]*@", "...", text)[:400]
