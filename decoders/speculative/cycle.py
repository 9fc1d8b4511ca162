"""The cycle that all speculative decoders share: draft, verify in one pass of the target, keep what stays.

A row's last token has not been read by the target yet. A cycle reads it together with the drafted tokens, takes
those that stay and one more, and that one is the next cycle's last token. So a cycle makes one token at least, and
reads no token that it keeps twice. Rows accept different numbers and end at different times; who has ended leaves
the batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from decodathlon.decoders.speculative import verify
from decodathlon.decoders.speculative.controllers import Controller, Panel, Seconds
from decodathlon.decoders.speculative.drafter import Draft
from decodathlon.decoders.speculative.trees import ancestors
from decodathlon.harness import law
from decodathlon.harness.decoder import Completion, Cost, Limits
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from decodathlon.decoders.speculative.base import Speculative
    from decodathlon.harness.randomness import RowRandom


@dataclass
class _Row:
    """One text on its way."""

    number: int
    text: list[int]
    prompt: int
    log_prob: float = 0.0
    cycles: int = 0
    positions: int = 0
    trace: list[dict[str, Any]] = field(default_factory=list)
    ended: Literal["", "stop", "length"] = ""

    @property
    def made(self) -> int:
        return len(self.text) - self.prompt


class Request:
    """One batch of prompts, from the first token to the last."""

    def __init__(
        self, decoder: Speculative, target: Any, prompts: Sequence[Sequence[int]], limits: Limits, rng: RowRandom
    ) -> None:
        if limits.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {limits.max_new_tokens}")
        self.decoder, self.target, self.limits, self.rng = decoder, target, limits, rng
        self.stop = frozenset() if limits.ignore_eos else target.stop_tokens
        need = max(map(len, prompts), default=0) + limits.max_new_tokens
        target.check_room(prompts, need)
        # A short row may draft in its padding what a long one has no room for.
        self.context = target.open(
            prompts, capacity=min(target.context_length, need + decoder.widest), hidden=decoder.hidden(target)
        )
        self.drafter = decoder.drafter(target, self.context, prompts)
        self.rows = [_Row(i, list(p), len(p), positions=len(p)) for i, p in enumerate(prompts)]
        self.noise = rng.uniforms(limits.max_new_tokens, 1)[..., 0]
        self.panel = Panel(self._controllers(len(prompts)))
        self.done: dict[int, Completion] = {}
        #: When the last cycle was booked; what comes behind it belongs to the bookkeeping of the next one.
        self._booked: float | None = None

    def _controllers(self, count: int) -> list[Controller]:
        found: list[Controller] = self.target.kept.pop(self.decoder, []) if self.decoder.remember else []
        # drawn by every row, also where its controller is one that has learnt: later draws must not depend on that
        seeds = (self.rng.uniforms(1)[:, 0] * 2**31).long().tolist()
        found += [self.decoder.new_controller(seeds[b]) for b in range(len(found), count)]
        for controller in found:
            controller.begin()
        self._all = found
        return found[:count]

    def run(self) -> list[Completion]:
        logits = self.context.next_logits
        first = law.draw(self.decoder.shape(logits), self.noise[:, 0].to(logits.device))
        if self.decoder.temperature == 0:
            first = logits.argmax(-1)
        scores = (logits.gather(1, first[:, None])[:, 0] - logits.logsumexp(-1)).tolist()
        for row, token, score in zip(self.rows, first.tolist(), scores, strict=True):
            self._take(row, [token], [score])
        self._leave()
        while self.rows:
            self._cycle()
            self._leave()
        if self.decoder.remember:
            self.target.kept[self.decoder] = self._all
        if self.drafter.trouble:
            self.target.happened(f"{self.decoder.spec}: {self.drafter.trouble}")
        return [self.done[i] for i in sorted(self.done)]

    def _cycle(self) -> None:
        begin = time.perf_counter()
        before = begin - self._booked if self._booked is not None else 0.0
        texts = [row.text for row in self.rows]
        room = self.context.capacity - max(map(len, texts))
        left = [self.limits.max_new_tokens - row.made - 1 for row in self.rows]
        asked = [c.width() for c in self.panel.controllers]
        want = [max(0, min(w, n, room)) for w, n in zip(asked, left, strict=True)]
        u = self._uniforms()
        drafting = self.decoder.numbers[0]
        draft = self.drafter.propose(texts, want, self.panel, u[:, :drafting])
        _check(draft, want, self.target.vocab_size, self.decoder.spec)
        draft = draft.cut(room)
        drafted = time.perf_counter()
        N = draft.tokens.shape[1]
        pending = torch.tensor([[text[-1]] for text in texts])
        tokens = torch.cat([pending, draft.tokens.clamp(min=0).to(pending)], 1)
        tree = None if draft.parents is None else ancestors(draft.parents)
        step = self.context.extend(tokens, tree=tree, hidden=self.drafter.hidden)
        accepted, nodes, token = self._verdict(step.logits, draft, tree, u[:, drafting:])
        kept = [n + 1 for n in accepted]
        verified = time.perf_counter()
        if nodes is None:
            self.context.keep(kept)
            path = torch.arange(N + 1).expand(len(texts), -1)
        else:
            path = torch.cat([torch.zeros(len(texts), 1, dtype=torch.long), nodes + 1], 1)
            self.context.keep(kept, path=path)
        row = torch.arange(len(texts))[:, None]
        self.drafter.settle(
            accepted, step.hidden if nodes is None else {n: h[row, path] for n, h in step.hidden.items()}
        )
        new = [
            [*tokens[b, path[b, 1 : n + 1]].tolist(), last]
            for b, (n, last) in enumerate(zip(accepted, token, strict=True))
        ]
        scores = self._scores(step.logits, path, new)
        self._booked = time.perf_counter()
        seconds = Seconds(drafted - begin, verified - drafted, before + self._booked - verified)
        if self.drafter.usual:
            self.drafter.timed(N, seconds)
        places = draft.places(tree)
        for b, row in enumerate(self.rows):
            controller = self.panel.controllers[b]
            # what the end of the text or of the context cut short says nothing of a length
            if want[b] == asked[b] and self.drafter.usual:
                controller.settle(places[b], accepted[b], seconds)
            row.cycles += 1
            row.positions += N + 1
            if self.limits.trace:
                row.trace.append(
                    {"position": row.made, "context": len(row.text), "asked": want[b], "drafted": places[b],
                     "nodes": draft.counts[b], "accepted": accepted[b], "draft_s": seconds.draft,
                     "verify_s": seconds.verify, "keep_s": seconds.keep, **controller.state, **self.drafter.state(b)}
                )  # fmt: skip
            self._take(row, new[b], scores[b])

    def _uniforms(self) -> Tensor:
        """(B, n): fresh in every cycle, because what a controller does may depend on the ones before."""
        if self.decoder.temperature == 0:
            return torch.zeros(len(self.rows), sum(self.decoder.numbers), dtype=torch.float64)
        return self.rng.uniforms(sum(self.decoder.numbers), rows=[row.number for row in self.rows])

    def _verdict(
        self, logits: Tensor, draft: Draft, tree: Tensor | None, u: Tensor
    ) -> tuple[list[int], Tensor | None, list[int]]:
        """How many drafted tokens stay, in a tree also which, and the token behind them."""
        N = draft.tokens.shape[1]
        counts = torch.tensor(draft.counts, device=logits.device)
        tokens = draft.tokens.to(logits.device)
        if draft.log_q is not None and draft.parents is None:
            log_p = self.decoder.shape(logits.flatten(0, 1)).view_as(logits)
            # the test's own numbers, and behind them the one for the draw
            numbers = torch.cat([u[:, :N], u[:, -1:]], 1).to(logits.device)
            verdict = verify.chain(log_p, tokens, draft.log_q, counts, numbers)
            return verdict.accepted.tolist(), None, verdict.token.tolist()
        depth = torch.arange(N + 1)[None] if tree is None else tree.sum(-1).cpu() - 1
        if draft.parents is None:
            verdict = verify.match(self._drawn(logits, depth), tokens, counts)
            return verdict.accepted.tolist(), None, verdict.token.tolist()
        parents = draft.parents.to(logits.device)
        meant = torch.where(torch.arange(N, device=tokens.device) < counts[:, None], tokens, -1)
        deepest = int(depth.max())
        if draft.log_q is None:
            path = verify.walk(self._drawn(logits, depth), meant, parents, deepest)
        else:
            log_p = self.decoder.shape(logits.flatten(0, 1)).view_as(logits)
            # by level: the tests' own numbers, and behind them the one for the draw
            numbers = u.unflatten(1, (self.decoder.k + 1, -1))[:, : deepest + 1].to(logits.device)
            path = verify.walk_drawn(log_p, meant, parents, draft.log_q, numbers, deepest, replaced=draft.replaced)
        return path.accepted.tolist(), path.nodes.cpu(), path.token.tolist()

    def _drawn(self, logits: Tensor, depth: Tensor) -> Tensor:
        """(B, 1 + N) the target's own tokens behind the text and each guess, drawn by the number of their place in the
        text: the same that the target alone would use there."""
        if self.decoder.temperature == 0:
            return logits.argmax(-1)
        places = torch.tensor([[row.made] for row in self.rows]) + depth
        numbers = torch.tensor([row.number for row in self.rows])[:, None]
        u = self.noise[numbers, places.clamp(max=self.noise.shape[1] - 1)]
        log_p = self.decoder.shape(logits.flatten(0, 1))
        return law.draw(log_p, u.flatten().to(logits.device)).view(logits.shape[:2])

    def _scores(self, logits: Tensor, path: Tensor, new: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probabilities of the new tokens under the target."""
        width = max(map(len, new))
        padded = torch.tensor([[*row, *[0] * (width - len(row))] for row in new], device=logits.device)
        at = logits.gather(1, path[:, :width, None].to(logits.device).expand(-1, -1, logits.shape[2]))
        found: list[list[float]] = (at.gather(2, padded[:, :, None])[..., 0] - at.logsumexp(-1)).tolist()
        return found

    def _take(self, row: _Row, tokens: Sequence[int], scores: Sequence[float]) -> None:
        """Append the tokens up to where the text ends."""
        for token, score in zip(tokens, scores, strict=False):
            row.text.append(token)
            row.log_prob += score
            if token in self.stop:
                row.ended = "stop"
            elif row.made == self.limits.max_new_tokens:
                row.ended = "length"
            if row.ended:
                return

    def _leave(self) -> None:
        """Rows that have ended leave the batch."""
        staying = [b for b, row in enumerate(self.rows) if not row.ended]
        if len(staying) == len(self.rows):
            return
        for row in self.rows:
            if row.ended:
                self.done[row.number] = self._completion(row)
        self.rows = [self.rows[b] for b in staying]
        if staying:
            self.context.select(staying)
            self.drafter.select(staying)
            self.panel.select(staying)

    def _completion(self, row: _Row) -> Completion:
        tokens = row.text[row.prompt :]
        assert row.ended
        return Completion(
            tokens=tokens,
            stop_reason=row.ended,
            log_prob=row.log_prob,
            text=self.target.decode(tokens) if "text" in self.target.capabilities else "",
            cost=Cost(row.cycles + 1, row.positions, self.drafter.calls, self.drafter.positions),
            trace=row.trace,
        )


