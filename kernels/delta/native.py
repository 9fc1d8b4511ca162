"""Compiles native.c where there is a compiler, once per machine, and calls it in the threads of torch."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from . import int4, reference

SOURCE = Path(__file__).with_name("native.c")
FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", "-std=c11")
#: Blocks from which on a second thread is worth its start.
LEAST = 512
Number = ctypes.c_int | ctypes.c_int64
Planes = reference.Nested | reference.Fixed12 | int4.Int4Delta


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where they cannot be had."""
    compiler = shlex.split(os.environ.get("CC", "")) or [c for c in map(shutil.which, ("cc", "gcc", "clang")) if c][:1]
    if not compiler:
        return None
    for more in (["-fopenmp"], []):
        try:
            return ctypes.CDLL(str(_compiled(compiler, [*FLAGS, *more])))
        except (OSError, subprocess.CalledProcessError):
            continue
    return None


def _compiled(compiler: Sequence[str], flags: Sequence[str]) -> Path:
    """What the compiler makes of the source, kept from one process to the next on processors that can do the same."""
    told = "\n".join([SOURCE.read_text(), *flags, *compiler, platform.machine(), platform.node(), _able()])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "decodathlon" / "native"
    made = folder / f"delta-{hashlib.sha256(told.encode()).hexdigest()[:16]}.so"
    if not made.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            part = Path(work) / made.name
            subprocess.run([*compiler, *flags, "-o", str(part), str(SOURCE)], check=True, capture_output=True)
            os.replace(part, made)
    return made


def _able() -> str:
    """What the processor can do, as Linux says it; elsewhere nothing."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")


def nested_exact(c: ctypes.CDLL, planes: reference.Nested, out: Tensor) -> None:
    """Into out (N,) int16."""
    numbers = [ctypes.c_int64(len(planes.escapes)), ctypes.c_int(planes.start)]
    _run(c.nested_exact, planes[:8], numbers, planes, out)


def nested_draft(c: ctypes.CDLL, planes: reference.Nested, bits: int, out: Tensor) -> None:
    """Into out (N,) int16, the patterns of the draft."""
    kept = bits - 4
    means = planes.means[2**kept - 1 : 2 ** (kept + 1) - 1]
    table = (means.to(torch.bfloat16).view(torch.int16) - (127 << 7)).contiguous()
    used = [planes.code, planes.first, planes.second, planes.escapes, planes.before, planes.spans, table]
    numbers = [ctypes.c_int64(len(planes.escapes)), ctypes.c_int(kept), ctypes.c_int(planes.start)]
    _run(c.nested_draft, used, numbers, planes, out)


def fixed12_exact(c: ctypes.CDLL, planes: reference.Fixed12, out: Tensor) -> None:
    """Into out (N,) int16."""
    _run(c.fixed12_exact, [planes.code, planes.rest], [ctypes.c_int(planes.start)], planes, out)
    at = planes.escape_at.long()
    out[at] = reference.low16(out[at].int() & 0x807F | planes.escapes.int() << 7)


def int4_delta_exact(c: ctypes.CDLL, planes: int4.Int4Delta, out: Tensor) -> None:
    """Into out (N,) int16."""
    used = [planes.code, planes.scales, planes.low, planes.escapes, planes.before, planes.spans]
    _run(c.int4_delta_exact, used, [ctypes.c_int64(len(planes.escapes)), *_groups(planes)], planes, out)
    at = planes.patch_at.long()
    kept = at < planes.count
    out[at[kept]] = planes.patches[kept]


def int4_draft(c: ctypes.CDLL, planes: int4.Int4Delta, out: Tensor) -> None:
    """Into out (N,) int16, the patterns of the base."""
    _run(c.int4_draft, [planes.code, planes.scales], _groups(planes), planes, out)


def _groups(planes: int4.Int4Delta) -> list[Number]:
    """How many weights have a scale, and whether it is of half precision."""
    group, dtype = int4.groups(planes.scales)
    return [ctypes.c_int(group), ctypes.c_int(dtype == torch.float16)]


def _run(
    function: Callable[..., int], used: Sequence[Tensor], numbers: Sequence[Number], planes: Planes, out: Tensor
) -> None:
    """Every function takes tensors, numbers of its own, threads, blocks, weights, and where they go.

    Raises:
        ValueError: the planes were not made by the encoders.
    """
    blocks = len(planes.code)
    threads = ctypes.c_int(torch.get_num_threads() if blocks >= LEAST else 1)
    used = [t.contiguous() for t in used]
    places = [ctypes.c_void_p(t.data_ptr()) for t in used]
    sizes = [threads, ctypes.c_int64(blocks), ctypes.c_int64(planes.count)]
    if function(*places, *numbers, *sizes, ctypes.c_void_p(out.data_ptr())):
        raise ValueError("the planes of a packed tensor count more escapes than there are")
