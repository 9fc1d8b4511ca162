"""Answers that are written anew from some token on: what was read is kept, and what was written has a code.

A code is a number in [0, 1) that stands for how an answer goes on, as in arithmetic coding: at each token the stretch
of the cumulative law that holds it says which token, and is magnified. A uniform code gives an exact draw.

Dimensions: B rows, H tokens of a head (the prompt), N tokens of an answer at most, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from decodathlon.decoders.mcmc.proposals import Distances
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from decodathlon.harness.targets.base import Context, Target

#: A code of 53 bits says no more once its stretch is that narrow; from then on each token has a number of its own.
FINEST = 2.0**-32
#: The largest float64 below 1.
_LAST = 1.0 - 2.0**-53


@dataclass(frozen=True)
class Pages:
    """B answers; behind its last token an answer is padded with that token."""

    #: (B, N).
    tokens: Tensor
    #: (B,) the stop token included.
    lengths: Tensor
    #: (B, N) log-probability of each token, and the probability of all tokens before it in the vocabulary; 0 behind.
    terms: Tensor
    below: Tensor


class Desk:
    """Rows of a target on which answers are written; the beginning that a row has read already is not read again."""

    def __init__(self, target: Target, shape: Callable[[Tensor], Tensor], stops: frozenset[int]) -> None:
        """
        Args:
            shape: logits (N, V) to log-probabilities, the law that tokens are drawn from.
            stops: tokens that end an answer.
        """
        self._target, self._shape = target, shape
        self._stops = torch.tensor(sorted(stops), dtype=torch.long, device=target.device)
        self._context: Context | None = None
        self._distances: Distances | None = None
        #: (B, H + N) and (B,): what the rows of the context have read.
        self._texts, self._read = torch.empty(0, 0), torch.empty(0)

    def read(self, heads: Tensor, tokens: Tensor) -> Pages:
        """The answers (B, N) behind the heads (B, H) as they are, with what the law says of each token."""
        (B, N), texts = tokens.shape, torch.cat([heads, tokens], 1)
        self._take_up(texts, torch.full((B,), heads.shape[1], device=texts.device))
        logits = self._opened.next_logits[:, None]
        if N > 1:
            logits = torch.cat([logits, self._opened.extend(tokens[:, :-1]).logits], 1)
            self._opened.keep(N - 1)
            self._texts, self._read = texts.clone(), self._read + N - 1
        log_law = self._log_law(logits.flatten(0, 1))
        _, below = _stretch(_cumulative(log_law), tokens.flatten())
        terms = log_law.gather(1, tokens.reshape(-1, 1)).view(B, N)
        place = torch.arange(N, device=texts.device)
        ends = torch.where(self.is_stop(tokens), place + 1, N).min(-1).values
        behind = place >= ends[:, None]
        return Pages(tokens, ends, terms.masked_fill(behind, 0.0), below.view(B, N).masked_fill(behind, 0.0))

    def write(
        self, texts: Tensor, kept: Tensor, noise: Tensor, codes: Tensor | None = None, *, copies: int = 1
    ) -> Pages:
        """Answers that begin as the texts (B, H + N) do, each several times.

        Args:
            kept: (B,) tokens of an answer that stay.
            noise: (B * copies, N) uniforms, one per written token.
            codes: (B * copies,) in place of the first of them, as far as they reach.

        Returns:
            B * copies answers; `terms` and `below` of the kept tokens are 0.
        """
        R, N = noise.shape
        H, rows = texts.shape[1] - N, torch.arange(R, device=texts.device)
        self._take_up(texts, H + kept)
        if copies > 1:
            self.select(torch.arange(len(texts), device=texts.device).repeat_interleave(copies))
        tokens, place = texts[:, H:].repeat_interleave(copies, 0), kept.repeat_interleave(copies)
        terms = torch.zeros(R, N, dtype=torch.float64, device=texts.device)
        below, width = torch.zeros_like(terms), torch.ones_like(terms[:, 0])
        at = noise[:, 0] if codes is None else codes
        writing = torch.ones(R, dtype=torch.bool, device=texts.device)
        for t in range(N):
            value = noise[:, t] if codes is None else torch.where(width > FINEST, at, noise[:, t])
            log_law = self._log_law(self._opened.next_logits)
            cumulative = _cumulative(log_law)
            found = torch.searchsorted(cumulative, value.to(cumulative)[:, None].contiguous(), right=True)
            token = found.clamp_(max=cumulative.shape[-1] - 1)[:, 0]
            p, low = _stretch(cumulative, token)
            now = (rows[writing], place[writing])
            tokens[now], below[now] = token[writing], low[writing]
            terms[now] = log_law.gather(1, token[:, None])[writing, 0]
            at, width = ((at - low) / p).clamp(0.0, _LAST), width * p
            place = place + writing
            writing = writing & (place < N) & ~self.is_stop(token)
            if not bool(writing.any()):
                break
            self._opened.extend(token[:, None])
            self._opened.keep(writing.long().tolist())
            self._texts[rows[writing], self._read[writing]] = token[writing]
            self._read = self._read + writing
        last = tokens.gather(1, place[:, None] - 1)
        behind = torch.arange(N, device=texts.device) >= place[:, None]
        return Pages(torch.where(behind, last, tokens), place, terms, below)

    def is_stop(self, tokens: Tensor) -> Tensor:
        """Whether each token ends an answer."""
        return torch.isin(tokens, self._stops)

    def select(self, rows: Tensor) -> None:
        """Make the desk consist of these rows."""
        self._opened.select(rows)
        self._texts, self._read = self._texts[rows], self._read[rows]

    @property
    def _opened(self) -> Context:
        assert self._context is not None
        return self._context

    def _take_up(self, texts: Tensor, lengths: Tensor) -> None:
        """Let the rows hold the first `lengths` (B,) tokens of the texts (B, H + N), and nothing else."""
        B, L = texts.shape
        if self._context is None or len(self._read) != B:
            heads = [text[:n] for text, n in zip(texts.tolist(), lengths.tolist(), strict=True)]
            place = {head: i for i, head in enumerate(dict.fromkeys(map(tuple, heads)))}
            self._context = self._target.open([list(head) for head in place], capacity=L)
            if len(place) < B:  # what several rows begin with is read once
                self._context.select([place[tuple(head)] for head in heads])
        else:
            place = torch.arange(L, device=texts.device)
            alike = (self._texts == texts) & (place < torch.minimum(self._read, lengths)[:, None])
            known = torch.minimum(alike.long().cumprod(1).sum(1), (lengths - 1).clamp(min=0))
            # All rows read as much as the one with most to read: a row that needs less goes further back.
            width = int((lengths - known).max())
            start = (lengths - width).clamp(min=0)
            self._context.rewind(start.tolist())
            if width > 0:
                self._context.extend(texts.gather(1, (start[:, None] + place[:width]).clamp(max=L - 1)))
                self._context.keep(lengths - start)
        self._texts, self._read = texts.clone(), lengths.clone()

    def distances(self, tokens: Tensor) -> Tensor:
        """(B, N, V) squared distances of all embeddings from those of the tokens (B, N)."""
        if self._distances is None:
            self._distances = Distances(self._target.embeddings, 2)
        return self._distances(tokens)

    def _log_law(self, logits: Tensor) -> Tensor:
        """(N, V) float64 log-probabilities of the next token."""
        return self._shape(logits).double().log_softmax(-1)


def _cumulative(log_law: Tensor) -> Tensor:
    """(N, V) cumulative law; its last entry is 1."""
    cumulative = log_law.exp().cumsum(-1)
    return cumulative / cumulative[:, -1:]


def code_of(pages: Pages, cut: Tensor, u: Tensor) -> Tensor:
    """(B,) one of the codes, by `u` (B,), under which each answer goes on behind its first `cut` tokens as it does."""
    N = pages.tokens.shape[1]
    place = torch.arange(N, device=cut.device)
    inside = (place >= cut[:, None]) & (place < pages.lengths[:, None])
    p = pages.terms.exp().masked_fill(~inside, 1.0)
    width = torch.cat([torch.ones_like(p[:, :1]), p.cumprod(1)[:, :-1]], 1)
    coded = inside & (width > FINEST)
    code = u.double()
    for t in range(N - 1, -1, -1):
        code = torch.where(coded[:, t], pages.below[:, t] + p[:, t] * code, code)
    return code.clamp(0.0, _LAST)


def _stretch(cumulative: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Probability (N,) of the tokens (N,), and of all before them in the vocabulary."""
    high = cumulative.gather(1, tokens[:, None])[:, 0]
    low = torch.where(tokens > 0, cumulative.gather(1, (tokens - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    return high - low, low
