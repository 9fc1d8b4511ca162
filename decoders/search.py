"""Searches for one good answer: beam search, and contrastive search, which avoids repeating itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from decodathlon.harness.decoder import Completion, Cost, Decoder, Limits, decoder
from decodathlon.harness.generation import completions, token_log_prob
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from decodathlon.harness.randomness import RowRandom


class Hypothesis(NamedTuple):
    """A text that has ended."""

    #: log-probability / length^length_penalty.
    score: float
    log_prob: float
    tokens: list[int]
    stopped: bool


class Search(Decoder):
    """A decoder that draws nothing: its answer is a function of the prompt."""

    def generate(
        self, target: Any, prompts: Sequence[Sequence[int]], limits: Limits, rng: RowRandom
    ) -> list[Completion]:
        self.check(target)
        with torch.no_grad():
            return self.search(target, prompts, limits)

    @abstractmethod
    def search(self, target: Any, prompts: Sequence[Sequence[int]], limits: Limits) -> list[Completion]:
        """Complete every prompt."""


@decoder(
    "beam",
    claim="heuristic",
    family="search",
    bounds={"width": "[1, 64]", "length_penalty": "(-inf, inf)"},
    sweep={"width": [2, 8]},
    paper="Lowerre 1976, The Harpy Speech Recognition System; as in transformers.generate(num_beams=...)",
)
class Beam(Search):
    """Beam search: the `width` likeliest beginnings are extended; the answer has the best log-probability per length.

    Ends when `width` texts have ended and no beginning, divided by its present length, beats the worst of them.
    """

    width: int = 4
    length_penalty: float = 1.0

    def search(self, target: Any, prompts: Sequence[Sequence[int]], limits: Limits) -> list[Completion]:
        stop = frozenset() if limits.ignore_eos else target.stop_tokens
        T = limits.max_new_tokens
        context = target.open(prompts, capacity=max(map(len, prompts)) + T)
        searches = [_Search(self, stop) for _ in prompts]
        going = list(searches)
        for t in range(T):
            # The rows of the context are the beams of the searches that still go on, one search after the other.
            log_p = context.next_logits.log_softmax(-1)
            parents: list[int] = []
            begin = 0
            for search in going:
                size = len(search.beams)
                parents += [begin + b for b in search.grow(log_p[begin : begin + size], last=t + 1 == T)]
                begin += size
            going = [search for search in going if search.beams]
            if not going or t + 1 == T:
                break
            context.select(parents)
            context.extend(torch.tensor([[beam[-1]] for search in going for beam in search.beams]))
            context.keep(1)
        return [search.completion(target, prompt) for search, prompt in zip(searches, prompts, strict=True)]


class _Search:
    """The beams of one prompt and what has ended."""

    def __init__(self, beam: Beam, stop: frozenset[int]) -> None:
        self._width, self._penalty, self._stop = beam.width, beam.length_penalty, stop
        self.beams: list[list[int]] = [[]]
        self._scores = torch.zeros(1, dtype=torch.float64)
        self._ended: list[Hypothesis] = []
        self._calls = self._rows = 0

    def grow(self, log_p: Tensor, *, last: bool) -> list[int]:
        """Extend the beams by one token, given its law after each (beams, V); which beam each new one came from."""
        self._calls += 1
        self._rows += len(self.beams)
        scores = self._scores[:, None].to(log_p.device) + log_p.double()
        # So many that `width` of them go on even if the best end here.
        best = scores.flatten().topk(min((1 + len(self._stop)) * self._width, scores.numel()))
        grown: list[tuple[int, int, float]] = []
        for rank, (place, score) in enumerate(zip(best.indices.tolist(), best.values.tolist(), strict=True)):
            b, v = divmod(place, log_p.shape[1])
            if v in self._stop:
                if rank < self._width:
                    self._end([*self.beams[b], v], score, stopped=True)
            elif len(grown) < self._width:
                grown.append((b, v, score))
        self.beams = [[*self.beams[b], v] for b, v, _ in grown]
        self._scores = torch.tensor([score for _, _, score in grown], dtype=torch.float64)
        length = self._calls
        if last:
            for beam, score in zip(self.beams, self._scores.tolist(), strict=True):
                self._end(beam, score, stopped=False)
        elif len(self._ended) == self._width and grown and grown[0][2] / length**self._penalty <= self._ended[-1].score:
            self.beams = []
        return [b for b, _, _ in grown] if self.beams else []

    def _end(self, tokens: list[int], log_prob: float, *, stopped: bool) -> None:
        self._ended.append(Hypothesis(log_prob / len(tokens) ** self._penalty, log_prob, tokens, stopped))
        self._ended = sorted(self._ended, reverse=True)[: self._width]

    def completion(self, target: Any, prompt: Sequence[int]) -> Completion:
        found = self._ended[0]
        return Completion(
            tokens=found.tokens,
            stop_reason="stop" if found.stopped else "length",
            log_prob=found.log_prob,
            text=target.decode(found.tokens) if "text" in target.capabilities else "",
            cost=Cost(target_calls=self._calls, target_positions=len(prompt) + self._rows - 1),
        )


@decoder(
    "contrastive",
    claim="heuristic",
    family="search",
    bounds={"k": "[1, 64]", "alpha": "[0, 1]"},
    sweep={"alpha": [0.2, 0.4]},
    needs=["hidden"],
    paper="Su, Lan, Wang, Yogatama, Kong, Collier 2022, A Contrastive Framework for Neural Text Generation",
)
class Contrastive(Search):
    """Contrastive search: of the k likeliest tokens the one with the best (1 - alpha) p - alpha (greatest similarity).

    Similarity is the cosine between the token's last hidden state and those of the text so far. All k candidates are
    read in one step, as the branches of a tree.
    """

    k: int = 4
    alpha: float = 0.6

    def search(self, target: Any, prompts: Sequence[Sequence[int]], limits: Limits) -> list[Completion]:
        B, T, k, last = len(prompts), limits.max_new_tokens, min(self.k, target.vocab_size), target.layers + 1
        stop = torch.tensor(sorted([] if limits.ignore_eos else target.stop_tokens), dtype=torch.long)
        longest = max(map(len, prompts))
        # A step holds its k candidates until one of them is kept.
        context = target.open(prompts, capacity=longest + T + k, hidden=(last,))
        device = context.lengths.device
        # seen[b, i]: direction of token i of row b; zeros behind a shorter prompt, which no similarity may meet.
        seen = _unit(context.prompt_hidden[last])
        real = torch.arange(longest, device=device)[None] < context.lengths[:, None]
        branches = torch.eye(k, dtype=torch.bool)
        each = torch.arange(B, device=device)
        tokens, log_probs = [], []
        running = torch.ones(B, dtype=torch.bool, device=device)
        for _ in range(T):
            logits = context.next_logits
            candidates = logits.softmax(-1).topk(k)
            fresh = _unit(context.extend(candidates.indices, tree=branches, hidden=(last,)).hidden[last])
            similarity = (fresh @ seen.transpose(1, 2)).masked_fill(~real[:, None], -1.0).amax(-1)
            chosen = ((1 - self.alpha) * candidates.values - self.alpha * similarity).argmax(-1)
            tokens.append(candidates.indices[each, chosen])
            log_probs.append(token_log_prob(logits, tokens[-1]))
            running &= ~torch.isin(tokens[-1], stop.to(device))
            if not bool(running.any()):
                break
            context.keep([1] * B, path=chosen[:, None])
            seen = torch.cat([seen, fresh[each, chosen][:, None]], dim=1)
            real = torch.cat([real, torch.ones(B, 1, dtype=torch.bool, device=device)], dim=1)
        answers = completions(target, prompts, torch.stack(tokens, 1), torch.stack(log_probs, 1), limits)
        for answer, prompt in zip(answers, prompts, strict=True):
            answer.cost = Cost(1 + len(answer.tokens), len(prompt) + k * len(answer.tokens))
        return answers


def _unit(states: Tensor) -> Tensor:
    """Directions of the states (..., E), in float32 or wider."""
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    return wide / wide.norm(dim=-1, keepdim=True)
