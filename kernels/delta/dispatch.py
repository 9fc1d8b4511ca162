"""Chooses the form in which weights are put together: compiled C or plain torch on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from . import native, reference


def rebuild(planes: reference.Nested | reference.Fixed12, out: Tensor) -> str:
    """The bit patterns of the weights, into out (N,) int16. Returns which form did it: `native` or `reference`."""
    form = "nested" if isinstance(planes, reference.Nested) else "fixed12"
    c = native.library() if out.device.type == "cpu" else None
    if c is not None:
        getattr(native, f"{form}_exact")(c, planes, out)
        return "native"
    out.copy_(getattr(reference, f"{form}_exact")(planes))
    return "reference"


def draft(planes: reference.Nested, bits: int, out: Tensor) -> str:
    """What the first 4, 5 or 6 bits of each weight say, into out (N,) bfloat16; as `rebuild`."""
    c = native.library() if out.device.type == "cpu" else None
    if c is not None:
        native.nested_draft(c, planes, bits, out.view(torch.int16))
        return "native"
    out.copy_(reference.nested_draft(planes, bits))
    return "reference"
