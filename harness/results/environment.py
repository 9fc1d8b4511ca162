"""The record of a run: what code, on what machine, with which versions and options."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import secrets
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
#: The environment variable that names the results file where no option does.
RESULTS_VARIABLE = "DECODATHLON_RESULTS"
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
#: Where a copy of the code that has no repository says what it was packed from.
PACKED_FILE = ".packed.json"
#: Tracked files that a run itself writes; a change in them is not dirty code.
OWN_OUTPUT = ("results.duckdb",)
#: Where an untracked file is code that may run; elsewhere it is the user's own.
CODE = ("harness/", "decoders/", "kernels/", "suites/", "leaderboard/")


def results_file() -> Path:
    """The results file where none is named: what the environment says, the clone's own, or one in this folder."""
    if RESULTS_VARIABLE in os.environ:
        return Path(os.environ[RESULTS_VARIABLE])
    return (ROOT if (ROOT / "pyproject.toml").is_file() else Path.cwd()) / "results.duckdb"


def describe() -> dict[str, Any]:
    """Everything that can be told without importing torch."""
    commit, dirty, change = git_state(ROOT)
    return {
        "git_commit": commit,
        "git_dirty": dirty,
        "git_diff_sha256": change,
        "machine": machine(),
        "container": container(),
        "python": platform.python_version(),
        "platform": "-".join([platform.system(), platform.machine(), *platform.libc_ver()]),
        "packages": packages(),
        "all_packages_sha256": all_packages_hash(),
        "editable_packages": editable_packages(),
        "cpu": cpu_name(),
        "cores": cores(),
        "memory_bytes": memory_bytes(),
        "gpus": gpus(),
    }


def hardware_name(record: dict[str, Any], model: dict[str, Any]) -> str:
    """One line for the table: the GPU that computed, else the CPU and the threads on it."""
    return str(model.get("processor") or f"{record['cpu']}, {model.get('threads', record['cores'])} threads")


def git_state(root: Path) -> tuple[str, bool | None, str]:
    """Commit, whether code differs from it, and a hash of the difference; ('', None, '') outside a repository."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, check=False, errors="replace"
            )
        except OSError:
            return None
        return done.stdout if done.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top.strip()).resolve() != root.resolve():  # no repository, or one around a copy of ours
        return packed_state(root)
    commit, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "-z", "--untracked-files=all")
    if commit is None or changed is None:
        return "", None, ""
    entries = [(line[:2], line[3:]) for line in changed.split("\0") if len(line) > 3]
    dirty = [(state, p) for state, p in entries if p not in OWN_OUTPUT and (state != "??" or p.startswith(CODE))]
    if not dirty:
        return commit.strip(), False, ""
    digest = hashlib.sha256((git("diff", "HEAD", "--", ".", *[f":!{p}" for p in OWN_OUTPUT]) or "").encode())
    for state, path in sorted(dirty):
        if state == "??" and (root / path).is_file():
            digest.update(path.encode() + (root / path).read_bytes())
    return commit.strip(), True, digest.hexdigest()[:16]


def packed_state(root: Path) -> tuple[str, bool | None, str]:
    """What `scripts/carry.py pack` wrote down of the repository, unless the code was changed since."""
    try:
        stored = json.loads((root / PACKED_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "", None, ""
    digest = code_hash(root, stored["files"])
    changed = bool(stored["git_dirty"]) or digest != stored["sha256"]
    return stored["git_commit"], changed, digest if changed else ""


def code_hash(root: Path, names: Sequence[str]) -> str:
    """Of the named files of the code, as they are."""
    digest = hashlib.sha256()
    for name in sorted(names):
        path = root / name
        digest.update(name.encode() + (path.read_bytes() if path.is_file() and not path.is_symlink() else b""))
    return digest.hexdigest()[:16]


def code() -> str:
    """Of all code that may run, wherever and however it was installed: two machines with the same have the same."""
    digest = hashlib.sha256()
    for name in CODE:
        folder = ROOT / name.rstrip("/")
        for path in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".c", ".sql")):
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def machine() -> str:
    """A name for this machine that tells nothing of it: rows of one machine can be put together."""
    for place in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        with contextlib.suppress(OSError):
            return hashlib.sha256(Path(place).read_bytes()).hexdigest()[:12]
    return hashlib.sha256(platform.node().encode()).hexdigest()[:12]


def host() -> str:
    """As `machine`, where many machines may have been made of one image."""
    return hashlib.sha256(f"{machine()} {platform.node()}".encode()).hexdigest()[:12]


def digest(path: Path) -> str:
    """Of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def container() -> str | None:
    """Which container runtime this process is in, where it shows."""
    if Path("/.dockerenv").exists():
        return "docker"
    if Path("/run/.containerenv").exists():
        return "podman"
    kubernetes = "kubernetes" if "KUBERNETES_SERVICE_HOST" in os.environ else None
    return os.environ.get("container") or kubernetes  # noqa: SIM112 - the name that systemd gave it


def all_packages_hash() -> str:
    """Of every installed distribution with its version."""
    lines = sorted({f"{d.name}=={d.version}" for d in distributions() if d.name})
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def editable_packages() -> list[str]:
    """Distributions whose code can change under their version number."""
    found = set()
    for distribution in distributions():
        direct = distribution.read_text("direct_url.json")
        if direct and json.loads(direct).get("dir_info", {}).get("editable"):
            found.add(str(distribution.name))
    return sorted(found)


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


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def place(model: dict[str, Any], gpu_uuid: str | None) -> dict[str, Any]:
    """Where a cell is measured, told by the process that measures it.

    Args:
        model: what a row stores of it, with its processor or its threads.
        gpu_uuid: of the GPU that computes.
    """
    mine = next((gpu for gpu in gpus() if gpu["uuid"] == gpu_uuid), {}) if gpu_uuid else {}
    told = {"gpu_uuid": gpu_uuid, **{k: v for k, v in mine.items() if k != "uuid"}} if gpu_uuid else {}
    return {"node": host(), "hardware": hardware_name({"cpu": cpu_name(), "cores": cores()}, model), **told}


def memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def gpus() -> list[dict[str, str]]:
    """What nvidia-smi tells of each GPU; empty where there is none."""
    fields = [
        "name", "uuid", "driver_version", "memory.total", "power.limit", "clocks.max.sm", "clocks.max.memory",
        "persistence_mode", "ecc.mode.current", "mig.mode.current", "compute_mode",
    ]  # fmt: skip
    return [dict(zip(fields, row, strict=False)) for row in nvidia_smi(f"--query-gpu={','.join(fields)}")]


def nvidia_smi(*words: str) -> list[list[str]]:
    """The rows of a query; empty where there is no driver, or it does not know the question."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *words, "--format=csv,noheader,nounits"],
            capture_output=True, text=True, check=False, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode != 0:
        return []
    return [[x.strip() for x in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


def run_id() -> str:
    """Sorts by time, and two runs that start together differ."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"


def data_folder() -> str | None:
    """The folder that `DECODATHLON_DATA` names, if it is set."""
    return os.environ.get("DECODATHLON_DATA") or None
