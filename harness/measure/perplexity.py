"""How well a decoder's own next-token law predicts real text (teacher forcing), and what truncation does to that.

Protocol: rows joined, a sliding window of `context` tokens that moves by half of itself, only new tokens counted.
A truncating law gives some real tokens probability zero. They are neither skipped nor replaced by the model's number:
`ppl` is then infinite, and four finite scores say what is left (Martins et al. 2020).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from decodathlon.harness.decoder import Decoder, Sampler
from decodathlon.harness.errors import UnsupportedError
from decodathlon.harness.law import check
from decodathlon.harness.measure import statistics
from decodathlon.harness.measure.statistics import Estimate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from decodathlon.harness.targets.base import Target

#: The model's weights in a mixture with it that the validation text chooses among. Never 0: where the validation text
#: happens to lose no token, the test text's score must stay finite all the same.
MODEL_WEIGHTS = np.concatenate([[1e-3], np.linspace(0.01, 1.0, 100)])
#: The uniform law's weights; the paper's range ends at 0.7.
UNIFORM_WEIGHTS = np.geomspace(1e-8, 0.7, 101)
#: Rows of logits that are processed at once; 256 rows of 150,000 tokens in float32 are 150 MB.
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Scores:
    """Per counted token, in the order of the text; the tokens of one window step form a cluster."""

    #: Natural log-probability of the real token under the decoder's law, -inf where cut.
    decoder: np.ndarray[Any, Any]
    #: The same under the model's unprocessed law.
    model: np.ndarray[Any, Any]
    #: Sum of the squared probabilities of the decoder's law.
    concentration: np.ndarray[Any, Any]
    #: Number of the window step in which the token was new.
    cluster: np.ndarray[Any, Any]
    vocabulary: int


def windows(length: int, context: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first counted) of each window over `length` tokens. Every token but the very first counts once."""
    stride = context // 2
    counted, begin = 1, 0
    while counted < length:
        end = min(begin + context, length)
        yield begin, end, counted
        counted, begin = end, begin + stride


@torch.no_grad()
def score(decoder: Decoder, target: Target, tokens: Sequence[int], context: int) -> Scores:
    """Teacher-force `tokens` through the target and score each under the decoder's law.

    Raises:
        UnsupportedError: the decoder has no next-token law of its own.
    """
    if not isinstance(decoder, Sampler):
        raise UnsupportedError("a next-token law", f"{decoder.spec} draws no token from a law that can be stated")
    if not decoder.stateless:
        raise UnsupportedError("a law without state", f"{decoder.spec} draws from more than the logits of one step")
    context = min(context, target.context_length)
    parts: list[tuple[np.ndarray[Any, Any], ...]] = []
    for number, (begin, end, counted) in enumerate(windows(len(tokens), context)):
        at = torch.arange(counted - begin - 1, end - begin - 1)
        logits = target.logits(torch.tensor([tokens[begin : end - 1]]), at)[0]
        real = torch.tensor(tokens[counted:end], device=logits.device)
        parts.append((*_judge(decoder, logits, real), np.full(end - counted, number)))
    decoder_law, model_law, concentration, cluster = (np.concatenate(p) for p in zip(*parts, strict=True))
    return Scores(decoder_law, model_law, concentration, cluster, target.vocab_size)


def _judge(sampler: Sampler, logits: torch.Tensor, real: torch.Tensor) -> tuple[np.ndarray[Any, Any], ...]:
    found = []
    for part, token in zip(logits.split(ROWS_AT_ONCE), real.split(ROWS_AT_ONCE), strict=True):
        law = sampler.shape(part)
        check(law, part, sampler.spec)
        own = law.gather(-1, token[:, None])[:, 0]
        raw = part.gather(-1, token[:, None])[:, 0] - part.logsumexp(-1)
        found.append(torch.stack([own.double(), raw.double(), law.exp().square().sum(-1).double()]))
    return tuple(torch.cat(found, dim=1).cpu().numpy())


def mixture_nats(scores: Scores, weight: float, *, uniform: bool) -> np.ndarray[Any, Any]:
    """-log((1 - weight) p + weight r) per token, with r the model's law or the uniform one."""
    other = -math.log(scores.vocabulary) if uniform else scores.model
    with np.errstate(divide="ignore"):
        nats: np.ndarray[Any, Any] = -np.logaddexp(np.log1p(-weight) + scores.decoder, np.log(weight) + other)
    return nats


def tuned_weight(validation: Scores, *, uniform: bool) -> float:
    """The weight that makes the validation text likeliest."""
    grid = UNIFORM_WEIGHTS if uniform else MODEL_WEIGHTS
    totals = [float(mixture_nats(validation, w, uniform=uniform).sum()) for w in grid]
    return float(grid[int(np.argmin(totals))])


def metrics(test: Scores, validation: Scores) -> dict[str, Estimate]:
    """Every perplexity of the suite, by metric name."""
    clusters = [test.cluster == c for c in np.unique(test.cluster)]
    counts = [int(c.sum()) for c in clusters]
    covered = np.isfinite(test.decoder)

    def per_cluster(values: np.ndarray[Any, Any]) -> list[float]:
        return [float(values[c].sum()) for c in clusters]

    def perplexity(nats: np.ndarray[Any, Any]) -> Estimate:
        return statistics.perplexity(per_cluster(nats), counts)

    model_weight = tuned_weight(validation, uniform=False)
    uniform_weight = tuned_weight(validation, uniform=True)
    kept = [int((c & covered).sum()) for c in clusters]
    inside = np.where(covered, -test.decoder, 0.0)
    score = np.exp(test.decoder) + 0.5 * (1.0 - test.concentration)
    found = {
        "ppl": perplexity(-test.decoder),
        "ppl_model": perplexity(-test.model),
        "coverage": statistics.share(per_cluster(covered.astype(float)), counts),
        "ppl_mixture": perplexity(mixture_nats(test, model_weight, uniform=False)),
        "mixture_weight": Estimate(model_weight, n=len(validation.decoder)),
        "ppl_epsilon": perplexity(mixture_nats(test, uniform_weight, uniform=True)),
        "sparsemax_score": statistics.share(per_cluster(score), counts),
    }
    if covered.any():
        nats, some = zip(*[(n, k) for n, k in zip(per_cluster(inside), kept, strict=True) if k], strict=True)
        found["ppl_conditional"] = statistics.perplexity(nats, some)
    return found
