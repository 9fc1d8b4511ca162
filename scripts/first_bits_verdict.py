"""What the first bits of a model are worth: a packed model, its bases, a Q4_0 file of it and the plain one in a table.

    python scripts/first_bits_verdict.py MODEL                 # prints the table
    python scripts/first_bits_verdict.py MODEL --out docs/findings    # and writes it into jit-delta.md
    ... --results FILE

MODEL is what the plain one is called; the others are called after it (MODEL-nested[weights=base], MODEL-Q4_0). One
line for each: perplexity on WikiText-2 by `temperature`, what `greedy` takes in `throughput`; the newest sound row of
each, in the setting (scale, type, machine, text) that the plain model was measured in last.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path

from decodathlon.harness.commands.command import say
from decodathlon.harness.results import environment, store
from decodathlon.harness.results.table import DASH, aligned, rewritten

#: Of suite, slice and decoder: the columns and what a number is divided by.
COLUMNS = {
    ("wikitext2", "joined", "temperature"): {"perplexity": ("ppl", 1.0, 2)},
    ("throughput", "batch-1", "greedy"): {
        "tokens/s": ("tokens_per_s", 1.0, 1),
        "bits per weight": ("bits_per_weight", 1.0, 2),
        "on disk, MB": ("weights_on_disk_bytes", 1e6, 0),
        "peak memory, MB": ("peak_memory_bytes", 1e6, 0),
        "weights read per token, MB": ("weight_bytes_per_token", 1e6, 0),
        "of them from disk, MB": ("fetched_bytes_per_token", 1e6, 0),
    },
}
QUERY = """
    SELECT c.model, c.suite, c.slice, c.decoder, [c.scale, c.dtype, c.hardware, c.dataset] AS setting,
           map_from_entries(list((m.metric, (m.value, m.ci_low, m.ci_high))))
    FROM newest_of('sound_cell') c JOIN metric m USING (run_id, cell_id)
    WHERE (c.model = $model OR starts_with(c.model, $model || '-')) AND list_contains($metrics, m.metric)
    GROUP BY ALL ORDER BY max(c.started)
"""
#: What the others are called behind the plain model's name.
OTHER = r"-(nested|fixed12|int4-delta)(\[.*\])?|-Q4_0"
Numbers = dict[str, tuple[float, float | None, float | None]]


def lines(results: Path, model: str) -> list[list[str]]:
    """A line per model; of each suite by the setting that the plain model was measured in last."""
    wanted = [metric for metrics in COLUMNS.values() for metric, _, _ in metrics.values()]
    with store.connect(results) as connection:
        rows = connection.execute(QUERY, {"model": model, "metrics": wanted}).fetchall()
    of = {name for name, *_ in rows if name == model or re.fullmatch(OTHER, name[len(model) :])}
    plain = {tuple(place): setting for name, *place, setting, _ in rows if name == model}
    found: dict[str, dict[str, str]] = {name: {} for name in sorted(of)}
    for name, *place, setting, numbers in rows:
        if name in of and setting == plain.get(tuple(place)):
            found[name] |= _shown(COLUMNS.get(tuple(place), {}), numbers)
    columns = [column for metrics in COLUMNS.values() for column in metrics]
    shown = sorted(((name, cells) for name, cells in found.items() if cells), key=lambda one: _size(one[1]))
    return [["model", *columns], *([name, *(cells.get(c, DASH) for c in columns)] for name, cells in shown)]


def _size(cells: Mapping[str, str]) -> float:
    return -float(cells.get("bits per weight", "0"))


def _shown(columns: Mapping[str, tuple[str, float, int]], numbers: Numbers) -> dict[str, str]:
    found = {}
    for column, (metric, unit, digits) in columns.items():
        value, low, high = numbers.get(metric, (None, None, None))
        if value is not None:
            interval = "" if low is None or high is None else f" [{low / unit:.{digits}f}, {high / unit:.{digits}f}]"
            found[column] = f"{value / unit:.{digits}f}{interval}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--results", type=Path, default=environment.results_file())
    parser.add_argument("--out", type=Path, help="docs/findings, whose page jit-delta.md has the table")
    options = parser.parse_args()
    table = lines(options.results, options.model)
    if len(table) == 1:
        raise SystemExit(
            f"{options.results} has no sound row of {options.model}: measure wikitext2 and throughput of it"
        )
    for line in aligned(table):
        say(line)
    if options.out:
        page = options.out / "jit-delta.md"
        page.write_text(rewritten(page.read_text(), "first bits", table))
        say(f"wrote the table of {page}")


if __name__ == "__main__":
    main()
