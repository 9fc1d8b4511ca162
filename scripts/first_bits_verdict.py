"""What the first bits of a model are worth: a packed model, its bases, a Q4_0 file of it and the plain one in a table.

    python scripts/first_bits_verdict.py MODEL                 # prints the table
    python scripts/first_bits_verdict.py MODEL --out docs/findings    # and writes it into jit-delta.md
    ... --results FILE

MODEL is what the plain one is called; the others are called after it (MODEL-nested[weights=base], MODEL-Q4_0.gguf). One
line for each: perplexity on WikiText-2 by `temperature`, what `greedy` takes in `throughput`, newest sound row of each.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import duckdb

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
    SELECT c.model, c.suite, c.slice, c.decoder, m.metric, m.value, m.ci_low, m.ci_high
    FROM newest_of('sound_cell') c JOIN metric m USING (run_id, cell_id)
    WHERE c.model = $model OR starts_with(c.model, $model || '-')
    ORDER BY c.started
"""


def lines(results: Path, model: str) -> list[list[str]]:
    with store.connect(results) as connection:
        found = _numbers(connection, model)
    names = [name for metrics in COLUMNS.values() for name in metrics]
    by_size = sorted(found, key=lambda m: (-found[m].get("bits per weight", (0.0, ""))[0], m))
    return [["model", *names], *([m, *(found[m].get(n, (0.0, DASH))[1] for n in names)] for m in by_size)]


def _numbers(connection: duckdb.DuckDBPyConnection, model: str) -> dict[str, dict[str, tuple[float, str]]]:
    """By model and column; of several rows the newest."""
    found: dict[str, dict[str, tuple[float, str]]] = {}
    for name, *place, metric, value, low, high in connection.execute(QUERY, {"model": model}).fetchall():
        for column, (wanted, unit, digits) in COLUMNS.get(tuple(place), {}).items():
            if metric == wanted and value is not None:
                interval = f" [{low / unit:.{digits}f}, {high / unit:.{digits}f}]" if low is not None else ""
                found.setdefault(name, {})[column] = (value, f"{value / unit:.{digits}f}{interval}")
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
