"""What the page Exactness asks of the results. SQL only, as queries.py."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from decodathlon.leaderboard.queries import Row, as_rows

if TYPE_CHECKING:
    import duckdb

#: The suites of targets whose law is known exactly.
AUDIT, ISING = "audit", "ising"


def audits(connection: duckdb.DuckDBPyConnection) -> list[Row]:
    """The newest audit of each decoder, whatever became of it, with its verdict; what failed first."""
    return as_rows(
        connection,
        f"""
        WITH newest AS (
            FROM known_cell WHERE suite = '{AUDIT}'
            QUALIFY row_number() OVER (PARTITION BY decoder ORDER BY started DESC, run_id DESC) = 1
        ), numbers AS (
            FROM (SELECT run_id, cell_id, metric, value FROM metric SEMI JOIN newest USING (run_id, cell_id))
            PIVOT (any_value(value)
                   FOR metric IN ('tvd', 'tvd_floor', 'tvd_floor_ratio', 'goodness_p', 'visible_tvd',
                                  'definition_gap')
                   GROUP BY run_id, cell_id)
        )
        SELECT c.run_id, c.cell_id, c.decoder, c.claim, c.status, c.reason, c.scale, c.started, c.hardware,
               c.git_commit, c.git_dirty, v.audit AS verdict, c.sizes->>'draws' AS draws, n.tvd, n.tvd_floor AS floor,
               n.tvd_floor_ratio AS ratio, n.goodness_p AS p, n.visible_tvd AS visible,
               n.definition_gap AS gap
        FROM newest c
        LEFT JOIN audited v USING (run_id, cell_id)
        LEFT JOIN numbers n USING (run_id, cell_id)
        ORDER BY list_position(['fail', 'weak', 'self', 'pass'], v.audit) NULLS LAST, c.status <> 'ok', c.decoder
        """,
    )


def outcomes(connection: duckdb.DuckDBPyConnection, run_id: str, cell_id: str) -> list[Row]:
    """Of one audit, every text with its probability under the claimed law and how often it came; likeliest first."""
    found = connection.execute(
        "SELECT data FROM sample WHERE run_id = $run AND cell_id = $cell AND row = 'counts'",
        {"run": run_id, "cell": cell_id},
    ).fetchone()
    data = json.loads(found[0]) if found else {}
    if "law" not in data:
        return []
    total = sum(data["counts"])
    texts = [" ".join(map(str, o)) for o in data["outcomes"]] + ["any other"]
    rows = [
        {"text": text, "law": p, "drawn": count / total}
        for text, p, count in zip(texts, data["law"], data["counts"], strict=True)
        if p > 0 or count > 0
    ]
    return sorted(rows, key=lambda row: -row["law"])


def targets(connection: duckdb.DuckDBPyConnection) -> list[str]:
    """The spin models on which a distance over draws is known."""
    found = connection.execute(
        f"SELECT DISTINCT slice FROM cell c JOIN sample s USING (run_id, cell_id) "
        f"WHERE suite = '{ISING}' AND s.row LIKE 'after-%' ORDER BY slice"
    )
    return [name for (name,) in found.fetchall()]


def curves(connection: duckdb.DuckDBPyConnection, target: str) -> list[Row]:
    """Distance to the law over draws and seconds, of the newest cell of each decoder on one spin model, place by place;
    that measured last comes first."""
    return as_rows(
        connection,
        f"""
        SELECT c.decoder, (s.data->>'draws')::INTEGER AS draws, (s.data->>'tvd')::DOUBLE AS tvd,
               (s.data->>'independent')::DOUBLE AS independent, (s.data->>'seconds')::DOUBLE AS seconds,
               c.hardware || ', ' || c.scale AS place
        FROM (
            FROM known_cell WHERE suite = '{ISING}' AND slice = $target AND status IN ('ok', 'partial')
            QUALIFY row_number() OVER (
                PARTITION BY decoder, hardware, scale ORDER BY git_dirty, started DESC, run_id DESC) = 1
        ) c
        JOIN sample s USING (run_id, cell_id)
        WHERE s.row LIKE 'after-%'
        ORDER BY max(c.started) OVER (PARTITION BY c.hardware, c.scale) DESC, c.decoder, draws
        """,
        {"target": target},
    )
