"""Arithmetic sampling: many samples of one prompt, each exactly drawn, spread evenly over the law of whole texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from decodathlon.harness import law
from decodathlon.harness.decoder import Completion, Limits, Sampler, decoder
from decodathlon.harness.generation import autoregressive
from decodathlon.harness.lazy import torch
from decodathlon.harness.randomness import RowRandom

if TYPE_CHECKING:
    from torch import Tensor

#: Distance of neighbouring float64 codes.
RESOLUTION = 2.0**-53


class Code(NamedTuple):
    """What is left of each row's code."""

    #: (B,) in [0, 1): where in the law of the rest of the text.
    at: Tensor
    #: (B,) how coarse that has become; every token magnifies it.
    coarseness: Tensor


def magnified(at: Tensor, coarseness: Tensor, low: Tensor, high: Tensor) -> Code:
    """What is left of codes `at` (B,) within the stretches from low to high (B,) that hold them."""
    width = (high - low).clamp(min=RESOLUTION)
    rest = ((at - low) / width).clamp(0.0, 1.0 - RESOLUTION)
    return Code(rest, (coarseness / width).clamp(max=1.0))


@decoder(
    "arithmetic",
    claim=lambda self: "exact" if self.temperature == 1 and self.top_p == 1 else "shaped",
    bounds={"temperature": "[0.01, 100]", "top_p": "(0, 1]"},
    paper="Vilnis, Zemlyanskiy, Murray, Passos, Sanghai 2023, Arithmetic Sampling",
)
class Arithmetic(Sampler):
    """A number in [0, 1) codes a whole text, as in arithmetic coding; samples of one prompt get evenly spaced numbers.

    Rows with the same prompt are one set. Their numbers are a lattice with one random shift, so that each alone is
    uniform and its text an exact draw, while together they cover the law better than independent draws. The shift comes
    from the seed, the prompt and the set's first row: here a row does depend on the equal prompts before it. Where the
    precision is used up (after some 50 bits of text) fresh random numbers take over, and the draws go on independently.
    """

    independent: ClassVar[bool] = False

    temperature: float = 1.0
    top_p: float = 1.0

    def shape(self, logits: Tensor) -> Tensor:
        return law.process(logits, temperature=self.temperature, top_p=self.top_p)

    def choose(self, logits: Tensor, state: Code | None, u: Tensor) -> tuple[Tensor, Code]:
        """The token whose stretch of the cumulative law holds the code; the code is then magnified to that stretch."""
        fresh = u[:, 0].double().contiguous()
        if state is None:
            at, coarseness = fresh, torch.full_like(fresh, RESOLUTION)
        else:
            # Noise as coarse as the code leaves a uniform number uniform (modulo 1) and fills the digits it has lost.
            at = (state.at + fresh * state.coarseness).remainder(1.0)
            coarseness = state.coarseness
        cumulative = self.shape(logits).double().exp().cumsum(-1)
        cumulative = cumulative / cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, at[:, None], right=True).clamp_(max=logits.shape[-1] - 1)
        high = cumulative.gather(1, tokens)[:, 0]
        low = torch.where(tokens[:, 0] > 0, cumulative.gather(1, (tokens - 1).clamp_(min=0))[:, 0], 0.0)
        return tokens[:, 0], magnified(at, coarseness, low, high)

    def generate(
        self, target: Any, prompts: Sequence[Sequence[int]], limits: Limits, rng: RowRandom
    ) -> list[Completion]:
        return autoregressive(self, target, prompts, limits, _Lattice(rng, prompts))


class _Lattice(RowRandom):
    """The rows' own streams, but the first number of each row is its place in the lattice of its set."""

    def __init__(self, rng: RowRandom, prompts: Sequence[Sequence[int]]) -> None:
        super().__init__(rng.seed, rng.keys)
        self._prompts = [tuple(p) for p in prompts]

    def uniforms(self, *shape: int) -> Tensor:
        noise = super().uniforms(*shape)
        for prompt in set(self._prompts):
            rows = [b for b, p in enumerate(self._prompts) if p == prompt]
            # named by its first row, so that sets that are drawn one after the other differ
            shift = RowRandom(self.seed, [("set", prompt, self.keys[rows[0]])]).uniforms(1)[0]
            noise[rows, 0, 0] = (torch.arange(len(rows), dtype=torch.float64) / len(rows) + shift).remainder(1.0)
        return noise
