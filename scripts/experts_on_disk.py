"""Experts that are read when a token is routed to them, and experts that are dropped: a small mixture, trained here.

    python scripts/experts_on_disk.py --out docs/findings        # two tables of jit-delta.md; minutes
    ... --steps 600 --data DIR                                   # WikiText-2's validation text, or its stand-in

A mixture of random weights is routed to anyhow, so this one is trained first (Mixtral's architecture, 16 experts of
which 2 read each token). Packed, with room for some of its experts, it writes answers by greedy search and by
`self-delta`, whose drafts tell which experts are likely needed; the texts are the same as with all of it in memory.
Beside it: what dropping experts by REAP's saliency does to the loss, and dropping others.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from persona_sizes import BATCH, LENGTH, loss
from torch import Tensor

from decodathlon.decoders.jit_delta import pack, reap
from decodathlon.harness import decoder as decoders
from decodathlon.harness import models, progress
from decodathlon.harness.commands.command import say
from decodathlon.harness.datasets.base import find
from decodathlon.harness.decoder import Limits
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.results import environment
from decodathlon.harness.results.table import DASH, rewritten

EXPERTS, ROUTED, VOCABULARY = 16, 2, 1024
DECODERS = ("greedy", "self-delta[k=1]", "self-delta[k=3]")
#: Of the room that there is between two units and everything.
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
PRUNED = (0.125, 0.25, 0.5)
TEXTS, TOKENS = 6, 48


def tokenizer_of(text: str) -> Any:
    from tokenizers import ByteLevelBPETokenizer

    made = ByteLevelBPETokenizer()
    made.train_from_iterator(text.splitlines(), VOCABULARY, special_tokens=["<s>", "</s>"], show_progress=False)
    return hf.PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, bos_token="<s>", eos_token="</s>")


def trained(tokens: Tensor, steps: int) -> Any:
    torch.manual_seed(0)
    config = hf.MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, num_local_experts=EXPERTS,
        num_experts_per_tok=ROUTED, output_router_logits=True, router_aux_loss_coef=0.02, bos_token_id=0,
        eos_token_id=1, sliding_window=None,
    )  # fmt: skip
    model = hf.MixtralForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    slower = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, steps)
    source = torch.Generator().manual_seed(0)
    for _ in progress.told(range(steps), "steps", say):
        at = torch.randint(0, len(tokens) - LENGTH, (BATCH, 1), generator=source) + torch.arange(LENGTH)
        optimiser.zero_grad()
        model(input_ids=tokens[at], labels=tokens[at]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        slower.step()
    model.config.output_router_logits = False
    return model.to(torch.bfloat16).eval()


def reading(out: Path, prompts: list[list[int]]) -> list[list[str]]:
    """A line for each amount of room: how often experts and layers were there, and what had to be fetched."""
    need = models.load(models.resolve(str(out)), device="cpu", dtype="bfloat16", say=say).packing.need
    least, most = (sum(need(where).values()) for where in ("disk", "resident"))
    lines, texts = [], set[str]()
    for share in progress.told(list(SHARES), "amounts of room", say):
        budget = least + share * (most - least)
        line = [f"{budget / 1e6:.1f} MB"]
        for spec in DECODERS:
            named = f"{out}[weights=disk,memory={budget / 1e6 + 0.001:.3f}MB]"
            target = models.load(models.resolve(named), device="cpu", dtype="bfloat16", say=say)
            made, before, limits = decoders.build(spec), target.weight_reads, Limits(TOKENS, ignore_eos=True)
            answers = [made.generate(target, [p], limits, RowRandom(0, [0]))[0] for p in prompts]
            texts.add(repr([a.tokens for a in answers]))
            after, count = target.weight_reads, sum(len(a.tokens) for a in answers)
            hits, misses = after.hits - before.hits, after.misses - before.misses
            line.append(f"{(after.fetched - before.fetched) / count / 1e3:.0f} kB, {hits / (hits + misses):.0%}")
        lines.append(line)
    if len(texts) > 1:
        raise SystemExit("texts differ by the room that experts have, or by the decoder: that must not be")
    return lines


def dropping(folder: Path, work: Path, calibration: Tensor, held: Tensor) -> list[list[str]]:
    """A line for each share of experts that goes: the loss without those that matter least, and without others."""
    target = models.load(models.resolve(str(folder)), device="cpu", dtype="float32", say=say)
    found = reap.saliency(target, calibration.split(LENGTH))
    counts = {name: len(one.tokens) for name, one in found.items()}

    def of(model: Path) -> float:
        return loss(hf.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), held)

    lines = [["none", f"{of(folder):.3f}", DASH, DASH]]
    for share in progress.told(list(PRUNED), "shares dropped", say):
        stay = reap.kept(found, share)
        left = len(next(iter(stay.values())))
        ways = {"reap": stay}
        for seed in range(3):
            source = torch.Generator().manual_seed(seed)
            ways[f"any-{seed}"] = {
                n: sorted(torch.randperm(count, generator=source)[:left].tolist()) for n, count in counts.items()
            }
        worst = {n: sorted(one.mean.argsort(stable=True)[:left].tolist()) for n, one in found.items()}
        ways["greatest"] = worst
        losses = {}
        for way, some in ways.items():
            out = work / f"{way}-{share}"
            reap.prune(folder, out, some)
            losses[way] = of(out)
        drawn = [value for way, value in losses.items() if way.startswith("any")]
        lines.append(
            [f"{EXPERTS - left} of {EXPERTS}", f"{losses['reap']:.3f}", f"{min(drawn):.3f} to {max(drawn):.3f}",
             f"{losses['greatest']:.3f}"]
        )  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--data", default=environment.data_folder(), help="folder with the data sets")
    parser.add_argument("--out", type=Path, required=True, help="docs/findings, whose page jit-delta.md has the tables")
    options = parser.parse_args()
    load_builtins()
    text = find("wikitext-2-raw-v1", "validation", options.data, say).joined
    tokenizer = tokenizer_of(text)
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    new, held = tokens[: -(len(tokens) // 10)], tokens[-(len(tokens) // 10) :]
    model = trained(new, options.steps)
    with tempfile.TemporaryDirectory() as scratch:
        folder, work = Path(scratch) / "mixture", Path(scratch)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        pack.pack(folder, work / "packed", "nested", lambda text: None)
        prompts = [held[i * 400 : i * 400 + 32].tolist() for i in range(TEXTS)]
        read = reading(work / "packed", prompts)
        dropped = dropping(folder, work, new[: 64 * LENGTH], held[: 64 * LENGTH])
    page = options.out / "jit-delta.md"
    told = rewritten(page.read_text(), "experts on disk", [["weights in memory", *(f"`{d}`" for d in DECODERS)], *read])
    columns = ["experts dropped", "those of the least saliency", "any, three draws", "those of the greatest"]
    page.write_text(rewritten(told, "experts dropped", [columns, *dropped]))
    say(f"wrote two tables of {page}")


if __name__ == "__main__":
    main()
