"""`decodathlon doctor`: is everything here that a run needs, and if not, what to do."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from decodathlon.harness import datasets, embedded, models
from decodathlon.harness.commands.command import Command, results_option, say
from decodathlon.harness.errors import DecodathlonError
from decodathlon.harness.registry import registry
from decodathlon.harness.results import environment, store
from decodathlon.harness.results.table import aligned

#: What measuring needs, and what the rest of the project needs.
NEEDED = ("torch", "transformers", "numpy", "pytest")
OPTIONAL = ("duckdb", "datasets", "pytest-benchmark", "lm_eval", "math-verify", "streamlit", "triton", "gguf")
#: Free space that a run with the embedded model should find, in bytes.
ROOM = 2 << 30


class Finding(NamedTuple):
    #: "ok", "note" (a run works without it) or "FAIL".
    state: str
    text: str


def _arguments(parser: argparse.ArgumentParser) -> None:
    results_option(parser)


def _run(options: argparse.Namespace) -> int:
    checks: dict[str, Callable[[], Finding]] = {
        "python": _python,
        "packages": _packages,
        "torch": _torch,
        "embedded model": _embedded,
        "hub": _hub,
        "data": _data,
        "results file": lambda: _results(options.results.resolve()),
        "disk": lambda: _disk(options.results.resolve().parent),
        "code": _code,
        "plugins": _plugins,
        "machine": _machine,
    }
    found = {name: check() for name, check in checks.items()}
    for line in aligned([[name, state, text] for name, (state, text) in found.items()]):
        say(line)
    return 1 if any(f.state == "FAIL" for f in found.values()) else 0


def _python() -> Finding:
    return Finding("ok", sys.version.split()[0])


def _packages() -> Finding:
    have, lost = [], []
    for name in (*NEEDED, *OPTIONAL):
        try:
            have.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            lost.append(name)
    if set(lost) & set(NEEDED):
        return Finding("FAIL", f"{', '.join(n for n in lost if n in NEEDED)} missing: pip install -e .")
    if lost:
        return Finding("note", f"without {', '.join(lost)}: pip install -e . adds them")
    return Finding("ok", ", ".join(have))


def _torch() -> Finding:
    if find_spec("torch") is None:
        return Finding("FAIL", "torch is not installed: pip install -e .")
    import torch

    if torch.cuda.is_available():
        return Finding("ok", f"{torch.__version__}, {torch.cuda.get_device_name(0)}")
    if environment.gpus():
        return Finding(
            "FAIL", f"{torch.__version__} sees no CUDA device, nvidia-smi does: install a CUDA build of torch"
        )
    kind = models.pick_dtype("auto", "cpu")
    return Finding("ok", f"{torch.__version__} on {torch.get_num_threads()} CPU threads in {kind}")


def _embedded() -> Finding:
    if embedded.is_ready():
        return Finding("ok", f"in {embedded.cache_folder()}")
    return Finding("note", f"not fetched yet; the first run does it, or: decodathlon models fetch {embedded.NAME}")


def _hub() -> Finding:
    try:
        models.check_hub("a model")
    except DecodathlonError as error:
        return Finding("note", f"hub models and data sets only from the cache: {error}")
    return Finding("ok", "answers")


def _data() -> Finding:
    folder = environment.data_folder()
    if folder is None:
        return Finding("note", "DECODATHLON_DATA is not set: hub cache, hub, or stand-in text (labelled in every row)")
    try:
        for name in registry.names("dataset"):
            datasets.check_folder(name, folder)
    except DecodathlonError as error:
        return Finding("FAIL", str(error))
    return Finding("ok", f"{folder} has {', '.join(registry.names('dataset'))}")


def _results(path: Path) -> Finding:
    try:
        store.check(path)
    except DecodathlonError as error:
        return Finding("FAIL", str(error))
    if not store.available():
        return Finding("note", "DuckDB is not installed: runs leave shards, to be ingested elsewhere")
    if not path.exists():
        return Finding("ok", f"{path} will be made")
    with store.connect(path) as connection:
        row = connection.execute("SELECT count(*), count(DISTINCT run_id) FROM cell").fetchone()
    return Finding("ok", f"{path}: {row[0]} cells of {row[1]} runs" if row else str(path))


def _disk(folder: Path) -> Finding:
    free = min(shutil.disk_usage(p).free for p in (folder, _existing(embedded.cache_folder())))
    state = "ok" if free >= ROOM else "FAIL"
    return Finding(state, f"{free / 2**30:.1f} GiB free" + ("" if state == "ok" else f"; {ROOM >> 30} GiB are needed"))


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _code() -> Finding:
    commit, dirty, _ = environment.git_state(environment.ROOT)
    if not commit:
        return Finding("note", "not a git checkout: rows cannot say which code measured them")
    return Finding("note", f"{commit[:12]}, changed since: rows will say so") if dirty else Finding("ok", commit[:12])


def _plugins() -> Finding:
    if registry.broken:
        first = registry.broken[0]
        return Finding("FAIL", f"{first.name} ({first.source}): {first.error.strip().splitlines()[-1]}")
    return Finding("ok", f"{len(registry.names('decoder'))} decoders, {len(registry.names('suite'))} suites")


def _machine() -> Finding:
    text = f"{environment.cpu_name()}, {os.cpu_count()} cores"
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.3:
        return Finding("note", f"{text}; load {load:.1f}: other work blurs every time that is measured")
    return Finding("ok", text)


registry.add("command", "doctor", Command("is everything here that a run needs", _arguments, _run), __file__)
