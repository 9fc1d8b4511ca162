"""Rebuild results.duckdb from the published text shards in leaderboard/published/.

The shards are the source; the database is made from them, so two people can add rows without a binary conflict.
`--add RUN_FOLDER` publishes a run: it copies the shards of a finished run there first. Rows that were not published
leave the database; their shards stay in results.shards/, and `decodathlon ingest results.shards` adds them again.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from decodathlon.harness.results import store

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "leaderboard" / "published"


def rebuild(published: Path, results: Path) -> int:
    """Make the database anew and put it in place; returns the number of cells."""
    made = results.with_name(f".{results.name}.rebuilt")
    made.unlink(missing_ok=True)
    runs = sorted(p.parent for p in published.glob("*/run.json"))
    count = store.ingest(made, runs).added
    made.replace(results)
    made.with_name(f".{made.name}.lock").unlink(missing_ok=True)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--add", type=Path, action="append", default=[], metavar="RUN_FOLDER")
    for folder in parser.parse_args().add:
        # what begins with a dot is the user's own: the plan with its paths, locks, journals; lines hold questions
        shutil.copytree(folder, PUBLISHED / folder.name, ignore=shutil.ignore_patterns(".*", "*.lines.jsonl"))
    rebuild(PUBLISHED, ROOT / "results.duckdb")


if __name__ == "__main__":
    main()
