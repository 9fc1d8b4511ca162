"""What became of the founding note's ideas on DFlash: the tables of docs/findings/dflash.md, out of results.duckdb.

    python scripts/dflash_backlog.py --commands     # what has to be measured for them
    python scripts/dflash_backlog.py                # rewrites them, dflash.csv, and the numbers of the drafter's card
    python scripts/dflash_backlog.py --results FILE --out DIR --model NAME --scale quick --hardware NAME

An idea is judged by its speed over plain `dflash` (or what it names as `beside`), both by turns in one process on the
same prompts: rows that were measured with that `--baseline`. All are of one model, scale, type and machine (the one
measured last, unless it is named). docs/findings/dflash.toml has the ideas, and what the note found.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb

from decodathlon.harness import embedded
from decodathlon.harness.commands.command import say
from decodathlon.harness.registry import load_builtins, registry
from decodathlon.harness.results import environment, store
from decodathlon.harness.results import measured as measured_rows
from decodathlon.harness.results.table import DASH, rewritten
from decodathlon.leaderboard import draft_queries, queries

PLACE = Path(__file__).parents[1] / "docs" / "findings"
#: One folder for each model that a drafter ships for, with a card.
DRAFTERS = Path(__file__).parents[1] / "decoders" / "dflash" / "drafters"
PLAIN = "dflash"
#: What plain `dflash` itself is measured beside: the same loop without a drafter.
ALONE = "dflash[block=1]"
#: Workloads of the throughput suite that have the prompts, with all slices or some.
WORKLOADS = (("problems", "math500"), ("spec-bench", "mt_bench or math_reasoning"))
#: Prompts, in the order of the columns; others are not looked at.
SLICES = ("math500", "mt_bench", "math_reasoning", "aime25")
#: What must be the same for rows to stand in one table.
SETTING = ("model", "dtype", "hardware", "scale", "seed")
Row = Mapping[str, Any]


@contextmanager
def snapshot(results: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """The results as they are now, shards that were not ingested yet among them; nobody has to wait for us."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "copy.duckdb"
        store.snapshot(results, copy, queries.prepare)
        with duckdb.connect(str(copy)) as connection:
            yield connection


def measured(connection: duckdb.DuckDBPyConnection) -> list[Row]:
    """The newest sound rows of the decoders that draft by blocks, on the prompts that are looked at; of each baseline
    that they were measured beside, which on the board the newest alone has."""
    connection.execute(
        """
        CREATE TEMP TABLE by_baseline AS SELECT c.*, false AS beside FROM sound_cell c
        LEFT JOIN (FROM metric WHERE metric = 'ratio_to_baseline') m USING (run_id, cell_id)
        QUALIFY c.suite_version = max(c.suite_version) OVER (PARTITION BY c.suite) AND row_number() OVER (
            PARTITION BY c.suite, c.slice, c.scale, c.decoder, c.model, c.dtype, c.dataset, c.seed, c.hardware,
                         m.baseline
            ORDER BY c.started DESC, c.run_id DESC) = 1
        """
    )
    cells = draft_queries.drafting(connection, "by_baseline")
    family = {name for name in registry.names("decoder") if registry.get("decoder", name).info.family == "dflash"}
    return [c for c in cells if c["decoder"].partition("[")[0] in family and c["slice"] in SLICES]


def of_one_setting(rows: Sequence[Row], model: str, scale: str, hardware: str | None) -> list[Row]:
    """Those of this model and scale, on that machine or the one measured last."""
    some = [r for r in rows if r["model"] == model and r["scale"] == scale and hardware in (None, r["hardware"])]
    if not some:
        return []
    last = max(some, key=lambda r: r["run_id"])
    return [r for r in some if all(r[k] == last[k] for k in SETTING)]


def costs(connection: duckdb.DuckDBPyConnection, setting: Row) -> list[tuple[str, str, float]]:
    """Slice (how long the text is), metric and value of the newest verify-cost curves of the same setting."""
    return connection.execute(
        """
        SELECT c.slice, m.metric, arg_max(m.value, c.run_id) FROM metric m JOIN sound_cell c USING (run_id, cell_id)
        WHERE c.suite = 'verify_cost' AND m.metric LIKE 'verify_cost(%'
        AND c.suite_version = (SELECT max(suite_version) FROM sound_cell WHERE suite = 'verify_cost')
        AND c.model = $model AND c.hardware = $hardware AND coalesce(c.dtype, $dtype) IN ($dtype, 'auto')
        AND c.scale = $scale
        GROUP BY ALL ORDER BY c.slice, m.metric
        """,
        {k: setting[k] for k in ("model", "hardware", "dtype", "scale")},
    ).fetchall()


