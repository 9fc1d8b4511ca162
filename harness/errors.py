"""The errors that users meet. Each names the thing and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DecodathlonError(Exception):
    """Base of every error that this project raises on purpose."""


class SpecError(DecodathlonError):
    """A name, parameter or option that the user typed is wrong. Becomes a usage error (exit code 4)."""


class MissingError(DecodathlonError):
    """A model, a data set or a package is not at hand; the message says how to get it."""


class UnsupportedError(DecodathlonError):
    """A target lacks what a decoder needs; the cell becomes `unsupported`."""

    def __init__(self, capability: str, reason: str) -> None:
        super().__init__(f"needs {capability}: {reason}")
        self.capability = capability


class RewardError(DecodathlonError):
    """A reward raised, or returned something that is no number per answer."""


class ContextOverflowError(DecodathlonError):
    """A text would grow beyond what the target reads."""


class StoreError(DecodathlonError):
    """A results file cannot be read or written."""


def near_miss(name: str, valid: Iterable[str]) -> str:
    """`; did you mean 'x'?` or, where nothing is near, the valid names."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are: {', '.join(names)}" if names else "; there are none"
