"""Add the shards of runs to a results file: `python scripts/ingest.py results.shards/*`.

For runs that were killed, that could not ingest, or that come from a machine without DuckDB. What is there stays.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from decodathlon.harness.errors import DecodathlonError
from decodathlon.harness.results import store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_FOLDER")
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "results.duckdb")
    options = parser.parse_args()
    try:
        added = store.ingest(options.results.resolve(), options.runs)
    except DecodathlonError as error:
        parser.exit(1, f"{error}\n")
    parser.exit(0, f"{added} cells added to {options.results}\n")


if __name__ == "__main__":
    main()
