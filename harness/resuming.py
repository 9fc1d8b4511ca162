"""A run is of one piece: which one is gone on with, and what must not have changed since it began."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decodathlon.harness.cells import CellSpec
from decodathlon.harness.errors import SpecError, StoreError, near_miss
from decodathlon.harness.registry import load_builtins, registry
from decodathlon.harness.results import environment, shards

#: What must be the same machine and libraries for two halves of a run to be one run.
SAME = ("git_commit", "git_diff_sha256", "machine", "cpu", "gpus", "python")
SAME_PACKAGES = ("decodathlon", "torch", "transformers", "triton", "numpy")


def same() -> dict[str, Any]:
    """What of this machine's software another one must have, too."""
    found = environment.packages()
    versions = {f"package {name}": found.get(name) for name in SAME_PACKAGES}
    return {"code": environment.code(), "python": platform.python_version(), **versions}


def find(results: Path, run: str) -> Path:
    """The folder of a run beside a results file; `last` is the newest.

    Raises:
        SpecError: there is none of that name, or it left no plan.
    """
    beside = results.with_suffix(".shards")
    runs = sorted(p.parent.name for p in beside.glob(f"*/{shards.PLAN_FILE}"))
    begun = [r for r in runs if (beside / r / shards.RUN_FILE).is_file()]
    if not begun:
        raise SpecError(f"--resume {run}: there is no run to resume in {beside}")
    name = begun[-1] if run == "last" else run
    if name not in begun:
        raise SpecError(f"--resume {run}: there is no such run in {beside}{near_miss(run, begun[-10:])}")
    return beside / name


def refuse_changes(folder: Path, plan: dict[str, Any], planned: Sequence[CellSpec]) -> None:
    """
    Args:
        folder: of the run.
        plan: what it wrote down before its first cell.

    Raises:
        StoreError: code, suites, decoders, machine or libraries are not those that it began with.
    """
    run_id = folder.name
    load_builtins()
    registry.load_entry_points()
    remedy = "a run is of one piece: start a new one"
    for path in {p for s in planned for p in s.decoder_files}:
        if not Path(path).is_file():
            raise StoreError(f"--resume {run_id}: {path} is gone; put it back, or start a new run")
        registry.load_file(path)
    for path, digest in plan["decoders"].items():
        if environment.digest(Path(path)) != digest:
            raise StoreError(f"--resume {run_id}: {path} has changed since; {remedy}")
    for spec in planned:
        version = registry.get("suite", spec.suite).version
        if version != spec.suite_version:
            was = f"suite {spec.suite} was version {spec.suite_version} and is {version}"
            raise StoreError(f"--resume {run_id}: {was}; {remedy}")
    record = shards.read(folder / shards.RUN_FILE)
    then, today = {**record["environment"], "git_commit": record["git_commit"]}, environment.describe()
    for key in SAME:
        if then.get(key) != today.get(key):
            what = "the code" if key.startswith("git") else key
            raise StoreError(f"--resume {run_id}: {what} has changed since ({key}); {remedy}")
    for name in SAME_PACKAGES:
        old, new = then["packages"].get(name), today["packages"].get(name)
        if old != new:
            raise StoreError(f"--resume {run_id}: {name} was {old} and is {new}; {remedy}")
