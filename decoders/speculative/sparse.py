"""The target with part of its weights set to zero, without training, as its drafter.

No kernel here is faster for it: what is measured is how many of its drafts stay, and its speed is the target's. SD2
(arXiv 2504.08838) has hardware on which zeros cost nothing, and repairs the drafter by training.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from decodathlon.decoders.speculative import pruning
from decodathlon.decoders.speculative.base import SELF_BOUNDS, SelfSpeculative, claim
from decodathlon.decoders.speculative.drafter import Drafter
from decodathlon.decoders.speculative.layers import written
from decodathlon.decoders.speculative.made import Made
from decodathlon.harness.decoder import decoder
from decodathlon.harness.errors import SpecError
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Method = Literal["magnitude", "wanda", "sparsegpt"]


#: What inputs are looked at in: texts, and tokens of each. Drawn ones, for greedy ones repeat themselves.
TEXTS, LENGTH = 16, 128


def calibration(target: Any) -> Tensor:
    """(B, L) texts that the model draws."""
    return written(target, TEXTS, LENGTH, drawn=True)[0]


class Recorder:
    """A matrix that adds up what goes into it: the mean of x x^T, or of x^2 alone."""

    def __init__(self, dense: Any, *, whole: bool) -> None:
        inputs = dense.weight.shape[1]
        self.dense, self.count = dense, 0
        self.total = torch.zeros(*([inputs] * (2 if whole else 1)), dtype=torch.float32, device=dense.weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).float()
        self.total += flat.T @ flat if self.total.dim() == 2 else flat.square().sum(0)
        self.count += len(flat)
        found: Tensor = self.dense(x)
        return found

    @property
    def mean(self) -> Tensor:
        return self.total / max(1, self.count)


def over_layers(target: Any, texts: Tensor, change: Callable[[Recorder], Any], *, whole: bool) -> Iterator[Any]:
    """The target's layers with every matrix changed, in order: each sees the inputs that the changed layers before it
    make. One layer's statistics and the residual streams of the texts are held at a time.

    Args:
        texts: (B, L) what is read for it.
        change: makes a matrix of one whose inputs were recorded.
        whole: whether x x^T is wanted, or x^2 alone.
    """
    from decodathlon.harness.targets.lean import Layer

    forward = target.lean
    none = Layer(None, None)
    count = len(forward.layers)
    read = texts[:, 1:]
    stream = forward.embedding[read.to(forward.embedding.device)]
    context = target.open([row[:1].tolist() for row in texts], capacity=texts.shape[1])

    def through(layer: Any, i: int) -> Tensor:
        """The residual stream behind a layer: the model of this layer alone, for which places are tokens."""
        alone = forward.replaced([none] * i + [layer] + [none] * (count - i - 1), embedding=stream.flatten(0, 1))
        places = torch.arange(read.numel()).view_as(read)
        found: Tensor = context.lent(alone).extend(places, hidden=[count], logits_at=torch.tensor([0])).hidden[count]
        return found

    for i, layer in enumerate(forward.layers):
        seen = layer.mapped(lambda dense: Recorder(dense, whole=whole))
        through(seen, i)
        changed = seen.mapped(change)
        if i + 1 < count:
            stream = through(changed, i)
        yield changed


class Calibrated(Made, SelfSpeculative):
    """A drafter made of the target's matrices one by one, in order, by the inputs that they meet in texts that the
    model writes itself."""

    def drafter(self, target: Any, context: Any, prompts: Sequence[Sequence[int]]) -> Drafter:
        return self.reading_on(target, context, self.made(target))

    def layers(self, target: Any) -> Iterator[Any]:
        return over_layers(target, calibration(target), self.changed, whole=self.by_pairs)

    @property
    def by_pairs(self) -> bool:
        """Whether `changed` wants the mean of x x^T, or of x^2 alone."""
        return False

    @abstractmethod
    def changed(self, seen: Recorder) -> Any:
        """The matrix as the drafter has it."""


@decoder(
    "sparse-self",
    claim=claim,
    family="speculative",
    bounds={**SELF_BOUNDS, "sparsity": "[0, 1]"},
    sweep={"method": ["magnitude", "wanda", "sparsegpt"], "sparsity": [0.3, 0.5, 0.7], "k": [1, 2, 4]},
    paper="Sun et al. 2023, Wanda (arXiv 2306.11695); Frantar, Alistarh 2023, SparseGPT (arXiv 2301.00774); "
    "as drafters SD2 (arXiv 2504.08838)",
)
class SparseSelf(Calibrated):
    """The target without a share of each layer's weights drafts: those that are smallest (`magnitude`), matter least
    for the inputs that it meets (`wanda`), or can best be made up for by the others (`sparsegpt`).

    `pattern=2:4` takes two of every four neighbours instead of the share `sparsity`. The inputs are those of texts
    that the model writes itself.
    """

    k: int = 2
    method: Method = "wanda"
    sparsity: float = 0.5
    pattern: Literal["none", "2:4", "4:8"] = "none"
    weights: str = ""

    def check(self, target: Any) -> None:
        super().check(target)
        if not (group := self._group):
            return
        for matrix in (m for layer in target.lean.layers for m in (layer.attention.qkv, layer.mlp.down)):
            if matrix.weight.shape[1] % group[1]:
                raise SpecError(
                    f"{self.spec}: {target.name} has a matrix of {matrix.weight.shape[1]} inputs, which {group[1]} "
                    "does not divide; give a share (sparsity) in place of the pattern"
                )

    @property
    def _group(self) -> tuple[int, int] | None:
        """How many stay of how many neighbours."""
        return None if self.pattern == "none" else (int(self.pattern[0]), int(self.pattern[2]))

    @property
    def recipe(self) -> Mapping[str, Any]:
        what = {"sparsity": self.sparsity} if self._group is None else {"pattern": self.pattern}
        return {"kind": self.method, **what}

    @property
    def by_pairs(self) -> bool:
        return self.method == "sparsegpt"

    def changed(self, seen: Recorder) -> Any:
        from decodathlon.harness.targets.lean import Dense

        weight, bias = seen.dense.weight, seen.dense.bias
        pattern = self._group
        if self.method == "sparsegpt":
            return Dense(pruning.sparsegpt(weight, seen.mean, self.sparsity, pattern), bias)
        score = pruning.magnitude(weight) if self.method == "magnitude" else pruning.wanda(weight, seen.mean)
        return Dense(weight * pruning.kept(score, self.sparsity, pattern), bias)
