"""Training a drafter: random anchors in texts of the target's own, and the tokens behind each of them to guess.

Chen, Liang, Liu 2026 (arXiv 2602.06036), section 4: an anchor is a token of an answer, and the block behind it all
masks; the block sees the context strictly before its anchor, and itself. The loss is the cross-entropy of the token at
each place, weighted exp(-(place - 1) / gamma), for a guess is of no use where one before it is wrong. Mixed with it, if
asked for, is the cross-entropy with the law that the target has there (distillation, which the paper does not do): it
says more of each of the few texts that a small machine has time for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from decodathlon.decoders.dflash.network import Network, seen
from decodathlon.decoders.training import trainer
from decodathlon.decoders.training.features import Seen

#: What becomes of a guess whose place is behind the end of the text.
NOTHING = -100


@dataclass(frozen=True)
class Recipe(trainer.Recipe):
    """How a drafter is trained; what it looks like is its config."""

    #: Of each text of a step.
    anchors: int = 16
    #: Of the weights by place; 0: the paper's for this block (7 for 16, 5 for 10, 4 for 8).
    gamma: float = 0.0
    #: Share of the steps in which blocks are half as long: cheaper, for the places that are reached most often, and so
    #: that the drafter knows such blocks.
    short: float = 0.0

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


class Trainer(trainer.Trainer):
    """One training of a network, which is changed; `embedding` is the target's (V, E), `texts` a hash of them all."""

    watched = "tau", "tokens per cycle"
    recipe: Recipe

    def __init__(
        self, network: Network, embedding: Tensor, head: Tensor, folder: Path, shards: Sequence[int],
        held_out: Sequence[Seen], recipe: Recipe, texts: str = "",
    ) -> None:  # fmt: skip
        network.train().requires_grad_(True)
        super().__init__(network, head, folder, shards, held_out, recipe, {**network.config.as_json(), "texts": texts})
        self.network, self.embedding = network, embedding

    def look(self) -> float:
        return tau(self.network, self.embedding, self.head, self.held_out)

    def loss(self, texts: Sequence[Seen], generator: torch.Generator) -> Tensor:
        """Weighted cross-entropy of the guesses behind random anchors."""
        block = self.network.config.block_size
        weights = self.recipe.weights(block).to(self.device)
        if self.recipe.short and float(torch.rand(1, generator=generator)) < self.recipe.short:
            block = max(2, block // 2)
        anchors = [
            s.begin + torch.randint(len(s.tokens) - 1 - s.begin, (self.recipe.anchors,), generator=generator)
            for s in texts
        ]
        outputs = guesses(self.network, self.embedding, texts, anchors, block)  # (A, b - 1, E)
        pairs = list(zip(texts, anchors, strict=True))
        tokens = torch.cat([_behind(s, at, block) for s, at in pairs]).to(self.device)
        last = torch.cat([_before(s.last, at, block) for s, at in pairs]).to(self.device)
        weights = weights[: block - 1].expand(tokens.shape)
        there = tokens != NOTHING
        found = self.errors(outputs[there], last[there], tokens[there], generator, self.network.logits)
        return (found * weights[there]).sum() / weights[there].sum()


def _behind(text: Seen, anchors: Tensor, block: int) -> Tensor:
    """(A, b - 1) the tokens behind each anchor; NOTHING behind the end of the text."""
    padded = F.pad(text.tokens, (0, block), value=NOTHING)
    return padded[anchors[:, None] + torch.arange(1, block)]


def _before(last: Tensor, anchors: Tensor, block: int) -> Tensor:
    """(A, b - 1, E) the states from which the target drew the tokens behind each anchor."""
    return F.pad(last, (0, 0, 0, block))[anchors[:, None] + torch.arange(block - 1)]


def guesses(network: Network, embedding: Tensor, texts: Sequence[Seen], anchors: Sequence[Tensor], b: int) -> Tensor:
    """(A, b - 1, E) outputs for the places behind each anchor, the texts' anchors one text after the other.

    What `Memory` does token by token, for all anchors at once; a test holds the two together.
    """
    config, device = network.config, embedding.device
    width = max(len(s.tokens) for s in texts)
    states = torch.stack([F.pad(s.states, (0, 0, 0, width - len(s.states))) for s in texts]).to(device)
    read = network.read(network.context(states.to(network.norm.weight.dtype)), torch.arange(width, device=device)[None])
    counts = [len(a) for a in anchors]
    # a number goes back by a sum, on a CPU much faster than an index does
    times = counts[0] if len(set(counts)) == 1 else torch.tensor(counts, device=device)
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
            torch.cat([before_keys.repeat_interleave(times, 0), keys], 2),
            torch.cat([before_values.repeat_interleave(times, 0), values], 2),
            seen(places[:, :, None], slots[:, None], there[:, None], attention.window, attention.causal),
        )

    return network.block(F.embedding(tokens, embedding), places, attended)[:, 1:]


@torch.no_grad()
def tau(network: Network, embedding: Tensor, head: Tensor, texts: Sequence[Seen]) -> float:
    """Tokens per cycle, the target's own one included, if these texts were decoded: what greedy search wrote is what
    the target would draw. Cycles that the end of a text cuts short are left out."""
    block, made, cycles = network.config.block_size, 0, 0
    for text in texts:
        last = len(text.tokens) - block
        if last < text.begin:
            continue
        anchors = torch.arange(text.begin, last + 1)
        found = []
        with torch.autocast(embedding.device.type, dtype=torch.bfloat16):
            for some in anchors.split(32):  # the logits of all at once would be large
                outputs = guesses(network, embedding, [text], [some], block)
                found.append(network.logits(outputs, lambda x: F.linear(x, head)).argmax(-1).cpu())
        best = torch.cat(found)
        stay = (best == _behind(text, anchors, block)).long().cumprod(1).sum(1)
        at = 0
        while at < len(anchors):
            made, cycles = made + int(stay[at]) + 1, cycles + 1
            at += int(stay[at]) + 1
    return made / max(1, cycles)
