"""What a reservoir of the founding note holds while text is written: what is kept, and is the likeliest token there?

    python scripts/reservoir_kept.py                        # SmolLM2-135M-Instruct, a minute on two cores
    python scripts/reservoir_kept.py --model stories-260k

Ancestral sampling writes a few texts, and reservoirs of every size look on, reweighting at every step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from decodathlon import Limits, RowRandom
from decodathlon.harness import decoder as decoders
from decodathlon.harness import models
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.results.table import aligned
from decodathlon.kernels.reservoir import reference

PROMPTS = (
    "The weather report for tomorrow:",
    "Once upon a time",
    "The town lies on a river and",
    "To bake bread, first",
)
#: Steps until which the greatest weight still grows, and of a text.
SETTLED, STEPS = 8, 64
SIZES, TOP_K = (8, 16, 32), 64


class Held(NamedTuple):
    """Of the steps after the first `SETTLED`."""

    #: Share of the slots whose token stays.
    kept: float
    #: Share of the steps in which the model's likeliest token is in the reservoir.
    likeliest: float
    #: Median over texts of the greatest weight, at the end.
    greatest: float


def held(logits: Sequence[Tensor], size: int, *, cross: bool, seed: int = 0) -> Held:
    """Reservoirs of rows whose laws are (B, V) `logits`, step by step."""
    generator = torch.Generator().manual_seed(seed)
    state = reference.start(len(logits[0]), size)
    kept, likeliest = [], []
    for scores in logits:
        u = torch.rand(len(scores), size, generator=generator, dtype=torch.float64)
        after = reference.step(scores.float(), state, u, top_k=TOP_K, every=1, cross=cross, fresh="one")
        kept.append(float(((after.tokens == state.tokens) & (state.tokens != reference.EMPTY)).double().mean()))
        likeliest.append(float((after.tokens == scores.argmax(1, keepdim=True)).any(1).double().mean()))
        state = after
    later = slice(SETTLED, None)
    return Held(
        sum(kept[later]) / len(kept[later]),
        sum(likeliest[later]) / len(likeliest[later]),
        float(state.log_greatest.exp().median()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    load_builtins()
    target = models.load(models.resolve(parser.parse_args().model), device="cpu", dtype="auto", say=sys.stderr.write)
    prompts = [target.encode(text) for text in PROMPTS]
    texts = decoders.build("temperature").generate(
        target, prompts, Limits(STEPS, ignore_eos=True), RowRandom(0, range(len(prompts)))
    )
    logits = []
    with torch.no_grad():
        for prompt, text in zip(prompts, texts, strict=True):
            at = torch.arange(len(prompt) - 1, len(prompt) + STEPS - 1)
            logits.append(target.logits(torch.tensor([[*prompt, *text.tokens]]), at)[0])
    rows = [["size", "reuse", "tokens kept", "likeliest token held", "greatest weight"]]
    for size in SIZES:
        for reuse in ("within", "cross"):
            found = held(list(torch.stack(logits, 1)), size, cross=reuse == "cross")
            rows.append([str(size), reuse, f"{found.kept:.1%}", f"{found.likeliest:.0%}", f"{found.greatest:.0f}"])
    sys.stdout.write("\n".join(aligned(rows)) + "\n")


if __name__ == "__main__":
    main()
