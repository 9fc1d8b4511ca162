"""`dflash`, and what all decoders of the family share: the drafter, its block, and how large it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from decodathlon.decoders.dflash import checkpoint as checkpoints
from decodathlon.decoders.dflash.drafter import BlockDrafter, Nothing, seen_by
from decodathlon.decoders.dflash.hints import HintedDrafter, Refining, Seeding
from decodathlon.decoders.dflash.schedules import BreakEvenSize, Scheduler
from decodathlon.decoders.speculative.base import BOUNDS, Speculative, claim
from decodathlon.decoders.speculative.controllers import Controller
from decodathlon.decoders.speculative.cycle import Request
from decodathlon.decoders.speculative.drafter import Drafter
from decodathlon.decoders.speculative.matrices import product
from decodathlon.harness.decoder import Completion, Limits, decoder
from decodathlon.harness.errors import SpecError, UnsupportedError
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from decodathlon.harness.randomness import RowRandom

Schedule = Literal["fixed", "ewma", "break-even"]
SCHEDULES: dict[str, type[Controller]] = {"ewma": Scheduler, "break-even": BreakEvenSize}
PAPER = "Chen, Liang, Liu 2026, DFlash: Block Diffusion for Flash Speculative Decoding (arXiv 2602.06036)"
BLOCK_BOUNDS = {**{name: text for name, text in BOUNDS.items() if name != "k"}, "block": "[0, 64]"}


@dataclass(frozen=True, kw_only=True)
class BlockSpeculative(Speculative):
    """A decoder whose drafter guesses all places of a block at once, from the target's hidden states."""

    #: Tokens of a block, the text's last one among them; 0: as many as the drafter was trained with; 1: nothing is
    #: drafted, which is greedy search or a draw in the very same loop.
    block: int = 0
    #: `auto` (what ships for the model, or was released for it), a folder, a hub id, or `random`.
    checkpoint: str = checkpoints.AUTO
    #: The output matrix that guesses go through; the target's is the same for all places, and large.
    head: Literal["same", "int8", "int4"] = "same"
    #: The most tokens that a cycle drafts; it follows from `block`.
    k: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "k", max(0, self.block - 1))
        if self.controller == "break-even":
            raise SpecError(
                f"{self.info.name}: controller=break-even counts seconds by drafted token, and a block takes the same "
                "however many of its tokens are of use; dflash[schedule=break-even] counts by block"
            )
        if self.block == 1 and self.controller != "static":
            raise SpecError(f"{self.info.name}: block=1 drafts nothing, so controller={self.controller} has no say")
        checkpoints.check_named(self.checkpoint, self.info.name)

    def check(self, target: Any) -> None:
        super().check(target)
        if self.head != "same" and target.device.type != "cpu":
            raise UnsupportedError(f"a kernel for head={self.head}", f"there is none on {target.device.type}")
        self.network(target)

    def sources(self) -> list[Path]:
        return sorted({*super().sources(), *checkpoints.files(self.checkpoint)})

    def network(self, target: Any) -> Any:
        """The drafter, which the target keeps."""
        key = ("dflash", self.checkpoint, *checkpoints.stamps(self.checkpoint))
        if key not in target.kept:
            target.kept[key] = checkpoints.load(self.checkpoint, target)
        return target.kept[key]

    def remarks(self, target: Any) -> list[str]:
        trained = self.network(target).config.block_size
        found = [f"drafter: {checkpoints.told(self.checkpoint, target)}"]
        if self.block > trained:
            found.append(f"a block of {self.block} tokens; the drafter was trained with {trained}")
        return found

    def output(self, target: Any) -> Any:
        """The output matrix in its form, which the target keeps."""
        from decodathlon.harness.targets.lean import Dense

        key = ("dflash head", self.head)
        if key not in target.kept:
            own = target.model.get_output_embeddings()
            exact = Dense(own.weight, getattr(own, "bias", None))
            target.kept[key] = exact if self.head == "same" else product(exact, 8 if self.head == "int8" else 4, "int")
        return target.kept[key]

    def hidden(self, target: Any) -> Sequence[int]:
        return seen_by(self.network(target)) if self.k else ()

    def drafter(self, target: Any, context: Any, prompts: Sequence[Sequence[int]]) -> Drafter:
        return self.drafting(BlockDrafter, target, context, prompts)

    def drafting(
        self, kind: type[BlockDrafter], target: Any, context: Any, prompts: Sequence[Sequence[int]], **more: Any
    ) -> Any:
        """A drafter of this kind, as the parameters say."""
        if not self.k:
            return Nothing()
        from decodathlon.decoders.dflash.captured import memory_for

        network, width = self.network(target), 1 + self.k
        # a row's block may reach beyond the text that it has room for, in places that nobody looks at
        room = context.capacity + self.widest + width + 1
        return kind(
            network, target.model.get_input_embeddings().weight, self.output(target), context, prompts,
            memory=memory_for(target, self.checkpoint, network, len(prompts), room, width),
            law=self.shape if self.draws else self.guide, sampled=self.draws, watched=self.looks,
            whole=0 if self.varies else self.k, **more,
        )  # fmt: skip

    @property
    def varies(self) -> bool:
        """Whether blocks have different sizes."""
        return False

    @property
    def draws(self) -> bool:
        """Whether what it drafts is drawn from the drafter's law, and not guessed."""
        return False

    def guide(self, logits: Tensor) -> Tensor:
        """Log-probabilities by which guesses are chosen: of a chain the likeliest, whatever the temperature, so rules
        look at the law as it is."""
        return logits.log_softmax(-1)

    def generate(
        self, target: Any, prompts: Sequence[Sequence[int]], limits: Limits, rng: RowRandom
    ) -> list[Completion]:
        self.check(target)
        network = self.network(target)
        sized = self if self.block else replace(self, block=network.config.block_size)
        with torch.no_grad():
            return Request(sized, target, prompts, limits, rng).run()


