"""One step of the reservoirs of a batch in two launches: what the whole vocabulary says, then everything else.

`_survey` splits each row among programs; each leaves the maximum and the sum of exponentials of its part, and its
likeliest tokens in order. `_update` has one program per row: it merges the parts, weighs and tests the stored tokens,
fills the free slots, draws a token and writes the new state. Nothing waits for the host, so both can be captured.

A score and its token's number travel as one integer: the float's bits, made to order like the float, above the number,
the lower the greater. So of equal scores the token of the lower number comes first, as in the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import EMPTY, Reservoirs

#: Tokens that one program surveys.
PART = 4096


@triton.jit
def _packed(scores, numbers):
    bits = (scores + 0.0).to(tl.int32, bitcast=True).to(tl.int64)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return ordered * 4294967296 + (2147483648 - numbers.to(tl.int64))


@triton.jit
def _unpacked(packed):
    numbers = 2147483648 - (packed & 0xFFFFFFFF)
    ordered = packed >> 32
    bits = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.int32)
    return bits.to(tl.float32, bitcast=True), numbers


@triton.jit
def _survey(
    logits, tops, maxima, sums, V, stride, inverse_temperature, PARTS, PART: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = part * PART + tl.arange(0, PART)
    scores = tl.load(logits + row * stride + at, mask=at < V, other=float("-inf")).to(tl.float32) * inverse_temperature
    top = tl.max(scores, 0)
    safe = tl.where(top > float("-inf"), top, 0.0)
    place = row * PARTS + part
    tl.store(maxima + place, top)
    tl.store(sums + place, tl.sum(tl.exp(scores - safe), 0))
    tl.store(tops + place * K + tl.arange(0, K), tl.topk(_packed(scores, at), K))


@triton.jit
def _greater(a, b):
    return tl.maximum(a, b)


@triton.jit
def _update(
    logits, tops, maxima, sums, tokens, before, weights, greatest, age, u,
    tokens_out, before_out, weights_out, greatest_out, age_out, drawn,
    stride, u_stride, inverse_temperature, PARTS, top_k, R,
    MERGED: tl.constexpr, PARTS_UP: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr,
    EVERY: tl.constexpr, CROSS: tl.constexpr, ONE: tl.constexpr, EMPTY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, SLOTS)
    inside = slots < R
    none = float("-inf")

    # What the parts say together.
    parts = tl.arange(0, PARTS_UP)
    tops_of = tl.load(maxima + row * PARTS + parts, mask=parts < PARTS, other=none)
    sums_of = tl.load(sums + row * PARTS + parts, mask=parts < PARTS, other=0.0)
    top = tl.max(tops_of, 0)
    total = tl.log(tl.sum(sums_of * tl.exp(tops_of - top), 0)) + top
    many = tl.arange(0, MERGED)
    lowest = -9223372036854775807 - 1
    merged = tl.load(tops + row * PARTS * K + many, mask=many < PARTS * K, other=lowest)
    values, numbers = _unpacked(tl.topk(merged, K))
    ranks = tl.arange(0, K)
    log_top = values - total
    possible = (ranks < top_k) & (log_top > none)

    # The stored tokens: how their probabilities have changed, and which are kept.
    old = tl.load(tokens + row * R + slots, mask=inside, other=EMPTY)
    stored = inside & (old != EMPTY)
    old_before = tl.load(before + row * R + slots, mask=inside, other=none)
    old_weights = tl.load(weights + row * R + slots, mask=inside, other=none)
    old_greatest = tl.load(greatest + row)
    steps = tl.load(age + row)
    now = tl.load(logits + row * stride + tl.where(stored, old, 0), mask=stored, other=0.0).to(tl.float32)
    now = now * inverse_temperature - total
    ratio = tl.where(stored, now - old_before, none)
    running = tl.associative_scan(tl.maximum(ratio, old_greatest), 0, _greater)
    chance = tl.load(u + row * u_stride + 1 + slots, mask=inside, other=1.0)
    kept = stored & (chance.to(tl.float32) < tl.exp(ratio - running))

    # What is new goes into the free slots, the i-th into the i-th.
    known = tl.sum((numbers[:, None] == old[None, :]).to(tl.int32) * stored[None, :].to(tl.int32), 1) > 0
    new = possible & (known == 0)
    nothing = (tl.sum(new.to(tl.int32), 0) + tl.sum(kept.to(tl.int32), 0)) == 0
    new = new | (possible & nothing)
    free = inside & (kept == 0)
    new_rank = tl.where(new, tl.cumsum(new.to(tl.int32), 0) - 1, -1)
    free_rank = tl.where(free, tl.cumsum(free.to(tl.int32), 0) - 1, -2)
    goes = new_rank[:, None] == free_rank[None, :]
    filled = tl.sum(goes.to(tl.int32), 0) > 0
    token_in = tl.sum(tl.where(goes, numbers[:, None], 0), 0)
    log_in = tl.sum(tl.where(goes, log_top[:, None], 0.0), 0)

    is_new = tl.where(ONE, 0.0, log_in)
    out = tl.where(kept, old, tl.where(filled, token_in, EMPTY))
    out_before = tl.where(kept, tl.where(CROSS, now, old_before), tl.where(filled, log_in, none))
    out_weights = tl.where(kept, ratio, tl.where(filled, is_new, none))
    out_greatest = tl.maximum(old_greatest, tl.max(ratio, 0))
    due = steps % EVERY == 0
    out, out_before = tl.where(due, out, old), tl.where(due, out_before, old_before)
    out_weights = tl.where(due, out_weights, old_weights)
    out_greatest = tl.where(due, out_greatest, old_greatest)

    # The draw, by inversion in the order of the slots; in float64, so that it is the reference's.
    wide = tl.where(inside, out_weights, none).to(tl.float64)
    share = tl.exp(wide - tl.max(wide, 0))
    cumulative = tl.cumsum(share, 0)
    threshold = tl.load(u + row * u_stride) * tl.sum(share, 0)
    first = tl.min(tl.where(inside & (cumulative > threshold), slots, SLOTS), 0)
    tl.store(drawn + row, tl.sum(tl.where(slots == first, out, 0), 0))
    tl.store(tokens_out + row * R + slots, out, mask=inside)
    tl.store(before_out + row * R + slots, out_before, mask=inside)
    tl.store(weights_out + row * R + slots, out_weights, mask=inside)
    tl.store(greatest_out + row, out_greatest)
    tl.store(age_out + row, steps + 1)


def step(
    logits: Tensor, state: Reservoirs, u: Tensor, temperature: float, *, top_k: int, every: int, cross: bool,
    fresh: str, part: int = PART,
) -> tuple[Tensor, Reservoirs]:  # fmt: skip
    """(B,) drawn tokens and the new state, of logits (B, V) and u (B, 1 + R) in float64; see reference.py."""
    (B, V), R = logits.shape, state.tokens.shape[1]
    top_k = min(top_k, V)
    K = triton.next_power_of_2(top_k)
    part = max(part, K)
    parts = triton.cdiv(V, part)
    tops = torch.empty(B, parts * K, dtype=torch.long, device=logits.device)
    maxima, sums = (torch.empty(B, parts, device=logits.device) for _ in range(2))
    _survey[(B, parts)](
        logits, tops, maxima, sums, V, logits.stride(0), 1.0 / temperature, parts, PART=part, K=K, num_warps=8
    )
    new = Reservoirs(*(torch.empty_like(x) for x in state))
    drawn = torch.empty(B, dtype=torch.long, device=logits.device)
    _update[(B,)](
        logits, tops, maxima, sums, *state, u, *new, drawn,
        logits.stride(0), u.stride(0), 1.0 / temperature, parts, top_k, R,
        MERGED=triton.next_power_of_2(parts * K), PARTS_UP=triton.next_power_of_2(parts), K=K,
        SLOTS=triton.next_power_of_2(R), EVERY=every, CROSS=cross, ONE=fresh == "one", EMPTY=EMPTY, num_warps=4,
    )  # fmt: skip
    return drawn, new
