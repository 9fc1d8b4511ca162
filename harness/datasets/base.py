"""What a data set is to a suite, and in which order its text is looked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from decodathlon.harness.errors import MissingError
from decodathlon.harness.registry import registry

Split = Literal["validation", "test"]
Source = Literal["folder", "hub-cache", "hub", "stand-in"]


@dataclass(frozen=True)
class Text:
    """Rows of one split, and everything that a result row must say about them."""

    #: What rows are labelled with; a stand-in never carries the name of what it stands for.
    name: str
    revision: str
    split: Split
    source: Source
    rows: tuple[str, ...]
    #: What stands between the rows when they are joined to one text.
    joint: str

    @property
    def joined(self) -> str:
        return self.joint.join(self.rows)

    @property
    def sha256(self) -> str:
        """Of the joined text, so that copies of other sources with the same content agree."""
        return hashlib.sha256(self.joined.encode()).hexdigest()

    def row_hash(self, row: int) -> str:
        """Short hash of one row: a result names the row without carrying its text."""
        return hashlib.sha256(self.rows[row].encode()).hexdigest()[:12]

    def record(self) -> dict[str, object]:
        """What a result row stores of the data."""
        return {
            "dataset": self.name,
            "revision": self.revision,
            "split": self.split,
            "source": self.source,
            "sha256": self.sha256,
            "rows": len(self.rows),
        }


@dataclass(frozen=True)
class DataSet:
    """A registered data set: how each source is read.

    Args:
        file: name of a split's file in a `--data` folder; beside it the same name with .jsonl is read too.
        parse: rows of a split from the text of such a file, which may hold all splits.
        hub: rows and revision of a split from the hub, `offline` from its cache only; raises MissingError.
        stand_in: text of the project's own where nothing else can be had.
    """

    name: str
    file: Callable[[Split], str]
    parse: Callable[[str, Path, Split], tuple[str, ...]]
    hub: Callable[[Split, bool], tuple[tuple[str, ...], str]]
    stand_in: Callable[[Split], Text]
    joint: str
    #: sha256 of each joined split, one or more; text that differs does not carry the data set's name.
    sha256: Mapping[Split, str | Sequence[str]]
    splits: tuple[Split, ...] = ("test", "validation")

    def text(self, split: Split, source: Source, rows: tuple[str, ...], revision: str) -> Text:
        """The rows under their name, or as unverified where they are not the known ones."""
        found = Text(self.name, revision, split, source, rows, self.joint)
        known = self.sha256[split]
        if found.sha256 not in ([known] if isinstance(known, str) else known):
            found = replace(found, name=f"unverified-{self.name}-{found.sha256[:8]}")
        return found


def find(name: str, split: Split, folder: str | None, say: Callable[[str], None] = lambda text: None) -> Text:
    """The rows of a split: from `folder` if one is given, else the hub cache, the hub, the stand-in (`say` tells).

    Raises:
        MissingError: `folder` was given and lacks the file, or the file cannot be read.
    """
    data: DataSet = registry.get("dataset", name)
    if folder is not None:
        return _from_folder(data, split, Path(folder))
    for source in ("hub-cache", "hub"):
        try:
            rows, revision = data.hub(split, source == "hub-cache")
        except MissingError:
            continue
        return data.text(split, "hub" if source == "hub" else "hub-cache", rows, revision)
    say(f"{name} is not at hand (no --data, not in the hub cache, no hub): stand-in text instead")
    return data.stand_in(split)


def splits(name: str) -> tuple[Split, ...]:
    """The splits that a data set has."""
    data: DataSet = registry.get("dataset", name)
    return data.splits


def check_folder(name: str, folder: str) -> None:
    """
    Raises:
        MissingError: `folder` lacks a file of the data set.
    """
    data: DataSet = registry.get("dataset", name)
    for split in data.splits:
        _file(data, split, Path(folder))


def _file(data: DataSet, split: Split, folder: Path) -> Path:
    """The split's file in the folder: its own form, or JSON lines."""
    path = folder / data.file(split)
    lines = path.with_suffix(".jsonl")
    if not path.is_file() and not lines.is_file():
        either = path.name if path == lines else f"{path.name}, nor {lines.name}"
        raise MissingError(
            f"--data {folder} has no {either} ({data.name}, {split}); add it, leave --data out, or name other suites"
        )
    return path if path.is_file() else lines


def json_lines(text: str, field: str, path: Path) -> tuple[str, ...]:
    """One field of every line of a JSON-lines file.

    Raises:
        MissingError: a line is torn, is no object, or lacks the field; its number is named.
    """
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)[field]
        except (ValueError, KeyError, TypeError) as error:
            what = "is torn" if isinstance(error, ValueError) else f"has no field {field!r}"
            raise MissingError(f"{path}, line {number} {what}; copy the file again") from None
        rows.append(str(value))
    return tuple(rows)


def _from_folder(data: DataSet, split: Split, folder: Path) -> Text:
    path = _file(data, split, folder)
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
        rows = data.parse(text, path, split)
    except UnicodeDecodeError as error:
        raise MissingError(f"{path} is not UTF-8 (byte {error.start}); convert it and run again") from None
    if not any(row.strip() for row in rows):
        raise MissingError(f"{path} has no text" + ("" if split == "test" else f" for {split}"))
    revision = f"file-{hashlib.sha256(raw).hexdigest()[:12]}"
    return data.text(split, "folder", rows, revision)
