"""Speculative decoding: a drafter guesses, the target looks at all guesses in one pass, and a controller decides how
many.

`cycle` is the loop, `verify` the rules by which tokens stay, `drafter` what a drafter is, `outlook` what a controller
may see. `controllers`, `clocks` and `bandits` decide how far to draft. `made` keeps drafters that are made of the
target's own matrices, and `build` is the command for them. The rest are drafters.
"""

from decodathlon.decoders.speculative import (
    build,
    codebook,
    layers,
    levels,
    lookup,
    models,
    peers,
    quantised,
    sparse,
    structured,
)

__all__ = ["build", "codebook", "layers", "levels", "lookup", "models", "peers", "quantised", "sparse", "structured"]
