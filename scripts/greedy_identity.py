"""Is the greedy text of every drafting decoder that of `greedy`? In float32 on a real model it has to be.

    python scripts/greedy_identity.py --data DIR                      # float32, 30 prompts of Spec-Bench, all drafters
    python scripts/greedy_identity.py --dtype bfloat16 --prompts 12   # where texts part, and how near the best two were

A pass over several tokens rounds otherwise than one over a single token. In float32 that moves logits by about 1e-5,
and greedy texts stay the same; in bfloat16 by up to a tenth, so texts part where the two best tokens were nearly equal.
Ends with 1 if texts differ in float32.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from decodathlon import Limits, RowRandom
from decodathlon.harness import datasets, models
from decodathlon.harness import decoder as decoders
from decodathlon.harness.commands.command import say
from decodathlon.harness.datasets import spec_bench
from decodathlon.harness.errors import SpecError, UnsupportedError
from decodathlon.harness.measure import texts
from decodathlon.harness.measure.speed import Pair, divergences
from decodathlon.harness.progress import told
from decodathlon.harness.registry import load_builtins, registry
from decodathlon.harness.results import environment
from decodathlon.harness.results.table import aligned

#: Prompts side by side.
BATCH = 10
#: What is tried of decoders beside their defaults.
MORE = (
    "prompt-lookup[k=10,controller=ewma]", "quantised-self[k=4,controller=tapout]", "quantised-self[zeros=true,k=3]",
    "quantised-self[bits=8]", "quantised-self[branches=2,k=3]", "early-exit[layers=20,controller=svip]",
)  # fmt: skip


def specs() -> list[str]:
    """All decoders that draft, and claim greedy search at their defaults; draft-model, which is its own drafter then,
    and transformers' own are left out."""
    found = []
    for name in registry.names("decoder"):
        made = decoders.build(name)
        if getattr(made, "drafts", False) and made.claim == "greedy-exact" and name not in ("draft-model",):
            found.append(name)
    return [name for name in found if not name.startswith("hf-")] + list(MORE)


def prompts(target: Any, folder: str | None, count: int, tokens: int) -> list[list[list[int]]]:
    """The shortest of each of Spec-Bench's kinds, in batches of like length."""
    text = datasets.find("spec-bench", "test", folder)
    each = -(-count // len(spec_bench.KINDS))
    asked = partial(texts.asked, text, target, pairs=80, tokens=tokens)
    kinds = [sorted((batch[0] for batch in asked(kind=kind).batches), key=len) for kind in spec_bench.KINDS]
    chosen = [kind[i] for i in range(each) for kind in kinds if i < len(kind)][:count]
    chosen.sort(key=len)
    return [chosen[i : i + BATCH] for i in range(0, len(chosen), BATCH)]


def answers(target: Any, spec: str, batch: list[list[int]], tokens: int) -> list[list[int]]:
    limits, rng = Limits(tokens, ignore_eos=True), RowRandom(0, range(len(batch)))
    return [a.tokens for a in decoders.build(spec).generate(target, batch, limits, rng)]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--data", default=environment.data_folder())
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--prompts", type=int, default=30, help="of all kinds of Spec-Bench (default 30)")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer (default 32)")
    parser.add_argument("--decoder", action="append", metavar="SPEC", help="instead of all that draft; repeatable")
    options = parser.parse_args(words)
    load_builtins()
    wanted = options.decoder or specs()
    if min(options.prompts, options.tokens) < 1:
        parser.error("--prompts and --tokens are at least 1")
    for spec in wanted:
        if (claim := decoders.build(spec).claim) != "greedy-exact":
            parser.error(f"{spec} claims {claim}, not the text of greedy search")
    target = models.load(models.resolve(options.model), device=options.device, dtype=options.dtype, say=say)
    batches = prompts(target, options.data, options.prompts, options.tokens)
    greedy = [answers(target, "greedy", batch, options.tokens) for batch in batches]
    count = sum(map(len, batches))
    rows, parted = [["decoder", "texts", "differ", "first at", "gap of the two best logits there"]], 0
    for spec in told(wanted, "decoders", say):
        try:
            decoders.build(spec).check(target)
        except (SpecError, UnsupportedError) as error:
            rows.append([spec, "-", "-", "-", str(error)])
            continue
        pairs = [
            Pair(answers={"candidate": answers(target, spec, batch, options.tokens), "greedy": own}, prompts=batch)
            for batch, own in zip(batches, greedy, strict=True)
        ]
        found = divergences(target, pairs, "greedy")
        parted += len(found)
        places = ", ".join(str(d.position) for d in found) or "-"
        gaps = ", ".join(f"{d.top2_gap:.3g}" for d in found) or "-"
        rows.append([spec, str(count), str(len(found)), places, gaps])
        say(f"{spec}: {len(found)} of {count} texts differ" + (f", gaps {gaps}" if found else ""))
    say("\n".join(aligned(rows)))
    return int(bool(parted) and options.dtype == "float32")


if __name__ == "__main__":
    sys.exit(main())
