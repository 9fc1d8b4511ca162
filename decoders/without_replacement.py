"""Gumbel top-B: as many different texts as there are rows, drawn without replacement, each with an importance weight.

Kool, van Hoof and Welling 2019, Stochastic Beams and Where to Find Them (arXiv 1903.06059): every text gets the key
log p + Gumbel noise, and those with the B greatest keys are the answers. The greatest key among all texts behind a
beginning has the law of log p(beginning) + Gumbel noise, so keys are drawn from the top of the tree down, each child's
given that the greatest of them is their parent's (their equation 11 and appendix B.3).

Dimensions: B rows of one prompt, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from decodathlon.harness import law
from decodathlon.harness.decoder import Completion, Cost, Decoder, Limits, decoder
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from decodathlon.harness.randomness import RowRandom


class Keyed(NamedTuple):
    """A text, or the beginning of some."""

    key: float
    log_prob: float
    tokens: tuple[int, ...]
    ended: bool


@decoder(
    "gumbel-top",
    claim="heuristic",
    family="sets",
    bounds={"temperature": "[0.01, 100]"},
    paper="Kool, van Hoof, Welling 2019, Stochastic Beams and Where to Find Them",
)
class GumbelTop(Decoder):
    """Different answers to equal prompts, drawn without replacement; the trace of each has its importance weight.

    A sum of f(answer) times weight estimates the mean of f without bias. The first answer alone is an exact draw, the
    others are not. Where there are fewer texts than rows, the last one comes again, with weight 0.
    """

    independent: ClassVar[bool] = False

    temperature: float = 1.0

    def generate(
        self, target: Any, prompts: Sequence[Sequence[int]], limits: Limits, rng: RowRandom
    ) -> list[Completion]:
        self.check(target)
        if limits.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {limits.max_new_tokens}")
        sets: dict[tuple[int, ...], list[int]] = {}
        for b, prompt in enumerate(prompts):
            sets.setdefault(tuple(prompt), []).append(b)
        found: dict[int, Completion] = {}
        with torch.no_grad():
            for prompt, rows in sets.items():
                found |= zip(rows, self._set(target, prompt, len(rows), limits, rng, rows[0]), strict=True)
        return [found[b] for b in range(len(prompts))]

    def _set(
        self, target: Any, prompt: Sequence[int], B: int, limits: Limits, rng: RowRandom, first: int
    ) -> list[Completion]:
        """B answers to one prompt, by the random numbers of its first row."""
        T, stop = limits.max_new_tokens, frozenset() if limits.ignore_eos else target.stop_tokens
        context = target.open([list(prompt)], capacity=len(prompt) + T)
        kept = [Keyed(_gumbel(torch.rand(1, generator=rng.row(first), dtype=torch.float64)).item(), 0.0, (), False)]
        positions = len(prompt)
        for t in range(T):
            log_p = law.process(context.next_logits, temperature=self.temperature).double().cpu()
            going = [one for one in kept if not one.ended]
            u = torch.rand(log_p.shape, generator=rng.row(first), dtype=torch.float64)
            scores = torch.tensor([[one.log_prob] for one in going], dtype=torch.float64) + log_p
            keys = below(scores + _gumbel(u), torch.tensor([[one.key] for one in going], dtype=torch.float64))
            best = keys.flatten().topk(min(B + 1, keys.numel()))
            grown = [one for one in kept if one.ended]
            parents = {}
            for key, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                if key > -math.inf:
                    b, v = divmod(place, log_p.shape[1])
                    child = Keyed(key, float(scores[b, v]), (*going[b].tokens, v), v in stop or t + 1 == T)
                    parents[child.tokens] = b
                    grown.append(child)
            kept = sorted(grown, reverse=True)[: B + 1]
            going = [one for one in kept if not one.ended]
            if not going:
                break
            context.select([parents[one.tokens] for one in going])
            context.extend(torch.tensor([[one.tokens[-1]] for one in going]).to(target.device))
            context.keep(1)
            positions += len(going)
        return self._answers(target, kept, B, positions, stop)

    def _answers(
        self, target: Any, kept: Sequence[Keyed], B: int, positions: int, stop: frozenset[int]
    ) -> list[Completion]:
        threshold = kept[B].key if len(kept) > B else -math.inf
        answers = []
        for b in range(B):
            one = kept[min(b, len(kept) - 1)]
            weight = math.exp(one.log_prob - log_chance(one.log_prob, threshold)) if b < len(kept) else 0.0
            answers.append(
                Completion(
                    tokens=list(one.tokens),
                    stop_reason="stop" if one.tokens[-1] in stop else "length",
                    log_prob=one.log_prob if self.temperature == 1 else None,
                    text=target.decode(list(one.tokens)) if "text" in target.capabilities else "",
                    cost=Cost(target_calls=max(len(k.tokens) for k in kept), target_positions=positions * (b == 0)),
                    trace=[{"importance": weight, "key": one.key}],
                )
            )
        return answers


def log_chance(log_prob: float, threshold: float) -> float:
    """Log of the chance that a text's key lies above the threshold: 1 - exp(-exp(log p - threshold))."""
    above = min(700.0, log_prob - threshold)
    # for what is very unlikely the chance is exp(above), which is no number of its own any more
    return above if above < -30 else math.log(-math.expm1(-math.exp(above)))


def below(keys: Tensor, greatest: Tensor) -> Tensor:
    """(D, V) Gumbel keys, given that the greatest of each row is `greatest` (D, 1); -inf stays."""
    top = keys.amax(1, keepdim=True)
    # -log(exp(-greatest) - exp(-top) + exp(-key)), without overflow (appendix B.3)
    v = greatest - keys + torch.log1p(-(keys - top).exp())
    return greatest - v.clamp(min=0) - torch.log1p((-v.abs()).exp())


def _gumbel(u: Tensor) -> Tensor:
    """Gumbel noise from uniforms in [0, 1)."""
    return -(-u.clamp(min=2.0**-54).log()).log()
