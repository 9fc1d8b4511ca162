"""Training a drafter: random anchors in texts of the target's own, and the tokens behind each of them to guess.

Chen, Liang, Liu 2026 (arXiv 2602.06036), section 4: an anchor is a token of an answer, and the block behind it all
masks; the block sees the context strictly before its anchor, and itself. The loss is the cross-entropy of the token at
each place, weighted exp(-(place - 1) / gamma), for a guess is of no use where one before it is wrong. Mixed with it, if
asked for, is the cross-entropy with the law that the target has there (distillation, which the paper does not do): it
says more of each of the few texts that a small machine has time for.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from decodathlon.decoders.dflash import features
from decodathlon.decoders.dflash.features import Seen
from decodathlon.decoders.dflash.network import Network, seen

Say = Callable[[str], None]
#: Seconds between two lines, and between two looks at texts that were held out.
SAY_EVERY, CHECK_EVERY = 30.0, 600.0
#: What becomes of a guess whose place is behind the end of the text.
NOTHING = -100


@dataclass(frozen=True)
class Recipe:
    """How a drafter is trained; what it looks like is its config."""

    steps: int = 6000
    #: Texts of a step, and anchors in each of them.
    texts: int = 8
    anchors: int = 16
    rate: float = 6e-4
    warm: float = 0.04
    clip: float = 1.0
    decay: float = 0.01
    #: Of the weights by place; 0: the paper's for this block (7 for 16, 5 for 10, 4 for 8).
    gamma: float = 0.0
    #: The loss compares with the tokens of the step, the most frequent ones of the texts and as many drawn anew in each
    #: step, this many of either; 0: with the whole vocabulary.
    classes: int = 0
    #: Share of the cross-entropy with the target's law in the loss; the rest is that with its token.
    soft: float = 0.0
    seed: int = 0

    def weights(self, block: int) -> Tensor:
        """(b - 1,) by place."""
        gamma = self.gamma or {16: 7.0, 10: 5.0, 8: 4.0}.get(block, block * 7 / 16)
        return torch.exp(-torch.arange(block - 1) / gamma)


@torch.no_grad()
def begin_as(network: Network, target: Any) -> None:
    """Let the drafter's blocks begin as the target's last ones, and see the latest of its hidden states alone.

    Only what the target's blocks have under the same names and of the same shapes; the rest stays random. Queries and
    keys are normed here and perhaps not there, so the weights of their norms take the size that they have there.
    """
    body = getattr(target.model, "model", None)
    if not hasattr(body, "layers") or not hasattr(body, "norm"):
        return
    for mine, theirs in zip(reversed(network.layers), reversed(body.layers), strict=False):
        for name, parameter in mine.named_parameters():
            try:
                own = theirs.get_parameter(name)
            except AttributeError:
                continue
            if own.shape == parameter.shape:
                parameter.copy_(own)
        if hasattr(theirs, "self_attn") and not hasattr(theirs.self_attn, "q_norm"):
            scale = theirs.input_layernorm.weight.float()
            for norm, projection in (("q_norm", "q_proj"), ("k_norm", "k_proj")):
                weight = getattr(theirs.self_attn, projection).weight.float() * scale
                # of inputs that are normed and independent
                getattr(mine.self_attn, norm).weight.fill_(float(weight.square().sum(1).mean().sqrt()))
    network.norm.weight.copy_(body.norm.weight)
    width = network.config.hidden_size
    network.fc.weight.mul_(0.1)
    network.fc.weight[:, -width:] += torch.eye(width)
    network.hidden_norm.weight.copy_(network.layers[0].input_layernorm.weight)


class Trainer:
    """One training, which can be left and taken up at any step.

    Args:
        network: in float32; it is changed.
        embedding: the target's (V, E).
        head: its output matrix (V, E).
        folder: of shards of hidden states (`features`).
        shards: numbers of those to train on.
        held_out: texts that are not.
    """

    def __init__(
        self, network: Network, embedding: Tensor, head: Tensor, folder: Path, shards: Sequence[int],
        held_out: Sequence[Seen], recipe: Recipe,
    ) -> None:  # fmt: skip
        self.network, self.embedding, self.head = network.train().requires_grad_(True), embedding, head
        self.folder, self.shards, self.held_out, self.recipe = folder, list(shards), list(held_out), recipe
        self.device = embedding.device
        self.step, self.spent = 0, 0.0
        self.history: list[dict[str, float]] = []
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.rate, weight_decay=recipe.decay)
        self.frequent = torch.zeros(0, dtype=torch.long)
        self._texts: list[Seen] = []

    # -- the loop -----------------------------------------------------------------------------------------------

    def run(self, state: Path, say: Say, *, until: float = math.inf) -> bool:
        """Train to the last step or until that time of `time.monotonic`. True when done.

        What was reached is kept in `state`, now and then, at the end, and when the work is interrupted.
        """
        self.load(state)
        if self.recipe.classes:
            self.frequent = self._most_frequent()
        first = self.step
        try:
            self._to(until, state, say)
        finally:
            if self.step > first:
                self.save(state)
        if self.step > first:
            self._check(say)
            self.save(state)
        return self.step >= self.recipe.steps

    def _to(self, until: float, state: Path, say: Say) -> None:
        began = said = checked = time.monotonic()
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
            if now - checked > CHECK_EVERY:
                self._check(say)
                self.save(state)
                checked = time.monotonic()

    def _check(self, say: Say) -> None:
        if not self.held_out:
            return
        found = tau(self.network, self.embedding, self.head, self.held_out)
        self.history.append({"step": self.step, "tau": found, "minutes": self.spent / 60})
        say(f"  step {self.step}: {found:.3f} tokens per cycle on {len(self.held_out)} texts that were held out")

    def _one(self) -> float:
        """One step; returns the loss."""
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.step)
        texts = self._some(generator)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate * self.schedule(self.step)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            loss = self.loss(texts, generator)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.step += 1
        return float(loss.detach())

    def schedule(self, step: int) -> float:
        """Of the learning rate: up in a straight line, down along a cosine."""
        warm = max(1, round(self.recipe.warm * self.recipe.steps))
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.recipe.steps - warm)))

    def _some(self, generator: torch.Generator) -> list[Seen]:
        """Texts of this step: all of some shards, mixed, before those of others. It follows from the step alone."""
        per_shard = max(1, 32 // self.recipe.texts)
        turn, within = divmod(self.step, per_shard * 4)
        if within == 0 or not self._texts:
            own = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + 7 * turn + 1)
            chosen = torch.randperm(len(self.shards), generator=own)[:4].tolist()
            self._texts = [s for i in chosen for s in features.load(self.folder, self.shards[i]) if _long(s)]
        picked = torch.randint(len(self._texts), (self.recipe.texts,), generator=generator).tolist()
        return [self._texts[i] for i in picked]

    # -- the loss -----------------------------------------------------------------------------------------------

    def loss(self, texts: Sequence[Seen], generator: torch.Generator) -> Tensor:
        """Weighted cross-entropy of the guesses behind random anchors."""
        block = self.network.config.block_size
        anchors = [
            s.begin + torch.randint(len(s.tokens) - 1 - s.begin, (self.recipe.anchors,), generator=generator)
            for s in texts
        ]
        outputs = guesses(self.network, self.embedding, texts, anchors)  # (A, b - 1, E)
        targets = torch.cat([_behind(s, at, block) for s, at in zip(texts, anchors, strict=True)]).to(self.device)
        weights = self.recipe.weights(block).to(self.device).expand(targets.shape)
        there = targets != NOTHING
        outputs, targets, weights = outputs[there], targets[there], weights[there]
        head, targets = self._classes(targets, generator)
        logits = self.network.logits(outputs, lambda x: F.linear(x, head))
        found = F.cross_entropy(logits, targets, reduction="none")
        if self.recipe.soft:
            last = torch.cat([_before(s.last, at, block) for s, at in zip(texts, anchors, strict=True)]).to(self.device)
            with torch.no_grad():
                law = self.network.logits(last[there].to(outputs.dtype), lambda x: F.linear(x, head)).softmax(-1)
            found = torch.lerp(found, F.cross_entropy(logits, law, reduction="none"), self.recipe.soft)
        return (found * weights).sum() / weights.sum()

    def _classes(self, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The rows of the head that the loss looks at, and the targets among them."""
        if not self.recipe.classes:
            return self.head, targets
        drawn = torch.randint(len(self.head), (self.recipe.classes,), generator=generator)
        chosen = torch.cat([targets.cpu(), self.frequent, drawn]).unique().to(self.device)
        return self.head[chosen], torch.searchsorted(chosen, targets)

    def _most_frequent(self) -> Tensor:
        counts = torch.zeros(len(self.head), dtype=torch.long)
        for number in self.shards:
            for text in features.load(self.folder, number):
                counts += torch.bincount(text.tokens[text.begin :], minlength=len(counts))
        return counts.topk(min(self.recipe.classes, len(counts))).indices

    # -- keeping it ---------------------------------------------------------------------------------------------

    def save(self, state: Path) -> None:
        work = state.with_suffix(".part")
        kept = {
            "recipe": asdict(self.recipe), "config": self.network.config.as_json(), "step": self.step,
            "network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(),
            "history": json.dumps(self.history), "spent": self.spent, "shards": self.shards,
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
                f"{state} is of a training on {len(kept['shards'])} shards of texts, not {len(self.shards)}; go on "
                "with the same options, or take another folder"
            )
        own = {"recipe": asdict(self.recipe), "config": self.network.config.as_json()}
        for what, mine in own.items():
            changed = [name for name, value in mine.items() if kept[what].get(name) != value]
            if changed:
                raise ValueError(
                    f"{state} is of a training with {changed[0]}={kept[what].get(changed[0])}, not {mine[changed[0]]}; "
                    "go on with the same options, or take another folder"
                )
        self.step, self.spent = kept["step"], kept["spent"]
        self.history = json.loads(kept["history"])
        self.network.load_state_dict(kept["network"])
        self.optimizer.load_state_dict(kept["optimizer"])


