"""Weights in fewer bits that come back bit for bit, whose first bits are a model by themselves.

`schemes` splits a tensor into planes (`kernels/delta` has the definitions), `container` keeps planes in files, `pack`
packs a whole model and gives it back; `commands` are those four that a user has.
"""

from decodathlon.decoders.jit_delta import commands

__all__ = ["commands"]