@decoder(
    "dflash",
    claim=claim,
    family="dflash",
    bounds={**BLOCK_BOUNDS, "draft_steps": "[1, 8]", "seed_max_tokens": "[-1, 64]"},
    sweep={"block": [4, 8, 12, 16], "schedule": ["fixed", "ewma", "break-even"]},
    needs=["hf-model", "hidden"],
    paper=PAPER,
)
class DFlash(BlockSpeculative):
    """A small network reads hidden states of the target and drafts a whole block of tokens in one pass."""

    #: Whether guesses are drawn from the drafter's law, or its likeliest is taken; at temperature 0 it is.
    proposal: Literal["sample", "guess"] = "sample"
    schedule: Schedule = "fixed"
    #: Places of a block that get tokens which the last cycle refused, the most of them (negative: any number), and
    #: whether each goes where it was a guess for.
    suffix_seed: Seeding = "none"
    seed_max_tokens: int = -1
    seed_aligned: bool = False
    #: Passes of the drafter over a block; later ones read the guesses of the one before, and guess anew all of them, or
    #: those that had less than 0.9.
    draft_steps: int = 1
    refine: Refining = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule != "fixed" and self.controller != "static":
            raise SpecError(
                f"{self.info.name}: schedule={self.schedule} and controller={self.controller} both say how far to draft"
            )
        if self.draft_steps == 1 and self.refine != "all":
            raise SpecError(f"{self.info.name}: refine={self.refine} is of a second pass; give draft_steps=2")
        if self.suffix_seed == "none" and (self.seed_aligned or self.seed_max_tokens != -1):
            raise SpecError(
                f"{self.info.name}: there is nothing to seed with; give suffix_seed=sparse, dense or confident"
            )
        if self.block == 1 and (self.schedule, self.suffix_seed, self.draft_steps) != ("fixed", "none", 1):
            raise SpecError(f"{self.info.name}: block=1 drafts nothing, so nothing else can be said of its draft")

    @property
    def draws(self) -> bool:
        return self.temperature > 0 and self.proposal == "sample"

    @property
    def varies(self) -> bool:
        return self.schedule != "fixed"

    def guide(self, logits: Tensor) -> Tensor:
        wanted = self.looks or self.suffix_seed != "none" or self.draft_steps > 1
        return super().guide(logits) if wanted else logits  # whose order is that of the law

    def drafter(self, target: Any, context: Any, prompts: Sequence[Sequence[int]]) -> Drafter:
        if self.suffix_seed == "none" and self.draft_steps == 1:
            return super().drafter(target, context, prompts)
        return self.drafting(
            HintedDrafter, target, context, prompts, seeding=self.suffix_seed, most=self.seed_max_tokens,
            aligned=self.seed_aligned, steps=self.draft_steps, refine=self.refine,
        )  # fmt: skip

    def new_controller(self, seed: int) -> Controller:
        return SCHEDULES[self.schedule](self.k) if self.schedule != "fixed" else super().new_controller(seed)
