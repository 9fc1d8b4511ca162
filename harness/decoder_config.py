"""`--decoder-config FILE.yaml`: the parameters of a decoder from a file, in a layout that the decoder states.

The layout (`@decoder(..., layout=...)`) says which dotted key of the file is which parameter. Types and bounds are the
decoder's own; what the file says that is no parameter, such as a seed, the harness has its own options for.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from decodathlon.harness import decoder as decoders
from decodathlon.harness import spec
from decodathlon.harness.decoder import Decoder
from decodathlon.harness.errors import SpecError, near_miss
from decodathlon.harness.registry import registry

#: Under which such a file says how its parameters are tuned.
TUNING = "tuning"
#: How such files name the methods of `decodathlon tune`.
_METHODS = {"grid": "grid", "random": "random", "bayesian": "tpe", "tpe": "tpe"}


class Tuning(NamedTuple):
    """What a file says of its own tuning; None where it says nothing."""

    #: Values by parameter.
    space: dict[str, list[Any]]
    method: str | None
    trials: int | None
    validation: int | None


def applied(path: str | Path, named: Sequence[str]) -> tuple[list[str], list[str]]:
    """The spec strings with the parameters of the file where they name none, and what of the file was left aside.

    Raises:
        SpecError: the file cannot be read, says something of no decoder here, or something that its decoder refuses.
    """
    content = read(path)
    found: list[str] = []
    aside: list[str] = []
    fits = False
    for text in named:
        parsed = spec.parse(text)
        cls: type[Decoder] = registry.get("decoder", parsed.name)
        if not cls.info.layout:
            found.append(text)
            continue
        fits = True
        own = spec.by_layout(parsed, "decoder", cls.info.layout).params
        values, aside = parameters(path, content, cls)
        both = {k: str(v).lower() if isinstance(v, bool) else str(v) for k, v in values.items()} | own
        try:
            found.append(decoders.build(f"{parsed.name}[{','.join(f'{k}={v}' for k, v in both.items())}]").spec)
        except SpecError as error:
            raise SpecError(f"--decoder-config {path}: {error}") from None
    if not fits:
        able = [n for n in registry.names("decoder") if registry.get("decoder", n).info.layout]
        raise SpecError(f"--decoder-config {path}: name a decoder that reads such a file: --decoder {', '.join(able)}")
    return found, aside


def read(path: str | Path) -> dict[str, Any]:
    """
    Raises:
        SpecError: there is no such file, or it is no YAML mapping.
    """
    import yaml

    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_loader())
    except OSError as error:
        raise SpecError(f"--decoder-config {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SpecError(f"--decoder-config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise SpecError(f"--decoder-config {path}: it must be a mapping with sections, not {type(content).__name__}")
    return content


@functools.cache
def _loader() -> Any:
    """YAML as people write it by hand: without anchors, which may stand for gigabytes, and without a key said twice, of
    which one would be lost in silence."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
                raise yaml.YAMLError(f"anchors and aliases are not taken, line {event.start_mark.line + 1}")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value:
                if key.value in seen:
                    raise yaml.YAMLError(f"{key.value!r} is there twice, line {key.start_mark.line + 1}")
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    return Loader


def parameters(path: str | Path, content: Mapping[str, Any], cls: type[Decoder]) -> tuple[dict[str, Any], list[str]]:
    """Values by parameter, checked; and the keys that are the harness's own business.

    A section that says `enabled: false` counts as not there, unless that is itself a parameter.

    Raises:
        SpecError: a key is unknown, or a value is of another type or out of bounds; both are named.
    """
    layout = cls.info.layout
    checked = _validated(_model(cls), content, path, layout)
    values: dict[str, Any] = {}
    aside: list[str] = []
    for key, value in _leaves(checked, layout):
        parameter = layout[key]
        section = key.rpartition(".")[0]
        if parameter is None:
            aside += [] if key == TUNING or key.endswith(".enabled") else [key]
        elif layout.get(f"{section}.enabled", "") is not None or _at(checked, f"{section}.enabled") is not False:
            _check_text(path, key, value)
            values[parameter] = value
    return values, aside


def _check_text(path: str | Path, key: str, value: Any) -> None:
    """
    Raises:
        SpecError: a text would not survive in a spec string.
    """
    if isinstance(value, str) and (not value or set(value) & set(",[]=")):
        raise SpecError(f"--decoder-config {path}: {key} = {_short(value)}: it may not be empty or hold any of , [ ] =")


