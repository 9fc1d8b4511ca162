"""MT-Bench (Zheng et al. 2023): 80 open questions of 8 categories in two turns, 30 of them with reference answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from decodathlon.harness.datasets import questions
from decodathlon.harness.datasets.base import Split
from decodathlon.harness.datasets.questions import Question
from decodathlon.harness.errors import MissingError

#: With the reference answers, and as the hub has it, without.
SHA256: Mapping[Split, Sequence[str]] = {
    "test": (
        "503fa7f7c2df9bb24eac8a81c939b512d29242f8f671982d264b3b56c4966a3d",
        "9d72af64be5d58f7cb2595cc0e4be973e882cecc2adb418760888f459937f695",
    )
}
#: Answers of GPT-4 to mathematics, reasoning and coding; the hub's copy of the questions has none.
REFERENCES = "mt_bench.reference_gpt4.jsonl"


def _with_references(found: list[Question], folder: Path) -> None:
    """Give every question the reference answers to its turns, from the file beside it where there is one; else none."""
    path, answers = folder / REFERENCES, {}
    if path.is_file():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                answers[f"mt_bench-{row['question_id']}"] = [str(turn) for turn in row["choices"][0]["turns"]]
            except (ValueError, KeyError, TypeError, IndexError):
                raise MissingError(f"{path}, line {number} is no reference answer; copy the file again") from None
    for question in found:
        question["reference"] = answers.get(question["id"], [])


def _of_hub(row: Mapping[str, Any]) -> Question:
    return {"turns": list(row["prompt"]), "category": row["category"], "reference": []}


questions.register(
    "mt-bench",
    file="mt_bench.questions.jsonl",
    fields={"turns": list, "category": str},
    completed=_with_references,
    hub_table=("HuggingFaceH4/mt_bench_prompts", None, "train"),
    of_hub=_of_hub,
    stand_in=lambda: questions.of_package("mt_bench.jsonl"),
    held_out=0,
    sha256=SHA256,
    source=__file__,
)
