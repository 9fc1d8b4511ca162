"""The store: what was measured into `results.duckdb`, by one writer at a time, without ever blocking a reader.

New rows are added to a copy of the file, which is then put in its place. A reader that has the old file open goes on
reading it; the next one opens the new file. A file that we cannot read is never replaced.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from decodathlon.harness.errors import MissingError, StoreError
from decodathlon.harness.locks import file_lock
from decodathlon.harness.results import migrations, reader, reading, rows, shards, team

if TYPE_CHECKING:
    import duckdb

#: The format on disk, so that DuckDB 1.4 reads what 2.0 writes.
STORAGE_VERSION = "v1.2.0"
#: Bytes per block: the smallest there is, because most of our columns are short.
BLOCK_BYTES = 16384


class Ingested(NamedTuple):
    """What came of adding shards or files."""

    #: Cells that were not there before.
    added: int
    #: Cells of a resumed run that took the place of their earlier attempt.
    replaced: int
    #: What is there already and says something else; the old row stayed.
    conflicts: list[str]


def available() -> bool:
    """Whether DuckDB and pydantic are installed; without them a run still leaves its shards."""
    import importlib.util

    return all(importlib.util.find_spec(name) is not None for name in ("duckdb", "pydantic"))


def check(path: Path) -> None:
    """Look at a results file before a run begins.

    Raises:
        StoreError: its folder is missing or cannot be written, or the file is not one of ours, or newer than this code.
    """
    if (dsn := team.of(path)) is not None:
        team.check(dsn)
    folder = path.resolve().parent
    if not folder.is_dir():
        raise StoreError(f"--results {path}: the folder {folder} does not exist; create it")
    if path.suffix == ".shards":
        raise StoreError(f"--results {path}: .shards is the ending of the folder beside it; use {path.stem}.duckdb")
    if path.is_dir():
        raise StoreError(f"--results {path} is a folder; name a file such as {path / 'results.duckdb'}")
    try:  # asking the file system is the only sure way: access bits say nothing of a read-only mount, or of root
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable"):
            pass
    except OSError as error:
        raise StoreError(
            f"--results {path}: the folder {folder} cannot be written ({error.strerror}); name another place"
        ) from error
    if path.exists() and available():
        with connect(path):
            return


@contextmanager
def connect(path: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A read-only connection, closed at the end of the block. A file of an older schema is read through a newer copy.

    Raises:
        StoreError: not a results file of ours, damaged, or written by newer code.
        MissingError: DuckDB is not installed.
    """
    _mirrored(path)
    with _opened(path) as connection:
        if migrations.version(connection, path) == migrations.NEWEST:
            yield connection
            return
    with tempfile.TemporaryDirectory(prefix="decodathlon-") as folder:
        copy = Path(folder) / path.name
        _copy_of(path, copy)
        with _opened(copy) as connection:
            yield connection


