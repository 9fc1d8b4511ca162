"""Compiles native.c where there is a compiler, once per machine, and calls it in as many threads as torch has."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from . import int4, reference

SOURCE = Path(__file__).with_name("native.c")
FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", "-std=c11")
#: Of planes that were not made by the encoders.
ESCAPED = "the planes of a packed tensor count more escapes than there are"
#: Blocks below which a second thread is not worth its start.
LEAST = 256


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where they cannot be had."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    told = "\n".join([SOURCE.read_text(), *FLAGS, compiler, platform.machine(), platform.node()])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "decodathlon" / "native"
    made = folder / f"delta-{hashlib.sha256(told.encode()).hexdigest()[:16]}.so"
    try:
        if not made.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as work:
                part = Path(work) / made.name
                subprocess.run([compiler, *FLAGS, "-o", str(part), str(SOURCE)], check=True, capture_output=True)
                os.replace(part, made)
        return ctypes.CDLL(str(made))
    except (OSError, subprocess.CalledProcessError):
        return None


def _in_threads(blocks: int, part: Callable[[int, int], None]) -> None:
    """Call `part` with ranges of blocks that make up all of them."""
    threads = max(1, min(torch.get_num_threads(), blocks // LEAST))
    edges = [blocks * i // threads for i in range(threads + 1)]
    if threads == 1:
        part(0, blocks)
        return
    for done in [_pool(threads).submit(part, a, b) for a, b in pairwise(edges)]:
        done.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="delta")


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def nested_exact(c: ctypes.CDLL, planes: reference.Nested, out: Tensor) -> None:
    """Into out (N,) int16."""
    held = [p.contiguous() for p in planes[:8]]
    tensors, room = [_at(p) for p in held], ctypes.c_int64(len(planes.escapes))

    def part(begin: int, end: int) -> None:
        places = [ctypes.c_int64(n) for n in (begin, end, planes.count)]
        if c.nested_exact(*tensors, room, ctypes.c_int(planes.start), *places, _at(out)):
            raise ValueError(ESCAPED)

    _in_threads(len(planes.code), part)


def nested_draft(c: ctypes.CDLL, planes: reference.Nested, bits: int, out: Tensor) -> None:
    """Into out (N,) int16, the patterns of the draft."""
    kept = bits - 4
    means = planes.means[2**kept - 1 : 2 ** (kept + 1) - 1]
    table = (means.to(torch.bfloat16).view(torch.int16) - (127 << 7)).contiguous()
    used = (planes.code, planes.first, planes.second, planes.escapes, planes.before, planes.spans, table)
    tensors = [_at(p) for p in used]
    numbers = [ctypes.c_int64(len(planes.escapes)), ctypes.c_int(kept), ctypes.c_int(planes.start)]

    def part(begin: int, end: int) -> None:
        places = [ctypes.c_int64(n) for n in (begin, end, planes.count)]
        if c.nested_draft(*tensors, *numbers, *places, _at(out)):
            raise ValueError(ESCAPED)

    _in_threads(len(planes.code), part)


def fixed12_exact(c: ctypes.CDLL, planes: reference.Fixed12, out: Tensor) -> None:
    """Into out (N,) int16."""
    code, rest = _at(planes.code), _at(planes.rest)

    def part(begin: int, end: int) -> None:
        places = [ctypes.c_int64(n) for n in (begin, end, planes.count)]
        c.fixed12_exact(code, rest, ctypes.c_int(planes.start), *places, _at(out))

    _in_threads(len(planes.code), part)
    at = planes.escape_at.long()
    out[at] = reference.low16(out[at].int() & 0x807F | planes.escapes.int() << 7)


def int4_delta_exact(c: ctypes.CDLL, planes: int4.Int4Delta, out: Tensor) -> None:
    """Into out (N,) int16."""
    used = (planes.code, planes.scales, planes.low, planes.escapes, planes.before, planes.spans)
    tensors, room, groups = [_at(p) for p in used], ctypes.c_int64(len(planes.escapes)), _groups(planes)

    def part(begin: int, end: int) -> None:
        places = [ctypes.c_int64(n) for n in (begin, end, planes.count)]
        if c.int4_delta_exact(*tensors, room, *groups, *places, _at(out)):
            raise ValueError(ESCAPED)

    _in_threads(len(planes.code), part)
    at = planes.patch_at.long()
    kept = at < planes.count
    out[at[kept]] = planes.patches[kept]


def int4_draft(c: ctypes.CDLL, planes: int4.Int4Delta, out: Tensor) -> None:
    """Into out (N,) int16, the patterns of the base."""
    code, scales, groups = _at(planes.code), _at(planes.scales), _groups(planes)

    def part(begin: int, end: int) -> None:
        c.int4_draft(code, scales, *groups, *[ctypes.c_int64(n) for n in (begin, end, planes.count)], _at(out))

    _in_threads(len(planes.code), part)


def _groups(planes: int4.Int4Delta) -> list[ctypes.c_int]:
    """How many weights have a scale, and whether it is of half precision."""
    group, dtype = int4.groups(planes.scales)
    return [ctypes.c_int(group), ctypes.c_int(dtype == torch.float16)]
