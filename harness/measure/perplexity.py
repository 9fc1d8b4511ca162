"""How well a decoder's own next-token law predicts real text (teacher forcing), and what truncation does to that.

Protocol: rows joined, a sliding window of `context` tokens that moves by half of itself, only new tokens counted.
A truncating law gives some real tokens probability zero. They are neither skipped nor replaced by the model's number:
`ppl` is then infinite, and four finite scores say what is left (Martins et al. 2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from decodathlon.harness.candidates import CandidateSampler
from decodathlon.harness.decoder import Decoder, Sampler
from decodathlon.harness.errors import UnsupportedError
from decodathlon.harness.law import check
from decodathlon.harness.measure.copies import CopiesJudge
from decodathlon.harness.measure.observations import Observations
from decodathlon.harness.measure.statistics import Array, Estimate
from decodathlon.harness.served import Served

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
#: Total variation between a row's law alone and among others: rounding, not a look at the neighbours.
ROW_TOLERANCE = 1e-3
#: Begin, end, first counted token.
Window = tuple[int, int, int]


@dataclass(frozen=True)
class Scores:
    """Per counted token, in the order of the text; the tokens of one window step form a cluster."""

    #: Natural log-probability of the real token under the decoder's law, -inf where cut.
    decoder: Array
    #: The same under the model's unprocessed law.
    model: Array
    #: Sum of the squared probabilities of the decoder's law.
    concentration: Array
    #: Number of the window step in which the token was new.
    cluster: Array
    vocabulary: int
    #: (2, n) of a law that is itself random: what either of two filters makes of it (copies.py); `decoder` has both.
    filters: Array | None = None


def windows(length: int, context: int) -> Iterator[Window]:
    """(begin, end, first counted) of each window over `length` tokens. Every token but the very first counts once.

    Raises:
        ValueError: no token would have one before it.
    """
    if context < 2:
        raise ValueError(f"a context of {context} tokens has none to read before the one that counts; at least 2")
    stride = max(1, context // 2)
    counted, begin = 1, 0
    while counted < length:
        end = min(begin + context, length)
        yield begin, end, counted
        counted, begin = end, begin + stride


@torch.no_grad()
def score(
    decoder: Decoder,
    target: Target,
    tokens: Sequence[int],
    context: int,
    until_late: Callable[[Sequence[Window]], Iterable[Window]] = iter,
) -> Scores:
    """Teacher-force `tokens` through the target and score each under the decoder's law.

    Args:
        until_late: passes on the windows that there is time for.

    Raises:
        UnsupportedError: the decoder has no next-token law of its own.
    """
    judge = judge_of(decoder, random=True)
    parts: list[tuple[Array, ...]] = []
    all_windows = list(windows(len(tokens), min(context, target.context_length)))
    for number, (begin, end, counted) in enumerate(until_late(all_windows)):
        at = torch.arange(counted - begin - 1, end - begin - 1)
        logits = target.logits(torch.tensor([tokens[begin : end - 1]]), at)[0]
        real = torch.tensor(tokens[counted:end], device=logits.device)
        parts.append((*judge(logits, real), np.full(end - counted, number)))
    decoder_law, model_law, concentration, *filters, cluster = (
        np.concatenate(p, axis=-1) for p in zip(*parts, strict=True)
    )
    return Scores(decoder_law, model_law, concentration, cluster, target.vocab_size, *filters)


def judge_of(decoder: Decoder, *, random: bool = False) -> Callable[[torch.Tensor, torch.Tensor], tuple[Array, ...]]:
    """What scores one window after another under this decoder's law: (n, V) logits and (n,) real tokens.

    Args:
        random: take a law that is itself random, too: what is said of it is then an estimate (see copies.py).

    Raises:
        UnsupportedError: the decoder has no law, or a random one.
    """
    if isinstance(decoder, Served):
        raise UnsupportedError("logits", "how likely given texts are is not what a server tells")
    if not isinstance(decoder, Sampler):
        raise UnsupportedError("a next-token law", f"{decoder.spec} draws no token from a law that can be stated")
    if decoder.stateless:
        return partial(_judge, decoder)
    base = Sampler
    by_other_means = type(decoder).choose is not base.choose and not isinstance(decoder, CandidateSampler)
    if by_other_means or type(decoder).next_law is base.next_law:
        raise UnsupportedError("a law that it draws from", f"{decoder.spec} chooses tokens by other means than its law")
    if not decoder.uniforms:
        return _StatefulJudge(decoder)
    if not random:
        # The probability of one text is then a mean over the state's whole past: too noisy to say which text has more.
        raise UnsupportedError("a law without random numbers of its own", f"the law of {decoder.spec} is itself random")
    return _RandomJudge(decoder)


def _judge(sampler: Sampler, logits: torch.Tensor, real: torch.Tensor) -> tuple[Array, ...]:
    found = []
    for part, token in zip(logits.split(ROWS_AT_ONCE), real.split(ROWS_AT_ONCE), strict=True):
        law = sampler.shape(part.clone())  # a law may be written into its argument
        check(law, part, sampler.spec)
        _check_rows(sampler, part, law)
        own = law.gather(-1, token[:, None])[:, 0]
        found.append(torch.stack([own.double(), _raw(part, token), law.exp().square().sum(-1).double()]))
    return tuple(torch.cat(found, dim=1).cpu().numpy())


def _check_rows(sampler: Sampler, logits: torch.Tensor, law: torch.Tensor) -> None:
    """
    Raises:
        ValueError: the law of a row is another one when the row is alone. The next row has read the real token, so a
            law that looks there, or forgets a `dim=-1`, knows what it is asked.
    """
    for row in {0, len(logits) // 2, len(logits) - 1}:
        alone = sampler.shape(logits[row : row + 1].clone())
        if float((alone[0].double().exp() - law[row].double().exp()).abs().sum()) / 2 > ROW_TOLERANCE:
            raise ValueError(f"{sampler.spec}: the law of a row depends on the other rows; work along dim=-1 only")


def _raw(logits: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    # the same operation as in a law that leaves the logits alone, so that it gives the same number to the last digit
    return logits.log_softmax(-1).gather(-1, token[:, None])[:, 0].double()


class _StatefulJudge:
    """Scores a sampler whose law depends on what it drew before: its state follows the real text over the windows."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.state = sampler.start(1)

    def __call__(self, logits: torch.Tensor, real: torch.Tensor) -> tuple[Array, ...]:
        own, concentration = [], []
        noise = torch.empty(1, 0, dtype=torch.float64, device=logits.device)
        for row, token in zip(logits, real, strict=True):
            law, self.state = self.sampler.next_law(row[None].clone(), self.state, noise)
            check(law, row[None], self.sampler.spec)
            self.state = self.sampler.advance(self.state, token[None])
            own.append(law[0, token].double())
            concentration.append(law[0].double().exp().square().sum())
        return tuple(x.cpu().numpy() for x in (torch.stack(own), _raw(logits, real), torch.stack(concentration)))


