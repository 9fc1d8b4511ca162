"""Weights of particles, by their logarithms and in float64: how many count, their mean, and who is copied.

Dimensions: P prompts, M particles of each, n copies.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from decodathlon.harness.errors import RewardError
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

#: systematic: floor or ceiling of n W copies of each; residual: floor(n W) of each and the rest by lot; multinomial:
#: all by lot; topN: the n of the greatest weight, one copy each, which is no resampling, for it gives other means.
Scheme = Literal["systematic", "residual", "multinomial", "topN"]
#: Below one by as much as float64 can be.
_LAST = 1.0 - 2.0**-53


def ess(log_weights: Tensor) -> Tensor:
    """(P,) effective sample sizes 1 / sum of W^2 of the normalised weights, of (P, M) weights; 0 where all are zero."""
    found = (2 * log_weights.logsumexp(-1) - (2 * log_weights).logsumexp(-1)).exp()
    return torch.nan_to_num(found, nan=0.0)


def log_mean(log_weights: Tensor) -> Tensor:
    """(P,) log of the mean weight."""
    return log_weights.logsumexp(-1) - math.log(log_weights.shape[-1])


def check(log_weights: Tensor, where: str) -> None:
    """
    Raises:
        RewardError: all weights of a prompt are zero, or one is no number.
    """
    if bool((log_weights.isnan() | (log_weights == math.inf)).any()):
        raise RewardError(
            f"{where}: a weight is not a finite number; a reward of lesser size, or a greater beta, has one"
        )
    if bool((log_weights.amax(-1) == -math.inf).any()):
        raise RewardError(f"{where}: all particles have the weight zero; more of them, or a milder reward, would help")


def parents(log_weights: Tensor, n: int, u: Tensor, scheme: Scheme) -> Tensor:
    """(P, n) which of the M particles each of n copies is of.

    Of all schemes but topN the mean number of copies is n W (Douc, Cappe and Moulines 2005).

    Args:
        log_weights: (P, M), not all -inf.
        u: (P, n) uniforms in [0, 1); systematic resampling takes the first.
    """
    if scheme == "topN":
        return log_weights.argsort(dim=-1, descending=True, stable=True)[:, torch.arange(n) % log_weights.shape[1]]
    weights = log_weights.softmax(-1)
    if scheme == "residual":
        return _residual(weights, n, u)
    points = (torch.arange(n, device=u.device) + u[:, :1]) / n if scheme == "systematic" else u
    return _inverted(weights, points)


def _inverted(weights: Tensor, points: Tensor) -> Tensor:
    """(P, n) particles at these points in [0, 1) of the cumulative weights; none of weight zero."""
    cumulative = weights.cumsum(-1)
    points = points.clamp(max=_LAST) * cumulative[:, -1:]
    points = points.minimum(cumulative[:, -1:].nextafter(torch.zeros_like(points[:, :1])))
    return torch.searchsorted(cumulative, points.contiguous(), right=True)


def _residual(weights: Tensor, n: int, u: Tensor) -> Tensor:
    whole = (n * weights + 1e-12).floor()  # rounding must not turn n W = 3 into two copies and a lot of one
    rest = (n * weights - whole).clamp(min=0.0)
    counts = whole.long().sum(-1)
    place = torch.arange(n, device=u.device)
    sure = _inverted(whole + 1e-300, (place + 0.5) / counts.clamp(min=1)[:, None])
    by_lot = _inverted(rest + (rest.sum(-1, keepdim=True) <= 0) * weights, u)
    return torch.where(place < counts[:, None], sure, by_lot)
