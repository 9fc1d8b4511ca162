"""The journal of the cell in flight: what it has observed so far, line by line, for the day that its process dies.

A finished cell leaves a shard and its journal goes. Of a cell that hung or crashed the journal is all there is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any

from decodathlon.harness.results import shards


def path_of(folder: Path, cell_id: str) -> Path:
    return folder / f".{cell_id}.journal"


class Journal:
    """Appends one JSON line per observation. The system keeps them when the process dies; no disk is waited for."""

    def __init__(self, path: Path | None) -> None:
        """
        Args:
            path: where; None keeps no journal.
        """
        self._file: IO[str] | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="utf-8", errors="replace", buffering=1)

    def write(self, part: str, content: Any) -> None:
        """Add to a part of the outcome: `samples`, `metrics` and `notes` grow, every other part is replaced."""
        if self._file is not None:
            self._file.write(json.dumps({part: shards.plain(content)}, ensure_ascii=False, allow_nan=False) + "\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read(path: Path) -> dict[str, Any]:
    """The parts of the outcome as far as they were written; a torn last line is left out."""
    parts: dict[str, Any] = {"samples": [], "metrics": [], "notes": []}
    if not path.is_file():
        return parts
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            break
        for part, content in entry.items():
            if part in ("samples", "metrics", "notes"):
                parts[part].append(content)
            else:
                parts[part] = content
    parts["metrics"] = shards.restored(parts["metrics"])
    return parts
