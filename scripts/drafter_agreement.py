"""How often does each drafter find likeliest what the model finds likeliest? And what does it take to make and to ask?

    python scripts/drafter_agreement.py --data DIR [--prompts 12] [--decoder SPEC ...]

Each drafter reads the greedy texts of the model in one pass; where its likeliest next token is the model's own, a draft
of one token would have stayed. Cheaper than a run of `throughput`, and as true of drafters that are slow here.
Writes docs/findings/drafter-agreement.csv.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from decodathlon import Limits, RowRandom
from decodathlon.harness import datasets, models
from decodathlon.harness import decoder as decoders
from decodathlon.harness.commands.command import say
from decodathlon.harness.datasets import spec_bench
from decodathlon.harness.errors import SpecError, UnsupportedError
from decodathlon.harness.measure import texts
from decodathlon.harness.measure.observations import Observations
from decodathlon.harness.progress import told
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.results import environment
from decodathlon.harness.results.table import aligned

TABLE = Path(__file__).parents[1] / "docs" / "findings" / "drafter-agreement.csv"
SPECS = (
    "quantised-self[bits=8]", "quantised-self[zeros=true]", "quantised-self", "quantised-self[head=same]",
    "quantised-self[form=float,bits=6]", "quantised-self[form=float,bits=5]", "quantised-self[form=float]",
    "codebook-self[bits=4]", "codebook-self[bits=3]", "codebook-self[bits=2]",
    "mixed-precision-self[budget_bits=4]", "mixed-precision-self[budget_bits=4,by=layer]",
    "mixed-precision-self[budget_bits=2]",
    *(f"sparse-self[method={m},sparsity={s}]" for s in (0.3, 0.5) for m in ("magnitude", "wanda", "sparsegpt")),
    *(f"sparse-self[method={m},pattern=2:4]" for m in ("wanda", "sparsegpt")),
    *(f"structured-self[method={m},share={s}]" for s in (0.1, 0.3) for m in ("flap", "gradient")),
    "layer-skip", "early-exit[layers=24]", "early-exit[layers=15]",
)  # fmt: skip


def agreement(target: Any, spec: str, prompts: list[list[int]], answers: list[list[int]]) -> list[float]:
    """By text, the share of the places behind its first token at which the drafter agrees."""
    decoder = decoders.build(spec)
    decoder.check(target)
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    context = target.open(prompts, capacity=longest)
    drafter: Any = decoder.drafter(target, context, prompts)  # type: ignore[attr-defined]
    truth = torch.tensor(answers)
    with torch.no_grad():
        guess = drafter.context.extend(truth[:, :-1]).logits.argmax(-1).cpu()
    return [float(x) for x in (guess == truth[:, 1:]).double().mean(1)]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--data", default=environment.data_folder())
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--decoder", action="append", metavar="SPEC", help="instead of the usual ones; repeatable")
    parser.add_argument("--out", type=Path, default=TABLE, metavar="FILE")
    options = parser.parse_args(words)
    load_builtins()
    wanted = options.decoder or list(SPECS)
    for spec in wanted:
        decoders.build(spec)
    target = models.load(models.resolve(options.model), device=options.device, dtype=options.dtype, say=say)
    prompts = chosen(target, options.data, options.prompts, options.tokens)
    limits, rng = Limits(options.tokens, ignore_eos=True), RowRandom(0, range(len(prompts)))
    answers = [a.tokens for a in decoders.build("greedy").generate(target, prompts, limits, rng)]
    rows = []
    for spec in told(wanted, "drafters", say):
        begin = time.monotonic()
        try:
            shares = agreement(target, spec, prompts, answers)
        except (SpecError, UnsupportedError) as error:
            say(f"{spec}: {error}")
            continue
        found = Observations.grouped([str(i) for i in range(len(shares))], shares).estimate()
        low, high = (math.nan if x is None else x for x in (found.low, found.high))
        rows.append([spec, f"{found.value:.3f}", f"{low:.3f}", f"{high:.3f}", f"{time.monotonic() - begin:.0f}"])
        say("  ".join(rows[-1]))
        target.release()
    header = ["decoder", "agreement", "low", "high", "seconds"]
    with options.out.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
    say("\n".join(aligned([header, *rows])))
    return 0


def chosen(target: Any, folder: str | None, count: int, tokens: int) -> list[list[int]]:
    """As many of each of Spec-Bench's kinds, the shortest."""
    text = datasets.find("spec-bench", "test", folder)
    found: list[list[int]] = []
    for kind in spec_bench.KINDS:
        asked = texts.asked(text, target, kind=kind, pairs=80, tokens=tokens).batches
        found += sorted((batch[0] for batch in asked), key=len)[: -(-count // len(spec_bench.KINDS))]
    return sorted(found, key=len)[:count]


if __name__ == "__main__":
    sys.exit(main())
