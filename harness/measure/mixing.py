"""How fast a Markov chain forgets: effective sample size, split R-hat, spectral gap; and what a step costs.

Vehtari, Gelman, Simpson, Carpenter and Bürkner 2021, Rank-Normalization, Folding, and Localization: an Improved R-hat,
for R-hat and the effective sample size; Geyer 1992 for where its sum ends.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from decodathlon.harness import law
from decodathlon.harness.chain import Chain
from decodathlon.harness.decoder import Decoder, Limits
from decodathlon.harness.errors import UnsupportedError
from decodathlon.harness.measure import exactness, statistics
from decodathlon.harness.measure.speed import timed
from decodathlon.harness.measure.statistics import Estimate
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.rewards import Answer, Rewarded
from decodathlon.harness.rewards import build as build_reward

if TYPE_CHECKING:
    from decodathlon.harness.targets.base import Spent, Target

Array = np.ndarray[Any, Any]


class Walked(NamedTuple):
    """What one step of all chains left."""

    #: (B, L) where the chains stand, and (B,) the log-probability of each text under the target.
    sequences: Tensor
    log_prob: Tensor
    #: (B,) moves accepted so far.
    accepted: Tensor
    #: Of this step alone.
    seconds: float


#: Share of the mean square below which a variance is rounding.
_STILL = 1e-20
#: Moves from every text where a transition matrix has to be estimated, and where a stated one is held against them.
MOVES, TRIED = 4000, 400
#: Chance that a true matrix is taken for a wrong one.
FALSE_ALARM = 1e-6
#: Rows that one call of a transition gets, at most, there.
ROWS_AT_ONCE = 1 << 16


@torch.no_grad()
def walk(chain: Chain, target: Target, chains: int, tokens: int, seed: int) -> Iterator[Walked]:
    """Chains behind the start token, step by step, without end; stop tokens are tokens like any other."""
    rng = RowRandom(seed, [f"chain-{i}" for i in range(chains)])
    states = chain.walk(target, chain.heads(target, [[]] * chains), Limits(tokens, ignore_eos=True), rng, range(chains))
    while True:
        seconds, state = timed(target, lambda: next(states))
        yield Walked(state.sequences, state.log_prob.cpu(), state.accepted.cpu(), seconds)


class Independent(NamedTuple):
    """Texts of the target's own law, drawn token by token."""

    #: (B, L), the start token included, and (B,).
    sequences: Tensor
    log_prob: Array
    #: That drawing them took.
    seconds: float


def rewards(decoder: Rewarded, target: Target, sequences: Tensor, log_prob: Array) -> list[float]:
    """What the decoder's reward makes of texts (B, L) behind the start token."""
    free = 0 if target.start_token is None else 1
    texts = zip(sequences.tolist(), log_prob.tolist(), strict=True)
    answers = [Answer(text[:free], text[free:], p, target) for text, p in texts]
    return [float(x) for x in build_reward(decoder.reward)(answers)]


@torch.no_grad()
def ancestral(target: Target, rows: int, tokens: int, seed: int) -> Independent:
    """So many independent texts of so many tokens."""
    head = [] if target.start_token is None else [target.start_token]
    u = RowRandom(seed, [f"ancestral-{i}" for i in range(rows)]).uniforms(tokens).to(target.device)

    drawn = torch.tensor([head] * rows, dtype=torch.long, device=target.device).view(rows, -1)

    def draw() -> tuple[Tensor, Tensor]:
        context, texts = target.open([head] * rows, capacity=len(head) + tokens), drawn
        score = torch.zeros(rows, dtype=torch.float64, device=target.device)
        for t in range(tokens):
            log_probs = context.next_logits.log_softmax(-1)
            token = law.draw(log_probs, u[:, t])
            texts = torch.cat([texts, token[:, None]], 1)
            score += log_probs.gather(1, token[:, None])[:, 0].double()
            if t + 1 < tokens:
                context.extend(token[:, None])
                context.keep(1)
        return texts, score

    seconds, (texts, score) = timed(target, draw)
    return Independent(texts, score.cpu().numpy(), seconds)


