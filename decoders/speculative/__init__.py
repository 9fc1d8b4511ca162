"""Speculative decoding: a drafter guesses, the target looks at all guesses in one pass, and a controller decides how
many.

`base` is what the decoders share, `cycle` their loop, `verify` the rules by which tokens stay, `drafter` what a drafter
is, `trees` are several ways on, `outlook` is what a controller may see. `controllers`, `clocks` and `bandits` decide
how far to draft. `made` keeps drafters that are made of the target's own matrices, in the forms of `matrices`, and
`build` is the command for them. The rest are decoders.
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
