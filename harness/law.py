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

#: On a CPU the least keys are looked for among so many tokens first.
_GUESS = 256
#: Tokens from which on a histogram by the leading 16 bits of the keys is faster than sorting them; and its bins.
_HISTOGRAM_FROM, _BINS = 4096, 1 << 15
#: Probability from which on it is quicker to draw tokens until one belongs to a set than to find the set.
_MOSTLY_KEPT = 0.5
#: Numbers that `draw_least` is given for one token.
ATTEMPTS = 5
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
        log_probs = only(log_probs, log_probs >= last)
    if top_p < 1.0:
        log_probs = only(log_probs, least(-log_probs, log_probs, top_p))
    if min_p > 0.0:
        top = log_probs.amax(-1, keepdim=True)
        log_probs = only(log_probs, log_probs >= top + math.log(min_p))
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
    """One token per row by inversion of the cumulative law, summed in float64; one uniform per token.

    Args:
        log_probs: (N, V).
        u: (N,) uniforms in [0, 1).

    Returns:
        (N,) int64; never a token of probability zero.
    """
    return draw_several(log_probs, u[:, None])[:, 0]


def draw_several(log_probs: Tensor, u: Tensor) -> Tensor:
    """(N, k) tokens, k independent ones from each row of (N, V) by as many uniforms (N, k); the law is summed once."""
    # softmax, because exp itself is five times as slow where tokens are cut
    return _inverted(log_probs.softmax(-1) if log_probs.shape[1] > _BLOCK else log_probs.double().exp(), u)


def _inverted(p: Tensor, u: Tensor) -> Tensor:
    """(N, k) tokens by inversion of the cumulative sum of (N, V) weights; `u` is (N, k)."""
    # First the block, then the token in it: a cumulative sum over 50,000 tokens is slow, a sum is not, unless many
    # tokens are drawn from one law.
    (N, V), k = p.shape, u.shape[1]
    if k * _BLOCK >= V:
        cumulative = p.double().cumsum(-1)
        total = cumulative[:, -1:]
        offset = (u.to(cumulative) * total).minimum(total.nextafter(torch.zeros_like(total)))
        return _first_above(cumulative, offset)
    if V % _BLOCK:
        p = torch.nn.functional.pad(p, (0, _BLOCK - V % _BLOCK))
    blocks = p.view(N, -1, _BLOCK)
    before = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    threshold = u.to(before) * before[:, -1:]
    block = _first_above(before, threshold)
    offset = threshold - torch.cat([torch.zeros_like(before[:, :1]), before], dim=1).gather(1, block)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK)).double().cumsum(-1)
    # Rounding may put the offset at the very end of its block; the last token with any probability takes it.
    end = inside[:, :, -1]
    offset = offset.minimum(end.nextafter(torch.zeros_like(end)))
    return block * _BLOCK + _first_above(inside, offset[:, :, None]).view(N, k)


def _first_above(cumulative: Tensor, threshold: Tensor) -> Tensor:
    """(N, k) indices of the first entry that exceeds each threshold: it added something, so it has probability."""
    return torch.searchsorted(cumulative, threshold.contiguous(), right=True).clamp_(max=cumulative.shape[-1] - 1)


def only(log_probs: Tensor, kept: Tensor) -> Tensor:
    """The laws (N, V) given that the token is among `kept` (N, V)."""
    return torch.where(kept, log_probs, float("-inf")).log_softmax(-1)


def least(key: Tensor, log_probs: Tensor, mass: float) -> Tensor:
    """(N, V) bool: the tokens of the least keys whose probabilities reach `mass`, and whatever ties with the last.

    Args:
        key: (N, V).
        log_probs: (N, V).
    """
    V = key.shape[-1]
    if key.device.type != "cpu" or V <= _GUESS:
        ranked, order = key.sort(dim=-1)
        return key <= _last(ranked, _gathered(log_probs, order).cumsum(-1), mass)
    # Most laws of a language model reach the mass among few tokens, found faster than the whole is gone through.
    first = key.topk(_GUESS, dim=-1, largest=False)
    cumulative = _gathered(log_probs, first.indices).cumsum(-1)
    found = cumulative[:, -1] >= mass
    if bool(found.all()):
        return key <= _last(first.values, cumulative, mass)
    last = torch.empty_like(key[:, :1])
    last[found] = _last(first.values[found], cumulative[found], mass)
    last[~found] = _last_of_all(key[~found], log_probs[~found], mass)
    return key <= last


