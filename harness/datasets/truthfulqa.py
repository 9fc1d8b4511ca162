"""TruthfulQA (Lin et al. 2022): 817 questions that people answer wrongly, to be answered freely or by choosing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from decodathlon.harness.datasets import questions
from decodathlon.harness.datasets.base import Split
from decodathlon.harness.datasets.questions import Question

GENERATION_SHA256: Mapping[Split, str] = {
    "test": "9dbfacf8042c2e4a721e9b6ea0c329f7b0eed2cc3bd5bc039620ae996e017356",
    "validation": "5e5d18e2eb86b78065c1defff76be085b2d9ff4f8c69bcf67b160e8db811ae9a",
}
CHOICE_SHA256: Mapping[Split, str] = {
    "test": "9fb1511fcb138caecd9357f6fd2e66b783f8e6a1cd5d7a47466f0cbca7ac3a1d",
    "validation": "ed34624f2c39b93a23a5c59d7a15cb811b4860743587aec23bc674e85e2db97a",
}
HUB_ID = "truthfulqa/truthful_qa"
_GENERATION = {"question": str, "best_answer": str, "correct_answers": list, "incorrect_answers": list}
_CHOICE = {"question": str, "mc1_targets": dict, "mc2_targets": dict}


def _generation(row: Mapping[str, Any]) -> Question:
    return {key: row[key] for key in _GENERATION}


def _choice(row: Mapping[str, Any]) -> Question:
    return {key: row[key] for key in _CHOICE}


def _own() -> list[Question]:
    return questions.of_package("truthfulqa.jsonl")


def _own_choices() -> list[Question]:
    """mc1: the best answer among the wrong ones; mc2: all right ones among the wrong ones."""
    found = []
    for q in _own():
        wrong = q["incorrect_answers"]
        found.append(
            {
                "id": q["id"],
                "question": q["question"],
                "mc1_targets": {"choices": [q["best_answer"], *wrong], "labels": [1, *[0] * len(wrong)]},
                "mc2_targets": {
                    "choices": [*q["correct_answers"], *wrong],
                    "labels": [*[1] * len(q["correct_answers"]), *[0] * len(wrong)],
                },
            }
        )
    return found


questions.register(
    "truthfulqa-generation",
    file="truthfulqa.generation.jsonl",
    fields=_GENERATION,
    hub_table=(HUB_ID, "generation", "validation"),
    of_hub=_generation,
    stand_in=_own,
    held_out=50,
    sha256=GENERATION_SHA256,
    source=__file__,
)
questions.register(
    "truthfulqa-choice",
    file="truthfulqa.multiple_choice.jsonl",
    fields=_CHOICE,
    hub_table=(HUB_ID, "multiple_choice", "validation"),
    of_hub=_choice,
    stand_in=_own_choices,
    held_out=50,
    sha256=CHOICE_SHA256,
    source=__file__,
)
