"""English prose that every Python carries: the language reference in `pydoc_data`. Stands in where no data can be had.

It differs from one Python to the next, so rows carry the version and the hash, and its own name.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence

from decodathlon.harness.datasets.base import Split, Text


def stand_in(split: Split) -> Text:
    """Every tenth topic, in alphabetical order, is for validation; the test split is the others.

    Topics share sections, so a paragraph that was seen before, or that validation has, is left out.
    """
    from pydoc_data import topics

    texts = [text for _, text in sorted(topics.topics.items())]
    validation = _paragraphs(texts[::10])
    rows = validation
    if split == "test":
        seen = set(validation)
        rows = [p for p in _paragraphs([t for i, t in enumerate(texts) if i % 10]) if p not in seen]
    return Text("python-topics", f"python-{platform.python_version()}", split, "stand-in", tuple(rows), "\n\n")


def _paragraphs(texts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(p.strip() for text in texts for p in text.split("\n\n") if p.strip()))
