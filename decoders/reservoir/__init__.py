"""Reservoir samplers after ReSTIR and (conditional) resampled importance sampling.

`stream` draws token by token, `resampled` from candidates of another law, `spatial` many answers to one prompt at once,
`reward` whole answers by an expensive weight. docs/findings/reservoir.md has the verdict.
"""

from decodathlon.decoders.reservoir import resampled, reward, spatial, stream

__all__ = ["resampled", "reward", "spatial", "stream"]
