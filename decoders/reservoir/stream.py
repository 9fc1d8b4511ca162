"""The reservoir sampler of the founding note, to the letter, and the weighted reservoir that does what it wants.

The note carries a reservoir of R likely tokens from step to step and weighs each by p1 / p0, its probability now over
that at an earlier step. What it leaves open is decided here:

- A fresh token has no p0. It enters with weight 1 (`fresh=one`, as if its p0 were its present probability), or with its
  probability (`fresh=probability`). So the first token of a text is uniform over the reservoir, or top-R sampling.
- Tokens are weighed in the order of their slots; a kept token stays in its slot, fresh ones fill the free slots from
  the likeliest on. The greatest weight so far begins at 1 and is never forgotten.
- Fresh is what was not stored when the step began: what has just been rejected does not come straight back. Where there
  are fewer fresh tokens than free slots, slots stay empty; where all are empty, the step is like the first one.
- With `every=2` the steps between change nothing: they draw by the weights of the step before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from decodathlon.harness import law
from decodathlon.harness.candidates import Candidates, CandidateSampler, same_for_all
from decodathlon.harness.decoder import Sampler, decoder
from decodathlon.harness.errors import SpecError
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from decodathlon.kernels.reservoir.reference import Reservoirs

PAPER = "after Bitterli et al. 2020, ReSTIR, and Kettunen, Lin, Ramamoorthi, Bashford-Rogers, Wyman 2023, CRIS"


@decoder(
    "reservoir",
    claim="heuristic",
    bounds={"size": "[1, 128]", "top_k": "[1, 1024]", "every": "[1, 2]", "temperature": "[0.01, 100]"},
    sweep={"size": [8, 16, 32], "top_k": [32, 64, 128], "every": [1, 2], "reuse": ["within", "cross"]},
    grid=True,
    paper=PAPER,
)
class Reservoir(CandidateSampler):
    """R likely tokens are kept from step to step and drawn in proportion to how their probability has changed.

    `reuse=within` compares a token's probability with that at which it entered, `cross` with that of the last step.
    `none` begins with an empty reservoir at every step: what remains of the sampler without the idea.
    """

    static_state: ClassVar[bool] = True

    size: int = 32
    top_k: int = 64
    every: int = 1
    reuse: Literal["within", "cross", "none"] = "within"
    fresh: Literal["one", "probability"] = "one"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.reuse == "none" and self.every > 1:
            raise SpecError(f"{self.info.name}: with reuse=none there is nothing to keep for every={self.every} steps")

    @property
    def uniforms(self) -> int:
        return self.size

    def shape(self, logits: Tensor) -> Tensor:
        """Top-k sampling, which a reservoir of right weights would draw from."""
        return law.process(logits, temperature=self.temperature, top_k=self.top_k)

    def start(self, rows: int) -> Reservoirs:
        from decodathlon.kernels.reservoir import reference

        return reference.start(rows, self.size)

    def candidates(self, logits: Tensor, state: Reservoirs, u: Tensor) -> tuple[Candidates, Reservoirs]:
        from decodathlon.kernels.reservoir import reference

        state = reference.Reservoirs(*(part.to(logits.device) for part in state))
        state = reference.emptied(state) if self.reuse == "none" else state
        scores = same_for_all(logits)
        scores = scores / self.temperature if self.temperature != 1 else scores
        cross = self.reuse == "cross"
        state = reference.step(scores, state, u, top_k=self.top_k, every=self.every, cross=cross, fresh=self.fresh)
        return Candidates(state.tokens.clamp(min=0), state.log_weight), state

    def choose(self, logits: Tensor, state: Reservoirs, u: Tensor) -> tuple[Tensor, Reservoirs]:
        """On a GPU the whole step is one operation of two launches (kernels/reservoir)."""
        if logits.device.type != "cuda":
            return super().choose(logits, state, u)
        from decodathlon.kernels.reservoir import dispatch, reference

        state = reference.Reservoirs(*(part.to(logits.device) for part in state))
        return dispatch.step(
            logits,
            reference.emptied(state) if self.reuse == "none" else state,
            u,
            temperature=self.temperature,
            top_k=self.top_k,
            every=self.every,
            cross=self.reuse == "cross",
            fresh=self.fresh,
        )


@decoder(
    "reservoir-exact",
    claim="shaped",
    bounds={"top_k": "[1, 1024]", "temperature": "[0.01, 100]"},
    paper="Chao 1982, A General Purpose Unequal Probability Sampling Plan (a reservoir of one)",
)
class ReservoirExact(Sampler):
    """A reservoir of one token that sees each of the k likeliest once, with its probability as weight: top-k sampling.

    The i-th token replaces the one before with probability w_i / (w_1 + ... + w_i), so that in any order each is left
    with its share of the whole. `top-k` draws from the same law at once.
    """

    top_k: int = 64
    temperature: float = 1.0

    @property
    def uniforms(self) -> int:
        return self.top_k - 1

    def shape(self, logits: Tensor) -> Tensor:
        """Of equally likely ones at the end so many as are seen, not all as with `top-k`."""
        seen = (logits / self.temperature).topk(min(self.top_k, logits.shape[1]), dim=1)
        cut = torch.full_like(logits, float("-inf"))
        return cut.scatter(1, seen.indices, seen.values.log_softmax(1))

    def definition(self, logits: Sequence[float]) -> list[float]:
        p = law.plainly(logits, self.temperature)
        return [x if sum(other > x for other in p) < self.top_k else 0.0 for x in p]

    def draw(self, logits: Tensor, u: Tensor) -> Tensor:
        seen = (logits / self.temperature).topk(min(self.top_k, logits.shape[1]), dim=1)
        return seen.indices.gather(1, survivor(seen.values, u[:, : seen.indices.shape[1]])[:, None])[:, 0]


def survivor(log_weights: Tensor, u: Tensor) -> Tensor:
    """(B,) place of the token that is left of a stream of weights (B, K) in a reservoir of one; `u` is (B, K).

    The first of them enters, whatever its number is; each later one replaces what is there by its share of the sum.
    """
    w = log_weights.double().softmax(1)
    enters = u.to(w) * w.cumsum(1) < w
    places = torch.arange(w.shape[1], device=w.device)
    return torch.where(enters, places, 0).amax(1)
