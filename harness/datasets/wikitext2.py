"""WikiText-2, raw (Merity et al. 2016): `Salesforce/wikitext`, or the original `wiki.*.raw` text by line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from decodathlon.harness.datasets import prose
from decodathlon.harness.datasets.base import DataSet, Split
from decodathlon.harness.errors import MissingError
from decodathlon.harness.registry import registry

#: Of the splits' rows joined by "\\n\\n".
SHA256: dict[Split, str] = {
    "test": "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83",
    "validation": "b44fb967f92b525731216a507d1fbc44b97446b7ef0a2b4d1a893f81f1bbc29e",
}
HUB_ID, CONFIG = "Salesforce/wikitext", "wikitext-2-raw-v1"


def file_name(split: Split) -> str:
    return f"{CONFIG}.{'valid' if split == 'validation' else split}.txt"


def rows_of_file(text: str) -> tuple[str, ...]:
    """The hub's rows: one per line, with its line feed, and an empty string for a blank line."""
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    return tuple(line + "\n" if line.strip() else "" for line in lines)


def rows_of_hub(split: Split, offline: bool) -> tuple[tuple[str, ...], str]:
    """Rows and revision from the hub or its cache.

    Raises:
        MissingError: they cannot be had.
    """
    try:
        import datasets
    except ImportError:
        raise MissingError("the hub's data sets need the package datasets: pip install datasets") from None
    if not offline:
        from decodathlon.harness.models import check_hub

        check_hub(f"data set {HUB_ID}")
    try:
        with _hub_offline() if offline else contextlib.nullcontext():
            table = datasets.load_dataset(HUB_ID, CONFIG, split=split)
    except Exception as error:
        raise MissingError(f"data set {HUB_ID}: {str(error).splitlines()[0] if str(error) else error!r}") from error
    checksums = sorted(getattr(table.info, "download_checksums", None) or {})
    revision = checksums[0].partition("@")[2].partition("/")[0] if checksums else table._fingerprint
    return tuple(table["text"]), revision


@contextlib.contextmanager
def _hub_offline() -> Iterator[None]:
    """Look into the cache only. The libraries read their switch at import; without it they retry for a minute."""
    import datasets.config
    import huggingface_hub.constants

    holders: list[Any] = [m for m in (datasets.config, huggingface_hub.constants) if hasattr(m, "HF_HUB_OFFLINE")]
    before = [m.HF_HUB_OFFLINE for m in holders]
    try:
        for module in holders:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(holders, before, strict=True):
            module.HF_HUB_OFFLINE = value


registry.add(
    "dataset",
    "wikitext-2-raw-v1",
    DataSet("wikitext-2-raw-v1", file_name, rows_of_file, rows_of_hub, prose.stand_in, "\n\n", "text", SHA256),
    source=__file__,
)
