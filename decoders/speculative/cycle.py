"""The cycle that all speculative decoders share: draft, verify in one pass of the target, keep what stays.

A row's last token has not been read by the target yet. A cycle reads it together with the drafted tokens, takes
those that stay and one more, and that one is the next cycle's last token. So a cycle makes one token at least, and
reads no token that it keeps twice. Rows accept different numbers and end at different times; who has ended leaves
the batch.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from decodathlon.decoders.speculative import bandits, clocks, controllers, verify
from decodathlon.decoders.speculative.controllers import Controller, Panel, Seconds
from decodathlon.decoders.speculative.drafter import Autoregressive, Draft, Drafter, SharedMemory
from decodathlon.decoders.speculative.trees import Branching, DrawnTree, ancestors
from decodathlon.harness import law
from decodathlon.harness.decoder import Claim, Completion, Cost, Limits, Sampler
from decodathlon.harness.errors import SpecError
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from decodathlon.harness.randomness import RowRandom

Rule = Literal[
    "static", "confidence", "svip", "adaedl", "margin", "heuristic", "ewma", "break-even", "tapout", "contextual"
]
#: Those that look at the drafter's laws and at nothing else.
LOOKING = {
    "confidence": controllers.Confidence,
    "svip": controllers.SVIP,
    "adaedl": controllers.AdaEDL,
    "margin": controllers.Margin,
}
BLIND = {
    "static": controllers.Static,
    "heuristic": controllers.Heuristic,
    "ewma": clocks.EWMA,
    "break-even": clocks.BreakEven,
}
BOUNDS = {"k": "[1, 64]", "temperature": "[0, 100]", "top_k": "[0, inf)", "top_p": "(0, 1]"}
SELF_BOUNDS = {**BOUNDS, "branches": "[1, 8]", "budget": "[0, 64]"}


def claim(decoder: Speculative) -> Claim:
    """What every speculative decoder claims: the law of its temperature and truncation, whatever it drafts."""
    if decoder.temperature == 0:
        return "greedy-exact"
    return "exact" if (decoder.temperature, decoder.top_k, decoder.top_p) == (1, 0, 1) else "shaped"


@dataclass(frozen=True, kw_only=True)
class Speculative(Sampler):
    """A sampler that drafts. `k` is the most tokens per cycle; `controller` decides how many of them are drafted."""

    k: int = 4
    controller: Rule = "static"
    #: Of tapout and contextual: how an arm is chosen, for how long, and by which reward.
    policy: bandits.Policy = "ucb1"
    level: bandits.Level = "sequence"
    reward: bandits.Reward = "blend"
    #: Whether what a controller has learnt is kept from prompt to prompt.
    remember: bool = True
    #: 0 is greedy search.
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    drafts: ClassVar[bool] = True
    #: Whether its drafters have laws that a controller could look at.
    has_laws: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.controller in LOOKING and not self.has_laws:
            able = ", ".join([*BLIND, "tapout", "contextual"])
            raise SpecError(f"controller={self.controller} looks at a law, and this drafter has none; one of {able}")

    @abstractmethod
    def drafter(self, target: Any, context: Any, prompts: Sequence[Sequence[int]]) -> Drafter:
        """A drafter for these prompts, which the target has just read into `context`."""

    @property
    def hidden(self) -> Sequence[int]:
        """Hidden states of the prompts that the drafter wants, as in `Target.open`."""
        return ()

    @property
    def widest(self) -> int:
        """The most tokens that a cycle reads behind the text, over all branches."""
        return self.k

    @property
    def numbers(self) -> tuple[int, int]:
        """How many uniform numbers a cycle needs by row, for drafting and for verifying."""
        return self.k, self.k + 1

    def shape(self, logits: Tensor) -> Tensor:
        if self.temperature == 0:
            return law.one_hot(logits)
        return law.process(logits, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)

    def definition(self, logits: Sequence[float]) -> list[float]:
        p = law.plainly(logits, self.temperature)
        if self.top_k:
            least = sorted(p, reverse=True)[min(self.top_k, len(p)) - 1]
            p = [x if x >= least else 0.0 for x in p]
        p = [x / sum(p) for x in p]
        return [x if sum(other for other in p if other > x) < self.top_p else 0.0 for x in p]

    def generate(
        self, target: Any, prompts: Sequence[Sequence[int]], limits: Limits, rng: RowRandom
    ) -> list[Completion]:
        self.check(target)
        with torch.no_grad():
            return _Request(self, target, prompts, limits, rng).run()

    def autoregressive(self, kind: type[Autoregressive], context: Any) -> Autoregressive:
        """A drafter that draws token by token, as this decoder's parameters say.

        What is only guessed is not drawn from the law that the temperature makes, so rules look at the law as it is.
        """
        sampled = self.temperature > 0 and getattr(self, "proposal", "sample") == "sample"
        law_of = self.shape if sampled else _plain
        return kind(context, law_of, sampled=sampled, watched=self.looks, normed=self.controller == "contextual")

    @property
    def looks(self) -> bool:
        """Whether the controller looks at laws, of a drafter that has some."""
        return self.has_laws and (self.controller in LOOKING or self.controller in ("tapout", "contextual"))

    def new_controller(self, seed: int) -> Controller:
        """A controller for one row."""
        if self.controller in LOOKING:
            return LOOKING[self.controller](self.k)
        if self.controller in BLIND:
            return BLIND[self.controller](self.k)
        if self.controller == "contextual":
            return bandits.Contextual(self.k, reward=self.reward, laws=self.has_laws)
        return bandits.TapOut(
            self.k, policy=self.policy, level=self.level, reward=self.reward, seed=seed, laws=self.has_laws
        )


@dataclass(frozen=True, kw_only=True)
class SelfSpeculative(Speculative):
    """A decoder whose drafter is a form of the target, in the target's own keys and values."""

    #: Whether tokens are drawn from the drafter's law (in a tree without replacement), or its likeliest are guessed;
    #: at temperature 0 they are.
    proposal: Literal["sample", "guess"] = "sample"
    #: How many ways on are drafted at each place, and how many nodes of that tree the target looks at (0: as many as
    #: pay by the times that were measured).
    branches: int = 1
    budget: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.branches > 1 and self.looks:
            raise SpecError(
                f"controller={self.controller} stops chains; a tree (branches={self.branches}) has a budget"
            )

    @property
    def widest(self) -> int:
        return self.k if self.branches == 1 else max(self.budget, self._most)

    @property
    def _most(self) -> int:
        """Nodes of the widest tree: so many at each place."""
        return self.branches * self.k

    @property
    def draws_trees(self) -> bool:
        return self.branches > 1 and self.temperature > 0 and self.proposal == "sample"

    @property
    def numbers(self) -> tuple[int, int]:
        if not self.draws_trees:
            return super().numbers
        return self.budget or self._most, (self.k + 1) * (self.branches + 1)

    def reading_on(self, target: Any, context: Any, forward: Any) -> Drafter:
        """A drafter that reads the target's context on with this forward."""
        if self.branches > 1:
            kept = ("budget", self)
            if not self.remember or kept not in target.kept:
                target.kept[kept] = clocks.Budget(self.budget, self._most)
            budget = target.kept[kept]
            if self.draws_trees:
                return DrawnTree(context.lent(forward), self.shape, branches=self.branches, budget=budget)
            return Branching(context.lent(forward), _plain, branches=self.branches, budget=budget)
        return self.autoregressive(SharedMemory, context.lent(forward))


