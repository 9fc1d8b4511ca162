"""Weights in fewer bits that come back bit for bit, whose first bits are a model by themselves.

`schemes` splits a tensor into planes (`kernels/delta` has the definitions), `container` keeps planes in files, which
`frames` compresses, `pack` packs a whole model and gives it back; `commands` are those four that a user has. To run
one, `loader` reads what stands behind `--model`, `target` builds the model around matrices that are put together when
they are read (`modules`), out of planes in memory or on disk (`storage`). `self_delta` is the decoder that drafts with
the first bits, and `contextual` chooses what is read of the others. `against` packs a model as what it differs in from
another, and `persona` runs such ones; `q4` takes a 4-bit file that exists as a base. `reap` says which experts of a
mixture matter.
"""

from decodathlon.decoders.jit_delta import commands, loader, reap, self_delta

__all__ = ["commands", "loader", "reap", "self_delta"]