def _long(text: Seen) -> bool:
    return len(text.tokens) - text.begin >= 2


def _behind(text: Seen, anchors: Tensor, block: int) -> Tensor:
    """(A, b - 1) the tokens behind each anchor; NOTHING behind the end of the text."""
    padded = F.pad(text.tokens, (0, block), value=NOTHING)
    return padded[anchors[:, None] + torch.arange(1, block)]


def _before(last: Tensor, anchors: Tensor, block: int) -> Tensor:
    """(A, b - 1, E) the states from which the target drew the tokens behind each anchor."""
    return F.pad(last, (0, 0, 0, block))[anchors[:, None] + torch.arange(block - 1)]


def guesses(network: Network, embedding: Tensor, texts: Sequence[Seen], anchors: Sequence[Tensor]) -> Tensor:
    """(A, b - 1, E) outputs for the places behind each anchor, the texts' anchors one text after the other.

    What `Memory` does token by token, for all anchors at once; a test holds the two together.
    """
    config, device = network.config, embedding.device
    b = config.block_size
    width = max(len(s.tokens) for s in texts)
    states = torch.stack([F.pad(s.states, (0, 0, 0, width - len(s.states))) for s in texts]).to(device)
    read = network.read(network.context(states.to(network.norm.weight.dtype)), torch.arange(width, device=device)[None])
    own = torch.cat([torch.full((len(a),), i) for i, a in enumerate(anchors)]).to(device)
    at = torch.cat(list(anchors)).to(device)
    first = torch.cat([s.tokens[a] for s, a in zip(texts, anchors, strict=True)]).to(device)
    tokens = torch.cat([first[:, None], torch.full((len(first), b - 1), config.mask_token_id, device=device)], 1)
    places = at[:, None] + torch.arange(b, device=device)
    slots = torch.cat([torch.arange(width, device=device).expand(len(at), -1), places], 1)
    there = torch.cat([slots[:, :width] < at[:, None], torch.ones_like(places, dtype=torch.bool)], 1)

    def attended(number: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        before_keys, before_values = read[number]
        attention = network.layers[number].self_attn
        return (
            torch.cat([before_keys[own], keys], 2),
            torch.cat([before_values[own], values], 2),
            seen(places[:, :, None], slots[:, None], there[:, None], attention.window, attention.causal),
        )

    return network.block(F.embedding(tokens, embedding), places, attended)[:, 1:]


@torch.no_grad()
def tau(network: Network, embedding: Tensor, head: Tensor, texts: Sequence[Seen]) -> float:
    """Tokens per cycle, the target's own one included, if these texts were decoded: what greedy search wrote is what
    the target would draw. Cycles that the end of a text cuts short are left out."""
    block, made, cycles = network.config.block_size, 0, 0
    network.eval()
    for text in texts:
        last = len(text.tokens) - block
        if last < text.begin:
            continue
        anchors = torch.arange(text.begin, last + 1)
        found = []
        with torch.autocast(embedding.device.type, dtype=torch.bfloat16):
            for some in anchors.split(32):  # the logits of all at once would be large
                outputs = guesses(network, embedding, [text], [some])
                found.append(network.logits(outputs, lambda x: F.linear(x, head)).argmax(-1).cpu())
        best = torch.cat(found)
        stay = (best == _behind(text, anchors, block)).long().cumprod(1).sum(1)
        at = 0
        while at < len(anchors):
            made, cycles = made + int(stay[at]) + 1, cycles + 1
            at += int(stay[at]) + 1
    network.train()
    return made / max(1, cycles)
