"""Pruning of single matrices, without training: which weights go, and how the others make up for them.

Dimensions: a weight is (O, I), outputs by inputs; statistics are of its inputs X, n vectors of I numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

#: Of the mean diagonal, what is added to the Hessian; and columns that SparseGPT prunes before it updates those behind.
DAMPING, BLOCK = 0.01, 128


def kept(score: Tensor, sparsity: float, pattern: tuple[int, int] | None = None) -> Tensor:
    """(O, I) bool: in each row all but the lowest share `sparsity` of the scores (O, I).

    Args:
        pattern: (n, m): instead, of every m neighbouring inputs the n highest.
    """
    if pattern is not None:
        n, m = pattern
        if score.shape[1] % m:
            raise ValueError(f"a pattern of {n} of {m} does not fit a matrix of {score.shape[1]} inputs")
        groups = score.unflatten(1, (-1, m))
        best = groups.topk(n, dim=-1).indices
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).flatten(1)
    gone = round(sparsity * score.shape[1])
    lowest = score.argsort(dim=1, stable=True)[:, :gone]
    return torch.ones_like(score, dtype=torch.bool).scatter_(1, lowest, False)


def magnitude(weight: Tensor) -> Tensor:
    """(O, I) scores |W|."""
    return weight.float().abs()


def wanda(weight: Tensor, square: Tensor) -> Tensor:
    """(O, I) scores |W_ij| times the norm of input j, of its mean squares (I,). Sun et al. 2023 (arXiv 2306.11695)."""
    return weight.float().abs() * square.float().sqrt()


def sparsegpt(
    weight: Tensor,
    second: Tensor,
    sparsity: float,
    pattern: tuple[int, int] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """(O, I) pruned weights, the kept ones moved so that W X changes least. Frantar, Alistarh 2023 (arXiv 2301.00774).

    Column by column: the error that a pruned weight makes is taken over by the columns behind it, along the inverse of
    the Hessian that is left. Which weights of a block of columns go is decided when it is reached.

    Args:
        second: (I, I) mean of x x^T over the inputs.
        mask: (O, I) bool: which weights stay, where that is known before.
    """
    W, H = weight.double().clone(), 2 * second.double().clone()
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1.0
    W[:, dead] = 0.0
    H.diagonal().add_(DAMPING * H.diagonal().mean())
    R = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    for begin in range(0, W.shape[1], BLOCK):
        end = min(begin + BLOCK, W.shape[1])
        block, errors = W[:, begin:end].clone(), torch.zeros_like(W[:, begin:end])
        diagonal = R.diagonal()[begin:end]
        stays = _block_mask(block, diagonal, sparsity) if mask is None else mask[:, begin:end].clone()
        for j in range(end - begin):
            if mask is None and pattern is not None and j % pattern[1] == 0:
                group = slice(j, j + pattern[1])
                stays[:, group] = kept((block[:, group] / diagonal[group]).square(), 0.0, pattern)
            error = torch.where(stays[:, j], 0.0, block[:, j] / diagonal[j])
            block[:, j] = torch.where(stays[:, j], block[:, j], 0.0)
            block[:, j + 1 :] -= error[:, None] * R[begin + j, begin + j + 1 : end]
            errors[:, j] = error
        W[:, begin:end] = block
        W[:, end:] -= errors @ R[begin:end, end:]
    return W.to(weight.dtype)


def _block_mask(block: Tensor, diagonal: Tensor, sparsity: float) -> Tensor:
    """(O, columns) bool: of the whole block all but the lowest share of w^2 / R_jj^2."""
    score = (block / diagonal).square().flatten()
    gone = score.argsort(stable=True)[: round(sparsity * score.numel())]
    return torch.ones_like(score, dtype=torch.bool).scatter_(0, gone, False).view_as(block)
