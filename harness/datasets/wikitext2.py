"""WikiText-2, raw (Merity et al. 2016): `Salesforce/wikitext`, or the original `wiki.*.raw` text by line."""

from __future__ import annotations

from decodathlon.harness.datasets import prose
from decodathlon.harness.datasets.base import DataSet, Split
from decodathlon.harness.errors import MissingError
from decodathlon.harness.registry import registry

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
        table = datasets.load_dataset(
            HUB_ID, CONFIG, split=split, download_config=datasets.DownloadConfig(local_files_only=offline)
        )
    except Exception as error:
        raise MissingError(f"data set {HUB_ID}: {str(error).splitlines()[0] if str(error) else error!r}") from error
    checksums = sorted(getattr(table.info, "download_checksums", None) or {})
    revision = checksums[0].partition("@")[2].partition("/")[0] if checksums else table._fingerprint
    return tuple(table["text"]), revision


registry.add(
    "dataset",
    "wikitext-2-raw-v1",
    DataSet("wikitext-2-raw-v1", file_name, rows_of_file, rows_of_hub, prose.stand_in, joint="\n\n"),
    source=__file__,
)
