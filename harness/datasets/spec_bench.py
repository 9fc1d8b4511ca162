"""Spec-Bench (Xia et al. 2024): 480 prompts of six kinds, 80 of them MT-Bench's. It is on no hub; `--data` has it."""

from __future__ import annotations

from collections.abc import Mapping

from decodathlon.harness.datasets import questions
from decodathlon.harness.datasets.base import Split

SHA256: Mapping[Split, str] = {"test": "ce768da3e6f553aca5ecd13baf0141b741f4379b8bcf1f514891178d8c5b6573"}

questions.register(
    "spec-bench",
    file="spec_bench.questions.jsonl",
    fields={"turns": list, "category": str},
    hub_table=None,
    of_hub=dict,
    stand_in=lambda: questions.of_package("spec_bench.jsonl"),
    held_out=0,
    sha256=SHA256,
    source=__file__,
)

#: The kinds by which results are told apart: MT-Bench's eight categories are one.
KINDS = ("mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag")


def kind(category: str) -> str:
    """The kind of a question."""
    return category if category in KINDS else "mt_bench"
