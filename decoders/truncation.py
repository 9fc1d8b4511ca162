"""Truncations that look at the entropy of the law: locally typical and eta sampling, and Mirostat, which steers it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from decodathlon.harness import law
from decodathlon.harness.decoder import Sampler, decoder
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def entropy(log_p: Tensor) -> Tensor:
    """(N, 1) entropy in nats of the laws (N, V)."""
    return -(log_p.exp() * log_p.nan_to_num(neginf=0.0)).sum(-1, keepdim=True)


def only(log_p: Tensor, kept: Tensor) -> Tensor:
    """The laws (N, V) given that the token is among `kept`."""
    return log_p.masked_fill(~kept, float("-inf")).log_softmax(-1)


@decoder(
    "locally-typical",
    claim="shaped",
    bounds={"mass": "(0, 1]", "temperature": "[0.01, 100]"},
    sweep={"mass": [0.2, 0.5, 0.9]},
    paper="Meister, Pimentel, Wiher, Cotterell 2023, Locally Typical Sampling",
)
class LocallyTypical(Sampler):
    """The tokens whose surprise is nearest to the entropy of the law, up to a probability of `mass`, renormalised.

    What ties with the last of them stays in, so that no device's sorting decides.
    """

    mass: float = 0.95
    temperature: float = 1.0

    def shape(self, logits: Tensor) -> Tensor:
        log_p = (logits / self.temperature).log_softmax(-1)
        if self.mass == 1:  # the whole law, which a rounded sum may reach too early
            return log_p
        p = log_p.double().exp()
        return only(log_p, law.least((-log_p - entropy(log_p)).abs(), p / p.sum(-1, keepdim=True), self.mass))

    def definition(self, logits: Sequence[float]) -> list[float]:
        p = law.plainly(logits, self.temperature)
        surprise = [-math.log(x) for x in p]
        far = [abs(s - sum(x * t for x, t in zip(p, surprise, strict=True))) for s in surprise]
        nearer = [sum(x for x, f in zip(p, far, strict=True) if f < mine) for mine in far]
        return [x if before < self.mass else 0.0 for x, before in zip(p, nearer, strict=True)]


@decoder(
    "eta",
    claim="shaped",
    bounds={"epsilon": "(0, 1)", "temperature": "[0.01, 100]"},
    sweep={"epsilon": [3e-4, 2e-3, 4e-3]},
    paper="Hewitt, Manning, Liang 2022, Truncation Sampling as Language Model Desmoothing",
)
class Eta(Sampler):
    """Tokens at least as likely as min(epsilon, sqrt(epsilon) exp(-entropy)), and always the likeliest one."""

    epsilon: float = 9e-4
    temperature: float = 1.0

    def shape(self, logits: Tensor) -> Tensor:
        log_p = (logits / self.temperature).log_softmax(-1)
        threshold = (0.5 * math.log(self.epsilon) - entropy(log_p)).clamp(max=math.log(self.epsilon))
        return only(log_p, log_p >= threshold.minimum(log_p.max(-1, keepdim=True).values))

    def definition(self, logits: Sequence[float]) -> list[float]:
        p = law.plainly(logits, self.temperature)
        bound = min(self.epsilon, math.sqrt(self.epsilon) * math.exp(sum(x * math.log(x) for x in p)))
        return [x if x >= bound or x == max(p) else 0.0 for x in p]


class Surprise(NamedTuple):
    """State of Mirostat: how much surprise each row may have, and what each token of the current step would bring."""

    #: (B, 1) in bits.
    most: Tensor
    #: (B, V) in bits; None before the first step.
    of_tokens: Tensor | None


@decoder(
    "mirostat",
    claim="shaped",
    bounds={"tau": "(0, inf)", "rate": "(0, 1]", "temperature": "[0.01, 100]"},
    sweep={"tau": [3.0, 4.0, 6.0]},
    paper="Basu, Ramachandran, Keskar, Varshney 2021, Mirostat: A Neural Text Decoding Algorithm (algorithm 2)",
)
class Mirostat(Sampler):
    """Mirostat 2: tokens whose surprise stays below a bound, which moves so that the mean surprise becomes `tau` bits.

    Surprise is that of the law before truncation, as in the paper; some programs take the law after it.
    """

    tau: float = 5.0
    rate: float = 0.1
    temperature: float = 1.0

    def start(self, rows: int) -> Surprise:
        return Surprise(torch.full((rows, 1), 2 * self.tau, dtype=torch.float64), None)

    def next_law(self, logits: Tensor, state: Surprise, u: Tensor) -> tuple[Tensor, Surprise]:
        log_p = (logits / self.temperature).log_softmax(-1)
        bits = -log_p.double() / math.log(2)
        most = state.most.to(bits.device)
        return only(log_p, bits <= most.maximum(bits.min(-1, keepdim=True).values)), Surprise(most, bits)

    def advance(self, state: Surprise, tokens: Tensor) -> Any:
        assert state.of_tokens is not None
        error = state.of_tokens.gather(-1, tokens[:, None]) - self.tau
        return Surprise(state.most - self.rate * error, None)