class _RandomJudge:
    """Scores a sampler whose law is itself random, by the filters of copies.py."""

    def __init__(self, sampler: Sampler) -> None:
        self.filters = CopiesJudge(sampler)

    def __call__(self, logits: torch.Tensor, real: torch.Tensor) -> tuple[Array, ...]:
        both, each, concentration = self.filters(logits, real)
        return both, _raw(logits, real).cpu().numpy(), concentration, each


def mixture_nats(scores: Scores, weight: float, *, uniform: bool) -> Array:
    """-log((1 - weight) p + weight r) per token, with r the model's law or the uniform one."""
    other = -math.log(scores.vocabulary) if uniform else scores.model
    with np.errstate(divide="ignore"):
        nats: Array = -np.logaddexp(np.log1p(-weight) + scores.decoder, np.log(weight) + other)
    return nats


def tuned_weight(validation: Scores, *, uniform: bool) -> float:
    """The weight that makes the validation text likeliest; of equals the greatest, as the decoder then adds nothing."""
    grid = UNIFORM_WEIGHTS if uniform else MODEL_WEIGHTS
    totals = np.array([float(mixture_nats(validation, w, uniform=uniform).sum()) for w in grid])
    return float(grid[np.flatnonzero(totals <= totals.min() * (1 + 1e-12))[-1]])


