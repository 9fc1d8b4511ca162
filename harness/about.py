"""What the names of a run mean, as its record keeps it: a reader without the plugins still learns what was measured."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Iterable
from typing import Any

from decodathlon.harness import decoder as decoders
from decodathlon.harness import spec
from decodathlon.harness.errors import SpecError
from decodathlon.harness.registry import registry
from decodathlon.harness.results import metrics


def describe(specs: Iterable[str], suites: Iterable[str]) -> dict[str, Any]:
    """
    Args:
        specs: decoders as spec strings; one that cannot be found (a broken plugin) is left out.
        suites: names of suites.

    Returns:
        `decoders` by name, `suites` by name, and `metrics` that are not of the project's own table.
    """
    found: dict[str, Any] = {}
    for text in specs:
        try:
            cls = registry.get("decoder", spec.parse(text).name)
        except SpecError:
            continue
        found.setdefault(cls.info.name, _decoder(cls))
    own = registry.entries["metric", metrics.OWN].source
    return {
        "decoders": found,
        "suites": {name: _suite(name) for name in dict.fromkeys(suites)},
        "metrics": {
            e.name: e.value._asdict() for e in registry.entries.values() if e.kind == "metric" and e.source != own
        },
    }


def _decoder(cls: type[decoders.Decoder]) -> dict[str, Any]:
    info, hints = cls.info, typing.get_type_hints(cls)
    parameters = [
        {
            "name": field.name,
            "type": getattr(hints[field.name], "__name__", str(hints[field.name])),
            "default": None if field.default is dataclasses.MISSING else field.default,
            "bounds": info.bounds.get(field.name, ""),
            "sweep": list(info.sweep.get(field.name, ())),
        }
        for field in dataclasses.fields(typing.cast("Any", cls))
        if field.init
    ]
    return {
        "family": info.family,
        "summary": info.summary,
        "text": inspect.getdoc(cls) or "",
        "paper": info.paper,
        "parameters": parameters,
    }


def _suite(name: str) -> dict[str, Any]:
    suite = registry.get("suite", name)
    return {
        "version": suite.version,
        "asks": suite.asks,
        "table": list(suite.table),
        "protocol": dict(suite.protocol),
    }