@contextmanager
def _opened(path: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    if not available():
        raise MissingError("reading results needs the packages duckdb and pydantic: pip install duckdb pydantic")
    import duckdb

    if not path.is_file():
        raise StoreError(f"there are no results at {path}; run `pytest suites/ --benchmark` first")
    try:
        connection = duckdb.connect(str(path), read_only=True)
    except duckdb.Error as error:
        first = str(error).splitlines()[0]
        remedy = (
            "close the program that has it open for writing"
            if "lock" in first
            else "it is damaged or no DuckDB file; move it away, the rows can be ingested again from their shards"
        )
        raise StoreError(f"{path} cannot be opened: {first}; {remedy}") from error
    with contextlib.closing(connection):
        yield connection


def ingest(path: Path, sources: Sequence[Path]) -> Ingested:
    """Add what was measured; what is already there stays as it is, unless a resumed run measured it again.

    Args:
        path: the results file, made if it is not there.
        sources: folders of runs, folders of such folders, and results files of other machines.

    Raises:
        StoreError: the file or a source is not ours, or a shard is damaged; the file is as it was.
        MissingError: DuckDB is not installed.
    """
    if not available():
        raise MissingError("ingesting needs the packages duckdb and pydantic: pip install duckdb pydantic")
    folders, files = reading.sources(sources)
    for file in files:
        if path.exists() and file.resolve() == path.resolve():
            raise StoreError(f"{file} is the results file itself")
    with tempfile.TemporaryDirectory(prefix="decodathlon-") as name:
        scratch = Path(name)
        # All that is read lies ready before the file is locked: others wait for what DuckDB does with it alone.
        ready = [reader.rows_of(batch, scratch / str(n)) for n, batch in enumerate(reading.batches(folders))]

        def staged(number: int, file: Path) -> Callable[[duckdb.DuckDBPyConnection], None]:
            """What puts the rows of another results file beside ours."""

            def stage(connection: duckdb.DuckDBPyConnection) -> None:
                copy = scratch / f"{number}.duckdb"
                _copy_of(file, copy)
                connection.execute(f"ATTACH '{rows.quoted(copy)}' AS other (READ_ONLY)")
                rows.stage_attached(connection, "other", file)
                connection.execute("DETACH other")

            return stage

        stagings: list[Callable[[duckdb.DuckDBPyConnection], None]] = [partial(rows.stage, folders=p) for p in ready]
        stagings += [staged(number, file) for number, file in enumerate(files)]

        def work(connection: duckdb.DuckDBPyConnection) -> Ingested:
            migrations.make_views(connection)  # those of this code: a view may have become faster
            merged = []
            for stage in stagings:
                stage(connection)
                merged.append(rows.merge(connection))
            return _summed(merged)

        if (dsn := team.of(path)) is not None:
            return _summed(team.ingest(dsn, stagings))
        ingested: Ingested = update(path, work)
    return ingested


def _summed(merged: Sequence[tuple[int, int, list[str]]]) -> Ingested:
    return Ingested(
        sum(added for added, _, _ in merged),
        sum(replaced for _, replaced, _ in merged),
        [line for _, _, told in merged for line in told],
    )


def _mirrored(path: Path) -> None:
    """Where the file mirrors a team's database, bring it up to date."""
    if (dsn := team.of(path)) is not None:
        with file_lock(path.with_name(f".{path.name}.lock"), timeout=60):
            team.refresh(path, dsn, _create)


def snapshot(path: Path, copy: Path, prepare: Callable[[duckdb.DuckDBPyConnection], None]) -> list[str]:
    """A private copy for a reader that stays: in the newest schema, with what runs beside the file have so far.

    Nothing of the file is held open afterwards, so that no writer ever waits for the reader.

    Args:
        path: the results file; where there is none yet, the shards beside it are all there is.
        prepare: what the reader wants to work out once; it gets the copy open for writing.

    Returns:
        What could not be read of the shards.

    Raises:
        StoreError: the file is not ours, damaged, or held by another program.
        MissingError: DuckDB is not installed.
    """
    import duckdb

    told = []
    _mirrored(path)
    try:
        if path.exists():
            _copy_of(path, copy)
        else:
            _create(copy)
        with duckdb.connect(str(copy)) as connection, tempfile.TemporaryDirectory(prefix="decodathlon-") as scratch:
            migrations.make_views(connection)
            beside = shards.runs(path)
            known = set(connection.execute("SELECT run_id, cell_id FROM cell").fetchall()) if beside else set()
            for folder in beside:
                if all((folder.name, shard.stem) in known for shard in shards.cells(folder)):
                    continue
                try:
                    rows.stage(connection, [reading.rows_of([folder], Path(scratch, folder.name))])
                except (StoreError, duckdb.Error) as error:
                    told.append(f"{folder.name} was left out: {str(error).splitlines()[0]}")
                    continue
                rows.merge(connection)
            prepare(connection)
    except (duckdb.Error, OSError) as error:
        raise StoreError(f"{path} could not be copied to {copy.parent}: {str(error).splitlines()[0]}") from error
    return told


def update(path: Path, work: Any) -> Any:
    """Run `work(connection)` on a copy of the file in the newest schema, then put the copy in its place.

    Raises:
        StoreError: the file is not ours, or it could not be written; it is then as it was.
    """
    import duckdb

    if team.of(path) is not None:
        raise StoreError(f"{path} mirrors a team's database, which takes rows of runs alone; name a file for this")
    with file_lock(path.with_name(f".{path.name}.lock"), timeout=60):
        copy = path.with_name(f".{path.name}.next")
        _remove(copy)  # a writer that was killed may have left one, and a log that would be replayed into ours
        try:
            if path.exists():
                _copy_of(path, copy)
            else:
                _create(copy)
            with duckdb.connect(str(copy)) as connection:
                result = work(connection)
                connection.execute("CHECKPOINT")
            _flush(copy)
            os.replace(copy, path)
            _log_of(path).unlink(missing_ok=True)  # it is in the new file, and does not belong to it
        except (duckdb.Error, OSError) as error:
            raise StoreError(f"{path} was left as it is: {str(error).splitlines()[0]}") from error
        finally:
            _remove(copy)
    return result


def _copy_of(path: Path, copy: Path) -> None:
    """A copy of one of our files, in the newest schema."""
    import duckdb

    with _opened(path) as connection:
        found = migrations.version(connection, path)
        shutil.copy(path, copy)  # with its permissions
        log = _log_of(path)
        if log.exists():  # what another program wrote and did not yet fold into the file
            shutil.copy(log, _log_of(copy))
    if found < migrations.NEWEST:
        with duckdb.connect(str(copy)) as connection:
            migrations.migrate(connection, found)


def _create(path: Path) -> None:
    import duckdb

    with duckdb.connect() as connection:
        connection.execute(
            f"ATTACH '{rows.quoted(path)}' AS made (STORAGE_VERSION '{STORAGE_VERSION}', BLOCK_SIZE {BLOCK_BYTES})"
        )
        connection.execute("USE made")
        migrations.migrate(connection, 0)
        connection.execute("USE memory")
        connection.execute("DETACH made")


def _flush(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def _remove(copy: Path) -> None:
    copy.unlink(missing_ok=True)
    _log_of(copy).unlink(missing_ok=True)


def _log_of(path: Path) -> Path:
    """DuckDB's write-ahead log beside a file."""
    return path.with_name(f"{path.name}.wal")
