"""What decoders answered: the samples of a cell, each with its question where the run's own lines are at hand.

Questions are not ours to publish. They stand in the lines that a run leaves beside its shards (lines.py), where it was
measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decodathlon.harness.results import shards
from decodathlon.harness.results.lines import Lines, path_of

if TYPE_CHECKING:
    import duckdb

#: What a line of `export --samples` says of its cell.
OF_A_CELL = ("run_id", "suite", "slice", "decoder", "model", "dtype", "scale", "seed")


def questions(results: Path, run_id: str, cell_id: str) -> dict[str, dict[str, Any]]:
    """By row what was asked (`prompt`, and `choices` where there were some); nothing where the lines are elsewhere."""
    return Lines.read(path_of(shards.folder_of(results, run_id), cell_id))


def samples(connection: duckdb.DuckDBPyConnection, run_id: str, cell_id: str) -> dict[str, Any]:
    """By row what a cell keeps of it, in the order of measurement."""
    found = connection.execute(
        "SELECT row, data FROM sample WHERE run_id = $run AND cell_id = $cell ORDER BY place",
        {"run": run_id, "cell": cell_id},
    )
    return {row: json.loads(data) for row, data in found.fetchall()}


def grades(connection: duckdb.DuckDBPyConnection, run_id: str, cell_id: str) -> dict[str, Any]:
    """The same without texts, which may be long: what `budgets.graded` needs of it."""
    found = connection.execute(
        """
        SELECT row, try_cast(data->>'correct' AS BOOLEAN), try_cast(data->>'says' AS BIGINT),
               try_cast(data->>'tokens' AS BIGINT), try_cast(data->>'log_prob' AS DOUBLE)
        FROM sample WHERE run_id = $run AND cell_id = $cell ORDER BY place
        """,
        {"run": run_id, "cell": cell_id},
    )
    names = ("correct", "says", "tokens", "log_prob")
    return {
        row: {k: v for k, v in zip(names, values, strict=True) if v is not None} for row, *values in found.fetchall()
    }


def lines(connection: duckdb.DuckDBPyConnection, results: Path, where: str) -> Iterator[dict[str, Any]]:
    """One mapping per sample of the cells that a condition chooses, with its question where that is at hand."""
    names = (*OF_A_CELL, "cell_id")
    cells = connection.execute(f"SELECT {', '.join(names)} FROM cell WHERE {where} ORDER BY started, cell_id")
    for values in cells.fetchall():
        cell = dict(zip(names, values, strict=True))
        asked = questions(results, cell["run_id"], cell["cell_id"])
        for row, data in samples(connection, cell["run_id"], cell["cell_id"]).items():
            known = data if isinstance(data, dict) else {"value": data}
            problem = asked.get(row, {}).get("prompt")
            yield {"row": row, "problem": problem} | known | {k: cell[k] for k in OF_A_CELL}
