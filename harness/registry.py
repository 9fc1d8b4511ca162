"""One registry for everything that has a name: decoders, model loaders, suites, data sets, rewards, metrics, commands.

Built-in entries register when their module is imported, which must not import torch. Other packages register through
entry points (group `decodathlon.decoders`, or `decodathlon.plugins` for the rest), files through `load_file`.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
import sys
import traceback
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

from decodathlon.harness.cells import HARNESS
from decodathlon.harness.errors import SpecError, near_miss

Kind = Literal["decoder", "model-loader", "suite", "dataset", "reward", "metric", "command", "served"]

#: Entry-point groups of third-party packages. Loading a module is enough; it registers what it holds.
ENTRY_POINT_GROUPS = ("decodathlon.decoders", "decodathlon.plugins")
#: `--decoder all`, and what stands for a decoder in rows of the harness's own operations.
RESERVED = ("all", HARNESS)
_KEBAB = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_SNAKE = re.compile(r"[a-z0-9]+(_[a-z0-9]+)*")


@dataclass(frozen=True)
class Entry:
    """A registered thing and the file it comes from."""

    kind: Kind
    name: str
    value: Any
    source: str


@dataclass(frozen=True)
class Broken:
    """A third-party plugin that could not be imported."""

    name: str
    source: str
    error: str


@dataclass
class Registry:
    """Entries by kind and name. Names are kebab-case; metrics and suites, which users type in SQL too, snake_case."""

    entries: dict[tuple[Kind, str], Entry] = field(default_factory=dict)
    broken: list[Broken] = field(default_factory=list)
    _loaded: set[str] = field(default_factory=set)

    def add(self, kind: Kind, name: str, value: Any, source: str) -> None:
        """Register `value`.

        Raises:
            SpecError: the name is malformed, or something else holds it; both sources are named.
        """
        shape, style = (_SNAKE, "snake_case") if kind in ("metric", "suite") else (_KEBAB, "kebab-case")
        if not shape.fullmatch(name):
            raise SpecError(f"{kind} name {name!r} ({source}) is not {style}")
        if kind == "decoder" and name in RESERVED:
            raise SpecError(f"decoder name {name!r} ({source}) means something else here; choose another")
        held = self.entries.get((kind, name))
        if held is not None and Path(held.source).resolve() != Path(source).resolve():
            raise SpecError(f"{kind} {name!r} is defined twice: in {held.source} and in {source}; rename one")
        self.entries[kind, name] = Entry(kind, name, value, source)

    def get(self, kind: Kind, name: str) -> Any:
        """The registered value.

        Raises:
            SpecError: nothing of this kind has the name; the nearest one is named.
        """
        if (kind, name) not in self.entries:
            own = "; one in a file of its own needs --decoder-file FILE" if kind in ("decoder", "reward") else ""
            raise SpecError(f"there is no {kind} {name!r}{near_miss(name, self.names(kind))}{own}")
        return self.entries[kind, name].value

    def names(self, kind: Kind) -> list[str]:
        return sorted(name for k, name in self.entries if k == kind)

    def load_package(self, package: str) -> None:
        """Import every module directly inside a built-in package, once."""
        if package in self._loaded:
            return
        self._loaded.add(package)
        module = importlib.import_module(package)
        for info in pkgutil.iter_modules(module.__path__, prefix=f"{package}."):
            importlib.import_module(info.name)

    def load_entry_points(self) -> None:
        """Import third-party plugins; one that fails is remembered in `broken`, the others run.

        Raises:
            SpecError: a plugin registers a name that is taken, or one that is malformed.
        """
        for group in ENTRY_POINT_GROUPS:
            for point in entry_points(group=group):
                if point.value in self._loaded:
                    continue
                self._loaded.add(point.value)
                try:
                    point.load()
                except SpecError:
                    raise
                except (Exception, SystemExit):  # noqa: BLE001 - whatever a stranger's module raises becomes its `failed` row
                    source = f"{point.value} ({point.dist.name if point.dist else 'unknown package'})"
                    self.broken.append(Broken(point.name, source, traceback.format_exc()))

    def load_file(self, path: str | Path) -> None:
        """Import a plugin file by its path.

        Raises:
            SpecError: there is no such file, or it does not import; the message has the file and the line.
        """
        file = Path(path).resolve()
        if not file.is_file():
            raise SpecError(f"--decoder-file {path}: there is no such file")
        name = f"decodathlon_file_{re.sub(r'[^0-9a-zA-Z]', '_', str(file))}"
        if name in sys.modules:
            return
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise SpecError(f"--decoder-file {path} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        before = len(self.entries)
        try:
            spec.loader.exec_module(module)
        except SpecError:
            del sys.modules[name]
            raise
        except (Exception, SystemExit) as error:
            del sys.modules[name]
            frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
            line = error.lineno if isinstance(error, SyntaxError) else frames[-1].lineno if frames else 1
            raise SpecError(f"--decoder-file {path}, line {line}: {type(error).__name__}: {error}") from error
        if len(self.entries) == before:
            del sys.modules[name]
            raise SpecError(
                f"--decoder-file {path} registers nothing; decorate a class with @decoder('name', claim=...)"
            )


#: The registry of this process.
registry = Registry()


def load_builtins() -> None:
    """Register the project's own decoders and suites. Imports neither torch nor transformers."""
    registry.load_package("decodathlon.decoders")
    registry.load_package("decodathlon.suites")
