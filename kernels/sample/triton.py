"""One draw per row from the processed law, in one launch and without a sort.

Each row is one program. A pass over the vocabulary finds the greatest of scores plus noise among those above a pivot,
at first among all. A second one counts and adds up what is likelier than it: if the truncation cuts it, its score is
the new pivot, below which nothing that is kept can lie; and the same pass has found the greatest above that pivot. As
the noise of a token stays the same, the token that survives is the one of the definition, whatever was tried before it.
(Rejection by pivots: FlashInfer, Ye et al. 2025; with fresh numbers per round there.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _scores(logits, at, V, inverse_temperature):
    return tl.load(logits + at, mask=at < V, other=float("-inf")).to(tl.float32) * inverse_temperature


@triton.jit
def _noisy(scores, key, at):
    """Scores plus Gumbel noise by the token's number, as in the reference."""
    u = tl.rand(key, at.to(tl.int64)) + 2.3283064365386963e-10
    small = u * (1.0 + u * (0.5 + u * 0.3333333333333333))
    return scores - tl.log(tl.where(u < 1e-3, small, -tl.log(1.0 - u)))


@triton.jit
def _sample(
    logits, keys, out, V, stride, inverse_temperature, top_k, top_p, log_min_p,
    BLOCK: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    key = tl.load(keys + row)
    offsets = tl.arange(0, BLOCK)

    best, token, value = float("-inf"), 0, float("-inf")
    greatest, total = float("-inf"), 0.0
    for begin in range(0, V, BLOCK):
        at = begin + offsets
        scores = _scores(logits, at, V, inverse_temperature)
        noisy = tl.where(scores > float("-inf"), _noisy(scores, key, at), float("-inf"))
        here, place = tl.max(noisy, 0, return_indices=True)
        here_value = tl.max(tl.where(offsets == place, scores, float("-inf")), 0)
        better = here > best
        best, token = tl.where(better, here, best), tl.where(better, begin + place, token)
        value = tl.where(better, here_value, value)
        top = tl.maximum(greatest, tl.max(scores, 0))
        safe = tl.where(top > float("-inf"), top, 0.0)
        total = total * tl.exp(greatest - safe) + tl.sum(tl.exp(scores - safe), 0)
        greatest = top

    if TOP_K or TOP_P or MIN_P:
        lowest = greatest + log_min_p if MIN_P else float("-inf")
        done = 0
        while done == 0:
            # how many, and how much, is likelier than the token; and the greatest among those
            count, mass = 0, 0.0
            best, next_token, next_value = float("-inf"), token, value
            for begin in range(0, V, BLOCK):
                at = begin + offsets
                scores = _scores(logits, at, V, inverse_temperature)
                above = scores > value
                count += tl.sum(above.to(tl.int32), 0)
                mass += tl.sum(tl.where(above, tl.exp(scores - greatest), 0.0), 0)
                noisy = tl.where(above, _noisy(scores, key, at), float("-inf"))
                here, place = tl.max(noisy, 0, return_indices=True)
                here_value = tl.max(tl.where(offsets == place, scores, float("-inf")), 0)
                better = here > best
                best, next_token = tl.where(better, here, best), tl.where(better, begin + place, next_token)
                next_value = tl.where(better, here_value, next_value)
            stays = value >= lowest
            if TOP_K:
                stays = stays & (count < top_k)
            if TOP_P:
                stays = stays & (mass < top_p * total)
            done = tl.where(stays | (count == 0), 1, 0)
            if done == 0:
                token, value = next_token, next_value
    tl.store(out + row, token.to(tl.int64))


def sample(
    logits: Tensor, key: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, block: int = BLOCK
) -> Tensor:
    """(B,) int64 tokens; see reference.py. Top-k and top-p at once need the k-th score, which this does not look for.

    Raises:
        ValueError: both are asked for.
    """
    if top_k > 0 and top_p < 1.0:
        raise ValueError("top_k and top_p at once: use the reference")
    B, V = logits.shape
    out = torch.empty(B, dtype=torch.long, device=logits.device)
    log_min_p = torch.tensor(min_p).log().item() if min_p > 0 else 0.0
    _sample[(B,)](
        logits, key, out, V, logits.stride(0), 1.0 / temperature, top_k, top_p, log_min_p,
        BLOCK=block, TOP_K=top_k > 0, TOP_P=top_p < 1.0, MIN_P=min_p > 0.0, num_warps=8,
    )  # fmt: skip
    return out
