"""The record of a run: what code, on what machine, with which versions and options."""

from __future__ import annotations

import os
import platform
import secrets
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "decodathlon",
    "torch",
    "transformers",
    "numpy",
    "pytest",
    "triton",
    "datasets",
    "duckdb",
    "gguf",
    "tokenizers",
)
#: Tracked files that a run itself writes; a change in them is not dirty code.
OWN_OUTPUT = ("results.duckdb",)
#: Where an untracked file is code that may run; elsewhere it is the user's own.
CODE = ("harness/", "decoders/", "kernels/", "suites/", "leaderboard/")


def describe() -> dict[str, Any]:
    """Everything that can be told without importing torch."""
    commit, dirty = git_state(ROOT)
    return {
        "git_commit": commit,
        "git_dirty": dirty,
        "python": platform.python_version(),
        "platform": "-".join([platform.system(), platform.machine(), *platform.libc_ver()]),
        "packages": packages(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": memory_bytes(),
        "gpus": gpus(),
    }


def hardware_name(record: dict[str, Any], model: dict[str, Any]) -> str:
    """One line for the table: the GPU that computed, else the CPU and the threads on it."""
    return str(model.get("processor") or f"{record['cpu']}, {model.get('threads', record['cores'])} threads")


def git_state(root: Path) -> tuple[str, bool | None]:
    """Commit and whether tracked code differs from it; ('', None) outside a repository."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout if done.returncode == 0 else None

    commit, changed = git("rev-parse", "HEAD"), git("status", "--porcelain")
    if commit is None or changed is None:
        return "", None
    paths = [(line[:2], line[3:].strip('"')) for line in changed.splitlines()]
    dirty = [p for state, p in paths if p not in OWN_OUTPUT and (state != "??" or p.startswith(CODE))]
    return commit.strip(), bool(dirty)


def packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def gpus() -> list[dict[str, str]]:
    """What nvidia-smi tells of each GPU; empty where there is none."""
    fields = ["name", "uuid", "driver_version", "memory.total", "power.limit", "clocks.max.sm"]
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"],
            capture_output=True, text=True, check=False, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode != 0:
        return []
    return [dict(zip(fields, (x.strip() for x in line.split(",")), strict=False)) for line in done.stdout.splitlines()]


def run_id() -> str:
    """Sorts by time, and two runs that start together differ."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"


def data_folder() -> str | None:
    """The folder that `DECODATHLON_DATA` names, if it is set."""
    return os.environ.get("DECODATHLON_DATA") or None
