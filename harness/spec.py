"""Spec strings: `name[key=value,...]` names a decoder or a model with its parameters, and round-trips.

Types, bounds and choices come from the dataclass that the name stands for.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from decodathlon.harness.errors import SpecError, near_miss

_SHAPE = re.compile(r"^(?P<name>[^\[\]]+)(\[(?P<params>[^\[\]]*)\])?$")


class Spec(NamedTuple):
    name: str
    params: dict[str, str]


def parse(text: str, what: str = "decoder") -> Spec:
    """Split a spec string; values stay text.

    Raises:
        SpecError: brackets or `key=value` pairs are malformed, or a key appears twice.
    """
    match = _SHAPE.match(text.strip())
    if match is None:
        raise SpecError(f"{what} {text!r} is not of the form name or name[key=value,...]")
    params: dict[str, str] = {}
    for pair in filter(None, (p.strip() for p in (match["params"] or "").split(","))):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not key or not value:
            raise SpecError(f"{what} {text!r}: {pair!r} is not of the form key=value")
        if key in params:
            raise SpecError(f"{what} {text!r}: {key!r} is given twice")
        params[key] = value
    return Spec(match["name"].strip(), params)


def also(text: str, what: str, more: Mapping[str, str | None]) -> str:
    """The spec string with more parameters in its brackets; those that are None are left out.

    Raises:
        SpecError: one of them is there already, or makes the string malformed.
    """
    spec, added = parse(text, what), {key: value for key, value in more.items() if value is not None}
    pairs = ",".join(f"{key}={value}" for key, value in [*spec.params.items(), *added.items()])
    made = f"{spec.name}[{pairs}]" if pairs else text
    parse(made, what)
    return made


def by_layout(spec: Spec, what: str, layout: Mapping[str, str | None]) -> Spec:
    """The spec with its dotted keys replaced by the parameters that they stand for.

    Raises:
        SpecError: a dotted key is unknown, or its parameter is given under another name as well.
    """
    params: dict[str, str] = {}
    for key, value in spec.params.items():
        name = layout.get(key) if "." in key else key
        if name is None:
            known = [k for k, parameter in layout.items() if parameter]
            raise SpecError(f"{what} {spec.name!r} has no parameter {key!r}{near_miss(key, known)}")
        if name in params:
            raise SpecError(f"{what} {spec.name!r}: {name!r} is given twice, once as {key!r}")
        params[name] = value
    return Spec(spec.name, params)


class Interval(NamedTuple):
    """A range of numbers in mathematical notation, such as `(0, 1]`."""

    text: str
    low: float
    high: float

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, (int, float)) or math.isnan(value):
            return False
        above = value > self.low if self.text[0] == "(" else value >= self.low
        below = value < self.high if self.text[-1] == ")" else value <= self.high
        return above and below


def interval(text: str) -> Interval:
    """Read `[0, 1)`, `(0, inf)` and the like."""
    match = re.fullmatch(r"[\[(]\s*([^,\s]+)\s*,\s*([^,\s]+)\s*[\])]", text)
    if match is None:
        raise ValueError(f"{text!r} is not an interval such as '[0, 1)'")
    return Interval(text, float(match[1]), float(match[2]))


def fill(cls: type, spec: Spec, what: str, bounds: Mapping[str, str]) -> Any:
    """An instance of the dataclass `cls` with the parameters of `spec`.

    Raises:
        SpecError: an unknown parameter, a value of the wrong type, or one out of bounds; names the nearest valid one.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}
    values: dict[str, Any] = {}
    for key, text in spec.params.items():
        if key not in fields:
            raise SpecError(f"{what} {spec.name!r} has no parameter {key!r}{near_miss(key, fields)}")
        values[key] = _value(text, fields[key], f"{what} {spec.name!r}: {key}")
        check_bounds(values[key], bounds.get(key), f"{what} {spec.name!r}: {key}={text}")
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.init
        and f.name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise SpecError(f"{what} {spec.name!r} needs {', '.join(missing)}: write {spec.name}[{missing[0]}=...]")
    return cls(**values)


def check_bounds(value: Any, bound: str | None, where: str) -> None:
    """
    Raises:
        SpecError: `value` is a number outside `bound`.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if bound is not None and number and value not in interval(bound):
        raise SpecError(f"{where} is outside {bound}")


def render(name: str, instance: Any) -> str:
    """The shortest spec string that gives this instance back: parameters at their default are left out."""
    shown = []
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if field.init and value != field.default:
            shown.append(f"{field.name}={_text(value)}")
    return f"{name}[{','.join(shown)}]" if shown else name


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value)


def _value(text: str, hint: Any, where: str) -> Any:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        by_text = {_text(o): o for o in options}
        if text not in by_text:
            raise SpecError(f"{where}={text} is not one of {', '.join(by_text)}")
        return by_text[text]
    if origin in (typing.Union, types.UnionType):
        if text.lower() == "none":
            return None
        (hint,) = [o for o in options if o is not type(None)]
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise SpecError(f"{where}={text} is not true or false")
        return text.lower() == "true"
    try:
        return hint(text)
    except ValueError:
        kind = {int: "a whole number", float: "a number"}.get(hint, f"a {hint.__name__}")
        raise SpecError(f"{where}={text} is not {kind}") from None
