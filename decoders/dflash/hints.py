"""Blocks that begin with more than masks: with what the last cycle threw away, or with the draft's own first guesses.

The network never saw such blocks in training. Whatever it makes of them, what stays is the target's to say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from decodathlon.decoders.dflash.drafter import BlockDrafter
from decodathlon.decoders.speculative.drafter import Draft, Stopping
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Seeding = Literal["none", "sparse", "dense", "confident"]
Refining = Literal["all", "low-confidence"]
#: A guess of this probability is one to rely on.
SURE = 0.9


class HintedDrafter(BlockDrafter):
    """As `BlockDrafter`; its block holds hints where others have masks.

    Args:
        seeding: which places of a block get tokens that were refused in the last one: every other (`sparse`), all
            (`dense`), or where the drafter was sure of them (`confident`).
        most: the most tokens of a block that are seeded; negative: any number.
        aligned: whether a token goes to the place that it was a guess for; else, as the founding note has it, the first
            that was refused goes to the first place that is seeded, and so on.
        steps: passes of the drafter. Later ones read the guesses of the one before.
        refine: whether the later ones guess everything anew, or what the first was not sure of.
    """

    def __init__(
        self, *given: Any, seeding: Seeding, most: int, aligned: bool, steps: int, refine: Refining, **more: Any
    ) -> None:
        super().__init__(*given, **more)
        self.seeding, self.most, self.aligned, self.steps, self.refine = seeding, most, aligned, steps, refine
        rows = len(self.memory.lengths)
        #: By row, the tokens that the last cycle refused, and how probable the drafter found them.
        self._refused: list[list[tuple[int, float]]] = [[] for _ in range(rows)]
        self._seeded = [0] * rows
        self._laws: Tensor | None = None
        #: The last draft's tokens with their probabilities, by row.
        self._drafted: list[list[tuple[int, float]]] = [[] for _ in range(rows)]

    def propose(self, texts: Sequence[Sequence[int]], want: Sequence[int], stopping: Stopping, u: Tensor) -> Draft:
        self._drafted = [[] for _ in texts]
        draft = super().propose(texts, want, stopping, u)
        if self.seeding != "none" and self._laws is not None:
            chances = self._laws.gather(2, draft.tokens[..., None])[..., 0].exp().tolist()
            pairs = zip(draft.tokens.tolist(), chances, draft.counts, strict=True)
            self._drafted = [list(zip(t, c, strict=True))[:count] for t, c, count in pairs]
        return draft

    def laws(self, texts: Sequence[Sequence[int]], want: Sequence[int]) -> Tensor | None:
        self._take_up()
        self._seeded, self._laws, width = [0] * len(texts), None, max(want)
        if not width:
            return None
        block = self.block(texts, self.whole or width)
        for row, refused in enumerate(self._refused):
            for place, token in self._seeds(refused, block.shape[1] - 1):
                block[row, place] = token
                self._seeded[row] += 1
        laws = self.read(block, block.shape[1] - 1)
        for _ in range(self.steps - 1):
            laws = self._again(block, laws)
        self._laws = laws[:, :width]
        return self._laws

    def _again(self, block: Tensor, laws: Tensor) -> Tensor:
        """Laws of a pass that reads the likeliest tokens of the one before."""
        best = laws.max(-1)
        known = torch.cat([block[:, :1], best.indices.cpu()], 1)
        if self.refine == "all":
            return self.read(known, laws.shape[1])
        sure = best.values.exp() >= SURE
        known[:, 1:] = torch.where(sure.cpu(), known[:, 1:], self.network.config.mask_token_id)
        return torch.where(sure[..., None], laws, self.read(known, laws.shape[1]))

    def _seeds(self, refused: Sequence[tuple[int, float]], width: int) -> list[tuple[int, int]]:
        """(place in the block, token). The text's last token stands at place 0, which the first refused one was for."""
        places = range(2, width + 1, 2) if self.seeding == "sparse" else range(1, width + 1)
        if self.aligned:
            pairs = [(place, refused[place]) for place in places if place < len(refused)]
        else:
            pairs = list(zip(places, refused, strict=False))
        found = [(at, token) for at, (token, chance) in pairs if self.seeding != "confident" or chance >= SURE]
        return found if self.most < 0 else found[: self.most]

    def settle(self, accepted: Sequence[int], hidden: Mapping[int, Tensor]) -> None:
        super().settle(accepted, hidden)
        self._refused = [drafted[n:] for drafted, n in zip(self._drafted, accepted, strict=True)]

    def select(self, rows: Sequence[int]) -> None:
        super().select(rows)
        self._refused = [self._refused[row] for row in rows]
        self._seeded = [self._seeded[row] for row in rows]

    def state(self, row: int) -> dict[str, float | str]:
        return {"seeded": self._seeded[row]} if self.seeding != "none" else {}
