"""A 4-bit file that somebody has already (GGUF, Q4_0) as the base of `int4-delta`: what it lacks makes it exact.

Of the types that such files have, Q4_0 alone is whole numbers times a scale; matrices of the others get a base of their
own. Nothing is taken on trust: a matrix must be near to the weights that it is said to be of.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decodathlon.harness.errors import MissingError, SpecError
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

#: Weights of a group of Q4_0, and its bytes: a scale in half precision, then the whole numbers plus 8, two in a byte.
GROUP, BYTES = 32, 18
#: Weights of a block of `kernels.delta`.
BLOCK = 256
#: Weights by which it is judged whether a matrix is of these weights, and how far it may be from them: its squared
#: error over theirs. Q4_0 errs by about 0.01; weights of another model by 1 or more.
JUDGED, FAR = 1 << 18, 0.25

STRANGE = "other than the model's in shape or numbers"

#: What int4-delta has as a base: given the first of some weights and how many blocks of 256 they fill, their whole
#: numbers (B, 256) int32 and the patterns of the scales (B, 8) int16.
Base = Callable[[int, int], "tuple[Tensor, Tensor]"]


class Q4File:
    """A GGUF file, mapped.

    Raises:
        MissingError: it is not there, or no GGUF file.
        SpecError: nothing in it is of type Q4_0.
    """

    def __init__(self, path: Path) -> None:
        import gguf

        self.path = path
        try:
            reader = gguf.GGUFReader(path)
            arch = str(reader.get_field("general.architecture").contents())  # type: ignore[union-attr]
            layers, heads, key_heads = (self._number(reader, f"{arch}.{key}") for key in (
                "block_count", "attention.head_count", "attention.head_count_kv",
            ))  # fmt: skip
            kind = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[arch]
        except OSError as error:
            raise MissingError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, IndexError, AttributeError) as error:
            raise MissingError(f"{path} is no GGUF file of a language model, or torn: {error}") from error
        self._heads = {"q_proj": heads, "k_proj": key_heads or heads}
        self._names = gguf.get_tensor_name_map(kind, layers)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._type = gguf.GGMLQuantizationType.Q4_0
        if not any(tensor.tensor_type == self._type for tensor in reader.tensors):
            types = Counter(tensor.tensor_type.name for tensor in reader.tensors)
            told = ", ".join(f"{n} x {name}" for name, n in types.most_common())
            raise SpecError(f"{path} has nothing in Q4_0, which alone can be a base of int4-delta (it has {told})")
        #: By name of the model's tensor, once it was compared.
        self.bases: dict[str, Base] = {}
        #: Why matrices have a base of their own, and how many.
        self.others: Counter[str] = Counter()

    def compare(self, tensors: Iterable[tuple[str, list[int], Tensor]]) -> None:
        """Find the bases of a model.

        Args:
            tensors: name, shape and BF16 bytes of what is to have one.

        Raises:
            SpecError: most of what the file has by the names of the model is not the model's, or nothing is.
        """
        for name, shape, data in tensors:
            found = self._base(name, shape, data)
            if isinstance(found, str):
                self.others[found] += 1
            else:
                self.bases[name] = found
        strange = self.others[STRANGE]
        if strange >= max(1, len(self.bases)):
            raise SpecError(
                f"{self.path} is of another model: {strange} matrices have other shapes or are far from the weights, "
                f"{len(self.bases)} are near. (Or its matrices were turned in a way that is not known here.)"
            )
        if not self.bases:
            told = ", ".join(f"{n} {why}" for why, n in self.others.most_common())
            raise SpecError(f"{self.path} is the base of no matrix: {told}")

    def _base(self, name: str, shape: list[int], data: Tensor) -> Base | str:
        """That of a tensor, or why it has none in the file."""
        tensor = self._tensors.get(self._names.get_name(name, try_suffixes=(".weight", ".bias")) or "")
        if tensor is None:
            return "not in the file by a name that is known"
        if tensor.tensor_type != self._type:
            return f"{tensor.tensor_type.name} in the file"
        if [int(n) for n in reversed(tensor.shape)] != shape:
            return STRANGE
        blocks = torch.from_numpy(tensor.data).view(-1, BYTES)
        if not bool(blocks[:, :2].contiguous().view(torch.float16).isfinite().all()):
            return "with scales that are not finite"
        able = [_of(blocks, shape, rows) for rows in self._orders(name, shape)]
        error, near = min(((_error(base, data), base) for base in able), key=lambda found: found[0])
        return near if error <= FAR else STRANGE

    def _orders(self, name: str, shape: list[int]) -> list[Tensor | None]:
        """In which order the file may have the rows of the model: as it has them, or as llama.cpp turns those of
        queries and keys, whose rotations pair neighbours and not halves."""
        heads = next((n for key, n in self._heads.items() if key in name), 0)
        if not heads or len(shape) != 2 or shape[0] % (2 * heads):
            return [None]
        there = torch.arange(shape[0]).view(heads, shape[0] // heads // 2, 2)  # of the file: pairs
        return [None, there.transpose(1, 2).reshape(-1)]

    @staticmethod
    def _number(reader: Any, key: str) -> int:
        field = reader.get_field(key)
        found = 0 if field is None else field.contents()
        return int(found) if not isinstance(found, list) else 0


def _of(blocks: Tensor, shape: list[int], rows: Tensor | None) -> Base:
    """
    Args:
        blocks: (groups, 18) uint8.
        rows: (R,) where the file has the model's rows; None: in their order.
    """
    across, every = shape[-1] // GROUP, len(blocks)

    def part(begin: int, count: int) -> tuple[Tensor, Tensor]:
        at = torch.arange(begin // GROUP, min(begin // GROUP + count * BLOCK // GROUP, every))
        if rows is not None:
            at = rows[at // across] * across + at % across
        some = blocks[at]
        q = torch.zeros(count * BLOCK // GROUP, GROUP, dtype=torch.int32)
        q[: len(at)] = torch.cat([some[:, 2:] & 15, some[:, 2:] >> 4], 1).int() - 8
        scales = torch.zeros(count * BLOCK // GROUP, dtype=torch.int16)
        scales[: len(at)] = some[:, :2].contiguous().view(torch.int16)[:, 0]
        return q.view(-1, BLOCK), scales.view(-1, BLOCK // GROUP)

    return part


def _error(base: Base, data: Tensor) -> float:
    """The squared error of the first weights over their squares; 0 of zeros that are met."""
    weights = data.view(torch.bfloat16)[:JUDGED].float()
    if not bool(weights.isfinite().all()):
        return math.inf
    q, scales = base(0, -(-len(weights) // BLOCK))
    near = q.float().view(-1, GROUP) * scales.view(-1, 1).view(torch.float16).float()
    missed = (near.flatten()[: len(weights)] - weights).square().sum()
    return float(missed / weights.square().sum().clamp(min=1e-30))
