"""The loop of a training, which can be left and taken up at any step; and the part of a loss that methods share."""

from __future__ import annotations

import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from decodathlon.decoders.training import features
from decodathlon.decoders.training.features import Seen

Say = Callable[[str], None]
#: Seconds between two lines, and between two looks at texts that were held out.
SAY_EVERY, CHECK_EVERY = 30.0, 600.0
#: Shards that the texts of some steps come from.
MIXED = 4


@dataclass(frozen=True)
class Recipe:
    """How a drafter is trained; what it looks like is another matter."""

    steps: int = 6000
    #: Of a step.
    texts: int = 8
    rate: float = 6e-4
    #: Share of the steps in which the rate rises.
    warm: float = 0.04
    clip: float = 1.0
    decay: float = 0.01
    #: The loss compares with the tokens of the step, the most frequent ones of the texts and as many drawn anew in each
    #: step, this many of either; 0: with the whole vocabulary.
    classes: int = 0
    #: Share of the cross-entropy with the target's law in the loss; the rest is that with its token.
    soft: float = 0.0
    seed: int = 0


class Trainer(ABC):
    """One training.

    Args:
        network: what is trained, its parameters in float32.
        head: the target's output matrix (V, E).
        folder: of shards of hidden states (`features`).
        shards: numbers of those to train on, in an order that does not change.
        held_out: texts that are not.
        identity: what a training must be of to be taken up, besides its recipe.
    """

    #: What is looked at in the texts held out: its name, and what the number counts.
    watched: ClassVar[tuple[str, str]]

    def __init__(
        self, network: torch.nn.Module, head: Tensor, folder: Path, shards: Sequence[int], held_out: Sequence[Seen],
        recipe: Recipe, identity: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.head, self.folder, self.shards = head, folder, list(shards)
        self.held_out, self.recipe, self.identity = list(held_out), recipe, dict(identity)
        self.trained, self.device = network, head.device
        self.step, self.spent = 0, 0.0
        self.history: list[dict[str, float]] = []
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.rate, weight_decay=recipe.decay)
        self.frequent = torch.zeros(0, dtype=torch.long)
        #: Whether what there is may be kept: no step is half made, and the loss is a number.
        self._whole = True
        self._order: list[tuple[int, int]] = []
        self._loaded: dict[int, list[Seen]] = {}
        self._counts = [features.long_enough(folder, number) for number in shards]

    @abstractmethod
    def loss(self, texts: Sequence[Seen], generator: torch.Generator) -> Tensor:
        """Of one step."""

    @abstractmethod
    def look(self) -> float:
        """What is `watched`, on the texts held out."""

    def run(self, state: Path, say: Say, *, until: float = math.inf) -> bool:
        """Train to the last step or until that time of `time.monotonic`. True when done.

        What was reached is kept in `state`, now and then, at the end, and when the work is interrupted.

        Raises:
            ValueError: the state is of another training, or the loss is no number any more.
        """
        self.load(state)
        if self.recipe.classes:
            self.frequent = self._most_frequent()
        first = self.step
        try:
            self._to(until, state, say)
        finally:
            if self.step > first and self._whole and self._sound():
                self.save(state)
        if self.step > first:
            self.note(say)
            self.save(state)
        return self.step >= self.recipe.steps

    def _to(self, until: float, state: Path, say: Say) -> None:
        began = said = looked = time.monotonic()
        losses: list[float] = []
        first = self.step
        while self.step < self.recipe.steps and time.monotonic() < until:
            before = time.monotonic()
            losses.append(self._one())
            now = time.monotonic()
            self.spent += now - before
            if now - said > SAY_EVERY:
                left = (now - began) / (self.step - first) * (self.recipe.steps - self.step)
                say(
                    f"  step {self.step} of {self.recipe.steps}, loss {sum(losses) / len(losses):.3f}, "
                    f"about {left / 60:.0f} min left"
                )
                said, losses = now, []
            if now - looked > CHECK_EVERY:
                self.note(say)
                self.save(state)
                looked = time.monotonic()

    def note(self, say: Say) -> None:
        """Look, say what was found, and write it down."""
        if not self.held_out:
            return
        name, what = self.watched
        self.trained.eval()
        with torch.no_grad():
            found = self.look()
        self.trained.train()
        self.history.append({"step": self.step, name: found, "minutes": self.spent / 60})
        say(f"  step {self.step}: {found:.3f} {what} on {len(self.held_out)} texts that were held out")

    def _one(self) -> float:
        """One step; returns the loss."""
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.step)
        texts = self._some()
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate * self.schedule(self.step)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            loss = self.loss(texts, generator)
        found = float(loss.detach())
        if not math.isfinite(found):
            self._whole = False  # the step before may have spoilt the parameters
            raise ValueError(f"the loss of step {self.step} is {found}; take a smaller --rate, and another folder")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained.parameters(), self.recipe.clip)
        self._whole = False  # an interrupt in here leaves parameters of two steps, which nobody may keep
        self.optimizer.step()
        self.step += 1
        self._whole = True
        return found

    def schedule(self, step: int) -> float:
        """Of the learning rate: up in a straight line, down along a cosine."""
        warm = max(1, round(self.recipe.warm * self.recipe.steps))
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.recipe.steps - warm)))

    def _some(self) -> list[Seen]:
        """Texts of this step. All come once before any comes twice, in another order each time, some shards after the
        others; the few that fill no step sit that turn out. It follows from the step alone."""
        turn, within = divmod(self.step, max(1, sum(map(len, self._counts)) // self.recipe.texts))
        if within == 0 or not self._order:
            self._order = self._ordered(turn)
        begin = within * self.recipe.texts
        picked = [self._order[(begin + i) % len(self._order)] for i in range(self.recipe.texts)]
        wanted = {shard for shard, _ in picked}
        self._loaded = {k: v for k, v in self._loaded.items() if k in wanted or len(self._loaded) < 2 * MIXED}
        for shard in wanted - self._loaded.keys():
            self._loaded[shard] = features.load(self.folder, self.shards[shard])
        return [self._loaded[shard][text] for shard, text in picked]

    def _ordered(self, turn: int) -> list[tuple[int, int]]:
        """Places of all texts in the shards, those of a few shards mixed."""
        own = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + 7 * turn + 1)
        shards = torch.randperm(len(self.shards), generator=own).tolist()
        found: list[tuple[int, int]] = []
        for at in range(0, len(shards), MIXED):
            some = [(shard, text) for shard in shards[at : at + MIXED] for text in self._counts[shard]]
            found += [some[i] for i in torch.randperm(len(some), generator=own).tolist()]
        return found

    # -- the loss -----------------------------------------------------------------------------------------------

    def errors(
        self, outputs: Tensor, last: Tensor, tokens: Tensor, generator: torch.Generator,
        logits: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor] = lambda outputs, head: head(outputs),
    ) -> Tensor:  # fmt: skip
        """(N,) cross-entropies of what `outputs` (N, E) guess: with `tokens` (N,), mixed with those with the target's
        laws, which it makes of its own states `last` (N, E).

        Args:
            logits: from outputs and the head to logits, where these are scaled or capped.
        """
        head, tokens = self._classes(tokens, generator)
        mine = logits(outputs, lambda x: F.linear(x, head))
        found = F.cross_entropy(mine.float(), tokens, reduction="none")
        if self.recipe.soft:
            with torch.no_grad():
                law = logits(last.to(outputs.dtype), lambda x: F.linear(x, head)).float().softmax(-1)
            found = torch.lerp(found, F.cross_entropy(mine.float(), law, reduction="none"), self.recipe.soft)
        return found

    def _classes(self, tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The rows of the head that the loss looks at, and the tokens among them."""
        if not self.recipe.classes:
            return self.head, tokens
        drawn = torch.randint(len(self.head), (self.recipe.classes,), generator=generator)
        chosen = torch.cat([tokens.cpu(), self.frequent, drawn]).unique().to(self.device)
        return self.head[chosen], torch.searchsorted(chosen, tokens)

    def _most_frequent(self) -> Tensor:
        counts = torch.zeros(len(self.head), dtype=torch.long)
        for number in self.shards:
            for text in features.load(self.folder, number):
                counts += torch.bincount(text.tokens[text.begin :], minlength=len(counts))
        return counts.topk(min(self.recipe.classes, len(counts))).indices

    # -- keeping it ---------------------------------------------------------------------------------------------

    def _sound(self) -> bool:
        return all(bool(p.isfinite().all()) for p in self.trained.parameters())

    def save(self, state: Path) -> None:
        """
        Raises:
            ValueError: the last step has spoilt the parameters; what was kept before stays.
        """
        if not self._sound():
            raise ValueError(
                f"parameters are no numbers any more after step {self.step}; {state} is what was kept before, if it is "
                "there. Take another folder and a lower --rate"
            )
        work = state.with_suffix(".part")
        kept = {
            "recipe": asdict(self.recipe), "of": self.identity, "step": self.step, "shards": self.shards,
            "network": self.trained.state_dict(), "optimizer": self.optimizer.state_dict(),
            "history": json.dumps(self.history), "spent": self.spent,
        }  # fmt: skip
        torch.save(kept, work)
        os.replace(work, state)

    def load(self, state: Path) -> None:
        """
        Raises:
            ValueError: the state is of another recipe, or of a drafter of another shape.
        """
        if not state.exists():
            return
        kept = torch.load(state, weights_only=True, map_location=self.device)
        if kept["shards"] != self.shards:
            raise ValueError(
                f"{state} is of a training on other shards of texts ({len(kept['shards'])} then, {len(self.shards)} "
                "now); go on with the same options, or take another folder"
            )
        if kept["of"].get("texts") != self.identity.get("texts"):
            raise ValueError(
                f"{state} is of a training on other texts: their lines (--about, --behind) are others, or the folder "
                "of --data leaves others out; go on with the same options, or take another folder"
            )
        own = {"recipe": asdict(self.recipe), "of": self.identity}
        for what, mine in own.items():
            changed = [name for name, value in mine.items() if kept[what].get(name) != value]
            if changed:
                raise ValueError(
                    f"{state} is of a training with {changed[0]}={kept[what].get(changed[0])}, not {mine[changed[0]]}; "
                    "go on with the same options, or take another folder"
                )
        self.step, self.spent = kept["step"], kept["spent"]
        self.history = json.loads(kept["history"])
        try:
            self.trained.load_state_dict(kept["network"])
        except RuntimeError as error:
            raise ValueError(f"{state} is of a drafter of another shape; take another folder") from error
        self.optimizer.load_state_dict(kept["optimizer"])