def draw_least(key: Tensor, log_probs: Tensor, mass: float, u: Tensor, p: Tensor | None = None) -> Tensor:
    """(N,) tokens from `only(log_probs, least(key, log_probs, mass))`; `u` is (N, k), k uniforms in [0, 1) for each.

    `p` is exp(log_probs), where somebody has it.

    On a CPU that set is not looked for: a token that is drawn from the whole law belongs to it if the tokens of lesser
    keys fall short of the mass. What does not is drawn anew; who fails k - 1 times draws from the set after all.
    """
    left = torch.arange(len(key), device=key.device)
    tokens = torch.empty_like(left)
    if key.device.type == "cpu" and key.shape[1] > _GUESS and mass >= _MOSTLY_KEPT:
        p = log_probs.softmax(-1) if p is None else p
        for column in range(u.shape[1] - 1):
            mine, keys = (p, key) if len(left) == len(p) else (p[left], key[left])
            drawn = _inverted(mine, u[left, column, None])
            nearer = keys < keys.gather(1, drawn)
            kept = (mine * nearer).sum(-1, dtype=torch.float64) < mass
            tokens[left[kept]] = drawn[kept, 0]
            left = left[~kept]
            if not len(left):
                return tokens
    law = log_probs[left]
    tokens[left] = draw(only(law, least(key[left], law, mass)), u[left, -1])
    return tokens


def _gathered(log_probs: Tensor, tokens: Tensor) -> Tensor:
    return log_probs.gather(-1, tokens).double().exp()


def _last(ranked: Tensor, cumulative: Tensor, mass: float) -> Tensor:
    """(N, 1) of keys by rank the last whose token starts below `mass`; `cumulative` (N, V) is what the ranks have."""
    before = torch.cat([torch.zeros_like(cumulative[:, :1]), cumulative[:, :-1]], dim=-1)
    return ranked.gather(-1, ((before < mass).sum(-1, keepdim=True) - 1).clamp(min=0))


def _last_of_all(key: Tensor, log_probs: Tensor, mass: float) -> Tensor:
    """What `_last` finds among all keys; sorting 50,000 takes milliseconds, so only those that matter are sorted."""
    if key.dtype != torch.float32 or key.shape[-1] < _HISTOGRAM_FROM:
        ranked, order = key.sort(dim=-1)
        return _last(ranked, _gathered(log_probs, order).cumsum(-1), mass)
    # The leading bits of numbers that are not negative are in order: a histogram by them says in which of its bins the
    # mass is reached, and only the keys in that one are sorted, those of all rows at once.
    bits = (key.clamp(min=0) + 0.0).view(torch.int32)  # -0.0 has a leading bit
    bins = bits >> 16
    rows = torch.arange(len(key), dtype=torch.int32)[:, None]
    p = log_probs.double().exp()
    per_bin = torch.bincount((bins + rows * _BINS).flatten(), p.flatten(), minlength=len(key) * _BINS)
    reached = per_bin.view(len(key), _BINS).cumsum(-1)
    enough = reached[:, -1:].clamp(max=mass)  # rounding may leave the sum of all below it
    last = (reached < enough).sum(-1, keepdim=True)
    row, token = (bins == last.int()).nonzero(as_tuple=True)
    ranked, order = ((row << 32) | bits[row, token]).sort()
    row, mine = row[order], p[row, token][order]
    # What lies before each: the bins before its own, and of its own row the keys before it.
    sums = mine.cumsum(0) - mine
    begins = torch.searchsorted(row, torch.arange(len(key)))
    below = (reached - per_bin.view_as(reached)).gather(-1, last)[:, 0]
    enters = sums - sums[begins][row] + below[row] < enough[row, 0]
    counted = torch.zeros(len(key), dtype=torch.long).scatter_add_(0, row, enters.long())
    found = ranked[begins + counted.clamp(min=1) - 1] & 0xFFFFFFFF
    return found.to(torch.int32).view(torch.float32)[:, None]
