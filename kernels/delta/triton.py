"""The GPU form of reference.py: planes to BF16 bit patterns, bit for bit, and products with few rows that decode as
they read, so that weights are never written.

A program of a rebuild has one block of 256 weights. A program of a product has some rows of the matrix and goes through
them block by block; weights are bit patterns until they are float32, in which everything is summed up, in the same
order at every call. Escapes of `nested` are found by counting; those of `fixed12` count as zero on the way and are
added behind, out of their list.

Dimensions: M rows of x, N rows of the matrix, K columns, a multiple of 256.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference

BLOCK = reference.BLOCK
#: Rows of the matrix that a program of a product has, and escapes that it looks at together.
ROWS, TOGETHER = 4, 16
#: The most rows of x for which a product decodes as it reads; above, the matrix is rebuilt.
MOST = 8


@triton.jit
def _nibble(plane, block, at):
    """Of weights `at` (0 to 255) of a block."""
    return (tl.load(plane + block * 128 + at % 128).to(tl.int32) >> (at // 128 * 4)) & 15


@triton.jit
def _bit(plane, block, at):
    return (tl.load(plane + block * 32 + at % 32).to(tl.int32) >> (at // 32)) & 1


@triton.jit
def _nested(
    code, first, second, middle, last, escapes, before, spans, table, block, at, start,
    KEPT: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """Bit patterns of weights `at` of blocks, which lie along the axis; of the first KEPT bits of mantissa alone, or of
    all (7)."""
    nibble = _nibble(code, block, at)
    outside = (nibble & 7) == 7
    rank = tl.cumsum(outside.to(tl.int32), AXIS) - 1
    rank += tl.load(before + block).to(tl.int32) & 0xFFFF
    known = tl.load(escapes + tl.load(spans + block // 256) + rank, mask=outside, other=0).to(tl.int32)
    exponent = tl.where(outside, known, start + (nibble & 7)) & 255
    u = (nibble >> 3) << 15 | exponent << 7
    if KEPT == 7:
        u |= _bit(first, block, at) << 6 | _bit(second, block, at) << 5
        u |= _nibble(middle, block, at) << 1 | _bit(last, block, at)
    else:
        prefix = tl.zeros_like(nibble)
        if KEPT >= 1:
            prefix = _bit(first, block, at)
        if KEPT == 2:
            prefix = prefix << 1 | _bit(second, block, at)
        mean = tl.load(table + prefix).to(tl.int32)
        u += tl.where((exponent == 0) | (exponent == 255), 0, mean)
    return u


@triton.jit
def _nested_rebuild(
    code, first, second, middle, last, escapes, before, spans, table, out, start, N, KEPT: tl.constexpr
):
    block = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, 256)
    u = _nested(code, first, second, middle, last, escapes, before, spans, table, block, at, start, KEPT, 0)
    place = block * 256 + at
    tl.store(out + place, ((u ^ 0x8000) - 0x8000).to(tl.int16), mask=place < N)


@triton.jit
def _fixed12_rebuild(code, rest, out, start, N):
    block = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, 256)
    place = block * 256 + at
    byte = tl.load(rest + place).to(tl.int32)
    u = (byte & 128) << 8 | ((start + _nibble(code, block, at)) & 255) << 7 | byte & 127
    tl.store(out + place, ((u ^ 0x8000) - 0x8000).to(tl.int16), mask=place < N)


@triton.jit
def _put_escapes(rest, escape_at, escapes, out, E, N, BLOCK: tl.constexpr):
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(escape_at + number, mask=number < E, other=0)
    byte = tl.load(rest + place).to(tl.int32)
    u = (byte & 128) << 8 | tl.load(escapes + number, mask=number < E, other=0).to(tl.int32) << 7 | byte & 127
    tl.store(out + place, ((u ^ 0x8000) - 0x8000).to(tl.int16), mask=(number < E) & (place < N))


@triton.jit
def _value(u):
    """Of a pattern of bfloat16, in float32."""
    return (u << 16).to(tl.float32, bitcast=True)


@triton.jit
def _row(x, m, K, columns, PATTERNS: tl.constexpr):
    found = tl.load(x + m * K + columns)
    return _value(found.to(tl.int32)) if PATTERNS else found.to(tl.float32)


@triton.jit
def _added(sums, x, w, K, columns, M: tl.constexpr, PATTERNS: tl.constexpr):
    """Sums (M, ROWS), and the products of each row of x with weights (ROWS, 256) of these columns."""
    for m in tl.static_range(M):
        part = tl.sum(w * _row(x, m, K, columns, PATTERNS), 1)
        sums += tl.where(tl.arange(0, M)[:, None] == m, part[None, :], 0.0)
    return sums


@triton.jit
def _nested_product(
    x, code, first, second, middle, last, escapes, before, spans, table, y, start, N, K,
    M: tl.constexpr, KEPT: tl.constexpr, PATTERNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, 256)[None, :]
    blocks = K // 256
    sums = tl.zeros((M, ROWS), tl.float32)
    numbers = tl.arange(0, M)[:, None]
    for step in range(blocks):
        block = (tl.minimum(rows, N - 1).to(tl.int64) * blocks + step)[:, None]
        w = _value(_nested(code, first, second, middle, last, escapes, before, spans, table, block, at, start, KEPT, 1))
        sums = _added(sums, x, w, K, step * 256 + at, M, PATTERNS)
    tl.store(y + numbers * N + rows[None, :], sums, mask=rows[None, :] < N)


@triton.jit
def _fixed12_product(
    x, code, rest, escape_at, escapes, bounds, y, start, N, K,
    M: tl.constexpr, PATTERNS: tl.constexpr, ROWS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    top = tl.program_id(0) * ROWS
    rows = top + tl.arange(0, ROWS)
    at = tl.arange(0, 256)[None, :]
    blocks = K // 256
    sums = tl.zeros((M, ROWS), tl.float32)
    numbers = tl.arange(0, M)[:, None]
    for step in range(blocks):
        block = (tl.minimum(rows, N - 1).to(tl.int64) * blocks + step)[:, None]
        nibble = _nibble(code, block, at)
        byte = tl.load(rest + block * 256 + at).to(tl.int32)
        u = (byte & 128) << 8 | ((start + nibble) & 255) << 7 | byte & 127
        w = tl.where(nibble == 15, 0.0, _value(u))
        sums = _added(sums, x, w, K, step * 256 + at, M, PATTERNS)
    begin, end = tl.load(bounds + top), tl.load(bounds + tl.minimum(top + ROWS, N))
    for some in range(begin, end, TOGETHER):
        number = some + tl.arange(0, TOGETHER)
        there = number < end
        place = tl.load(escape_at + number, mask=there, other=0)
        byte = tl.load(rest + place).to(tl.int32)
        exponent = tl.load(escapes + number, mask=there, other=0).to(tl.int32)
        w = _value((byte & 128) << 8 | exponent << 7 | byte & 127)
        own = (place // K)[None, :] == rows[:, None]
        for m in tl.static_range(M):
            products = tl.where(there, w * _row(x, m, K, place % K, PATTERNS), 0.0)
            part = tl.sum(tl.where(own, products[None, :], 0.0), 1)
            sums += tl.where(numbers == m, part[None, :], 0.0)
    tl.store(y + numbers * N + rows[None, :], sums, mask=rows[None, :] < N)


@triton.jit
def _read(words, sums, W, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(sums + tl.program_id(0), tl.sum(tl.load(words + place, mask=place < W, other=0), 0))


def reading(planes: reference.Nested | reference.Fixed12) -> Callable[[], Tensor]:
    """Work that reads every byte of the planes, 4,096 words at a time, and returns the sum of each part's words, int32
    (parts,): the least that any product with them can take."""
    held = [p.contiguous().view(torch.uint8).flatten() for p in planes if isinstance(p, Tensor)]
    every = torch.cat(held)
    words = torch.cat([every, every.new_zeros(-len(every) % 4)]).view(torch.int32)
    sums = torch.empty(triton.cdiv(len(words), 4096), dtype=torch.int32, device=words.device)

    def work() -> Tensor:
        _read[(len(sums),)](words, sums, len(words), BLOCK=4096)
        return sums

    return work


def table(planes: reference.Nested, kept: int) -> Tensor:
    """What a prefix of the mantissa adds to a pattern, int16: its mean, which may be the next power of two."""
    means = planes.means[2**kept - 1 : 2 ** (kept + 1) - 1]
    return (means.to(torch.bfloat16).view(torch.int16) - (127 << 7)).contiguous()


def _of_nested(planes: reference.Nested, bits: int) -> tuple[list[Tensor], int]:
    kept = bits - 4 if bits else 7
    means = table(planes, kept) if bits else planes.before
    return [*planes[:8], means], kept


def nested_rebuild(planes: reference.Nested, out: Tensor, bits: int = 0) -> None:
    """Bit patterns into out (N,) int16: of the weights, or of what their first 4, 5 or 6 bits say."""
    tensors, kept = _of_nested(planes, bits)
    if len(planes.code):
        _nested_rebuild[(len(planes.code),)](*tensors, out, planes.start, planes.count, KEPT=kept)


def fixed12_rebuild(planes: reference.Fixed12, out: Tensor) -> None:
    """Bit patterns of the weights, into out (N,) int16."""
    if not len(planes.code):
        return
    _fixed12_rebuild[(len(planes.code),)](planes.code, planes.rest, out, planes.start, planes.count)
    count = len(planes.escapes)
    if count:
        grid = (triton.cdiv(count, 256),)
        _put_escapes[grid](planes.rest, planes.escape_at, planes.escapes, out, count, planes.count, BLOCK=256)


def fits(columns: int, rows: int) -> bool:
    """Whether a product of so many rows with a matrix of so many columns can decode as it reads."""
    return columns % BLOCK == 0 and 1 <= rows <= MOST


def product(planes: reference.Nested | reference.Fixed12, x: Tensor, bits: int = 0) -> Tensor:
    """x W^T, (M, N) float32, for x (M, K) bfloat16 or float32; see `fits`.

    Sums are made in float32, block by block, so the result is near that of any other order and not equal to it.
    """
    count, K = x.shape
    M = triton.next_power_of_2(count)
    padded = torch.zeros(M, K, dtype=x.dtype, device=x.device)
    padded[:count] = x
    patterns = x.dtype == torch.bfloat16
    read = padded.view(torch.int16) if patterns else padded
    N = planes.count // K
    y = torch.empty(M, N, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(N, ROWS),)
    if isinstance(planes, reference.Nested):
        tensors, kept = _of_nested(planes, bits)
        _nested_product[grid](
            read, *tensors, y, planes.start, N, K, M=M, KEPT=kept, PATTERNS=patterns, ROWS=ROWS
        )  # fmt: skip
    else:
        edges = torch.arange(0, N + 1, device=x.device) * K
        bounds = torch.searchsorted(planes.escape_at.long(), edges).to(torch.int32)
        _fixed12_product[grid](
            read, planes.code, planes.rest, planes.escape_at, planes.escapes, bounds, y, planes.start, N, K,
            M=M, PATTERNS=patterns, ROWS=ROWS, TOGETHER=TOGETHER,
        )  # fmt: skip
    return y[:count]
