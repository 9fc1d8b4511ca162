"""One step of the reservoirs of a batch, in plain torch: the definition that the GPU form is held against.

A row's reservoir is R slots: a token, the log-probability it is compared with, and its weight in the present draw. A
step weighs every stored token by how its probability has changed, keeps it with probability min(1, w / greatest w so
far), in the order of the slots, and fills the free slots with likely tokens that were not stored.

Dimensions: B rows, R slots, K likeliest tokens, V vocabulary. Any floating dtype.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

#: What a slot without a token holds.
EMPTY = -1
#: Tokens beyond the k likeliest among which those that are as likely as the last of them are looked for.
TIES = 32
#: Tokens beyond which log_softmax, which adds one number to the next, rounds float32 by more than 1e-5.
MOST_TERMS = 1 << 16
#: Weight of a token in the step in which it enters: 1, or its probability.
Fresh = Literal["one", "probability"]


class Reservoirs(NamedTuple):
    """The state of B rows."""

    #: (B, R) int64, EMPTY where there is none.
    tokens: Tensor
    #: (B, R) log-probability that a stored token's new one is divided by.
    log_before: Tensor
    #: (B, R) log-weight of each stored token in the present draw, -inf where there is none.
    log_weight: Tensor
    #: (B, 1) log of the greatest weight so far.
    log_greatest: Tensor
    #: (B, 1) int64 steps taken.
    age: Tensor


def start(rows: int, size: int, dtype: torch.dtype = torch.float32) -> Reservoirs:
    """Empty reservoirs."""
    none = torch.full((rows, size), float("-inf"), dtype=dtype)
    tokens = torch.full((rows, size), EMPTY)
    return Reservoirs(tokens, none, none.clone(), torch.zeros(rows, 1, dtype=dtype), torch.zeros(rows, 1).long())


def emptied(state: Reservoirs) -> Reservoirs:
    """Reservoirs like these that hold nothing, on the same device."""
    none = torch.full_like(state.log_before, float("-inf"))
    tokens = torch.full_like(state.tokens, EMPTY)
    return Reservoirs(tokens, none, none, torch.zeros_like(state.log_greatest), torch.zeros_like(state.age))


def likeliest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and numbers of the k greatest of (B, V), each (B, k); of equals the lower number comes first."""
    m = min(k + TIES, scores.shape[1])
    top = scores.topk(m, dim=1)
    # By number first, then stably by value; where the last value may go on behind these, everything is sorted so.
    numbers, order = top.indices.sort(dim=1)
    ranked = top.values.gather(1, order).sort(dim=1, descending=True, stable=True)
    if m == scores.shape[1] or bool((top.values[:, k - 1] > top.values[:, m - 1]).all()):
        return ranked.values[:, :k], numbers.gather(1, ranked.indices)[:, :k]
    whole = scores.sort(dim=1, descending=True, stable=True)
    return whole.values[:, :k], whole.indices[:, :k]


def step(
    scores: Tensor, state: Reservoirs, u: Tensor, *, top_k: int, every: int, cross: bool, fresh: Fresh
) -> Reservoirs:
    """The reservoirs after they have seen the law of the next token.

    Args:
        scores: (B, V) logits over temperature; or (1, V) where all rows have read the same text.
        state: before the step.
        u: (B, R) uniforms in [0, 1), one per slot: whether its token is kept.
        top_k: fresh tokens come from so many likeliest ones.
        every: only every so many steps, the first included, change anything; between them the draw has the old weights.
        cross: compare a kept token with its probability at the step before, not with that at which it entered.
        fresh: the weight of a token that has just entered.
    """
    if scores.device.type == "cpu" and every > 1 and int(state.age[0]) % every:  # nothing to do, which saves the time
        return state._replace(age=state.age + 1)
    B = len(state.tokens)
    stored = state.tokens != EMPTY
    K = min(top_k, scores.shape[1])
    values, numbers = likeliest(scores, K)
    if scores.shape[1] <= MOST_TERMS:  # twice as fast
        total = values[:, :1] - scores.log_softmax(1).gather(1, numbers[:, :1])
    else:
        total = scores.logsumexp(1, keepdim=True)
    log_now = (scores.expand(B, -1).gather(1, state.tokens.clamp(min=0)) - total).to(state.log_before)
    log_ratio = torch.where(stored, log_now - state.log_before, float("-inf"))
    # A weight above the greatest so far is kept surely, so what was rejected never was the greatest.
    greatest = torch.cat([state.log_greatest, log_ratio], 1).cummax(1).values[:, 1:]
    kept = stored & (u.to(log_ratio) < (log_ratio - greatest).exp())

    top, log_top = numbers.expand(B, -1), (values - total).expand(B, -1).to(state.log_before)
    possible = log_top > float("-inf")
    known = (top[:, :, None] == state.tokens[:, None, :]).any(2)
    new = possible & ~known
    # Where nothing is left, the likeliest tokens come back, as on the very first step.
    new = new | (possible & ~(new.any(1, keepdim=True) | kept.any(1, keepdim=True)))

    # The i-th new token goes into the i-th free slot.
    place = torch.where(new, new.cumsum(1) - 1, K)
    order = torch.zeros(B, K + 1, dtype=torch.long, device=scores.device)
    order.scatter_(1, place, torch.arange(K, device=scores.device).expand(B, -1))
    free = ~kept
    rank = free.cumsum(1) - 1
    filled = free & (rank < new.sum(1, keepdim=True))
    source = order.gather(1, rank.clamp(min=0, max=K - 1))
    token_in, log_in = top.gather(1, source), log_top.gather(1, source)

    none = torch.full_like(log_in, float("-inf"))
    stepped = Reservoirs(
        tokens=torch.where(kept, state.tokens, torch.where(filled, token_in, EMPTY)),
        log_before=torch.where(kept, log_now if cross else state.log_before, torch.where(filled, log_in, none)),
        log_weight=torch.where(
            kept, log_ratio, torch.where(filled, torch.zeros_like(log_in) if fresh == "one" else log_in, none)
        ),
        log_greatest=greatest[:, -1:],
        age=state.age + 1,
    )
    if every == 1:
        return stepped
    due = state.age % every == 0
    return Reservoirs(*(torch.where(due, a, b) for a, b in zip(stepped[:-1], state[:-1], strict=True)), stepped.age)


def pick(state: Reservoirs, u: Tensor) -> Tensor:
    """(B,) tokens drawn in proportion to their weights, by inversion in the order of the slots; `u` is (B,)."""
    weights = state.log_weight.double().softmax(1).cumsum(1)
    above = weights > u.to(weights)[:, None] * weights[:, -1:]
    return state.tokens.gather(1, above.int().argmax(1, keepdim=True))[:, 0]
