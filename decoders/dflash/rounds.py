"""Several draws for each place of a block, of which the target tries one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from decodathlon.decoders.dflash import packing
from decodathlon.decoders.dflash.block import BLOCK_BOUNDS
from decodathlon.decoders.dflash.drafter import BlockDrafter
from decodathlon.decoders.dflash.trees import NEEDS, BlockTree, no_tree
from decodathlon.decoders.speculative.base import claim
from decodathlon.decoders.speculative.drafter import Draft, Drafter, Stopping
from decodathlon.decoders.speculative.trees import without_replacement
from decodathlon.harness import law
from decodathlon.harness.decoder import decoder
from decodathlon.harness.errors import SpecError
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@decoder(
    "dflash-multiround",
    claim=claim,
    family="dflash",
    bounds={**BLOCK_BOUNDS, "rounds": "[1, 16]"},
    sweep={"rounds": [2, 3]},
    needs=NEEDS,
    paper="Miao et al. 2023, SpecInfer (arXiv 2305.09781); Chen et al. 2024, Sequoia (arXiv 2402.12374), for `diverse`",
)
class MultiRound(BlockTree):
    """Several draws for each place: who is refused leaves the residual law to the next one.

    The first of each place goes on to the next place. Draws are independent, or with `diverse` all different. At
    temperature 0 nothing is drawn, and the likeliest tokens are tried in their order.
    """

    rounds: int = 2
    diverse: bool = False
    proposal: Literal["sample", "guess"] = "sample"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.diverse and not self.draws:
            raise SpecError(
                f"{self.info.name}: diverse=true says how tokens are drawn, and none is at temperature="
                f"{self.temperature:g} with proposal={self.proposal}: the likeliest of a place are different anyway"
            )

    @property
    def draws(self) -> bool:
        return self.temperature > 0 and self.proposal == "sample"

    @property
    def widest(self) -> int:
        return self.k * self.rounds

    @property
    def numbers(self) -> tuple[int, int]:
        return self.k * self.rounds, (self.k + 1) * (self.rounds + 1)

    def drafter(self, target: Any, context: Any, prompts: Sequence[Sequence[int]]) -> Drafter:
        if not self.draws:

            def grow(values: packing.Values, tokens: packing.Tokens) -> packing.Nodes:
                return packing.comb(tokens)

            return self.plant(target, context, prompts, grow=grow, ranks=self.rounds)
        found: Drafter = self.drafting(Rounds, target, context, prompts, rounds=self.rounds, diverse=self.diverse)
        return found


class Rounds(BlockDrafter):
    """Draws `rounds` tokens for each place; the first one of a place has those of the next place as its children."""

    def __init__(self, *given: Any, rounds: int, diverse: bool, **more: Any) -> None:
        super().__init__(*given, **more)
        self.rounds, self.diverse = rounds, diverse

    def propose(self, texts: Sequence[Sequence[int]], want: Sequence[int], stopping: Stopping, u: Tensor) -> Draft:
        width, R = max(want), self.rounds
        laws = self.laws(texts, want)
        if laws is None:
            return no_tree(len(texts))
        numbers = u[:, : width * R].to(laws.device).unflatten(1, (width, R))
        if self.diverse:
            drawn = [without_replacement(laws[:, place], numbers[:, place]) for place in range(width)]
        else:
            drawn = [
                torch.stack([law.draw(laws[:, place], numbers[:, place, r]) for r in range(R)], 1)
                for place in range(width)
            ]
        parents = torch.tensor([(place - 1) * R if place else -1 for place in range(width) for _ in range(R)])
        # the law of the children of the text, and of each place's first node; the others have none
        behind = torch.full((len(texts), 1 + width * R, laws.shape[2]), float("-inf"), device=laws.device)
        behind[:, 0] = laws[:, 0]
        behind[:, 1 : 1 + (width - 1) * R : R] = laws[:, 1:]
        return Draft(
            torch.cat(drawn, 1), [w * R for w in want], behind, parents.expand(len(texts), -1),
            replaced=not self.diverse,
        )  # fmt: skip
