"""What N particles cost beside one answer: pairs of both, measured in turns on one prompt.

    python scripts/particles_cost.py [--particles 8] [--tokens 64] [--pairs 9]

Prints the ratio of seconds with a 95 % interval over pairs (a median, by order statistics).
"""

from __future__ import annotations

import argparse
import math
import sys
import time

from decodathlon.harness import decoder as decoders
from decodathlon.harness import embedded, models
from decodathlon.harness.decoder import Limits
from decodathlon.harness.measure.observations import Observations
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.registry import load_builtins

PROMPT = "Question: What is the greatest lake of Africa, and how deep is it?\n\nAnswer:"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--particles", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--model", default=embedded.NAME)
    options = parser.parse_args()
    load_builtins()
    target = models.load(models.resolve(options.model), device="auto", dtype="auto", say=print)
    prompt, limits = [target.encode(PROMPT)], Limits(options.tokens, ignore_eos=True)
    one = decoders.build("temperature")
    specs = [f"smc[particles={options.particles}]", f"smc[particles={options.particles},ess=0]"]
    ratios: dict[str, list[float]] = {spec: [] for spec in specs}

    def seconds(decoder: decoders.Decoder, seed: int) -> float:
        begun = time.perf_counter()
        (answer,) = decoder.generate(target, prompt, limits, RowRandom(seed, ["a"]))
        assert len(answer.tokens) == options.tokens
        return time.perf_counter() - begun

    for pair in range(-1, options.pairs):  # the first pair warms up
        alone = seconds(one, pair)
        for spec in specs:
            ratio = seconds(decoders.build(spec), pair) / alone
            if pair >= 0:
                ratios[spec].append(math.log(ratio))
    for spec, logs in ratios.items():
        found = Observations.each([f"pair-{i}" for i in range(len(logs))], logs, scale="exp").estimate()
        sys.stdout.write(
            f"{spec}: {found.value:.2f} [{found.low:.2f}, {found.high:.2f}] times the seconds of one answer of "
            f"{options.tokens} tokens\n"
        )


if __name__ == "__main__":
    main()