def _check(draft: Draft, want: Sequence[int], vocabulary: int, who: str) -> None:
    """
    Raises:
        ValueError: a drafter drafted more than was asked for, a token outside the vocabulary, or from a law with NaN.
    """
    B, N = draft.tokens.shape
    if len(draft.counts) != B or any(not 0 <= n <= N for n in draft.counts):
        raise ValueError(f"{who}: drafted {draft.counts} tokens in a table of {B} x {N}")
    if draft.parents is None and any(n > w for n, w in zip(draft.counts, want, strict=True)):
        raise ValueError(f"{who}: drafted {draft.counts} tokens where {list(want)} were wanted")
    if not N:
        return
    meant = (
        torch.arange(N, device=draft.tokens.device) < torch.tensor(draft.counts, device=draft.tokens.device)[:, None]
    )
    if draft.parents is not None and draft.log_q is not None:
        meant = meant & (draft.tokens != -1)
    outside = meant & ((draft.tokens < 0) | (draft.tokens >= vocabulary))
    if bool(outside.any()):
        raise ValueError(
            f"{who}: drafted token {int(draft.tokens[outside][0])}, outside the vocabulary of {vocabulary}"
        )
    if draft.log_q is not None:
        laws, tokens = draft.log_q, draft.tokens.to(draft.log_q.device).clamp(min=0)
        if draft.parents is not None:
            behind = draft.parents.to(laws.device) + 1
            laws = laws.gather(1, behind[:, :, None].expand(-1, -1, laws.shape[2]))
        drawn = laws.gather(2, tokens[:, :, None])[..., 0]
        if bool((~drawn.isfinite())[meant.to(drawn.device)].any()):
            raise ValueError(f"{who}: drafted a token to which its own law gives no probability, or NaN")
