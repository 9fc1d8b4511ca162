"""A physically smaller copy of the target as its drafter: whole groups of heads and channels are gone.

Fewer heads make other keys and values, so this drafter has a memory of its own and reads the prompt itself. A group
of heads is one key head with the query heads that share it; a channel is one input of the MLP's last matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from decodathlon.decoders.speculative.base import BOUNDS, Speculative, claim
from decodathlon.decoders.speculative.drafter import Drafter, OwnMemory
from decodathlon.decoders.speculative.made import Made
from decodathlon.decoders.speculative.sparse import calibration
from decodathlon.harness.decoder import decoder
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """Mean and variance (I,) of what goes into a matrix, and how much the loss feels each input (I,)."""

    mean: Tensor
    variance: Tensor
    slope: Tensor


class Gated:
    """A matrix whose inputs are multiplied by ones, so that the loss has a slope along each."""

    def __init__(self, dense: Any) -> None:
        self.dense = dense
        self.gate = torch.ones(dense.weight.shape[1], dtype=torch.float32, device=dense.weight.device)
        self.gate.requires_grad_(True)
        self.seen: Tensor = torch.empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        self.seen = x.detach().reshape(-1, x.shape[-1]).float()
        found: Tensor = self.dense(x * self.gate.to(x.dtype))
        return found

    @property
    def inputs(self) -> Inputs:
        grad = self.gate.grad
        assert grad is not None
        return Inputs(self.seen.mean(0), self.seen.var(0), grad.abs())


def observed(target: Any, texts: Tensor) -> list[tuple[Inputs, Inputs]]:
    """By layer, of the inputs of the attention's and the MLP's last matrix: moments, and the slope of the
    log-probability of the texts (B, L) along each (a single shot: Michel, Levy, Neubig 2019, arXiv 1905.10650)."""
    layers = [
        replace(
            layer,
            attention=replace(layer.attention, out=Gated(layer.attention.out)),
            mlp=replace(layer.mlp, down=Gated(layer.mlp.down)),
        )
        for layer in target.lean.layers
    ]
    context = target.open([row[:1].tolist() for row in texts], capacity=texts.shape[1])
    reading = context.lent(target.lean.replaced(layers))
    with torch.enable_grad():
        logits = reading.extend(texts[:, 1:]).logits[:, :-1]
        law = logits.log_softmax(-1).gather(2, texts[:, 2:, None].to(logits.device))
        law.sum().backward()
    return [(layer.attention.out.inputs, layer.mlp.down.inputs) for layer in layers]


def scores(dense: Any, inputs: Inputs, method: str) -> Tensor:
    """(I,) how much each input matters: `flap` what of the output varies with it, Var(x_j) sum_i W_ij^2 (An et al.
    2023, arXiv 2312.11983); `gradient` how much the loss feels it."""
    if method == "gradient":
        return inputs.slope
    return inputs.variance * dense.weight.float().square().sum(0)


def smaller(target: Any, method: str, share: float) -> Any:
    """The target's forward with about this share of its layers' weights left out.

    Scores are standardised within each layer and kind of matrix, as in FLAP, and what is lowest by weight goes
    first, over all layers. A layer keeps one group of heads and one channel. What the left-out inputs are on average
    is added as a bias.
    """
    forward = target.lean
    seen = observed(target, calibration(target))
    D, per_group = forward.width, forward.heads // forward.key_heads
    units: list[tuple[float, int, str, int, int]] = []
    whole = 0
    for i, (layer, (heads, channels)) in enumerate(zip(forward.layers, seen, strict=True)):
        E = layer.attention.out.weight.shape[0]
        by_group = scores(layer.attention.out, heads, method).view(forward.key_heads, per_group * D).mean(1)
        by_channel = scores(layer.mlp.down, channels, method)
        group, channel = D * E * (2 * per_group + 2), 3 * E
        for kind, found, size in (("heads", by_group, group), ("channels", by_channel, channel)):
            units += [(z, i, kind, k, size) for k, z in enumerate(_standardised(found).tolist())]
            whole += size * len(found)
    gone: dict[tuple[int, str], set[int]] = {}
    left = share * whole
    most = {"heads": forward.key_heads - 1, "channels": 0}
    for _, i, kind, k, size in sorted(units):
        mine = gone.setdefault((i, kind), set())
        limit = most["heads"] if kind == "heads" else forward.layers[i].mlp.down.weight.shape[1] - 1
        if size <= left and len(mine) < limit:
            mine.add(k)
            left -= size
    layers = [
        _without(forward, layer, heads, channels, gone.get((i, "heads"), set()), gone.get((i, "channels"), set()))
        for i, (layer, (heads, channels)) in enumerate(zip(forward.layers, seen, strict=True))
    ]
    return forward.replaced(layers)


def _standardised(found: Tensor) -> Tensor:
    spread = found.std() if len(found) > 1 else found.new_zeros(())
    return (found - found.mean()) / spread.clamp(min=1e-12)


def _without(forward: Any, layer: Any, heads: Inputs, channels: Inputs, groups: set[int], gone: set[int]) -> Any:
    """A layer without these groups of heads and channels; what stays is copied, so that it takes less memory."""
    H, K, D = forward.heads, forward.key_heads, forward.width
    each, a, m = H // K, layer.attention, layer.mlp
    kept = [k for k in range(K) if k not in groups]
    queries = [h * D + d for k in kept for h in range(k * each, (k + 1) * each) for d in range(D)]
    keys = [H * D + k * D + d for k in kept for d in range(D)]
    values = [(H + K) * D + k * D + d for k in kept for d in range(D)]
    inner = m.down.weight.shape[1]
    stay = [j for j in range(inner) if j not in gone]
    return replace(
        layer,
        attention=replace(
            a, qkv=_rows(a.qkv, [*queries, *keys, *values]), out=_columns(a.out, queries, heads.mean),
            heads=len(kept) * each, key_heads=len(kept),
        ),
        mlp=replace(
            m, gate_up=_rows(m.gate_up, [*stay, *(inner + j for j in stay)]), down=_columns(m.down, stay, channels.mean)
        ),
    )  # fmt: skip


def _rows(dense: Any, rows: Sequence[int]) -> Any:
    bias = None if dense.bias is None else dense.bias[list(rows)].clone()
    return type(dense)(dense.weight[list(rows)].clone(), bias)


def _columns(dense: Any, columns: Sequence[int], mean: Tensor) -> Any:
    """The matrix on these inputs; the others count by their mean."""
    mask = torch.ones(dense.weight.shape[1], dtype=torch.bool)
    mask[list(columns)] = False
    instead = (dense.weight[:, mask].float() @ mean[mask]).to(dense.weight.dtype)
    bias = instead if dense.bias is None else dense.bias + instead
    return type(dense)(dense.weight[:, list(columns)].clone(), bias if bool(mask.any()) else dense.bias)


@decoder(
    "structured-self",
    claim=claim,
    family="speculative",
    bounds={**BOUNDS, "share": "[0, 0.95]"},
    sweep={"share": [0.2, 0.4, 0.6], "method": ["flap", "gradient"], "k": [1, 2, 4]},
    paper="An et al. 2023, FLAP (arXiv 2312.11983); Michel, Levy, Neubig 2019 (arXiv 1905.10650)",
)
class StructuredSelf(Made, Speculative):
    """The target without the groups of heads and the channels that matter least drafts, as a smaller model with its own
    memory: `share` of the layers' weights is left out, by `flap` or by `gradient`, judged on texts that it writes."""

    k: int = 2
    share: float = 0.3
    method: Literal["flap", "gradient"] = "flap"
    proposal: Literal["sample", "guess"] = "sample"
    weights: str = ""

    def drafter(self, target: Any, context: Any, prompts: Sequence[Sequence[int]]) -> Drafter:
        own = target.open(prompts, capacity=context.capacity, forward=self.made(target))
        return self.autoregressive(OwnMemory, own)

    @property
    def recipe(self) -> Mapping[str, Any]:
        return {"kind": self.method, "share": self.share}

    def layers(self, target: Any) -> Iterator[Any]:
        return iter(smaller(target, self.method, self.share).layers)
