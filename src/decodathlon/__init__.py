"""Decodathlon: a decathlon for LLM decoders.

What a plugin author needs is here; the parts live in the folders `harness`, `decoders`, `kernels`, `suites` and
`leaderboard` at the top of the repository, which this package reaches through links.
"""

from decodathlon.harness.chain import Chain
from decodathlon.harness.chain import State
from decodathlon.harness.decoder import Completion
from decodathlon.harness.decoder import Cost
from decodathlon.harness.decoder import Decoder
from decodathlon.harness.decoder import Limits
from decodathlon.harness.decoder import Sampler
from decodathlon.harness.decoder import decoder
from decodathlon.harness.errors import UnsupportedError
from decodathlon.harness.lazy import torch
from decodathlon.harness.law import draw
from decodathlon.harness.law import process
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.results.metrics import metric
from decodathlon.harness.rewards import Answer
from decodathlon.harness.rewards import Tilted
from decodathlon.harness.rewards import reward
from decodathlon.harness.suite import suite

__all__ = [
    "Answer",
    "Chain",
    "Completion",
    "Cost",
    "Decoder",
    "Limits",
    "RowRandom",
    "Sampler",
    "State",
    "Tilted",
    "UnsupportedError",
    "decoder",
    "draw",
    "metric",
    "process",
    "reward",
    "suite",
    "torch",
]

__version__ = "0.1.0"
