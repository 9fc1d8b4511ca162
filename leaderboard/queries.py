"""What the board asks of the results. SQL only: no Streamlit, no drawing, no judgement.

Every function takes a connection to a snapshot that `prepare` has seen, and returns plain values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from decodathlon.harness.results import measured
from decodathlon.harness.results.measured import Measured, Number
from decodathlon.harness.results.metrics import METRICS, Metric
from decodathlon.harness.results.table import LOUD

if TYPE_CHECKING:
    import duckdb

Row = dict[str, Any]
#: The spread of a decoder's speed against itself, as a logarithm, above which its reader is told.
NOISY = 0.1
#: What stands in for a decoder in rows of the harness's own operations.
HARNESS = "harness"


def part_name(suite: str, slice: str) -> str:
    """What a part of a suite is called."""
    return suite if slice == "all" else f"{suite} {slice}"


@dataclass(frozen=True)
class Setting:
    """What must be equal for decoders to share a table; the data set is part of each column instead."""

    model: str
    dtype: str
    hardware: str
    scale: str
    seed: int

    def __str__(self) -> str:
        seed = f", seed {self.seed}" if self.seed else ""
        return f"{self.model} {self.dtype}, {self.hardware}, {self.scale}{seed}"


@dataclass(frozen=True)
class Column:
    """One part of a suite on one data set: cells of different columns are never compared."""

    suite: str
    version: int
    slice: str
    dataset: str

    def __str__(self) -> str:
        return part_name(self.suite, self.slice)

    @property
    def part(self) -> tuple[str, int, str]:
        """What is measured, on whatever data."""
        return (self.suite, self.version, self.slice)


@dataclass(frozen=True)
class Cell:
    """One cell as a reader of the board needs it."""

    run_id: str
    column: Column
    family: str
    claim: str
    audit: str | None
    params: Row
    measured: Measured
    #: Why the row is greyed, a word each; empty where nothing speaks against it.
    doubts: tuple[str, ...]
    #: What the reader of its numbers must know.
    remarks: tuple[str, ...]
    #: Whether it is newer than a sound cell of the same thing, which counts in its place.
    beside: bool = False

    @property
    def decoder(self) -> str:
        return self.measured.decoder

    @property
    def key(self) -> tuple[str, str]:
        """What tells it from all other cells, also from the same one in another run."""
        return (self.run_id, self.measured.cell_id)

    @property
    def name(self) -> str:
        """The decoder without its parameters."""
        return self.decoder.partition("[")[0]

    def number(self, metric: str) -> Number | None:
        return self.measured.metrics.get(metric)


_SETTING = "model = $model AND dtype = $dtype AND hardware = $hardware AND scale = $scale AND seed = $seed"
_NUMBER = ("cell_id", "metric", "value", "unit", "better", "ci_low", "ci_high", "n", "units")


def prepare(connection: duckdb.DuckDBPyConnection) -> None:
    """Work out once per snapshot which cells are shown; a table, because every page asks. It has what pages choose by;
    what is long and only shown stays where it is.

    Those are the newest ones. Where something speaks against the newest, the newest sound one is shown as well, and the
    other stands beside it: what is doubted or failed takes nobody's place.
    """
    columns = (
        "run_id, cell_id, started, suite, suite_version, slice, scale, decoder, model, dtype, dataset, seed, hardware"
    )
    for kind in ("known", "sound"):  # in tables of few columns the newest are found in half the time
        connection.execute(f"CREATE TEMP TABLE {kind} AS SELECT {columns}, status FROM {kind}_cell")
    connection.execute(f"CREATE TEMP TABLE newest AS SELECT {columns} FROM newest_of('known')")
    doubted = connection.execute("SELECT 1 FROM newest ANTI JOIN sound USING (run_id, cell_id) LIMIT 1").fetchone()
    connection.execute(  # where nothing is doubted, and in a large file that saves time, the newest are the sound ones
        "CREATE TEMP TABLE newest_sound AS "
        + (f"SELECT {columns} FROM newest_of('sound')" if doubted else "FROM newest")
    )
    connection.execute(
        f"""
        CREATE TABLE board AS
        WITH shown AS (
            SELECT n.run_id, n.cell_id, EXISTS (
                FROM newest_sound s WHERE (s.run_id, s.cell_id) <> (n.run_id, n.cell_id)
                AND (s.suite, s.suite_version, s.slice, s.scale, s.decoder, s.model, s.seed, s.hardware)
                    = (n.suite, n.suite_version, n.slice, n.scale, n.decoder, n.model, n.seed, n.hardware)
                AND (n.dataset IS NULL OR n.dataset IS NOT DISTINCT FROM s.dataset)
                AND (coalesce(n.dtype, '') IN ('', 'auto') OR n.dtype = s.dtype)
            ) AND NOT EXISTS (FROM newest_sound s WHERE (s.run_id, s.cell_id) = (n.run_id, n.cell_id)) AS beside
            FROM newest n
            UNION ALL
            SELECT s.run_id, s.cell_id, false AS beside FROM newest_sound s ANTI JOIN newest n USING (run_id, cell_id)
        )
        SELECT run_id, cell_id, started, suite, suite_version, slice, scale, decoder,
               split_part(decoder, '[', 1) AS name, family, coalesce(claim, '') AS claim, verdict.audit,
               model, coalesce(dtype, '') AS dtype, coalesce(device, '') AS device, coalesce(dataset, '') AS dataset,
               data->>'source' AS source, seed, status, coalesce(reason, '') AS reason, notes, hardware, git_dirty,
               beside,
               coalesce(NOT 1 BETWEEN a.ci_low AND a.ci_high AND abs(ln(a.value)) > {measured.BIAS}, false) AS biased,
               greatest(abs(ln(a.value)), abs(ln(a.ci_low)), abs(ln(a.ci_high))) AS spread
        FROM known_cell
        JOIN shown USING (run_id, cell_id)
        LEFT JOIN (FROM metric WHERE metric = 'ratio_to_self' AND value > 0 AND coalesce(ci_low, value) > 0) a
            USING (run_id, cell_id)
        LEFT JOIN verdict USING (decoder, decoder_sha256)
        WHERE decoder <> '{HARNESS}' ORDER BY model, hardware, scale, suite, slice, decoder
        """
    )
    # Ratios to different baselines are different metrics.
    connection.execute(
        """
        CREATE VIEW number AS
        SELECT * REPLACE (CASE WHEN metric = 'ratio_to_baseline' THEN metric || '(' || baseline || ')' ELSE metric END
                          AS metric)
        FROM metric
        """
    )


def settings(connection: duckdb.DuckDBPyConnection) -> list[tuple[Setting, int]]:
    """Every setting with the number of its decoders; the one measured last comes first, that of the toys at the end.

    What failed before its model was loaded knows no type; it makes a setting only where nothing else did.
    """
    rows = connection.execute(
        """
        SELECT model, dtype, hardware, scale, seed, decoders
        FROM (SELECT model, dtype, hardware, scale, seed, count(DISTINCT decoder) AS decoders, max(started) AS newest
              FROM board GROUP BY ALL)
        QUALIFY dtype NOT IN ('', 'auto') OR
                bool_and(dtype IN ('', 'auto')) OVER (PARTITION BY model, hardware, scale, seed)
        ORDER BY model = 'toy', newest DESC, model, dtype, hardware, scale, seed
        """
    ).fetchall()
    return [(Setting(*row[:5]), row[5]) for row in rows]


def elsewhere(connection: duckdb.DuckDBPyConnection, setting: Setting) -> list[Row]:
    """Decoders that were measured, but not in this setting; with the setting in which they were measured last."""
    return as_rows(
        connection,
        f"""
        SELECT name,
               arg_max({{model: model, dtype: dtype, hardware: hardware, scale: scale, seed: seed}}, started) AS at
        FROM board WHERE status IN ('ok', 'partial') GROUP BY name
        HAVING count(*) FILTER ({_SETTING}) = 0 ORDER BY name
        """,
        vars(setting),
    )


def cells(
    connection: duckdb.DuckDBPyConnection,
    setting: Setting,
    metrics: Sequence[str] | None = None,
    name: str = "",
    column: Column | None = None,
) -> list[Cell]:
    """The newest cells of a setting.

    A cell that failed before its model was loaded knows no dtype; it counts to every dtype of its model.

    Args:
        metrics: only these, which is faster; None for all.
        name: only cells of this decoder.
        column: only cells of this part of a suite, on this data or on none.
    """
    where = _SETTING.replace("dtype = $dtype", "dtype IN ($dtype, '', 'auto')")
    values = vars(setting) | {"name": name, "metrics": list(metrics or ())}
    where += " AND ($name = '' OR name = $name)"
    if column is not None:
        where += " AND suite = $suite AND suite_version = $version AND slice = $slice AND dataset IN ('', $dataset)"
        values |= vars(column)
    rows = as_rows(
        connection,
        f"""
        SELECT * EXCLUDE (place) FROM (SELECT *, rowid AS place FROM board WHERE {where})
        JOIN (SELECT run_id, cell_id, params, weights, data, sizes FROM cell) USING (run_id, cell_id) ORDER BY place
        """,
        values,
    )
    numbers: dict[tuple[str, str], dict[str, Number]] = {}
    found = connection.execute(
        f"""
        SELECT m.run_id, {", ".join("m." + c for c in _NUMBER)} FROM number m JOIN board b USING (run_id, cell_id)
        WHERE {where} AND (len($metrics) = 0 OR list_contains($metrics, m.metric))
        """,
        values,
    )
    for row in found.fetchall():
        entry = dict(zip(_NUMBER, row[1:], strict=True))
        numbers.setdefault((row[0], entry["cell_id"]), {})[entry["metric"]] = measured.number(entry)
    return [_cell(row, numbers.get((row["run_id"], row["cell_id"]), {})) for row in rows]


def columns(connection: duckdb.DuckDBPyConnection, setting: Setting) -> dict[Column, list[str]]:
    """Every part of a suite that was measured in a setting, with its metrics; stand-in data come last."""
    found = connection.execute(
        f"""
        SELECT suite, suite_version, slice, dataset, list(DISTINCT m.metric ORDER BY m.metric)
        FROM board b JOIN number m USING (run_id, cell_id) WHERE {_SETTING}
        GROUP BY ALL ORDER BY bool_and(source = 'stand-in'), suite, slice, dataset
        """,
        vars(setting),
    )
    return {Column(*row[:4]): row[4] for row in found.fetchall()}


def baselines(connection: duckdb.DuckDBPyConnection, setting: Setting) -> dict[str, str]:
    """Of each ratio, the decoder that it is relative to."""
    found = connection.execute(
        f"SELECT DISTINCT m.metric, m.baseline FROM number m JOIN board b USING (run_id, cell_id) "
        f"WHERE {_SETTING} AND m.baseline IS NOT NULL AND starts_with(m.metric, 'ratio_to_') "
        f"AND m.metric <> 'ratio_to_self' ORDER BY ALL",
        vars(setting),
    )
    return dict(found.fetchall())


def suites(connection: duckdb.DuckDBPyConnection) -> dict[str, Row]:
    """What each suite asks and shows, as the newest run that described it said."""
    return _described(connection, "suites")


def decoders(connection: duckdb.DuckDBPyConnection) -> dict[str, Row]:
    """What each decoder is, as the newest run that described it said; those that no run described have an empty row."""
    names = connection.execute("SELECT DISTINCT name FROM board ORDER BY name").fetchall()
    return {name: {} for (name,) in names} | _described(connection, "decoders")


def decoder_files(connection: duckdb.DuckDBPyConnection, name: str) -> list[str]:
    """The files of their own that the newest run with a decoder was given."""
    found = connection.execute(
        "SELECT r.options->>'$.decoder_file[*]' FROM board b JOIN run r USING (run_id) WHERE b.name = $name "
        "ORDER BY r.started DESC LIMIT 1",
        {"name": name},
    ).fetchone()
    return list(found[0]) if found and found[0] else []


def metrics(connection: duckdb.DuckDBPyConnection) -> dict[str, Metric]:
    """The table of metrics with those that plugins added to the runs."""
    known = {
        name: Metric(row["unit"], row["better"], row["meaning"], row["kind"])
        for name, row in _described(connection, "metrics").items()
    }
    known |= METRICS
    strange = connection.execute("SELECT DISTINCT metric, unit, better FROM number ORDER BY ALL").fetchall()
    for name, unit, better in strange:
        like = known.get(name.partition("(")[0])
        known.setdefault(name, like or Metric(unit, better, "", "context"))
    return known


def history(connection: duckdb.DuckDBPyConnection, setting: Setting, name: str, metric: str) -> list[Row]:
    """One metric of one decoder over its newest runs, oldest first; versions of a suite are told apart."""
    newest_first = as_rows(
        connection,
        f"""
        SELECT c.run_id, c.started, c.decoder, c.suite, c.suite_version, c.slice, coalesce(c.dataset, '') AS dataset,
               m.value, m.ci_low, m.ci_high, m.n, c.git_commit, c.git_dirty
        FROM known_cell c JOIN number m USING (run_id, cell_id)
        WHERE {_SETTING} AND split_part(c.decoder, '[', 1) = $name AND m.metric = $metric AND isfinite(m.value)
        ORDER BY c.started DESC, c.decoder DESC LIMIT 2000
        """,
        vars(setting) | {"name": name, "metric": metric},
    )
    return newest_first[::-1]


def failures(connection: duckdb.DuckDBPyConnection, name: str, most: int = 200) -> list[Row]:
    """Cells of a decoder that were not measured whole, in any run and setting, newest first."""
    return as_rows(
        connection,
        """
        SELECT started, run_id, suite, slice, decoder, model, hardware, scale, status, reason, error, log
        FROM known_cell
        WHERE split_part(decoder, '[', 1) = $name AND status <> 'ok' ORDER BY started DESC LIMIT $most
        """,
        {"name": name, "most": most},
    )


def runs(connection: duckdb.DuckDBPyConnection) -> list[Row]:
    """Every run, newest first."""
    return as_rows(
        connection,
        """
        SELECT run_id, r.started, r.hardware, r.git_commit, r.git_dirty, count(c.cell_id) AS cells,
               count(c.cell_id) FILTER (c.status = 'ok') AS ok, string_agg(DISTINCT c.model, ', ') AS models,
               string_agg(DISTINCT c.scale, ', ') AS scales
        FROM run r LEFT JOIN cell c USING (run_id) GROUP BY ALL ORDER BY r.started DESC, run_id DESC
        """,
    )


def run(connection: duckdb.DuckDBPyConnection, run_id: str) -> Row:
    """The record of one run; `environment` and `options` as mappings."""
    (row,) = as_rows(
        connection,
        "SELECT run_id, started, hardware, git_commit, git_dirty, environment, options FROM run WHERE run_id = $run",
        {"run": run_id},
    )
    return row | {part: json.loads(row[part] or "{}") for part in ("environment", "options")}


def gates(connection: duckdb.DuckDBPyConnection, run_id: str) -> list[Row]:
    """What the gates said of a run: what failed first."""
    return as_rows(
        connection,
        """
        SELECT gate, decoder, outcome, detail FROM gate WHERE run_id = $run
        ORDER BY list_position(['fail', 'inconclusive', 'pass', 'not run'], outcome), gate, decoder
        """,
        {"run": run_id},
    )


def run_cells(connection: duckdb.DuckDBPyConnection, run_id: str) -> list[Row]:
    """The cells of one run in the order in which they were measured."""
    return as_rows(
        connection,
        """
        SELECT suite, slice, decoder, claim, model, dtype, dataset, data->>'source' AS source, scale, seed, status,
               coalesce(reason, '') AS reason, (seconds->>'total')::DOUBLE AS seconds, notes->>'$[*]' AS notes,
               error, log, coalesce(json_array_length(attempts), 0) AS attempts_before
        FROM cell WHERE run_id = $run ORDER BY started, cell_id
        """,
        {"run": run_id},
    )


def numbers_as_rows(connection: duckdb.DuckDBPyConnection, setting: Setting) -> list[Row]:
    """Every number of a setting, one per row, as a table for other programs."""
    return as_rows(
        connection,
        f"""
        SELECT b.suite, b.slice, b.dataset, b.decoder, b.family, b.claim, b.model, b.dtype, b.hardware, b.scale, b.seed,
               b.status, b.reason, m.metric, m.value, m.unit, m.better, m.ci_low, m.ci_high, m.n, m.baseline,
               b.git_dirty, b.source, b.biased, b.notes, b.run_id, b.cell_id
        FROM board b LEFT JOIN number m USING (run_id, cell_id) WHERE {_SETTING} ORDER BY ALL
        """,
        vars(setting),
    )


def overheads(connection: duckdb.DuckDBPyConnection) -> list[Row]:
    """What the harness itself costs, newest measurement on each machine."""
    return as_rows(
        connection,
        f"""
        SELECT c.hardware, c.slice AS operation, m.value, m.ci_low, m.ci_high, m.n
        FROM latest_cell c JOIN metric m USING (run_id, cell_id) WHERE c.decoder = '{HARNESS}' ORDER BY ALL
        """,
    )


def _cell(row: Row, numbers: dict[str, Number]) -> Cell:
    column = Column(row["suite"], row["suite_version"], row["slice"], row["dataset"])
    keys = ("cell_id", "suite", "suite_version", "slice", "scale", "decoder", "model", "dtype", "device", "seed",
            "status", "reason")  # fmt: skip
    doubts = {
        "stand-in data": row["source"] == "stand-in",
        "unverified data": row["dataset"].startswith("unverified"),
        "changed code": row["git_dirty"] is True,
        "unknown code": row["git_dirty"] is None,
        "audit failed": row["audit"] == "fail",
        "A/A failed": row["biased"],
    }
    whole = row["status"] in ("ok", "partial")
    notes = [note for note in json.loads(row["notes"] or "[]") if whole and note.startswith(LOUD)]
    partial = [f"partial: {row['reason']}"] if row["status"] == "partial" else []
    if whole and (row["spread"] or 0) > NOISY:
        partial.append(f"noisy: its speed against itself spreads by {math.expm1(row['spread']):.0%}")
    return Cell(
        run_id=row["run_id"],
        column=column,
        family=row["family"] or row["name"],
        claim=row["claim"],
        audit=row["audit"],
        params=json.loads(row["params"] or "{}"),
        measured=Measured(
            **{k: row[k] for k in keys},
            dataset=row["dataset"] or None,
            metrics=numbers,
            basis=measured.basis(*(json.loads(row[part] or "{}") or {} for part in ("weights", "data", "sizes"))),
        ),
        doubts=tuple(word for word, so in doubts.items() if so),
        remarks=(*partial, *notes),
        beside=row["beside"],
    )


def _described(connection: duckdb.DuckDBPyConnection, part: str) -> dict[str, Row]:
    found: dict[str, Row] = {}
    for (about,) in connection.execute(
        f"SELECT about->'{part}' FROM run WHERE about IS NOT NULL ORDER BY started, run_id"
    ).fetchall():
        found |= json.loads(about or "{}")
    return found


def as_rows(connection: duckdb.DuckDBPyConnection, sql: str, values: Row | None = None) -> list[Row]:
    """What a query finds, one mapping per row; values that it does not name are left out."""
    found = connection.execute(sql, {k: v for k, v in (values or {}).items() if f"${k}" in sql})
    names = [column[0] for column in found.description or ()]
    return [dict(zip(names, row, strict=True)) for row in found.fetchall()]
