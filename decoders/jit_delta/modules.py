"""Matrices that are put together from their planes when they are read, as modules of a Hugging Face model.

Rebuilt weights live in room that all matrices of a model share: the next one writes over them. So no graph of autograd
may hold them, and what is to stay is a copy (`weight`).

Dimensions: R rows, C columns of a matrix; B batch and whatever else stands before the last dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from decodathlon.decoders.jit_delta import schemes
from decodathlon.decoders.jit_delta.container import NAMES
from decodathlon.decoders.jit_delta.storage import Storage
from decodathlon.kernels.delta import dispatch

#: What torch calls the types that are packed.
TYPES = {name: getattr(torch, NAMES[name]) for name in schemes.WIDTH}
#: Rows of a table from which on all of it is put together: fewer are put together one by one.
MANY = 512


class Room:
    """Memory for what is rebuilt, grown to the largest of it: one piece by type of number."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        #: Of the numbers that the model computes with.
        self.dtype, self.device = dtype, device
        #: Is told how weights were put together.
        self.told: Callable[[str], None] = lambda how: None
        self._pieces: dict[tuple[str, torch.dtype], Tensor] = {}

    def piece(self, what: str, count: int, dtype: torch.dtype) -> Tensor:
        """(count,) numbers of any content; the same memory at every call."""
        have = self._pieces.get((what, dtype))
        if have is None or len(have) < count:
            self._pieces[what, dtype] = have = torch.empty(count, dtype=dtype, device=self.device)
        return have[:count]


class Matrix:
    """A tensor of a packed model."""

    def __init__(self, storage: Storage, name: str, room: Room, part: int = 0) -> None:
        """
        Args:
            part: which of a tensor (parts, R, C).
        """
        self._storage, self.name, self._room = storage, name, room
        record = storage.reader.records[name]
        self.columns = record.shape[-1]
        self.rows = record.shape[-2]
        self._begin, self._whole = part * self.rows * self.columns, len(record.shape) == 2
        self.native, self._form = TYPES[record.dtype], record.form

    def into(self, out: Tensor) -> None:
        """Rebuild it into out (R, C), of the room's type."""
        bits = self._storage.bits
        packed = self._storage.planes(self.name, bits, out.numel() / self._storage.reader.records[self.name].count)
        if not self._whole:
            part = schemes.stretch(packed, self._begin, out.numel(), self.native, bits)
            out.copy_(part.view(out.shape))
            return
        direct = out.dtype == (torch.bfloat16 if schemes.drafts(packed.form, bits) else self.native)
        flat = out.view(-1) if direct else self._room.piece("native", out.numel(), self.native)
        form = schemes.decode(packed, flat.view(torch.uint8), bits)
        self._room.told(f"packed weights: rebuilt by {form}")
        if not direct:
            out.copy_(flat.view(out.shape))

    def multiplies(self, rows: int) -> bool:
        """Whether a kernel decodes it as it reads it, for so many rows of x."""
        if not self._whole or self._room.dtype != torch.bfloat16:
            return False
        return dispatch.multiplies(self._form, torch.device(self._room.device).type, self.columns, rows)

    def product(self, x: Tensor) -> Tensor:
        """x W^T (M, R) float32 of x (M, C), by that kernel."""
        bits = self._storage.bits
        return dispatch.product(schemes.kernel_planes(self._storage.planes(self.name, bits)), x, bits)

    def some(self, rows: Tensor) -> Tensor:
        """(n, C) rows of it, of the room's type; of all their bits also while others are drafted with fewer."""
        bits = self._storage.own
        if len(rows) > MANY:
            whole = self._room.piece("rebuilt", self.rows * self.columns, self._room.dtype).view(self.rows, -1)
            with self._storage.drafting(bits):
                self.into(whole)
            return whole[rows]
        packed = self._storage.planes(self.name, bits, len(rows) / self.rows)
        return schemes.rows(packed, rows, self.columns, self.native, bits).to(self._room.dtype)


