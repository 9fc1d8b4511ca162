"""What rebuilding weights costs on this machine, and whether the model of speed holds: measured beside predicted.

    python scripts/packed_speed.py MODEL          # a folder with safetensors, or what --model takes
    python scripts/packed_speed.py MODEL --threads 2 --tokens 48 --turns 5 --out docs/findings

A token of a packed model takes what one of the plain model takes, and the rebuilding of its weights on top; a cycle of
`self-delta` takes k drafts, each with a rebuilding of first bits, and one pass of all weights that reads k + 1 tokens.
Seconds of each are measured by themselves, and what they predict stands beside what was measured, both in turns with
the plain model (A, the parts, B, B, the parts, A) in one process. The plain model's greedy search is 1, so `self-delta`
is worth its while where it is above both lines of its scheme.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from decodathlon.decoders.jit_delta import pack, schemes
from decodathlon.harness import decoder as decoders
from decodathlon.harness import models, progress
from decodathlon.harness.commands.command import say
from decodathlon.harness.decoder import Limits
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.results.table import DASH, aligned, rewritten

PROMPT = "The history of the town begins with a bridge that somebody built across the river, and"
#: How many tokens `self-delta` drafts.
K = 2
#: How often what is short is done at a time.
OFTEN = 8


def seconds(work: Callable[[], Any], turns: int) -> float:
    """The median of some turns, after one that does not count."""
    work()
    found = []
    for _ in range(turns):
        begin = time.perf_counter()
        work()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def products(target: Any) -> list[Any]:
    """What a token is multiplied with: every matrix once, the head among them."""
    lean = target.lean
    by_layer = [(at.attention.qkv, at.attention.out, at.mlp.gate_up, at.mlp.down) for at in lean.layers]
    return [*(product for layer in by_layer for product in layer), lean.head]


def rebuilding(target: Any, bits: int) -> Callable[[], None]:
    """Put every matrix together once."""

    def work() -> None:
        with target.packing.storage.drafting(bits):
            for product in products(target):
                product.rebuilt()

    return work


def generating(spec: str, target: Any, tokens: int) -> Callable[[], Any]:
    made, prompt = decoders.build(spec), [target.encode(PROMPT)]
    return lambda: made.generate(target, prompt, Limits(tokens, ignore_eos=True), RowRandom(0, [0]))


class Turn(NamedTuple):
    """Seconds of one turn."""

    plain: float
    other: float
    #: To put all weights together, and the first bits that are drafted with.
    all_bits: float
    first_bits: float


class Beside:
    """A plain model that others are measured beside, greedily.

    Attributes:
        first, wide: what its share of the time of a text is until the first token is there, and what reading K + 1
            tokens at once takes over reading one.
    """

    def __init__(self, target: Any, tokens: int, turns: int) -> None:
        self.tokens, self.turns, self.greedy = tokens, turns, generating("greedy", target, tokens)
        self.first = seconds(generating("greedy", target, 1), turns) / seconds(self.greedy, turns)
        prompt = target.encode(PROMPT)
        context = target.open([prompt], capacity=len(prompt) + K + 1)
        reads = [torch.tensor([prompt[:width]]) for width in (1, K + 1)]
        one, several = (seconds(lambda r=r: context.extend(r).logits.argmax(-1).tolist(), 5 * turns) for r in reads)
        self.wide = several / one

    def beside(self, other: Callable[[], Any], target: Any, bits: int) -> list[Turn]:
        work = [self.greedy, other, rebuilding(target, target.packing.bits), rebuilding(target, bits)]
        often = (1, 1, OFTEN, OFTEN)
        for one in work:
            one()
        found = []
        for _ in range(self.turns):
            took = [0.0] * len(work)
            for i in (0, 2, 3, 1, 1, 3, 2, 0):
                begin = time.perf_counter()
                for _ in range(often[i]):
                    work[i]()
                took[i] += (time.perf_counter() - begin) / 2 / often[i]
            found.append(Turn(*took))
        return found

    def predicted(self, turn: Turn, cost: Any) -> float:
        """Of a text, its speed over the plain model's, by what it called."""
        first = self.first * turn.plain
        step = (turn.plain - first) / (self.tokens - 1)
        wide = step * (self.wide if cost.draft_calls else 1)
        target = first + turn.all_bits + (cost.target_calls - 1) * (wide + turn.all_bits)
        return turn.plain / (target + cost.draft_calls * (step + turn.first_bits))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, help="docs/findings, whose page jit-delta.md has the table")
    options = parser.parse_args()
    load_builtins()
    torch.set_num_threads(options.threads)
    folder = Path(models.fetch(models.resolve(options.model), say))
    plain = models.load(models.resolve(options.model), device="cpu", dtype="bfloat16", say=say)
    beside = Beside(plain, options.tokens, options.turns)
    token = seconds(beside.greedy, 1) / options.tokens
    say(f"{plain.name}: {1e3 * token:.1f} ms for a token, {options.threads} threads")
    lines = [["weights", "bits per weight", "put together in", "weights per second", "speed, predicted", "measured"],
             ["plain", "16", DASH, DASH, "1", "1"]]  # fmt: skip
    for scheme in progress.told(list(schemes.SCHEMES), "schemes", say):
        with tempfile.TemporaryDirectory() as scratch:
            pack.pack(folder, Path(scratch) / "packed", scheme, lambda text: None, cast=True)
            lines += _of_scheme(scheme, f"{scratch}/packed", beside)
    for line in aligned(lines):
        say(line)
    if options.out:
        page = options.out / "jit-delta.md"
        page.write_text(rewritten(page.read_text(), "speeds", lines))
        say(f"wrote the table of {page}")


def _of_scheme(scheme: str, model: str, beside: Beside) -> list[list[str]]:
    """All weights, the first bits alone, and `self-delta`, each beside the plain model."""
    target = models.load(models.resolve(model), device="cpu", dtype="bfloat16", say=say)
    weights = sum(target.packing.reader.records[n].count for n in target.packing.packed)

    def line(name: str, spec: str, of: Any, bits: int = 0) -> list[str]:
        (answer,) = generating(spec, of, beside.tokens)()
        turns = beside.beside(generating(spec, of, beside.tokens), of, bits)
        predicted = statistics.median(beside.predicted(turn, answer.cost) for turn in turns)
        ratios = sorted(turn.plain / turn.other for turn in turns)
        rebuild = statistics.median(turn.first_bits for turn in turns)
        if answer.cost.draft_calls:
            name += f", {(beside.tokens - 1) / (answer.cost.target_calls - 1):.2f} tokens per cycle"
        return [name, f"{of.bits_per_weight:.2f}", f"{1e3 * rebuild:.0f} ms", f"{weights / rebuild / 1e9:.1f} G",
                f"{predicted:.2f}", f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"]  # fmt: skip

    lines = [line(scheme, "greedy", target)]
    for bits in schemes.FIRST_BITS[scheme]:
        named = models.resolve(f"{model}[weights=base,bits={bits}]")
        base = models.load(named, device="cpu", dtype="bfloat16", say=say)
        lines.append(line(f"{scheme}: base of {bits} bits", "greedy", base, bits))
        drafting = f"self-delta[k={K},bits={bits}]"
        lines.append(line(f"{scheme}: {drafting}", drafting, target, bits))
    return lines


if __name__ == "__main__":
    main()
