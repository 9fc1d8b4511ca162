"""What a long cell has finished, one JSON line per unit, written as it comes; a resumed run goes on behind it.

The lines stay beside the shards when the cell is done: they hold what is too long, or not ours, to be published.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any

from decodathlon.harness.results import shards


def path_of(folder: Path, cell_id: str) -> Path:
    return folder / f"{cell_id}.lines.jsonl"


class Lines:
    """The lines of one cell."""

    def __init__(self, path: Path | None) -> None:
        """
        Args:
            path: where; None keeps nothing.
        """
        self._path = path
        self._file: IO[str] | None = None
        #: By row, what an earlier attempt at this cell left; a torn last line is not among it.
        self.earlier: dict[str, dict[str, Any]] = {}
        if path is not None and path.is_file():
            self.earlier, whole = _whole(path)
            with path.open("r+b") as file:
                file.truncate(whole)

    @staticmethod
    def read(path: Path) -> dict[str, dict[str, Any]]:
        """The lines of a file by row, which is left as it is; nothing where there is none."""
        return _whole(path)[0] if path.is_file() else {}

    def write(self, row: str, **values: Any) -> None:
        """Add the line of a unit. The system keeps it when the process dies."""
        if self._path is None:
            return
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8", errors="replace", buffering=1)
        self._file.write(json.dumps(shards.plain({"row": row, **values}), ensure_ascii=False, allow_nan=False) + "\n")

    def keep(self, row: str, **values: Any) -> None:
        """Add a line that an earlier attempt may have added already."""
        if row not in self.earlier:
            self.write(row, **values)

    def of(self, part: str) -> Lines:
        """A part of these lines under names of its own, written to the same file."""
        return _Part(self, part)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class _Part(Lines):
    """Lines whose names begin alike, as if they were all."""

    def __init__(self, whole: Lines, part: str) -> None:
        super().__init__(None)
        self._whole, self._part = whole, part
        self.earlier = {row.removeprefix(part): e for row, e in whole.earlier.items() if row.startswith(part)}

    def write(self, row: str, **values: Any) -> None:
        self._whole.write(self._part + row, **values)


def _whole(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The whole lines of a file by row, and how many bytes they have."""
    found: dict[str, dict[str, Any]] = {}
    size = 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(entry, dict) or "row" not in entry:
            break
        found[str(entry["row"])] = entry
        size += len(line)
    return found, size