def _plain(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1)


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


class _Request:
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
            prompts, capacity=min(target.context_length, need + decoder.widest), hidden=decoder.hidden
        )
        self.drafter = decoder.drafter(target, self.context, prompts)
        self.rows = [_Row(i, list(p), len(p), positions=len(p)) for i, p in enumerate(prompts)]
        self.noise = rng.uniforms(limits.max_new_tokens, 1)[..., 0]
        self.panel = Panel(self._controllers(len(prompts)))
        self.done: dict[int, Completion] = {}

    def _controllers(self, count: int) -> list[Controller]:
        found: list[Controller] = self.target.kept.pop(self.decoder, []) if self.decoder.remember else []
        # drawn by every row, also where its controller is one that has learnt: later draws must not depend on that
        seeds = (self.rng.uniforms(1)[:, 0] * 2**31).long().tolist()
        found += [self.decoder.new_controller(seeds[b]) for b in range(len(found), count)]
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
        return [self.done[i] for i in sorted(self.done)]

    def _cycle(self) -> None:
        begin = time.perf_counter()
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
        self.drafter.settle(accepted, step.hidden)
        new = [
            [*tokens[b, path[b, 1 : n + 1]].tolist(), last]
            for b, (n, last) in enumerate(zip(accepted, token, strict=True))
        ]
        scores = self._scores(step.logits, path, new)
        seconds = Seconds(drafted - begin, verified - drafted, time.perf_counter() - verified)
        self.drafter.timed(N, seconds)
        for b, row in enumerate(self.rows):
            controller = self.panel.controllers[b]
            controller.settle(draft.counts[b], accepted[b], seconds)
            row.cycles += 1
            row.positions += N + 1
            if self.limits.trace:
                row.trace.append(
                    {"position": row.made, "context": len(row.text), "asked": want[b], "drafted": draft.counts[b],
                     "accepted": accepted[b], "draft_s": seconds.draft, "verify_s": seconds.verify,
                     "keep_s": seconds.keep, **controller.state}
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
            path = verify.walk_drawn(log_p, meant, parents, draft.log_q, numbers, deepest, replaced=False)
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
