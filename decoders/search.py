"""Searches for one good answer: beam search, and contrastive search, which avoids repeating itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from decodathlon.harness.decoder import Completion, Cost, Decoder, Limits, decoder
from decodathlon.harness.generation import token_log_prob
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


@decoder(
    "beam",
    claim="heuristic",
    family="search",
    bounds={"width": "[1, 64]", "length_penalty": "(-inf, inf)"},
    sweep={"width": [2, 8]},
    paper="Lowerre 1976, The Harpy Speech Recognition System; as in transformers.generate(num_beams=...)",
)
class Beam(Decoder):
    """Beam search: the `width` likeliest beginnings are extended; the answer has the best log-probability per length.

    Ends when `width` texts have ended and no beginning, divided by its present length, beats the worst of them.
    """

    width: int = 4
    length_penalty: float = 1.0

    def generate(
        self, target: Any, prompts: Sequence[Sequence[int]], limits: Limits, rng: RowRandom
    ) -> list[Completion]:
        self.check(target)
        stop = frozenset() if limits.ignore_eos else target.stop_tokens
        return [self._search(target, prompt, limits.max_new_tokens, stop) for prompt in prompts]

    def _search(self, target: Any, prompt: Sequence[int], T: int, stop: frozenset[int]) -> Completion:
        """One prompt; the beams are the rows of one context, which is read once."""
        context = target.open([prompt], capacity=len(prompt) + T)
        ended: list[Hypothesis] = []
        beams: list[list[int]] = [[]]
        scores = torch.zeros(1, dtype=torch.float64)
        calls = 0
        for t in range(T):
            calls += 1
            log_p = scores[:, None] + context.next_logits.log_softmax(-1).double().cpu()
            # So many that `width` of them go on even if the best end here.
            best = log_p.flatten().topk(min((1 + len(stop)) * self.width, log_p.numel()))
            parents, tokens = best.indices // log_p.shape[1], best.indices % log_p.shape[1]
            grown: list[tuple[int, int, float]] = []
            for rank, (b, v, score) in enumerate(
                zip(parents.tolist(), tokens.tolist(), best.values.tolist(), strict=True)
            ):
                if v in stop:
                    if rank < self.width:
                        ended.append(self._hypothesis([*beams[b], v], score, stopped=True))
                elif len(grown) < self.width:
                    grown.append((b, v, score))
            ended = sorted(ended, reverse=True)[: self.width]
            if not grown:
                break
            beams = [[*beams[b], v] for b, v, _ in grown]
            scores = torch.tensor([s for _, _, s in grown], dtype=torch.float64)
            hopeful = float(scores[0]) / (t + 1) ** self.length_penalty
            if len(ended) == self.width and hopeful <= ended[-1].score:
                beams = []
                break
            if t + 1 < T:
                context.select([b for b, _, _ in grown])
                context.extend(torch.tensor([[v] for _, v, _ in grown]))
                context.keep(1)
        ended += [
            self._hypothesis(b, s, stopped=False) for b, s in zip(beams, scores.tolist(), strict=False) if len(b) == T
        ]
        found = max(ended)
        return Completion(
            tokens=found.tokens,
            stop_reason="stop" if found.stopped else "length",
            log_prob=found.log_prob,
            text=target.decode(found.tokens) if "text" in target.capabilities else "",
            cost=Cost(target_calls=calls, target_positions=len(prompt) + (calls - 1) * self.width),
        )

    def _hypothesis(self, tokens: list[int], log_prob: float, *, stopped: bool) -> Hypothesis:
        return Hypothesis(log_prob / len(tokens) ** self.length_penalty, log_prob, tokens, stopped)


@decoder(
    "contrastive",
    claim="heuristic",
    family="search",
    bounds={"k": "[1, 64]", "alpha": "[0, 1]"},
    sweep={"alpha": [0.2, 0.4]},
    needs=["hidden"],
    paper="Su, Lan, Wang, Yogatama, Kong, Collier 2022, A Contrastive Framework for Neural Text Generation",
)
class Contrastive(Decoder):
    """Contrastive search: of the k likeliest tokens the one with the best (1 - alpha) p - alpha (greatest similarity).

    Similarity is the cosine between the token's last hidden state and those of the text so far. All k candidates are
    read in one step, as the branches of a tree.
    """

    k: int = 4
    alpha: float = 0.6

    def generate(
        self, target: Any, prompts: Sequence[Sequence[int]], limits: Limits, rng: RowRandom
    ) -> list[Completion]:
        self.check(target)
        stop = frozenset() if limits.ignore_eos else target.stop_tokens
        return [self._search(target, prompt, limits.max_new_tokens, stop) for prompt in prompts]

    @torch.no_grad()
    def _search(self, target: Any, prompt: Sequence[int], T: int, stop: frozenset[int]) -> Completion:
        last, k = target.layers + 1, min(self.k, target.vocab_size)
        # A step holds its k candidates until one of them is kept.
        context = target.open([prompt], capacity=len(prompt) + T + k, hidden=(last,))
        seen = _unit(context.prompt_hidden[last][0])
        branches = torch.eye(k, dtype=torch.bool)
        tokens: list[int] = []
        log_prob, stopped = 0.0, False
        while len(tokens) < T and not stopped:
            logits = context.next_logits
            candidates = logits[0].softmax(-1).topk(k)
            states = context.extend(candidates.indices[None], tree=branches, hidden=(last,)).hidden[last][0]
            fresh = _unit(states)
            repeats = (fresh @ seen.T).amax(-1)
            chosen = int(((1 - self.alpha) * candidates.values - self.alpha * repeats).argmax())
            token = candidates.indices[chosen : chosen + 1]
            log_prob += float(token_log_prob(logits, token))
            context.keep([1], path=torch.tensor([[chosen]]))
            seen = torch.cat([seen, fresh[chosen : chosen + 1]])
            tokens.append(int(token))
            stopped = tokens[-1] in stop
        return Completion(
            tokens=tokens,
            stop_reason="stop" if stopped else "length",
            log_prob=log_prob,
            text=target.decode(tokens) if "text" in target.capabilities else "",
            cost=Cost(target_calls=1 + len(tokens), target_positions=len(prompt) + k * len(tokens)),
        )


def _unit(states: Tensor) -> Tensor:
    """(n, E) directions, in float32 or wider."""
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    return wide / wide.norm(dim=-1, keepdim=True)
