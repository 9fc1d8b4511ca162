"""WikiText-2, raw (Merity et al. 2016): `Salesforce/wikitext`, or the original `wiki.*.raw` text by line."""

from __future__ import annotations

from pathlib import Path

from decodathlon.harness.datasets import hub, prose
from decodathlon.harness.datasets.base import DataSet, Split, json_lines
from decodathlon.harness.registry import registry

#: Of the splits' rows joined by "\\n\\n".
SHA256: dict[Split, str] = {
    "test": "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83",
    "validation": "b44fb967f92b525731216a507d1fbc44b97446b7ef0a2b4d1a893f81f1bbc29e",
}
HUB_ID, CONFIG = "Salesforce/wikitext", "wikitext-2-raw-v1"


def file_name(split: Split) -> str:
    return f"{CONFIG}.{'valid' if split == 'validation' else split}.txt"


def rows_of_file(text: str, path: Path, split: Split) -> tuple[str, ...]:
    """The hub's rows: one per line, with its line feed, an empty string for a blank line; or those of JSON lines."""
    if path.suffix == ".jsonl":
        return json_lines(text, "text", path)
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    return tuple(line + "\n" if line.strip() else "" for line in lines)


def rows_of_hub(split: Split, offline: bool) -> tuple[tuple[str, ...], str]:
    """Rows and revision from the hub or its cache.

    Raises:
        MissingError: they cannot be had.
    """
    table, revision = hub.table(HUB_ID, CONFIG, split, offline=offline)
    return tuple(table["text"]), revision


registry.add(
    "dataset",
    "wikitext-2-raw-v1",
    DataSet("wikitext-2-raw-v1", file_name, rows_of_file, rows_of_hub, prose.stand_in, "\n\n", SHA256),
    source=__file__,
)