def cross_fitted(scores: Scores, names: Sequence[str]) -> dict[str, Observations]:
    """Scores of short texts, each a cluster, where there is no validation text: the weight of a mixture is tuned on
    every other text, for those between them.

    Args:
        names: of the texts, by the number of their cluster.
    """
    places = [int(c) for c in np.unique(scores.cluster)]
    halves = [_only(scores, [c for i, c in enumerate(places) if i % 2 == half]) for half in (0, 1)]
    mixed = np.empty(len(scores.decoder))
    for half in (0, 1):
        weight = tuned_weight(halves[1 - half], uniform=False)
        mine = np.isin(scores.cluster, np.unique(halves[half].cluster))
        mixed[mine] = mixture_nats(halves[half], weight, uniform=False)
    rows = [names[c] for c in places]
    counts = [int((scores.cluster == c).sum()) for c in places]

    def per_text(values: Array, *, exp: bool = False, share: bool = False) -> Observations:
        sums = [float(values[scores.cluster == c].sum()) for c in places]
        return Observations(rows, sums, counts, scale="exp" if exp else "identity", share=share)

    return {
        "cross_entropy": per_text(-scores.decoder),
        "coverage": per_text(np.isfinite(scores.decoder).astype(float), share=True),
        "sparsemax_score": per_text(np.exp(scores.decoder) + 0.5 * (1.0 - scores.concentration), share=True),
        "ppl_model": per_text(-scores.model, exp=True),
        "ppl_mixture": per_text(mixed, exp=True),
    }


def _only(scores: Scores, clusters: Sequence[int]) -> Scores:
    mine = np.isin(scores.cluster, clusters)
    decoder, model, concentration = (part[mine] for part in (scores.decoder, scores.model, scores.concentration))
    return Scores(decoder, model, concentration, scores.cluster[mine], scores.vocabulary)


def metrics(test: Scores, validation: Scores) -> dict[str, Estimate | Observations]:
    """Every perplexity of the suite, by metric name."""
    clusters = [test.cluster == c for c in np.unique(test.cluster)]
    counts = [int(c.sum()) for c in clusters]
    covered = np.isfinite(test.decoder)

    def per_cluster(values: Array) -> list[float]:
        return [float(values[c].sum()) for c in clusters]

    names = [f"window-{c}" for c in np.unique(test.cluster)]

    def perplexity(nats: Array) -> Observations:
        return Observations(names, per_cluster(nats), counts, scale="exp")

    model_weight = tuned_weight(validation, uniform=False)
    uniform_weight = tuned_weight(validation, uniform=True)
    mixed = mixture_nats(test, model_weight, uniform=False)
    score = np.exp(test.decoder) + 0.5 * (1.0 - test.concentration)
    found: dict[str, Estimate | Observations] = {
        "ppl_model": perplexity(-test.model),
        "ppl_mixture": perplexity(mixed),
        "mixture_weight": Estimate(model_weight, n=len(validation.decoder)),
        "ppl_epsilon": perplexity(mixture_nats(test, uniform_weight, uniform=True)),
        "sparsemax_score": Observations(names, per_cluster(score), counts, share=True),
    }
    if test.filters is not None:  # a token that no copy could draw may still have a probability: nothing of `ppl`
        found |= _copies(test, uniform_weight, clusters)
        return found
    found |= {
        "ppl": perplexity(-test.decoder),
        "coverage": Observations(names, per_cluster(covered.astype(float)), counts, share=True),
    }
    if covered.any():
        inside = per_cluster(np.where(covered, -test.decoder, 0.0))
        kept = [int((c & covered).sum()) for c in clusters]
        some = [i for i, k in enumerate(kept) if k]
        found["ppl_conditional"] = Observations(
            [names[i] for i in some], [inside[i] for i in some], [kept[i] for i in some], scale="exp"
        )
    return found


def _copies(scores: Scores, weight: float, clusters: Sequence[Array]) -> dict[str, Estimate]:
    """What the number of copies does to the log of `ppl_epsilon`: noise, and a bias that more copies would take away.

    The filters' difference of a window has four times the variance of their mean; windows count as independent. The log
    of a mean of few is too low on average, by half as much for twice as many, so one filter against both together shows
    what is left, where the copies are many enough for that rule.
    """
    assert scores.filters is not None
    one, other = (mixture_nats(replace(scores, decoder=f), weight, uniform=True) for f in scores.filters)
    apart = [float((one - other)[c].sum()) for c in clusters]
    both = mixture_nats(scores, weight, uniform=True)
    return {
        "copies_error": Estimate(math.sqrt(sum(x * x for x in apart)) / 2 / len(one), n=len(clusters)),
        "copies_bias": Estimate(float((one + other).mean() / 2 - both.mean()), n=len(one)),
    }
