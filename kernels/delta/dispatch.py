"""Chooses the form in which weights are put together: Triton on a GPU, compiled C or plain torch on a CPU."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from . import int4, native, reference

#: Whether the GPU form can be had.
HAS_TRITON = importlib.util.find_spec("triton") is not None
#: What plain torch takes: whole numbers of 32 and 64 bits for each weight.
SCRATCH = 40
Planes = reference.Nested | reference.Fixed12 | int4.Int4Delta


def _form(planes: Planes, device: torch.device) -> str:
    if device.type == "cuda":  # `int4-delta` is not meant to be fast
        return "triton" if HAS_TRITON and not isinstance(planes, int4.Int4Delta) else "reference"
    return "native" if native.library() is not None else "reference"


def scratch(form: str, device: str) -> int:
    """Bytes by weight that `rebuild` takes besides what it writes, of the scheme `form` on such a device."""
    triton = device != "cpu" and HAS_TRITON and form != "int4-delta"
    return 0 if triton or (device == "cpu" and native.library() is not None) else SCRATCH


def rebuild(planes: Planes, out: Tensor) -> str:
    """The bit patterns of the weights, into out (N,) int16. Returns which form did it: `triton`, `native` or
    `reference`."""
    form = _form(planes, out.device)
    if isinstance(planes, reference.Nested):
        exact, plain = native.nested_exact, reference.nested_exact
    elif isinstance(planes, reference.Fixed12):
        exact, plain = native.fixed12_exact, reference.fixed12_exact
    else:
        exact, plain = native.int4_delta_exact, int4.int4_delta_exact
    if form == "native":
        exact(native.library(), planes, out)
    elif form == "triton":
        from . import triton

        if isinstance(planes, reference.Nested):
            triton.nested_rebuild(planes, out)
        else:
            triton.fixed12_rebuild(planes, out)
    else:
        out.copy_(plain(planes))
    return form


def draft(planes: reference.Nested | int4.Int4Delta, bits: int, out: Tensor) -> str:
    """What the first 4, 5 or 6 bits of each weight say (of `int4-delta` its base), into out (N,) bfloat16; as
    `rebuild`."""
    form = _form(planes, out.device)
    if isinstance(planes, int4.Int4Delta):
        if form == "native":
            native.int4_draft(native.library(), planes, out.view(torch.int16))
        else:
            out.copy_(int4.int4_draft(planes))
    elif form == "native":
        native.nested_draft(native.library(), planes, bits, out.view(torch.int16))
    elif form == "triton":
        from . import triton

        triton.nested_rebuild(planes, out.view(torch.int16), bits)
    else:
        out.copy_(reference.nested_draft(planes, bits))
    return form


def multiplies(form: str, device: str, columns: int, rows: int) -> bool:
    """Whether `product` can be had of the scheme `form`, for so many rows of x with so many columns."""
    if device == "cpu" or not HAS_TRITON or form not in ("nested", "fixed12"):
        return False
    from . import triton

    return triton.fits(columns, rows)


def product(planes: reference.Nested | reference.Fixed12, x: Tensor, bits: int = 0) -> Tensor:
    """x W^T, (M, N) float32, for x (M, K), by a kernel that decodes as it reads; see `multiplies`."""
    from . import triton

    return triton.product(planes, x, bits)
