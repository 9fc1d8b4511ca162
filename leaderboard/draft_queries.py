"""What the page Speculation asks of the results. SQL only, as queries.py."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from decodathlon.leaderboard.queries import Row, as_rows

if TYPE_CHECKING:
    import duckdb

#: The metrics of a decoder that drafts, in the order of the page's table.
METRICS = (
    "ratio_to_greedy",
    "ratio_to_greedy(decode)",
    "ratio_to_greedy(without loops)",
    "ratio_to_greedy(per token)",
    "length_to_greedy",
    "greedy_match",
    "ratio_to_baseline",
    "ratio_to_baseline(per token)",
    "ratio_to_self",
    "ratio_predicted",
    "tau",
    "tau_by_text",
    "tau(without loops)",
    "tau(to the stop token)",
    "tau_per_target_s",
    "draft_acceptance",
    "draft_share",
    "keep_share",
    "looping_share",
)


def drafting(connection: duckdb.DuckDBPyConnection, cells: str = "board") -> list[Row]:
    """The newest cells of decoders that draft, with what a cycle did and took (`drafts`, as measure/drafts.py has
    it), and their numbers by metric: value, lower and upper end. `baseline` is what `ratio_to_baseline` is to.

    Args:
        cells: the table or view to look at, with the board's columns.
    """
    rows = as_rows(
        connection,
        f"""
        SELECT b.run_id, b.cell_id, b.decoder, b.slice, b.model, b.dtype, b.hardware, b.scale, b.dataset, b.seed,
        b.beside, s.data FROM sample s JOIN {cells} b USING (run_id, cell_id)
        WHERE s.row = 'drafts' AND b.status IN ('ok', 'partial')
        ORDER BY b.model, b.hardware, b.scale, b.slice, b.decoder
        """,
    )
    numbers = connection.execute(
        """
        SELECT run_id, cell_id, metric, baseline, value, ci_low, ci_high FROM metric
        WHERE list_contains($metrics, metric)
        """,
        {"metrics": list(METRICS)},
    ).fetchall()
    of: dict[tuple[str, str], dict[str, tuple[Any, ...]]] = {}
    against: dict[tuple[str, str], str] = {}
    for run, cell, metric, baseline, *found in numbers:
        of.setdefault((run, cell), {})[metric] = tuple(found)
        if metric == "ratio_to_baseline":
            against[run, cell] = baseline
    return [
        row
        | {
            "drafts": json.loads(row.pop("data")),
            "numbers": of.get((row["run_id"], row["cell_id"]), {}),
            "baseline": against.get((row["run_id"], row["cell_id"])),
        }
        for row in rows
    ]
