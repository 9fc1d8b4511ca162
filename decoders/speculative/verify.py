"""Verification: which drafted tokens stay, and which token follows them, so that the text has the target's law.

Pure functions on tensors, in whatever precision they are given; none of them asks the host anything. B rows, K drafted
tokens, N tree nodes, V vocabulary. Laws are natural log-probabilities, -inf where cut; those of the target and of the
drafter have gone through the same temperature and truncation, or the residual is of something else.

A drafted token comes with the law that it was drawn from (`chain`, `rounds`), or with none, as a guess (`match`,
`walk`): then the target draws its own tokens, and a guess stays if it is the one that was drawn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from decodathlon.harness import law
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class Verdict(NamedTuple):
    """What became of a chain of drafted tokens."""

    #: (B,) how many of them stay.
    accepted: Tensor
    #: (B,) the token behind those.
    token: Tensor


class Path(NamedTuple):
    """What became of a tree of drafted tokens."""

    #: (B,) how many nodes stay.
    accepted: Tensor
    #: (B,) the token behind them.
    token: Tensor
    #: (B, depth) the nodes that stay, parents first; what stands behind `accepted` means nothing.
    nodes: Tensor


def chain(log_p: Tensor, drafted: Tensor, log_q: Tensor, counts: Tensor, u: Tensor) -> Verdict:
    """The rule of speculative sampling: x from q stays with probability min(1, p(x) / q(x)); the first that does not is
    replaced by a draw from max(p - q, 0), renormalised; if all stay, one more is drawn from p.

    Leviathan, Kalman, Matias 2023 (arXiv 2211.17192), algorithm 1; Chen et al. 2023 (arXiv 2302.01318).

    Args:
        log_p: (B, K + 1, V) the target's law behind the text and behind each drafted token.
        drafted: (B, K) token k drawn from `log_q[:, k]`.
        log_q: (B, K, V).
        counts: (B,) how many of the K are meant; what stands behind them is padding.
        u: (B, K + 1) uniforms in [0, 1): K for the tests, the last for the draw.
    """
    p, q = log_p.exp(), log_q.exp()
    K = drafted.shape[1]
    px = p[:, :K].gather(2, drafted[:, :, None])[..., 0]
    qx = q.gather(2, drafted[:, :, None])[..., 0]
    stays = (u[:, :K].to(px) * qx < px) & (torch.arange(K, device=drafted.device) < counts[:, None])
    accepted = stays.cumprod(1).sum(1)
    at = accepted[:, None, None].expand(-1, 1, p.shape[2])
    here = p.gather(1, at)[:, 0]
    if not K:
        return Verdict(accepted, law.draw(here.log(), u[:, -1]))
    against = q.gather(1, at.clamp(max=K - 1))[:, 0] * (accepted < counts)[:, None]
    return Verdict(accepted, law.draw(residual(here, against).log(), u[:, -1]))


def residual(p: Tensor, q: Tensor) -> Tensor:
    """(B, V) weights max(p - q, 0), or p itself where nothing is left of it: p and q are then equal up to rounding,
    and a token was refused by that."""
    left = (p - q).clamp(min=0)
    return torch.where(left.sum(-1, keepdim=True) > 0, left, p)


def match(drawn: Tensor, drafted: Tensor, counts: Tensor) -> Verdict:
    """Guesses stay as long as they are what the target draws.

    A point mass at x under `chain` gives the same law: x stays with probability p(x), and otherwise p without x
    follows. This form needs no law of the drafter, and the text is the one that the target draws alone from the same
    numbers.

    Args:
        drawn: (B, K + 1) the target's own tokens, drawn behind the text and behind each guess.
        drafted: (B, K).
        counts: (B,) how many of the K are meant.
    """
    K = drafted.shape[1]
    stays = (drawn[:, :K] == drafted) & (torch.arange(K, device=drafted.device) < counts[:, None])
    accepted = stays.cumprod(1).sum(1)
    return Verdict(accepted, drawn.gather(1, accepted[:, None])[:, 0])


def rounds(log_p: Tensor, candidates: Tensor, log_q: Tensor, u: Tensor, *, replaced: bool) -> tuple[Tensor, Tensor]:
    """One position with several candidates: they are tried in turn, and each that is refused leaves its residual.

    Recursive rejection: x_i stays with probability min(1, p(x_i) / q_i(x_i)), and else p becomes max(p - q_i, 0),
    renormalised. SpecInfer (arXiv 2305.09781) draws with replacement, so that q_i = q; Sequoia (arXiv 2402.12374)
    without, so that q_i is q without the ones before, renormalised.

    Args:
        log_p: (B, V).
        candidates: (B, n) in the order in which they were drawn; negative where there is none.
        log_q: (B, V) the law of the first.
        u: (B, n + 1) uniforms in [0, 1): n for the tests, the last for the draw.
        replaced: whether they were drawn with replacement.

    Returns:
        (B,) which candidate stays, -1 where none does, and (B,) the token: it, or a draw from what is left of p.
    """
    p, q = log_p.exp(), log_q.exp()
    chosen = torch.full_like(candidates[:, 0], -1)
    for i in range(candidates.shape[1]):
        x = candidates[:, i, None].clamp(min=0)
        asked = (chosen < 0) & (candidates[:, i] >= 0)
        px, qx = p.gather(1, x)[:, 0], q.gather(1, x)[:, 0]
        stays = asked & (u[:, i].to(px) * qx < px)
        chosen = torch.where(stays, i, chosen)
        refused = (asked & ~stays)[:, None]
        left = residual(p, q)
        p = torch.where(refused, left / left.sum(-1, keepdim=True), p)
        if not replaced:
            rest = q.scatter(1, x, 0.0)
            total = rest.sum(-1, keepdim=True)
            q = torch.where(refused, rest / total.where(total > 0, 1.0), q)
    drawn = law.draw(p.log(), u[:, -1])
    token = candidates.gather(1, chosen.clamp(min=0)[:, None])[:, 0]
    return chosen, torch.where(chosen < 0, drawn, token)


def walk(drawn: Tensor, tokens: Tensor, parents: Tensor, depth: int) -> Path:
    """Guesses in a tree stay along the path that the target draws: at each node it draws one token, and the child that
    has it is next. SpecInfer's and EAGLE's trees of likeliest tokens, in the form in which nothing is renormalised.

    Args:
        drawn: (B, 1 + N) the target's own tokens, drawn behind the text and behind each node.
        tokens: (B, N) of the nodes; no two children of one node have the same.
        parents: (B, N) the parent of each node, -1 for the text itself; parents come before their children.
        depth: of the tree.
    """
    B = len(tokens)
    here = torch.full((B,), -1, dtype=torch.long, device=tokens.device)
    accepted, nodes = torch.zeros_like(here), []
    for _ in range(depth):
        wanted = drawn.gather(1, here[:, None] + 1)
        # a node that does not exist is its own parent's child of no token; `max` finds the one that does
        child = (parents == here[:, None]) & (tokens == wanted)
        found, index = child.max(1)
        stays = found & (accepted == len(nodes))
        here = torch.where(stays, index, here)
        accepted = accepted + stays
        nodes.append(here)
    path = torch.stack(nodes, 1) if nodes else torch.zeros(B, 0, dtype=torch.long, device=tokens.device)
    return Path(accepted, drawn.gather(1, here[:, None] + 1)[:, 0], path)


def walk_drawn(
    log_p: Tensor, tokens: Tensor, parents: Tensor, log_q: Tensor, u: Tensor, depth: int, *, replaced: bool
) -> Path:
    """Nodes that were drawn stay by recursive rejection at each level (`rounds`), down the tree. Sequoia, algorithm 2.

    Args:
        log_p: (B, 1 + N, V) the target's law behind the text and behind each node.
        tokens: (B, N) of the nodes, siblings in the order in which they were drawn.
        parents: (B, N) as in `walk`.
        log_q: (B, 1 + N, V) the law that the children of the text and of each node were drawn from.
        u: (B, depth + 1, W + 1) uniforms in [0, 1), W the most children that a node has.
        depth: of the tree.
        replaced: whether siblings were drawn with replacement.
    """
    N = tokens.shape[1]
    V, W = log_p.shape[2], u.shape[2] - 1
    here = torch.full((len(tokens),), -1, dtype=torch.long, device=tokens.device)
    going = torch.ones_like(here, dtype=torch.bool)
    accepted, token, nodes = torch.zeros_like(here), torch.zeros_like(here), []
    for level in range(depth + 1):
        at = (here[:, None, None] + 1).expand(-1, 1, V)
        child = parents == here[:, None]
        order = torch.where(child, torch.arange(N, device=child.device), N).sort(1).values[:, :W]
        exists = order < N
        candidates = torch.where(exists, tokens.gather(1, order.clamp(max=max(N - 1, 0))), -1)
        which, found = rounds(
            log_p.gather(1, at)[:, 0], candidates, log_q.gather(1, at)[:, 0], u[:, level], replaced=replaced
        )
        token = torch.where(going, found, token)
        stays = going & (which >= 0)
        here = torch.where(stays, order.gather(1, which.clamp(min=0)[:, None])[:, 0], here)
        accepted = accepted + stays
        going = stays
        nodes.append(here)
    return Path(accepted, token, torch.stack(nodes[:depth], 1) if depth else torch.zeros_like(tokens[:, :0]))
