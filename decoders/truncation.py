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


def entropy(log_p: Tensor, p: Tensor | None = None) -> Tensor:
    """(N, 1) entropy in nats of the laws (N, V); what is cut has no part in it. `p` is exp(log_p), if at hand."""
    p = log_p.softmax(-1) if p is None else p
    return -torch.linalg.vecdot(p, log_p.clamp(min=torch.finfo(log_p.dtype).min))[:, None]


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

    @property
    def uniforms(self) -> int:
        return law.ATTEMPTS - 1

    def shape(self, logits: Tensor) -> Tensor:
        log_p = law.process(logits, temperature=self.temperature)
        if self.mass == 1:  # the whole law, which a rounded sum may reach too early
            return log_p
        return law.only(log_p, law.least((log_p + entropy(log_p)).abs_(), log_p, self.mass))

    def draw(self, logits: Tensor, u: Tensor) -> Tensor:
        if self.mass == 1:
            return super().draw(logits, u)
        log_p = law.process(logits, temperature=self.temperature)
        p = log_p.softmax(-1)
        return law.draw_least((log_p + entropy(log_p, p)).abs_(), log_p, self.mass, u, p)

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
        log_p = law.process(logits, temperature=self.temperature)
        threshold = (0.5 * math.log(self.epsilon) - entropy(log_p)).clamp(max=math.log(self.epsilon))
        return law.only(log_p, log_p >= threshold.minimum(log_p.amax(-1, keepdim=True)))

    def definition(self, logits: Sequence[float]) -> list[float]:
        p = law.plainly(logits, self.temperature)
        bound = min(self.epsilon, math.sqrt(self.epsilon) * math.exp(sum(x * math.log(x) for x in p)))
        return [x if x >= bound or x == max(p) else 0.0 for x in p]


class Surprise(NamedTuple):
    """State of Mirostat: how much surprise each row may have, and the law that it is measured by."""

    #: (B, 1) in bits.
    most: Tensor
    #: (B, V) log-probabilities, in nats; None before the first step.
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
        log_p = law.process(logits, temperature=self.temperature)
        most = state.most.to(log_p.device)
        floor = (-most * math.log(2)).to(log_p).minimum(log_p.amax(-1, keepdim=True))
        return law.only(log_p, log_p >= floor), Surprise(most, log_p)

    def advance(self, state: Surprise, tokens: Tensor) -> Any:
        assert state.of_tokens is not None
        bits = -state.of_tokens.gather(-1, tokens[:, None]).double() / math.log(2)
        return Surprise(state.most - self.rate * (bits - self.tau), None)
