"""One draw per row from the processed law, in plain torch: the definition that the GPU form is held against.

The law is softmax(logits / temperature), cut by top-k, then top-p of what is left, then min-p, as in the harness's one
function for it; ties with the last that is kept stay in. The draw is Gumbel-max: the greatest of scores plus noise is
an exact draw from their softmax, and stays one when tokens are cut, so nothing needs to be renormalised. The noise is a
function of a key per row and the token's number (Philox), so that any form of the operation draws the same token.

Dimensions: B rows, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
#: Salmon, Moraes, Dror and Shaw 2011, Parallel Random Numbers: As Easy as 1, 2, 3 (Philox 4x32-10).
_ROUNDS, _KEY_A, _KEY_B, _ROUND_A, _ROUND_B = 10, 0x9E3779B9, 0xBB67AE85, 0xD2511F53, 0xCD9E8D57
#: What GPU generators multiply a 31-bit number with, so that the product stays below 1 in float32.
_SCALE = 4.6566127342e-10


def keys(u: Tensor) -> Tensor:
    """(B,) int64 keys from uniforms in [0, 1) in float64, of which they keep every bit."""
    return (u.double() * 2.0**53).long()


def philox(key: Tensor, counter: Tensor) -> Tensor:
    """(B, V) int64 below 2^32: the first word of Philox 4x32-10 at the counters (V,), under the keys (B,)."""
    c0 = counter[None].expand(len(key), -1)
    c1 = c2 = c3 = torch.zeros_like(c0)
    k0, k1 = (key & _MASK)[:, None], ((key >> 32) & _MASK)[:, None]
    for _ in range(_ROUNDS):
        (high_b, low_b), (high_a, low_a) = _product(c2, _ROUND_B), _product(c0, _ROUND_A)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + _KEY_A) & _MASK, (k1 + _KEY_B) & _MASK
    return c0


def _product(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The high and the low 32 bits of x * factor, both below 2^32."""
    high, low = factor * (x >> 16), factor * (x & 0xFFFF)
    return (high + (low >> 16)) >> 16, ((high << 16) + low) & _MASK


def uniforms(key: Tensor, counter: Tensor) -> Tensor:
    """(B, V) float32 in [0, 1), as `triton.language.rand(key, counter)` makes them."""
    word = philox(key, counter)
    signed = torch.where(word > 0x7FFFFFFF, _MASK - word, word)
    return signed.float() * torch.tensor(_SCALE, dtype=torch.float32)


def gumbel(u: Tensor) -> Tensor:
    """-log(-log(1 - u)) of uniforms in [0, 1): fine where it is great, which a float32 near 1 is not."""
    u = u + 2.0**-32
    small = u * (1 + u * (0.5 + u * (1 / 3)))
    return -torch.where(u < 1e-3, small, -(1 - u).log()).log()


def kept(scores: Tensor, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """(B, V) bool: which tokens the truncations leave, `scores` being logits over temperature."""
    left = torch.ones_like(scores, dtype=torch.bool)
    if top_k > 0:
        left = scores >= scores.topk(min(top_k, scores.shape[1]), dim=1).values[:, -1:]
    if top_p < 1.0:
        log_p = scores.masked_fill(~left, -math.inf).log_softmax(1)
        ranked = log_p.sort(dim=1, descending=True).values
        mass = ranked.double().exp().cumsum(1)
        before = torch.cat([torch.zeros_like(mass[:, :1]), mass[:, :-1]], 1)
        left = left & (log_p >= ranked.gather(1, (before < top_p).sum(1, keepdim=True) - 1))
    if min_p > 0.0:
        left = left & (scores >= scores.amax(1, keepdim=True) + math.log(min_p))
    return left & (scores > -math.inf)


def sample(
    logits: Tensor, key: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """(B,) int64 tokens from logits (B, V) in float32 or wider; `key` (B,) int64 names the noise of each row."""
    scores = logits / temperature
    noise = gumbel(uniforms(key, torch.arange(logits.shape[1], device=logits.device)))
    left = kept(scores, top_k=top_k, top_p=top_p, min_p=min_p)
    return (scores + noise.to(scores)).masked_fill(~left, -math.inf).argmax(1)
