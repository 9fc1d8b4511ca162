"""Which drafter wins where: the table of docs/findings/speculative.md, out of results.duckdb.

    python scripts/speculative_verdict.py                      # prints it, and writes docs/findings/speculative.csv
    python scripts/speculative_verdict.py --results FILE --out DIR

One line per decoder that drafts and kind of prompt: its speed over greedy search (the same engine, the same prompts,
taken by turns in one process) with its interval, tokens per cycle, acceptance, and what the shares of a cycle predict.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb

from decodathlon.harness.commands.command import say
from decodathlon.harness.datasets.spec_bench import KINDS
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.results import environment, store
from decodathlon.harness.results.table import DASH, aligned
from decodathlon.leaderboard import draft_queries, queries

PLACE = Path(__file__).parents[1] / "docs" / "findings"
TABLE = "speculative.csv"
#: The prompt apart: reading it takes as long for everybody, and for long prompts longer than the answer. Rows that lack
#: it have it in, and a mark.
RATIO, WHOLE, MARK = "ratio_to_greedy(decode)", "ratio_to_greedy", "°"


#: What must be the same for speeds to stand in one table.
SETTING = ("model", "dtype", "hardware", "scale", "dataset")


def lines(results: Path) -> list[dict[str, Any]]:
    """The newest sound row of each decoder, kind of prompt and setting; what stands beside a sound one is left out."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "copy.duckdb"
        store.snapshot(results, copy, queries.prepare)
        with duckdb.connect(str(copy)) as connection:
            cells = [c for c in draft_queries.drafting(connection) if c["slice"] in KINDS and not c["beside"]]
    found = []
    for cell in cells:
        row = {k: cell[k] for k in ("decoder", "slice", *SETTING)}
        for metric in draft_queries.METRICS:
            value, low, high = cell["numbers"].get(metric, (None, None, None))
            row |= {metric: value, **({f"{metric} low": low, f"{metric} high": high} if "ratio_to" in metric else {})}
        found.append(row | {"run": cell["run_id"]})
    return found


def across(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """By decoder, fastest first: the ratio on each kind of prompts, and their geometric mean where all are there."""
    by: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if row[RATIO] is not None or row[WHOLE] is not None:
            by.setdefault(row["decoder"], {})[row["slice"]] = row

    def which(row: Mapping[str, Any]) -> str:
        return RATIO if row[RATIO] is not None else WHOLE

    def mean(of: Mapping[str, Mapping[str, Any]]) -> float:
        return math.exp(statistics.fmean(math.log(row[which(row)]) for row in of.values()))

    def shown(row: Mapping[str, Any] | None) -> str:
        if row is None:
            return DASH
        name = which(row)
        low, high = row[f"{name} low"], row[f"{name} high"]
        interval = f" [{low:.2f}, {high:.2f}]" if low is not None and high is not None else ""
        return f"{row[name]:.2f}{interval}{MARK if name == WHOLE else ''}"

    table = [["decoder", "all six", *KINDS]]
    for name, of in sorted(by.items(), key=lambda item: (-len(item[1]), -mean(item[1]))):
        table.append([name, f"{mean(of):.2f}" if len(of) == len(KINDS) else DASH, *(shown(of.get(k)) for k in KINDS)])
    return table


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=environment.results_file())
    parser.add_argument("--out", type=Path, default=PLACE, metavar="DIR")
    options = parser.parse_args(words)
    load_builtins()
    rows = lines(options.results)
    if not rows:
        raise SystemExit(
            f"{options.results} has no rows of drafting decoders on --workload spec-bench: see speculative.md there"
        )
    with (options.out / TABLE).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    places: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        places.setdefault(tuple(row[k] for k in SETTING), []).append(row)
    for place, mine in places.items():
        say(" ".join(map(str, place)))
        say("\n".join(aligned(across(mine))) + "\n")
    say(f"{len(rows)} rows in {options.out / TABLE}")


if __name__ == "__main__":
    main()