def shown(found: tuple[Any, ...] | None) -> str:
    if found is None or found[0] is None:
        return DASH
    value, low, high = found
    return f"{value:.2f}" + (f" [{low:.2f}, {high:.2f}]" if low is not None and high is not None else "")


def word(ratio: tuple[Any, ...], noise: tuple[Any, ...] | None) -> str:
    """Whether a speed is another one: by its interval, and by more than the decoder differed from itself in that row.
    A row whose decoder is faster or slower than itself tells nothing."""
    value, low, high = ratio
    if noise is not None:
        own, own_low, own_high = noise
        if own_low is not None and not own_low <= 1 <= own_high and abs(math.log(own)) > measured_rows.BIAS:
            return ""
        if abs(math.log(value)) <= abs(math.log(own)):
            return ""
    return "faster" if low > 1 else "slower" if high < 1 else ""


def speed(numbers: Mapping[str, tuple[Any, ...]], over: str) -> tuple[Any, ...] | None:
    """Over `greedy` or the `baseline`: by token where texts end by themselves, for there a shorter text is no speed."""
    return numbers.get(f"ratio_to_{over}(per token)", numbers.get(f"ratio_to_{over}"))


def verdict(found: Sequence[Mapping[str, tuple[Any, ...]]]) -> str:
    """In a word, from the numbers of a slice each: speeds over plain `dflash`, their intervals and their noise."""
    ratios = [(ratio, n.get("ratio_to_self")) for n in found if (ratio := speed(n, "baseline"))]
    told = [word(ratio, noise) for ratio, noise in ratios if ratio[1] is not None]
    if not told:
        return "too few prompts" if ratios else "not measured"
    if len(set(told)) == 1:
        return told[0] or "no difference seen"
    parts = [f"{word} on {told.count(word)} of {len(told)}" for word in ("faster", "slower") if word in told]
    return ", ".join(parts)


def backlog(ideas: Sequence[Row], rows: Sequence[Row]) -> list[list[str]]:
    """A line per idea and decoder: what the note found, and its speed over plain `dflash` by slice."""
    besides = {idea.get("beside", PLAIN) for idea in ideas}
    having = [s for s in SLICES if any(r["slice"] == s and r["baseline"] in besides for r in rows)]
    table = [["idea", "the note", "decoder", *having, "verdict", "why"]]
    for idea in ideas:
        for number, spec in enumerate(idea["decoders"]):
            beside = idea.get("beside", PLAIN)
            found = {
                r["slice"]: r["numbers"]
                for r in rows
                if r["decoder"] == spec and r["baseline"] == beside and "ratio_to_baseline" in r["numbers"]
            }
            ratios = {slice_: speed(numbers, "baseline") for slice_, numbers in found.items()}
            first = [idea["name"], idea["note"]] if number == 0 else ["", ""]
            table.append(
                [*first, f"`{spec}`", *(shown(ratios.get(s)) for s in having), verdict(list(found.values())),
                 idea["why"] if number == 0 else ""]
            )  # fmt: skip
    return table


def speeds(rows: Sequence[Row]) -> list[list[str]]:
    """A line per decoder and slice: tokens per cycle, measured speeds, and what the cycles predict."""
    table = [["decoder", "prompts", "tau", "acceptance", "drafting", "over greedy", "predicted", "over the baseline",
              "as greedy search has it"]]  # fmt: skip
    over_greedy = lambda n: n.get("ratio_to_greedy(per token)") or n.get("ratio_to_greedy(decode)")  # noqa: E731
    for row in sorted(rows, key=lambda r: (SLICES.index(r["slice"]), -((over_greedy(r["numbers"]) or (0,))[0] or 0))):
        n = row["numbers"]
        against = f"{shown(speed(n, 'baseline'))} to `{row['baseline']}`" if row["baseline"] else DASH
        table.append(
            [f"`{row['decoder']}`", row["slice"], shown(_plain(n.get("tau"))),
             shown(_plain(n.get("draft_acceptance"))),
             shown(_plain(n.get("draft_share"))), shown(over_greedy(n)), shown(n.get("ratio_predicted")), against,
             _share(n.get("greedy_match"))]
        )  # fmt: skip
    return table


