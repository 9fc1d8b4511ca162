"""Part of the target's layers as its drafter: the first ones, or all but some that matter little."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from decodathlon.decoders.speculative.base import SELF_BOUNDS, SelfSpeculative, claim
from decodathlon.decoders.speculative.drafter import Drafter
from decodathlon.decoders.speculative.made import Made
from decodathlon.harness.decoder import decoder
from decodathlon.harness.errors import SpecError
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

#: Texts that the model itself writes, to see which parts matter, and tokens of each.
TEXTS, LENGTH = 4, 48
#: A drafter is judged by cycles of so many drafted tokens.
JUDGED_BY = 3


def without(forward: Any, parts: Sequence[int]) -> Any:
    """The forward without some of its parts: number 2 i is the attention of layer i, 2 i + 1 its MLP."""
    gone = set(parts)
    return forward.replaced(
        [
            replace(
                layer,
                attention=None if 2 * i in gone else layer.attention,
                mlp=None if 2 * i + 1 in gone else layer.mlp,
            )
            for i, layer in enumerate(forward.layers)
        ]
    )


def size(forward: Any) -> int:
    """Weights that a token passes through."""
    weights = [forward.head]
    for layer in forward.layers:
        weights += [] if layer.attention is None else [layer.attention.qkv, layer.attention.out]
        weights += [] if layer.mlp is None else [layer.mlp.gate_up, layer.mlp.down]
    return sum(w.weight.numel() for w in weights)


def written(target: Any, count: int = TEXTS, length: int = LENGTH, *, drawn: bool = False) -> tuple[Tensor, Tensor]:
    """Texts (B, L) that the model writes by itself, behind the likeliest first tokens, and what it finds likeliest
    behind each of their tokens but the first (B, L - 1). They are greedy, or drawn from its law, always the same ones.
    """
    start = target.start_token if target.start_token is not None else 0
    many, length = min(count, target.vocab_size), min(length, target.context_length)
    firsts = target.open([[start]], capacity=2).next_logits[0].topk(many).indices
    texts = torch.stack([torch.full_like(firsts, start), firsts], 1).cpu()
    context = target.open(texts.tolist(), capacity=length)
    source = torch.Generator().manual_seed(0)
    likeliest = [context.next_logits.argmax(-1).cpu()]
    while texts.shape[1] < length:
        chosen = likeliest[-1][:, None]
        if drawn:
            chosen = torch.multinomial(context.next_logits.float().softmax(-1).cpu(), 1, generator=source)
        texts = torch.cat([texts, chosen], 1)
        context.extend(chosen)
        context.keep(1)
        likeliest.append(context.next_logits.argmax(-1).cpu())
    return texts, torch.stack(likeliest, 1)


def agreement(target: Any, forward: Any, texts: Tensor, truth: Tensor) -> float:
    """How often another forward finds the same token likeliest, reading what the target has read before."""
    context = target.open([row[:1].tolist() for row in texts], capacity=texts.shape[1])
    guess = context.lent(forward).extend(texts[:, 1:]).logits.argmax(-1).cpu()
    return float((guess == truth).double().mean())


def skipped(target: Any) -> list[int]:
    """The parts that the drafter is best without: in the order of how little each matters alone, as many as pay
    together.

    A set that leaves a share c of the weights and an agreement a makes (1 + a + ... + a^k) / (k c + 1) tokens in the
    time of one, k = 3. Draft & Verify (arXiv 2309.08168) searches the sets by measured speed; this asks each part
    once, and each beginning of their order once.
    """
    texts, truth = written(target)
    whole = target.lean
    alone = [(agreement(target, without(whole, [part]), texts, truth), part) for part in range(2 * len(whole.layers))]
    order = [part for _, part in sorted(alone, reverse=True)]
    best, best_gain, weights = 1, 0.0, size(whole)
    for count in range(1, len(order)):
        less = without(whole, order[:count])
        a = agreement(target, less, texts, truth)
        gain = sum(a**j for j in range(JUDGED_BY + 1)) / (JUDGED_BY * size(less) / weights + 1)
        if gain > best_gain:
            best, best_gain = count, gain
    return sorted(order[:best])


@decoder(
    "early-exit",
    claim=claim,
    family="speculative",
    bounds={**SELF_BOUNDS, "layers": "[0, 1000]"},
    sweep={"k": [1, 2, 4], "layers": [4, 8, 16]},
    paper="Elhoushi et al. 2024, LayerSkip (arXiv 2404.16710)",
)
class EarlyExit(SelfSpeculative):
    """The first `layers` of the target (0: half of them), its last norm and its head draft. Made for models that were
    trained to be left early; the others lose most of what they know."""

    k: int = 2
    layers: int = 0

    def check(self, target: Any) -> None:
        super().check(target)
        if self.layers >= (count := len(target.lean.layers)):
            raise SpecError(f"{self.spec}: {target.name} has {count} layers, and a drafter has fewer")

    def drafter(self, target: Any, context: Any, prompts: Sequence[Sequence[int]]) -> Drafter:
        first = self.layers or target.layers // 2
        return self.reading_on(target, context, without(target.lean, range(2 * first, 2 * target.layers)))


@decoder(
    "layer-skip",
    claim=claim,
    family="speculative",
    bounds=SELF_BOUNDS,
    sweep={"k": [1, 2, 4]},
    paper="Zhang et al. 2023, Draft & Verify (arXiv 2309.08168)",
)
class LayerSkip(Made, SelfSpeculative):
    """The target without those attentions and MLPs that it agrees with itself without. Which, is found once per
    model, on texts that it writes."""

    k: int = 2

    small: ClassVar[bool] = True

    def drafter(self, target: Any, context: Any, prompts: Sequence[Sequence[int]]) -> Drafter:
        return self.reading_on(target, context, self.made(target))

    @property
    def recipe(self) -> Mapping[str, Any]:
        return {"kind": "layer-skip"}

    def layers(self, target: Any) -> Iterator[Any]:
        return iter(without(target.lean, skipped(target)).layers)
