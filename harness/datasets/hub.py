"""Tables of the hub, from its cache or over the net; all that can go wrong there becomes `MissingError`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from decodathlon.harness.errors import MissingError


def table(hub_id: str, config: str | None, split: str, *, offline: bool) -> tuple[Any, str]:
    """The table of a split (it has rows, and columns by name), and its revision.

    Args:
        offline: look into the cache only.

    Raises:
        MissingError: it cannot be had.
    """
    try:
        import datasets
    except ImportError:
        raise MissingError("the hub's data sets need the package datasets: pip install datasets") from None
    if not offline:
        from decodathlon.harness.models import check_hub

        check_hub(f"data set {hub_id}")
    try:
        with _offline() if offline else contextlib.nullcontext():
            found = datasets.load_dataset(hub_id, config, split=split)
    except Exception as error:
        raise MissingError(f"data set {hub_id}: {str(error).splitlines()[0] if str(error) else error!r}") from error
    checksums = sorted(getattr(found.info, "download_checksums", None) or {})
    return found, checksums[0].partition("@")[2].partition("/")[0] if checksums else found._fingerprint


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """The libraries read their switch at import; without it they retry for a minute."""
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
