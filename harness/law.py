"""The processed next-token law: temperature, then truncation. One function for samplers, scorers, drafters, verifiers.

Rows N are independent; V is the vocabulary. Everything is defined on natural log-probabilities, -inf where cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

#: On a CPU a nucleus is looked for among so many tokens first.
_NUCLEUS_GUESS = 256
#: Tokens from which on a histogram by the leading 16 bits of the keys is faster than sorting them; and its bins.
_HISTOGRAM_FROM, _BINS = 4096, 1 << 15
#: How far the log of a law's total probability may lie from 0: float32 sums over 150,000 tokens.
SUM_TOLERANCE = 1e-3
#: Tokens whose probabilities `draw` adds up before it looks at any one of them.
_BLOCK = 256


def process(
    logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """(N, V) logits to (N, V) log-probabilities of the processed law.

    The order is temperature, top-k, top-p, min-p; each truncation sees the law that the one before left, renormalised.

    Args:
        temperature: divides the logits; greater than 0 (greedy search is a decoder of its own).
        top_k: keep the k likeliest tokens and whatever ties with the last of them; 0 keeps all. Fan et al. 2018.
        top_p: keep the smallest set of likeliest tokens whose probability reaches p, and whatever ties with the last
            of them, so that no device's sorting decides. Holtzman et al. 2020.
        min_p: keep tokens with at least this fraction of the greatest probability. Nguyen et al. 2024.
    """
    log_probs = (logits / temperature if temperature != 1.0 else logits).log_softmax(-1)
    if top_k > 0:
        k = min(top_k, logits.shape[-1])
        last = log_probs.topk(k, dim=-1).values[..., -1:]
        log_probs = _renormalised(log_probs, log_probs >= last)
    if top_p < 1.0:
        log_probs = _renormalised(log_probs, _nucleus(log_probs, top_p))
    if min_p > 0.0:
        top = log_probs.max(-1, keepdim=True).values
        log_probs = _renormalised(log_probs, log_probs >= top + math.log(min_p))
    return log_probs


def plainly(logits: Sequence[float], temperature: float = 1.0) -> list[float]:
    """The law of one token, logits over temperature, in plain Python: for definitions that share no code with ours."""
    top = max(logits)
    weights = [math.exp((x - top) / temperature) for x in logits]
    return [w / sum(weights) for w in weights]


def check(log_probs: Tensor, logits: Tensor, who: str) -> None:
    """
    Raises:
        ValueError: what came out for `logits` is no law: another shape, NaN, or probabilities that do not sum to one.
            Or the logits themselves have NaN.
    """
    if bool(logits.isnan().any()):
        raise ValueError(
            f"{who}: the model's own logits have NaN; its weights are broken, or too large for their dtype"
        )
    if log_probs.shape != logits.shape:
        raise ValueError(f"{who}: shape got logits {tuple(logits.shape)} and returned {tuple(log_probs.shape)}")
    total = (log_probs if log_probs.dtype == torch.float64 else log_probs.float()).logsumexp(-1)
    if bool(total.isnan().any()):  # one NaN makes the whole sum one
        raise ValueError(f"{who}: its law has NaN")
    if not bool((total.abs() < SUM_TOLERANCE).all()):
        worst = float(total[total.abs().argmax()].exp())
        raise ValueError(f"{who}: its law sums to {worst:.4g}, not 1; end with log_softmax(-1)")


def one_hot(logits: Tensor) -> Tensor:
    """The law of greedy search: all mass on the first of the greatest logits."""
    return torch.full_like(logits, float("-inf")).scatter_(-1, logits.argmax(-1, keepdim=True), 0.0)


def draw(log_probs: Tensor, u: Tensor) -> Tensor:
    """One token per row by inversion of the cumulative law: exact up to float64 rounding, one uniform per token.

    Args:
        log_probs: (N, V).
        u: (N,) uniforms in [0, 1).

    Returns:
        (N,) int64; never a token of probability zero.
    """
    # First the block, then the token in it: a cumulative sum over 50,000 tokens is slow, a sum is not.
    N, V = log_probs.shape
    p = log_probs.double().exp()
    if V <= _BLOCK:
        cumulative = p.cumsum(-1)
        total = cumulative[:, -1:]
        offset = (u.to(cumulative)[:, None] * total).minimum(total.nextafter(torch.zeros_like(total)))
        return _first_above(cumulative, offset)[:, 0]
    if V % _BLOCK:
        p = torch.nn.functional.pad(p, (0, _BLOCK - V % _BLOCK))
    blocks = p.view(N, -1, _BLOCK)
    before = blocks.sum(-1).cumsum(-1)
    threshold = u.to(before)[:, None] * before[:, -1:]
    block = _first_above(before, threshold)
    offset = threshold - torch.cat([torch.zeros_like(threshold), before], dim=1).gather(1, block)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK))[:, 0].cumsum(-1)
    # Rounding may put the offset at the very end of its block; the last token with any probability takes it.
    offset = offset.minimum(inside[:, -1:].nextafter(torch.zeros_like(offset)))
    return (block * _BLOCK + _first_above(inside, offset))[:, 0]


def draw_several(log_probs: Tensor, u: Tensor) -> Tensor:
    """(N, k) tokens, k independent ones from each row of (N, V) by as many uniforms (N, k); the law is summed once."""
    cumulative = log_probs.double().exp().cumsum(-1)
    total = cumulative[:, -1:]
    offset = (u.to(cumulative) * total).minimum(total.nextafter(torch.zeros_like(total)))
    return _first_above(cumulative, offset.contiguous())


def _first_above(cumulative: Tensor, threshold: Tensor) -> Tensor:
    """(N, k) indices of the first entry that exceeds each threshold: it added something, so it has probability."""
    return torch.searchsorted(cumulative, threshold, right=True).clamp_(max=cumulative.shape[-1] - 1)


def _renormalised(log_probs: Tensor, kept: Tensor) -> Tensor:
    return log_probs.masked_fill(~kept, float("-inf")).log_softmax(-1)


def _nucleus(log_probs: Tensor, p: float) -> Tensor:
    """(N, V) bool: the smallest set of likeliest tokens whose probability reaches p, and what ties with its last."""
    if log_probs.device.type == "cpu" and log_probs.shape[-1] > _NUCLEUS_GUESS:
        # Most laws of a language model reach it among few tokens, found faster than the whole is gone through.
        values = log_probs.topk(_NUCLEUS_GUESS, dim=-1).values
        mass = values.double().exp().cumsum(-1)
        found = mass[..., -1] >= p
        kept = log_probs >= _last(values, mass, p)
        if not bool(found.all()):
            rest = log_probs[~found]
            kept[~found] = least(-rest, rest.double().exp(), p)
        return kept
    return least(-log_probs, log_probs.double().exp(), p)


def _last(values: Tensor, mass: Tensor, p: float) -> Tensor:
    """(N, 1) of values by rank the last that starts below p; `mass` (N, V) is what the ranks so far have."""
    before = torch.cat([torch.zeros_like(mass[..., :1]), mass[..., :-1]], dim=-1)
    return values.gather(-1, ((before < p).sum(-1, keepdim=True) - 1).clamp(min=0))


def least(key: Tensor, p: Tensor, mass: float) -> Tensor:
    """(N, V) bool: the tokens of the least keys whose probabilities reach `mass`, and whatever ties with the last.

    Args:
        key: (N, V), not below 0 but for rounding.
        p: (N, V) probabilities in float64.
    """
    if key.device.type != "cpu" or key.shape[-1] < _HISTOGRAM_FROM or key.dtype != torch.float32:
        ranked, order = key.sort(dim=-1)
        return key <= _last(ranked, p.gather(-1, order).cumsum(-1), mass)
    # Sorting 50,000 keys takes milliseconds. Their leading bits are in order, so a histogram by them says in which of
    # its bins the mass is reached, and only that one is sorted.
    N, rows = len(key), torch.arange(len(key))[:, None]
    bins = key.clamp(min=0).view(torch.int32) >> 16
    per_bin = torch.bincount((bins + rows * _BINS).flatten(), p.flatten(), minlength=N * _BINS).view(N, _BINS)
    reached = per_bin.cumsum(-1)
    last = (reached < mass).sum(-1).clamp(max=_BINS - 1)
    kept = torch.empty_like(key, dtype=torch.bool)
    for row in range(N):
        inside = (bins[row] == last[row]).nonzero()[:, 0]
        ranked, order = key[row, inside].sort()
        before = float(reached[row, last[row]] - per_bin[row, last[row]])
        upto = _last(ranked[None], before + p[row, inside][order].cumsum(0)[None], mass) if len(inside) else None
        kept[row] = key[row] <= upto[0] if upto is not None else True
    return kept
