"""Shards: each finished cell is one JSON file, written whole or not at all. The shards are the log of a run."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from decodathlon.harness.errors import StoreError

RUN_FILE = "run.json"
#: What the gates said of the run, and what it plans (with the user's own paths, so it is never published).
GATES_FILE = "gates.json"
PLAN_FILE = ".plan.json"
#: Held by the process that measures the run.
LOCK_FILE = ".lock"
#: How often what a shard says may be nested; what recurses into one gets to its bottom.
DEEPEST = 200
#: Where none of it stands in a text, nothing in it is for `restored`: the words, or letters that are spelt as numbers.
_MAY_BE_NO_NUMBER = ('NaN"', 'Infinity"', "\\u00")


def folder_of(results: Path, run_id: str) -> Path:
    """Where the shards of a run lie beside its results file."""
    return results.with_suffix(".shards") / run_id


def runs(results: Path) -> list[Path]:
    """The folders of runs beside a results file, oldest first."""
    return sorted(p.parent for p in results.with_suffix(".shards").glob(f"*/{RUN_FILE}"))


def write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON under a temporary name, flush it to disk, put it in place.

    Raises:
        StoreError: the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # what is no text in UTF-8 (half a surrogate in a message) must not cost the shard
        with temporary.open("w", encoding="utf-8", errors="replace") as handle:
            json.dump(plain(content), handle, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # the folder itself may be what is wrong
            temporary.unlink(missing_ok=True)
        raise StoreError(f"{path} cannot be written: {error.strerror}") from error


def read(path: Path) -> dict[str, Any]:
    """
    Raises:
        StoreError: the file is not whole JSON.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{path} is not a whole shard: {error}") from error
    if not isinstance(content, dict):
        raise StoreError(f"{path} is not a shard")
    if text.count("[") + text.count("{") > DEEPEST and _is_deeper(content, DEEPEST):
        raise StoreError(f"{path} is not a whole shard: it is nested more than {DEEPEST} times")
    if not any(word in text for word in _MAY_BE_NO_NUMBER):
        return content
    return content | {part: restored(content[part]) for part in ("metrics", "arrays") if part in content}


def _is_deeper(value: Any, most: int) -> bool:
    """Whether containers are nested more than so many times; level by level, so that no depth is too deep for it."""
    level = [value]
    for _ in range(most):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True


def cells(folder: Path) -> Iterator[Path]:
    """The cell shards of a run's folder."""
    others = (RUN_FILE, GATES_FILE)
    return (p for p in sorted(folder.glob("*.json")) if p.name not in others and not p.name.startswith("."))


def plain(value: Any) -> Any:
    """JSON has no infinity and no NaN; they travel as the words that DuckDB reads as numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def restored(value: Any) -> Any:
    """The inverse of `plain`, for parts that hold numbers only: elsewhere "NaN" may be what a model said."""
    if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    if isinstance(value, dict):
        return {k: restored(v) for k, v in value.items()}
    if isinstance(value, list):
        return [restored(v) for v in value]
    return value
