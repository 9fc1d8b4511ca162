"""How near particle methods come to the law that they approach, by the length of the answers, where it is known.

    python scripts/particles_bias.py [--decoder SPEC ...] [--lengths 3 12 32 64] [--answers 200]

The texts are independent tosses (toy.Coins): of the law p(y)^(1 + 1/beta) the number of ones and the constant are
known in closed form at any length. Prints both as they came out, with their standard errors.
"""

from __future__ import annotations

import argparse
import math
import sys

import torch

from decodathlon.harness import decoder as decoders
from decodathlon.harness.decoder import Limits
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.targets import toy

USUAL = [
    "persistent-smc",
    "persistent-smc[particles=32]",
    "smc",
    "smc[particles=64]",
    "twisted-smc",
    "twisted-smc[particles=64]",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--decoder", action="append", default=[], metavar="SPEC")
    parser.add_argument("--lengths", type=int, nargs="+", default=[3, 12, 32, 64])
    parser.add_argument("--answers", type=int, default=200)
    options = parser.parse_args()
    load_builtins()
    torch.set_num_threads(1)
    n = options.answers
    sys.stdout.write(f"{'decoder':34}{'tokens':>7}  {'ones':>14}{'law':>7}{'model':>7}   log of the constant, error\n")
    for spec in options.decoder or USUAL:
        decoder = decoders.build(spec)
        for length in options.lengths:
            target = toy.Coins()
            law, log_z = target.power(1 + 1 / decoder.beta, length)
            found = decoder.generate(target, [[0]] * n, Limits(length), RowRandom(0, range(n)))
            ones = torch.tensor([sum(a.tokens) for a in found], dtype=torch.float64)
            error = torch.tensor([a.trace[-1]["log_z"] - log_z for a in found], dtype=torch.float64)
            sys.stdout.write(
                f"{spec:34}{length:>7}  {ones.mean():8.2f} ±{ones.std() / math.sqrt(n):4.2f}{law:7.2f}"
                f"{target.share * length:7.2f}   {error.mean():8.2f} ±{error.std() / math.sqrt(n):4.2f}\n"
            )


if __name__ == "__main__":
    main()
