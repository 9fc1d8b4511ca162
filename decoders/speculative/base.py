"""What all speculative decoders share: their parameters, what they claim, and the controllers that they can have."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from decodathlon.decoders.speculative import bandits, clocks, controllers
from decodathlon.decoders.speculative.controllers import Controller
from decodathlon.decoders.speculative.cycle import Request
from decodathlon.decoders.speculative.drafter import Autoregressive, Drafter, SharedMemory
from decodathlon.decoders.speculative.trees import Branching, DrawnTree
from decodathlon.harness import law
from decodathlon.harness.decoder import Claim, Completion, Limits, Sampler
from decodathlon.harness.errors import SpecError
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from decodathlon.harness.randomness import RowRandom

Rule = Literal[
    "static", "confidence", "svip", "adaedl", "margin", "heuristic", "ewma", "break-even", "tapout", "contextual"
]
#: Those that look at the drafter's laws and at nothing else.
LOOKING = {
    "confidence": controllers.Confidence,
    "svip": controllers.SVIP,
    "adaedl": controllers.AdaEDL,
    "margin": controllers.Margin,
}
BLIND = {
    "static": controllers.Static,
    "heuristic": controllers.Heuristic,
    "ewma": clocks.EWMA,
    "break-even": clocks.BreakEven,
}
BOUNDS = {"k": "[1, 64]", "temperature": "[0, 100]", "top_k": "[0, inf)", "top_p": "(0, 1]"}
SELF_BOUNDS = {**BOUNDS, "branches": "[1, 8]", "budget": "[0, 64]"}


def claim(decoder: Speculative) -> Claim:
    """What every speculative decoder claims: the law of its temperature and truncation, whatever it drafts."""
    if decoder.temperature == 0:
        return "greedy-exact"
    return "exact" if (decoder.temperature, decoder.top_k, decoder.top_p) == (1, 0, 1) else "shaped"


@dataclass(frozen=True, kw_only=True)
class Speculative(Sampler):
    """A sampler that drafts. `k` is the most tokens per cycle; `controller` decides how many of them are drafted."""

    k: int = 4
    controller: Rule = "static"
    #: Of tapout and contextual: how an arm is chosen, for how long, and by which reward.
    policy: bandits.Policy = "ucb1"
    level: bandits.Level = "sequence"
    reward: bandits.Reward = "blend"
    #: Whether what a controller has learnt is kept from prompt to prompt.
    remember: bool = True
    #: 0 is greedy search.
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    drafts: ClassVar[bool] = True
    #: Whether its drafters have laws that a controller could look at.
    has_laws: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.controller in LOOKING and not self.has_laws:
            able = ", ".join([*BLIND, "tapout", "contextual"])
            raise SpecError(
                f"{self.info.name}: controller={self.controller} looks at a law, and this drafter has none; take {able}"
            )
        learning = {"tapout": ("policy", "level", "reward"), "contextual": ("reward",)}.get(self.controller, ())
        for name in ("policy", "level", "reward"):
            if name not in learning and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise SpecError(
                    f"{self.info.name}: {name} says how a bandit learns; controller={self.controller} does not"
                )

    @abstractmethod
    def drafter(self, target: Any, context: Any, prompts: Sequence[Sequence[int]]) -> Drafter:
        """A drafter for these prompts, which the target has just read into `context`."""

    def hidden(self, target: Any) -> Sequence[int]:
        """Hidden states of the prompts that the drafter wants, as in `Target.open`."""
        return ()

    @property
    def widest(self) -> int:
        """The most tokens that a cycle reads behind the text, over all branches."""
        return self.k

    @property
    def numbers(self) -> tuple[int, int]:
        """How many uniform numbers a cycle needs by row, for drafting and for verifying."""
        return self.k, self.k + 1

    def shape(self, logits: Tensor) -> Tensor:
        if self.temperature == 0:
            return law.one_hot(logits)
        return law.process(logits, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)

    def definition(self, logits: Sequence[float]) -> list[float]:
        p = law.plainly(logits, self.temperature)
        if self.top_k:
            least = sorted(p, reverse=True)[min(self.top_k, len(p)) - 1]
            p = [x if x >= least else 0.0 for x in p]
        p = [x / sum(p) for x in p]
        return [x if sum(other for other in p if other > x) < self.top_p else 0.0 for x in p]

    def generate(
        self, target: Any, prompts: Sequence[Sequence[int]], limits: Limits, rng: RowRandom
    ) -> list[Completion]:
        self.check(target)
        with torch.no_grad():
            return Request(self, target, prompts, limits, rng).run()

    def autoregressive(self, kind: type[Autoregressive], context: Any) -> Autoregressive:
        """A drafter that draws token by token, as this decoder's parameters say.

        What is only guessed is not drawn from the law that the temperature makes, so rules look at the law as it is.
        """
        sampled = self.temperature > 0 and getattr(self, "proposal", "sample") == "sample"
        law_of = self.shape if sampled else _plain
        return kind(context, law_of, sampled=sampled, watched=self.looks, normed=self.controller == "contextual")

    @property
    def looks(self) -> bool:
        """Whether the controller looks at laws, of a drafter that has some."""
        return self.has_laws and (self.controller in LOOKING or self.controller in ("tapout", "contextual"))

    def new_controller(self, seed: int) -> Controller:
        """A controller for one row."""
        if self.controller in LOOKING:
            return LOOKING[self.controller](self.k)
        if self.controller in BLIND:
            return BLIND[self.controller](self.k)
        if self.controller == "contextual":
            return bandits.Contextual(self.k, reward=self.reward, laws=self.has_laws)
        return bandits.TapOut(
            self.k, policy=self.policy, level=self.level, reward=self.reward, seed=seed, laws=self.has_laws
        )


@dataclass(frozen=True, kw_only=True)
class SelfSpeculative(Speculative):
    """A decoder whose drafter is a form of the target, in the target's own keys and values."""

    #: Whether tokens are drawn from the drafter's law (in a tree without replacement), or its likeliest are guessed;
    #: at temperature 0 they are.
    proposal: Literal["sample", "guess"] = "sample"
    #: How many ways on are drafted at each place, and how many nodes of that tree the target looks at (0: as many as
    #: pay by the times that were measured).
    branches: int = 1
    budget: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.branches > 1 and self.looks:
            raise SpecError(
                f"{self.info.name}: controller={self.controller} stops chains, and a tree has a budget; leave "
                f"branches={self.branches} out, or take controller=static, ewma, break-even or heuristic"
            )

    @property
    def widest(self) -> int:
        return self.k if self.branches == 1 else max(self.budget, self._most)

    @property
    def _most(self) -> int:
        """Nodes of the widest tree: so many at each place."""
        return self.branches * self.k

    @property
    def draws_trees(self) -> bool:
        return self.branches > 1 and self.temperature > 0 and self.proposal == "sample"

    @property
    def numbers(self) -> tuple[int, int]:
        if not self.draws_trees:
            return super().numbers
        return self.budget or self._most, (self.k + 1) * (self.branches + 1)

    def reading_on(self, target: Any, context: Any, forward: Any) -> Drafter:
        """A drafter that reads the target's context on with this forward."""
        if self.branches > 1:
            kept = ("budget", self)
            if not self.remember or kept not in target.kept:
                target.kept[kept] = clocks.Budget(self.budget, self._most)
            budget = target.kept[kept]
            if self.draws_trees:
                return DrawnTree(context.lent(forward), self.shape, branches=self.branches, budget=budget)
            return Branching(context.lent(forward), _plain, branches=self.branches, budget=budget)
        return self.autoregressive(SharedMemory, context.lent(forward))


def _plain(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1)
