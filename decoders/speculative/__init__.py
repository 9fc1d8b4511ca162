"""Speculative decoding: a drafter guesses, the target looks at all guesses in one pass, and a controller decides how
many.

`cycle` is the loop, `verify` the rules by which tokens stay, `drafter` what a drafter is, `outlook` what a
controller may see. `controllers`, `clocks` and `bandits` decide how far to draft. The rest are drafters.
"""

from decodathlon.decoders.speculative import (
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

__all__ = ["codebook", "layers", "levels", "lookup", "models", "peers", "quantised", "sparse", "structured"]