def card(rows: Sequence[Row]) -> list[list[str]]:
    """A line per slice: what the drafter as it comes is worth there."""
    head = ["prompts", "tau", "without answers that loop", "to the stop token", "by text", "share that loops",
            "speed over greedy, by token"]  # fmt: skip
    table = [head]
    plain = {r["slice"]: r for r in sorted(rows, key=lambda r: r["run_id"]) if r["decoder"] == PLAIN}
    for row in sorted(plain.values(), key=lambda r: SLICES.index(r["slice"])):
        n = row["numbers"]
        tau = n.get("tau")
        straight = tau if n.get("looping_share", (None,))[0] == 0 else n.get("tau(without loops)")
        ended = n.get("tau(to the stop token)", tau)
        numbers = (tau, straight, ended, n.get("tau_by_text"), _plain(n.get("looping_share")), speed(n, "greedy"))
        table.append([row["slice"], *map(shown, numbers)])
    return table


def curve(found: Sequence[tuple[str, str, float]]) -> list[list[str]]:
    """A line per length of the text before: what it costs to read so many tokens at once, against one."""
    widths = sorted({_width(metric) for _, metric, _ in found})
    table = [["text before", *map(str, widths)]]
    for place in sorted({slice_ for slice_, *_ in found}, key=lambda s: (_width(s), s)):
        mine = {_width(metric): value for slice_, metric, value in found if slice_ == place}
        table.append([place, *(f"{mine[w]:.2f}" if w in mine else DASH for w in widths)])
    return table


def _width(metric: str) -> int:
    return int((re.findall(r"\d+", metric) or [0])[0])


def _share(found: tuple[Any, ...] | None) -> str:
    return DASH if found is None else f"{found[0]:.0%}"


def _plain(found: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    return None if found is None else (found[0], None, None)


def commands(ideas: Sequence[Row]) -> list[str]:
    """What has to be run for the tables: plain `dflash` and its loop alone, each idea beside what it is judged by, and
    what wider passes cost."""
    runs = [(ALONE, [PLAIN])]
    for beside in dict.fromkeys(idea.get("beside", PLAIN) for idea in ideas):
        specs = [spec for idea in ideas if idea.get("beside", PLAIN) == beside for spec in idea["decoders"]]
        runs.append((beside, specs))
    found = [
        f"pytest suites/ --benchmark --suite throughput --workload {workload} -k '{slices}' --baseline '{beside}' "
        + " ".join(f"--decoder '{spec}'" for spec in specs)
        for workload, slices in WORKLOADS
        for beside, specs in runs
    ]
    return [*found, "pytest suites/ --benchmark --suite verify_cost"]


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=environment.results_file())
    parser.add_argument("--out", type=Path, default=PLACE, metavar="DIR", help="where dflash.toml and dflash.md are")
    parser.add_argument("--drafters", type=Path, default=DRAFTERS, metavar="DIR", help="with a card for the model")
    parser.add_argument("--model", default=embedded.NAME)
    parser.add_argument("--scale", default="quick")
    parser.add_argument("--commands", action="store_true", help="say what has to be measured, and do nothing")
    parser.add_argument("--hardware", default=None, help="as the board names it (default: what was measured on last)")
    options = parser.parse_args(words)
    load_builtins()
    ideas = tomllib.loads((options.out / "dflash.toml").read_text())["idea"]
    if options.commands:
        say("\n".join(commands(ideas)))
        return
    with snapshot(options.results) as connection:
        rows = of_one_setting(measured(connection), options.model, options.scale, options.hardware)
        widths = costs(connection, rows[0]) if rows else []
    if not rows:
        raise SystemExit(
            f"{options.results} has no sound rows of decoders that draft by blocks, of {options.model} at "
            f"{options.scale}: see dflash.md"
        )
    page = (options.out / "dflash.md").read_text()
    tables = {
        "setting": [list(SETTING), [str(rows[0][k]) for k in SETTING]],
        "backlog": backlog(ideas, rows),
        "speeds": speeds(rows),
        "curve": curve(widths),
    }
    for name, table in tables.items():
        page = rewritten(page, name, table)
    (options.out / "dflash.md").write_text(page)
    if (told := options.drafters / options.model / "README.md").exists():
        told.write_text(rewritten(told.read_text(), "tau", card(rows)))
    with (options.out / "dflash.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["decoder", "slice", "model", "dtype", "hardware", "scale", "dataset", "run", "baseline",
                         "metric", "value", "low", "high"])  # fmt: skip
        for row in rows:
            for metric, numbers in sorted(row["numbers"].items()):
                place = [
                    row[k] for k in ("decoder", "slice", "model", "dtype", "hardware", "scale", "dataset", "run_id")
                ]
                writer.writerow([*place, row["baseline"] or "", metric, *(_short(x) for x in numbers)])
    say("\n".join(" | ".join(line) for line in tables["backlog"]))
    say(f"{len(rows)} rows in {options.out / 'dflash.csv'}, and the tables of dflash.md")


def _short(x: float | None) -> str:
    return "" if x is None else f"{x:.6g}"


if __name__ == "__main__":
    main()
