"""Sets of questions: JSON lines with an id, of which a fixed part is kept for tuning and never reported.

A question travels as one row of a `Text`: its JSON with sorted keys. It is named by a hash of its text, so that the
same question has the same name from every source; rows come in the order of that hash, so that the first n are a fair
mixture.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from decodathlon.harness.datasets import hub
from decodathlon.harness.datasets.base import DataSet, Split, Text
from decodathlon.harness.errors import MissingError
from decodathlon.harness.registry import registry

Question = dict[str, Any]
Rows = tuple[str, ...]


def register(
    name: str,
    *,
    file: str,
    fields: Mapping[str, type],
    hub_table: tuple[str, str | None, str] | None,
    of_hub: Callable[[Mapping[str, Any]], Question],
    stand_in: Callable[[], Sequence[Question]],
    held_out: int,
    sha256: Mapping[Split, str | Sequence[str]],
    source: str,
    completed: Callable[[list[Question], Path], None] = lambda found, folder: None,
) -> None:
    """Register a question set.

    Args:
        file: JSON lines in a `--data` folder; each has an `id` and the fields.
        fields: what a question has, with its type; the first is its text.
        hub_table: id, config and split on the hub, if it is there; `of_hub` makes a question of its rows.
        stand_in: the project's own questions, where nothing else can be had.
        held_out: how many questions are kept for tuning: the validation split.
        completed: adds to questions what other files of the folder say of them.
    """
    text_field = next(iter(fields))

    def split_up(questions: Sequence[Question], split: Split, spared: int) -> Rows:
        named = {}
        for question in questions:
            text = question[text_field]
            plain = text.strip() if isinstance(text, str) else json.dumps(text)
            digest = hashlib.sha256(plain.encode()).hexdigest()
            named[digest] = _row(question | {"id": f"{name}-{digest[:8]}"})
        ordered = [row for _, row in sorted(named.items())]
        return tuple(ordered[:spared] if split == "validation" else ordered[spared:])

    def parse(text: str, path: Path, split: Split) -> Rows:
        found = _parsed(text, path, fields)
        completed(found, path.parent)
        return split_up(found, split, held_out)

    def from_hub(split: Split, offline: bool) -> tuple[Rows, str]:
        if hub_table is None:
            raise MissingError(f"{name} is on no hub")
        table, revision = hub.table(*hub_table, offline=offline)
        return split_up([of_hub(row) for row in table], split, held_out), revision

    def own(split: Split) -> Text:
        questions = stand_in()
        rows = split_up(questions, split, len(questions) // 5 if held_out else 0)
        return Text(f"own-{name}", "1", split, "stand-in", rows, "\n")

    splits: tuple[Split, ...] = ("test", "validation") if held_out else ("test",)
    registry.add("dataset", name, DataSet(name, lambda _: file, parse, from_hub, own, "\n", sha256, splits), source)


def read(text: Text, count: int | None = None) -> list[Question]:
    """The first `count` questions of the rows, or all."""
    return [json.loads(row) for row in text.rows[:count]]


def of_package(file: str) -> list[Question]:
    """Questions that the project wrote itself, beside this file."""
    path = Path(__file__).parent / "stand_ins" / file
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _row(question: Question) -> str:
    return json.dumps(question, sort_keys=True, ensure_ascii=False)


def _parsed(text: str, path: Path, fields: Mapping[str, type]) -> list[Question]:
    """
    Raises:
        MissingError: a line is torn or lacks a field, or an id comes twice; named by their lines.
    """
    found: dict[str, tuple[int, Question]] = {}
    for number, line in enumerate(text.split("\n"), 1):  # what else ends a line in Unicode may stand in a question
        if not line.strip():
            continue
        try:
            question = json.loads(line)
        except ValueError:
            raise MissingError(f"{path}, line {number} is torn; copy the file again") from None
        if not isinstance(question, dict):
            raise MissingError(f"{path}, line {number} is no JSON object")
        for field, kind in {"id": str, **fields}.items():
            if not isinstance(question.get(field), kind):
                raise MissingError(f"{path}, line {number}: {field!r} must be a {kind.__name__}")
        name = question["id"]
        if name in found:
            raise MissingError(f"{path}: lines {found[name][0]} and {number} have the same id {name!r}; remove one")
        found[name] = (number, {key: question[key] for key in ("id", *fields)})
    return [question for _, question in found.values()]
