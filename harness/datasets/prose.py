"""English prose that every Python carries: the language reference in `pydoc_data`. Stands in where no data can be had.

It differs from one Python to the next, so rows carry the version and the hash, and its own name.
"""

from __future__ import annotations

import platform

from decodathlon.harness.datasets.base import Split
from decodathlon.harness.datasets.base import Text


def stand_in(split: Split) -> Text:
    """Nine tenths of the topics, in alphabetical order, are the test split; every tenth is for validation."""
    from pydoc_data import topics

    wanted = 0 if split == "validation" else None
    chosen = [text for i, (_, text) in enumerate(sorted(topics.topics.items())) if (i % 10 == 0) == (wanted == 0)]
    paragraphs = tuple(p.strip() for text in chosen for p in text.split("\n\n") if p.strip())
    return Text("python-topics", f"python-{platform.python_version()}", split, "stand-in", paragraphs, "\n\n")