class Product:
    """x W^T, W of one or several matrices one above the other, which are rebuilt for it."""

    def __init__(self, matrices: Sequence[Matrix], bias: Tensor | None, room: Room) -> None:
        self.matrices, self.bias, self.room = list(matrices), bias, room
        self.shape = sum(m.rows for m in matrices), matrices[0].columns

    def __call__(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = _Differentiated.apply(x, self)  # type: ignore[no-untyped-call]
            return y if self.bias is None else y + self.bias
        fused = self._fused(x)
        return fused if fused is not None else F.linear(x, self.rebuilt(), self.bias)

    def _fused(self, x: Tensor) -> Tensor | None:
        """The product by kernels that decode as they read; None where there is none for one of the matrices."""
        flat = x.reshape(-1, x.shape[-1])
        if x.device.type == "cpu" or not all(m.multiplies(len(flat)) for m in self.matrices):
            return None
        self.room.told("packed weights: decoded as they are read")
        y = torch.cat([m.product(flat) for m in self.matrices], -1).to(x.dtype).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

    def rebuilt(self) -> Tensor:
        """(R, C), until anything else of the model is rebuilt."""
        return self._into(self.room.piece("rebuilt", math.prod(self.shape), self.room.dtype))

    @property
    def weight(self) -> Tensor:
        """(R, C), a copy."""
        return self._into(torch.empty(math.prod(self.shape), dtype=self.room.dtype, device=self.room.device))

    def _into(self, flat: Tensor) -> Tensor:
        out, row = flat.view(self.shape), 0
        for matrix in self.matrices:
            matrix.into(out[row : row + matrix.rows])
            row += matrix.rows
        return out


class _Differentiated(torch.autograd.Function):
    """The product, whose weights are rebuilt once more for the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, product: Product) -> Tensor:
        ctx.product = product
        return F.linear(x, product.rebuilt())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.product.rebuilt(), None


class PackedLinear(torch.nn.Module):
    """In the place of `torch.nn.Linear`."""

    def __init__(self, product: Product, bias: Tensor | None) -> None:
        super().__init__()
        self.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
        self.product = Product(product.matrices, self.bias, product.room)
        self.out_features, self.in_features = product.shape

    @classmethod
    def joined(cls, modules: Sequence[PackedLinear]) -> Product:
        """One product with the weights of all (targets/lean.py)."""
        bias = None if modules[0].bias is None else torch.cat([m.bias for m in modules if m.bias is not None])
        return Product([part for m in modules for part in m.product.matrices], bias, modules[0].product.room)

    @property
    def weight(self) -> Tensor:
        return self.product.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)


class PackedEmbedding(torch.nn.Module):
    """In the place of `torch.nn.Embedding`; `scale` is what some models multiply what they look up by."""

    def __init__(self, product: Product, scale: Tensor | None = None) -> None:
        super().__init__()
        self.product, self._scale = product, scale
        self.num_embeddings, self.embedding_dim = product.shape

    @property
    def weight(self) -> Tensor:
        return self.product.weight

    @property
    def device(self) -> torch.device:
        return torch.device(self.product.room.device)

    def __getitem__(self, tokens: Any) -> Tensor:
        if isinstance(tokens, slice):
            tokens = torch.arange(self.num_embeddings, device=self.device)[tokens]
        found = self.product.matrices[0].some(tokens.flatten())
        return found.view(*tokens.shape, -1)

    def forward(self, tokens: Tensor) -> Tensor:
        found = self[tokens]
        return found if self._scale is None else found * self._scale.to(found.dtype)


class Experts:
    """In the place of a tensor (experts, R, C): the matrix of an expert is rebuilt when it is asked for."""

    def __init__(self, products: Sequence[Product]) -> None:
        self._products = list(products)
        self.shape = (len(products), *products[0].shape)

    def __getitem__(self, expert: Any) -> Tensor:
        product = self._products[int(expert)]
        return product.weight if torch.is_grad_enabled() else product.rebuilt()


def tensor_of(module: torch.nn.Module, key: str, product: Product) -> None:
    """Have a module of any other kind find a copy of the matrix where it looks for its parameter `key`."""
    kind = type(module)
    found = property(lambda self: self.packed_parts[key].weight)
    module.packed_parts = {**getattr(module, "packed_parts", {}), key: product}
    del module._parameters[key]
    module.__class__ = type(kind.__name__, (kind,), {key: found, "__module__": kind.__module__})