def _validated(model: Any, content: Mapping[str, Any], path: str | Path, known: Iterable[str]) -> dict[str, Any]:
    """What the file says, as the model reads it; what it does not say is left out.

    Raises:
        SpecError: the first thing that the model refuses.
    """
    from pydantic import ValidationError

    try:
        found: dict[str, Any] = model.model_validate(content).model_dump(exclude_unset=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            dotted = "; write it as sections, without dots" if key in known else near_miss(key, list(known))
            raise SpecError(f"--decoder-config {path}: there is no {key!r}{dotted}") from None
        raise SpecError(f"--decoder-config {path}: {key} = {_short(first['input'])}: {first['msg']}") from None
    return found


def _short(value: Any) -> str:
    """A value for an error; Python refuses to write out integers of thousands of digits."""
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return "a number of more than 64 bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def tuning(path: str | Path, cls: type[Decoder]) -> Tuning:
    """What the file says under `tuning`.

    Raises:
        SpecError: a parameter of the search space is unknown, or one of its values is refused.
    """
    from pydantic import TypeAdapter, ValidationError

    section = _validated(_tuning_model(), read(path).get(TUNING) or {}, f"{path}: {TUNING}", ())
    hints, space = typing.get_type_hints(cls), dict[str, list[Any]]()
    for key, values in (section.get("search_space") or {}).items():
        parameter = cls.info.layout.get(key)
        if parameter is None:
            known = [k for k, p in cls.info.layout.items() if p]
            raise SpecError(f"--decoder-config {path}: tuning.search_space: no {key!r}{near_miss(key, known)}")
        kind = _bounded(hints[parameter], cls.info.bounds.get(parameter))
        try:
            space[parameter] = [TypeAdapter(kind).validate_python(value) for value in values]
            for value in space[parameter]:
                _check_text(path, f"tuning.search_space: {key}", value)
        except ValidationError as error:
            first = error.errors()[0]
            where = f"tuning.search_space: {key} = {_short(first['input'])}"
            raise SpecError(f"--decoder-config {path}: {where}: {first['msg']}") from None
    if section.get("enabled") is False:
        return Tuning({}, None, None, None)
    method = section.get("method")
    return Tuning(space, method and _METHODS[method], section.get("n_trials"), section.get("validation_samples"))


def _tuning_model() -> Any:
    from pydantic import ConfigDict, Field, create_model

    number = typing.Annotated[int, Field(ge=1, strict=True)]
    values = dict[str, typing.Annotated[list[Any], Field(min_length=1)]]
    fields: dict[str, Any] = {
        "enabled": (bool | None, None),
        "method": (typing.Literal["grid", "random", "bayesian", "tpe"] | None, None),
        "n_trials": (number | None, None),
        "validation_samples": (number | None, None),
        "search_space": (values | None, None),
        "metric": (str | None, None),  # --metric of tune
        "validation_seed": (int | None, None),
    }
    return create_model("Tuning", __config__=ConfigDict(extra="forbid"), **fields)


def _leaves(content: Mapping[str, Any], layout: Mapping[str, str | None], head: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of the layout that the file has, each with what stands there; keys without a value are left out."""
    for key, value in content.items():
        dotted = f"{head}{key}"
        if dotted in layout:
            if value is not None:
                yield dotted, value
        elif isinstance(value, Mapping):
            yield from _leaves(value, layout, f"{dotted}.")


def _at(content: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        content = content.get(part) if isinstance(content, Mapping) else None
    return content


def _model(cls: type[Decoder]) -> Any:
    """The file as pydantic checks it, made from the decoder's own types and bounds."""
    hints = typing.get_type_hints(cls)
    names = {f.name for f in dataclasses.fields(cast("Any", cls))}
    tree: dict[str, Any] = {}
    for key, parameter in cls.info.layout.items():
        *sections, last = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        if parameter is None:
            place[last] = (bool | None if last == "enabled" else Any, None)
        else:
            assert parameter in names
            place[last] = (_bounded(hints[parameter], cls.info.bounds.get(parameter)) | None, None)
    return _nested(cls.__name__, tree)


def _bounded(hint: Any, bounds: str | None) -> Any:
    """The type as pydantic takes it: within its bounds; true and false are no numbers, and nothing else is either."""
    from pydantic import BeforeValidator, Field

    if hint is bool:
        return typing.Annotated[bool, Field(strict=True)]
    if hint in (int, float):
        hint = typing.Annotated[hint, BeforeValidator(_no_truth)]
    if bounds is None:
        return hint
    found = spec.interval(bounds)
    limits: dict[str, Any] = {
        "gt" if bounds[0] == "(" else "ge": found.low,
        "lt" if bounds[-1] == ")" else "le": found.high,
    }
    return typing.Annotated[hint, Field(**limits)]


def _no_truth(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is wanted, not true or false")
    return value


def _nested(name: str, tree: Mapping[str, Any]) -> Any:
    from pydantic import ConfigDict, create_model

    fields: dict[str, Any] = {
        key: (_nested(f"{name}_{key}", part) | None, None) if isinstance(part, dict) else part
        for key, part in tree.items()
    }
    return create_model(name, __config__=ConfigDict(extra="forbid"), **fields)
