"""Does any setting of the reservoir sampler meet one of its founding note's two criteria? From stored rows.

    python scripts/reservoir_verdict.py                  # from results.duckdb
    python scripts/reservoir_verdict.py --results FILE --out FOLDER   # from your own

Prints every setting with its verdict (rivals are there for scale), and writes docs/findings/reservoir.csv and
reservoir.svg, the front of speed and quality. A criterion is a file of gates (reservoir-quality.toml and
reservoir-speed.toml, there): it holds where every gate passes, fails where one fails, and is not decided otherwise.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb

from decodathlon.harness import decoder as decoders
from decodathlon.harness.errors import DecodathlonError
from decodathlon.harness.measure.observations import compared
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.results import environment, gates, measured, store
from decodathlon.harness.results.measured import Measured
from decodathlon.harness.results.table import aligned
from decodathlon.leaderboard import charts, findings, queries

PLACE = Path(__file__).parents[1] / "docs" / "findings"
TABLE, FIGURE = PLACE / "reservoir.csv", PLACE / "reservoir.svg"
CRITERIA = {"quality": PLACE / "reservoir-quality.toml", "speed": PLACE / "reservoir-speed.toml"}
MODEL, SCALE, BASE = "smollm2-135m-instruct", "quick", "temperature"
#: The sampler without its idea, as the note leaves open and as it ought to be.
CONTROLS = ("reservoir[reuse=none]", "reservoir[size=8,reuse=none]", "reservoir-exact")
RIVALS = (BASE, "top-k", "top-p", "min-p", "greedy")
SPEED, TEXT = ("throughput", "batch-4"), ("wikitext2", "joined")
ACROSS, UPWARDS = f"ratio_to_baseline({BASE})", "sparsemax_score"


def settings() -> list[str]:
    """The 36 of the note."""
    return [d.spec for d in decoders.swept(decoders.build("reservoir"))]


def outcome(verdicts: Sequence[gates.Verdict]) -> str:
    """Of a criterion, for one setting."""
    found = {v.outcome for v in verdicts}
    if "fail" in found:
        return "fails"
    return "not measured" if "not run" in found else "holds" if found == {"pass"} else "not decided"


def judged(cells: Sequence[Measured], specs: Sequence[str]) -> dict[str, dict[str, str]]:
    """By setting, what came of each criterion."""
    found: dict[str, dict[str, str]] = {spec: {} for spec in specs}
    for name, path in CRITERIA.items():
        verdicts = gates.judge(gates.load(path), cells)
        for spec in specs:
            mine = [v for v in verdicts if v.cell is not None and v.cell.decoder == spec]
            found[spec][name] = outcome(mine) if len(mine) == len(gates.load(path)) else "not measured"
    return found


def rows(cells: Sequence[Measured], specs: Sequence[str]) -> list[dict[str, Any]]:
    """A line per decoder: its speed and perplexity beside ancestral sampling, verdicts, and the runs they are of."""
    at = {(c.decoder, c.suite, c.slice): c for c in cells}
    verdicts = judged(cells, specs) | dict.fromkeys(RIVALS, dict.fromkeys(CRITERIA, "–"))  # they are there for scale
    base = at.get((BASE, *TEXT))
    found = []
    for spec in specs:
        fast, text = at.get((spec, *SPEED)), at.get((spec, *TEXT))
        ratio = fast.metrics.get("ratio_to_baseline") if fast else None
        mixed = text.metrics.get("ppl_mixture") if text else None
        model = base.metrics.get("ppl_mixture") if base else None
        units = mixed and model and mixed.units and model.units
        gap = compared(mixed.units, model.units, "difference") if units and mixed and model else None  # type: ignore[arg-type]
        row: dict[str, Any] = {"decoder": spec}
        for name, estimate in (("ratio_to_temperature", ratio.estimate if ratio else None), ("ppl_mixture_less", gap)):
            value, low, high = estimate[:3] if estimate else (None, None, None)
            row |= {name: value, f"{name}_low": low, f"{name}_high": high}
        for metric in ("ppl_epsilon", UPWARDS):
            number = text.metrics.get(metric) if text else None
            row[metric] = number.estimate.value if number else None
        runs = {"speed_run": fast.run_id if fast else None, "text_run": text.run_id if text else None}
        found.append(row | verdicts[spec] | runs)
    return found


def figure(results: Path, shown: Sequence[str]) -> Any:
    """The chart of the board's page Trade-off, of these decoders alone."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "copy.duckdb"
        store.snapshot(results, copy, queries.prepare)
        with duckdb.connect(str(copy)) as connection:
            places = [s for s, _ in queries.settings(connection) if (s.model, s.scale) == (MODEL, SCALE)]
            every = findings.axes(
                queries.columns(connection, places[0]), queries.suites(connection), queries.metrics(connection)
            )
            wanted = ((*SPEED, ACROSS), (*TEXT, UPWARDS))
            named = {(a.column.suite, a.column.slice, a.metric): a for a in every}
            if absent := [" ".join(w) for w in wanted if w not in named]:
                raise SystemExit(f"{results} lacks {', '.join(absent)}: see the commands in reservoir.md")
            x, y = (named[w] for w in wanted)
            cells = [c for c in queries.cells(connection, places[0]) if c.decoder in shown]
            points, _ = findings.points(
                [c for c in cells if c.column in (x.column, y.column)], x, y, queries.baselines(connection, places[0])
            )
            return charts.trade_off(points, x, y).properties(width=760)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=environment.results_file())
    parser.add_argument("--out", type=Path, default=PLACE, help="folder for the table and the figure")
    options = parser.parse_args()
    results, out = options.results, options.out
    load_builtins()
    specs = settings()
    shown = [*specs, *CONTROLS, *RIVALS]
    try:
        known = measured.of_decoders(results, shown)
    except DecodathlonError as error:
        raise SystemExit(str(error)) from None
    found = [pair for pairs in known.values() for pair in pairs if (pair[1].model, pair[1].scale) == (MODEL, SCALE)]
    places = Counter(place for place, _ in found)
    if not places:
        raise SystemExit(f"{results} has no sound rows of {MODEL} at --scale {SCALE}: see the commands in reservoir.md")
    cells = [cell for place, cell in found if place == places.most_common(1)[0][0]]  # one machine, one type
    chart = figure(results, shown)
    table = rows(cells, shown)
    with (out / TABLE.name).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in table)
    lines = [["decoder", "speed / temperature", "ppl_mixture less temperature", "quality", "speed"]]
    lines += [
        [
            row["decoder"],
            _interval(row, "ratio_to_temperature"),
            _interval(row, "ppl_mixture_less"),
            row["quality"],
            row["speed"],
        ]
        for row in table
    ]
    sys.stdout.write("\n".join(aligned(lines)) + "\n")
    of = [row for row in table if row["decoder"] in specs]
    for name in CRITERIA:
        said = sorted({row[name] for row in of})
        counts = ", ".join(f"{sum(row[name] == word for row in of)} {word}" for word in said)
        sys.stdout.write(f"{name}: of {len(of)} settings {counts}\n")
    chart.save(str(out / FIGURE.name))


def _interval(row: dict[str, Any], name: str) -> str:
    value, low, high = (row[k] for k in (name, f"{name}_low", f"{name}_high"))
    if value is None:
        return "–"
    return f"{value:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
