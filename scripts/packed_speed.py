"""What rebuilding weights costs on this machine, and whether the model of speed holds: measured beside predicted.

    python scripts/packed_speed.py MODEL          # a folder with safetensors, or what --model takes
    python scripts/packed_speed.py MODEL --threads 2 --tokens 48 --turns 5

A token of a packed model takes what one of the plain model takes, and the rebuilding of its weights on top; a cycle of
`self-delta` takes k drafts, each with a rebuilding of first bits, and one pass of all. Seconds of each are measured by
themselves, the speeds that follow are predicted (docs/findings/jit-delta.md), and then measured: packed and plain by
turns, A B B A, in one process.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from decodathlon.decoders.jit_delta import pack, schemes
from decodathlon.harness import decoder as decoders
from decodathlon.harness import models
from decodathlon.harness.commands.command import say
from decodathlon.harness.decoder import Limits
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.results.table import DASH, aligned

PROMPT = "The history of the town begins with a bridge that somebody built across the river, and"
#: The longest of the drafts of `self-delta` that are predicted.
K = 2


def seconds(work: Callable[[], Any], turns: int) -> float:
    """The median of some turns, after one that does not count."""
    work()
    found = []
    for _ in range(turns):
        begin = time.perf_counter()
        work()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def paired(one: Callable[[], Any], other: Callable[[], Any], turns: int) -> tuple[float, float, float]:
    """Seconds of the other over those of the one: median, least and greatest of turns A B B A."""
    one(), other()
    found = []
    for _ in range(turns):
        times = {"one": 0.0, "other": 0.0}
        for name, work in (("one", one), ("other", other), ("other", other), ("one", one)):
            begin = time.perf_counter()
            work()
            times[name] += time.perf_counter() - begin
        found.append(times["other"] / times["one"])
    return statistics.median(found), min(found), max(found)


def rebuilding(target: Any, bits: int) -> Callable[[], None]:
    """Put together what a token reads: every matrix once, the head among them."""
    products = [p for layer in target.lean.layers for p in (layer.attention.qkv, layer.attention.out, layer.mlp.gate_up,
                                                            layer.mlp.down)]  # fmt: skip

    def work() -> None:
        with target.packing.storage.drafting(bits):
            for product in [*products, target.lean.head]:
                product.rebuilt()

    return work


def generating(spec: str, target: Any, tokens: int) -> Callable[[], Any]:
    made, prompt = decoders.build(spec), [target.encode(PROMPT)]
    return lambda: made.generate(target, prompt, Limits(tokens, ignore_eos=True), RowRandom(0, [0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    load_builtins()
    torch.set_num_threads(options.threads)
    folder = Path(models.fetch(models.resolve(options.model), say))
    plain = models.load(models.resolve(options.model), device="cpu", dtype="bfloat16", say=say)
    greedy = generating("greedy", plain, options.tokens)
    token = seconds(greedy, options.turns) / options.tokens
    say(f"{plain.name}: {1e3 * token:.1f} ms for a token, {options.threads} threads")
    lines = [["scheme", "bits", "bits per weight", "rebuild", "weights/s", "speed predicted", "speed measured"]]
    for scheme in schemes.SCHEMES:
        with tempfile.TemporaryDirectory() as scratch:
            pack.pack(folder, Path(scratch) / "packed", scheme, lambda text: None, cast=True)
            target = models.load(models.resolve(f"{scratch}/packed"), device="cpu", dtype="bfloat16", say=say)
            weights = sum(target.packing.reader.records[n].count for n in target.packing.packed)
            took = {bits: seconds(rebuilding(target, bits), options.turns)
                    for bits in (0, *schemes.FIRST_BITS[scheme])}  # fmt: skip
            ratio = paired(greedy, generating("greedy", target, options.tokens), options.turns)
            for bits, rebuild in took.items():
                predicted, measured = token / (token + rebuild), DASH
                if bits == 0:
                    measured = f"{1 / ratio[0]:.2f} [{1 / ratio[2]:.2f}, {1 / ratio[1]:.2f}]"
                lines.append(
                    [scheme, str(bits or "all"), f"{target.bits_per_weight:.2f}" if bits == 0 else DASH,
                     f"{1e3 * rebuild:.1f} ms", f"{weights / rebuild / 1e9:.2f} G", f"{predicted:.2f}", measured]
                )  # fmt: skip
            for bits in schemes.FIRST_BITS[scheme][:1]:
                lines.append(_drafting(target, scheme, bits, token, took, options))
        say(f"{scheme}: measured")
    for line in aligned(lines):
        say(line)


def _drafting(
    target: Any, scheme: str, bits: int, token: float, took: dict[int, float], options: argparse.Namespace
) -> list[str]:
    """`self-delta` beside greedy search, both on the packed model."""
    drafting = generating(f"self-delta[k={K},bits={bits}]", target, options.tokens)
    (answer,) = drafting()
    tau = (options.tokens - 1) / max(1, answer.cost.target_calls - 1)
    wide = seconds(lambda: target.logits(torch.ones(1, K + 1, dtype=torch.long), torch.arange(K + 1)), options.turns)
    cycle = K * (token + took[bits]) + wide
    predicted = tau * (token + took[0]) / cycle
    ratio = paired(generating("greedy", target, options.tokens), drafting, options.turns)
    return [f"{scheme}: self-delta[k={K}]", str(bits), f"tau {tau:.2f}", DASH, DASH, f"{predicted:.2f}",
            f"{1 / ratio[0]:.2f} [{1 / ratio[2]:.2f}, {1 / ratio[1]:.2f}]"]  # fmt: skip


if __name__ == "__main__":
    main()
