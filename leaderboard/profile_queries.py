"""What the page Profile asks of the results. SQL only, as queries.py."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from decodathlon.leaderboard.queries import Row, as_rows

if TYPE_CHECKING:
    import duckdb


def profiled(connection: duckdb.DuckDBPyConnection) -> list[Row]:
    """The cells that were profiled, newest first."""
    return as_rows(
        connection,
        """
        SELECT c.run_id, c.cell_id, c.decoder, c.slice, c.model, c.scale, c.started, c.hardware
        FROM sample s JOIN known_cell c USING (run_id, cell_id)
        WHERE s.row = 'profile' AND c.status = 'ok'
        ORDER BY c.started DESC, c.decoder
        """,
    )


def profile(connection: duckdb.DuckDBPyConnection, run_id: str, cell_id: str) -> dict[str, Any]:
    """One profile, as `harness/measure/profile.py` stores it."""
    found = connection.execute(
        "SELECT data FROM sample WHERE run_id = $run AND cell_id = $cell AND row = 'profile'",
        {"run": run_id, "cell": cell_id},
    ).fetchone()
    stored: dict[str, Any] = json.loads(found[0]) if found else {}
    return stored