def drawn(decoder: Decoder, target: Target, rows: int, tokens: int, seed: int) -> Independent:
    """The same of a decoder that draws texts independently, by its own code.

    Raises:
        UnsupportedError: its texts are not all of this length.
    """
    head = [] if target.start_token is None else [target.start_token]
    rng, limits = RowRandom(seed, [f"draw-{i}" for i in range(rows)]), Limits(tokens, ignore_eos=True)
    seconds, answers = timed(target, lambda: decoder.generate(target, [head] * rows, limits, rng))
    if {len(a.tokens) for a in answers} != {tokens}:
        raise UnsupportedError("texts of one length", "its answers end earlier")
    sequences = torch.tensor([[*head, *a.tokens] for a in answers], device=target.device)
    return Independent(sequences, target.score(sequences, len(head)).cpu().numpy(), seconds)


def ess(values: Array) -> float:
    """Effective sample size of the mean of (chains, steps) values: as many independent draws would say as much.

    NaN where no chain moves, or hardly has: then nobody can tell.
    """
    chains, steps = values.shape
    centred = values - values.mean(1, keepdims=True)
    if steps < 4 or float(np.square(centred).mean()) <= _STILL * float(np.square(values).mean()):
        return float("nan")
    spectrum = np.abs(np.fft.rfft(centred, 2 * steps, axis=1)) ** 2
    autocovariance = np.fft.irfft(spectrum, axis=1)[:, :steps] / steps
    within = float(autocovariance[:, 0].mean()) * steps / (steps - 1)
    total = within * (steps - 1) / steps
    if chains > 1:
        total += float(values.mean(1).var(ddof=1))
    rho = 1 - (within - autocovariance.mean(0) * steps / (steps - 1)) / total
    rho[0] = 1.0
    pairs = rho[: steps // 2 * 2].reshape(-1, 2).sum(1)
    ends = np.flatnonzero(pairs < 0)
    pairs = np.minimum.accumulate(pairs[: ends[0] if len(ends) else len(pairs)])
    time_between = max(-1 + 2 * float(pairs.sum()), 1 / np.log10(max(10, chains * steps)))
    return float(chains * steps / time_between)


def split_rhat(values: Array) -> float:
    """Of (chains, steps) values, the halves of all chains against one another: 1 where they agree; NaN where all are
    the same."""
    steps = values.shape[1]
    half = steps // 2
    if half < 2:
        return float("nan")
    parts = np.concatenate([values[:, :half], values[:, steps - half :]])
    within = float(parts.var(1, ddof=1).mean())
    between = half * float(parts.mean(1).var(ddof=1))
    still = _STILL * float(np.square(values).mean())  # rounding is no movement
    if within <= still:
        return float("nan") if between <= still else float("inf")
    return float(np.sqrt((half - 1) / half + between / (half * within)))


def spectral_gap(chain: Chain, target: Target, length: int, seed: int = 0) -> Estimate:
    """Of the chain over all texts of so many tokens: from its transition matrix where the chain states it, else from
    `MOVES` moves of each text, which tell it to about 0.02."""
    matrix = transitions(chain, target, length)
    if matrix is not None:
        return Estimate(gap(matrix), n=len(matrix))
    return Estimate(gap(kernel(chain, target, length, MOVES, seed)), n=MOVES * target.vocab_size**length)


@torch.no_grad()
def transitions(chain: Chain, target: Target, length: int) -> Tensor | None:
    """(M, M) transition matrix over all M texts of so many tokens, in the order of their digits; None where the chain
    cannot state it, or overrides what the statement may rest on.

    Raises:
        ValueError: the chain has a burn-in, before which it is another chain; or what it states is no transition
            matrix, or not that of its steps.
    """
    sequences, free = all_texts(chain, target, length)
    line = type(chain).__mro__
    stated = next(i for i, kind in enumerate(line) if "transitions" in vars(kind))
    changed = {name for kind in line[:stated] for name, it in vars(kind).items() if inspect.isfunction(it)}
    if any(name in dir(line[stated]) and not name.startswith("__") for name in changed):
        return None
    matrix = chain.transitions(target, chain.begin(target, sequences, free))
    if matrix is not None:
        _check(matrix, kernel(chain, target, length, TRIED), f"{chain.spec}: transitions()")
    return matrix


def _check(matrix: Tensor, moved: Tensor, what: str) -> None:
    """
    Raises:
        ValueError: a matrix is not what `TRIED` moves of each text (M, M) come from.
    """
    M = len(moved)
    if matrix.shape != (M, M) or float((matrix.sum(1) - 1).abs().max()) > 1e-6 or float(matrix.min()) < -1e-9:
        raise ValueError(f"{what} must give a ({M}, {M}) matrix of probabilities whose rows sum to 1")
    rows = zip((moved * TRIED).round().numpy(), matrix.clamp(min=0).numpy(), strict=True)
    least = min(exactness.p_value(np.append(n, 0), np.append(p / p.sum(), 0)) for n, p in rows)
    if least * M < FALSE_ALARM:
        raise ValueError(f"{what} is not the matrix of its steps: some moves would come about with p = {least:.1g}")


@torch.no_grad()
def kernel(chain: Chain, target: Target, length: int, moves: int, seed: int = 0) -> Tensor:
    """The same (M, M) estimated: `moves` single moves from each text. Only for targets without stop tokens."""
    sequences, free = all_texts(chain, target, length)
    M, place = len(sequences), target.vocab_size ** torch.arange(length - 1, -1, -1)
    counts = torch.zeros(M * M, dtype=torch.float64)
    each = max(1, min(moves, ROWS_AT_ONCE // M))
    for start in range(0, moves, each):
        rows = torch.arange(M).repeat_interleave(min(each, moves - start))
        state = chain.begin(target, sequences[rows], free)
        u = RowRandom(seed, [start]).uniforms(len(rows), chain.uniforms(length))[0]
        moved = (chain.step(target, state, u).tokens * place).sum(1)
        counts += torch.bincount(rows * M + moved, minlength=M * M)
    return counts.view(M, M) / moves


def all_texts(chain: Chain, target: Target, length: int) -> tuple[Tensor, int]:
    """(M, L) all texts of so many free tokens, and where those begin."""
    if chain.burn_in:
        raise ValueError(f"{chain.spec} is another chain after its burn-in")
    (head,) = chain.heads(target, [[]])
    V, place = target.vocab_size, target.vocab_size ** torch.arange(length - 1, -1, -1)
    tokens = torch.arange(V**length)[:, None] // place % V
    return torch.cat([torch.tensor([head], dtype=torch.long).view(1, -1).expand(len(tokens), -1), tokens], 1), len(head)


def gap(matrix: Tensor, stationary: Tensor | None = None) -> float:
    """1 less the second largest modulus of the eigenvalues of a transition matrix (M, M): 1 forgets in one step.

    Args:
        stationary: (M,) law of a chain that is reversible with respect to it. Then the flow is made symmetric first,
            which halves the noise of an estimated matrix and leaves an exact one as it is.
    """
    if stationary is None:
        return 1.0 - float(torch.linalg.eigvals(matrix).abs().sort(descending=True).values[1])
    root = stationary.sqrt()
    flow = root[:, None] * matrix / root
    return 1.0 - float(torch.linalg.eigvalsh((flow + flow.T) / 2).abs().sort(descending=True).values[1])


def flops(target: Target, spent: Spent) -> float:
    """Floating-point operations, estimated as usual: 2 per parameter and token forward, 2 more where a gradient of the
    inputs was taken. Attention over the context is left out."""
    return 2.0 * target.parameters * (spent.positions + spent.backward)


def peak_flops(device: Any, dtype: torch.dtype, *, repeats: int = 5) -> float:
    """Operations per second of the fastest of some large matrix products of this type on this device."""
    on_gpu = torch.device(device).type == "cuda"
    size, products = (8192, 10) if on_gpu else (1024, 1)
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(repeats + 1):
        if on_gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(products):
            a @ a
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - began) / products)
    return 2.0 * size**3 / best


def excess(later: Array, reference: Array, tokens: int) -> Estimate:
    """Mean of the units' energies (n,) less that of the reference (m,), per token, with Welch's 95 % interval."""
    value = float(later.mean() - reference.mean()) / tokens
    if len(later) < 2 or len(reference) < 2:
        return Estimate(value, n=len(later))
    a, b = float(later.var(ddof=1)) / len(later), float(reference.var(ddof=1)) / len(reference)
    if a + b <= 0:
        return Estimate(value, n=len(later))
    freedom = (a + b) ** 2 / (a**2 / (len(later) - 1) + b**2 / (len(reference) - 1))
    half = statistics.t_quantile(0.5 + statistics.LEVEL / 2, max(1, int(freedom))) * (a + b) ** 0.5 / tokens
    return Estimate(value, value - half, value + half, len(later))
