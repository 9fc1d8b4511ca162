"""What a fine-tune takes as a delta on its base, bit for bit: stories-260k, trained on with other prose.

    DECODATHLON_MODELS=FOLDER python scripts/persona_sizes.py     # a table of docs/findings/jit-delta.md; minutes
    ... --steps 300 --rates 1e-5 1e-4 1e-3 --data DIR             # WikiText-2's validation text, or its stand-in

For each learning rate the model is trained on in float32, and looked at, rounded to bfloat16 as such models are
published, beside its base and beside itself 100 steps before. The loss is on text that it was not trained on.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from packed_sizes import PLACE, stored
from torch import Tensor

from decodathlon.decoders.jit_delta import against, schemes
from decodathlon.harness import llama2c, progress
from decodathlon.harness.commands.command import say
from decodathlon.harness.datasets.base import find
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.results.table import rewritten

BATCH, LENGTH, EARLIER = 8, 128, 100
COLUMNS = (
    "learning rate", "steps", "loss before", "after", "numbers that changed", "delta on the base",
    f"delta on {EARLIER} steps before", "by itself (nested)",
)  # fmt: skip


def trained(model: Any, tokens: Tensor, rate: float, steps: int) -> Iterator[dict[str, Tensor]]:
    """Its weights in bfloat16 before the first step, and after each."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    source = torch.Generator().manual_seed(0)
    yield rounded(model)
    for _ in range(steps):
        at = torch.randint(0, len(tokens) - LENGTH, (BATCH, 1), generator=source) + torch.arange(LENGTH)
        loss = model(input_ids=tokens[at], labels=tokens[at]).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        yield rounded(model)


def rounded(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().to(torch.bfloat16).flatten() for name, p in model.named_parameters()}


@torch.no_grad()
def loss(model: Any, tokens: Tensor) -> float:
    """Nats per token, over windows that do not overlap."""
    windows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    return float(torch.stack([model(input_ids=w, labels=w).loss for w in windows.split(BATCH)]).mean())


def differing(own: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Bits per weight on disk of one as a delta on the other, held to bring it back."""
    bits = 0
    for name, weights in own.items():
        data, base = weights.view(torch.uint8), other[name].view(torch.uint8)
        packed, back = against.difference(data, base, "BF16"), torch.empty_like(data)
        against.applied(packed, base, back, name)
        if not torch.equal(back, data):
            raise AssertionError(f"{name} does not come back")
        bits += sum(8 * stored(plane, tensor, compressed=True) for plane, tensor in packed.planes.items())
    return bits / sum(map(len, own.values()))


def alone(own: dict[str, Tensor]) -> float:
    packed = [schemes.encode(weights.view(torch.uint8), "BF16", "nested") for weights in own.values()]
    bits = sum(8 * stored(plane, tensor) for one in packed for plane, tensor in one.planes.items())
    return bits / sum(map(len, own.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-5, 1e-4, 1e-3])
    parser.add_argument("--data", default=os.environ.get("DECODATHLON_DATA"))
    parser.add_argument("--out", type=Path, default=PLACE)
    options = parser.parse_args()
    if not os.environ.get("DECODATHLON_MODELS"):
        parser.error("stories-260k is not at hand; have DECODATHLON_MODELS name the folder of its checkpoint")
    if options.steps <= EARLIER:
        parser.error(f"--steps {options.steps}: take more than {EARLIER}, for the last column")
    load_builtins()
    torch.set_num_threads(1)  # for so small a model a second thread costs more than it brings
    text = find("wikitext-2-raw-v1", "validation", options.data, say).joined[:400_000]
    lines = []
    for rate in progress.told(list(options.rates), "learning rates", say):
        torch.manual_seed(0)
        model, tokenizer = llama2c.load(Path(os.environ["DECODATHLON_MODELS"]))
        tokens = torch.tensor(tokenizer(text)["input_ids"])
        new, held = tokens[: -(len(tokens) // 10)], tokens[-(len(tokens) // 10) :]
        before, states = loss(model, held), trained(model, new, rate, options.steps)
        base = next(states)
        earlier = last = base
        for step, state in enumerate(states, 1):
            earlier, last = (state if step == options.steps - EARLIER else earlier), state
        changed = sum(int((w.view(torch.int16) != base[n].view(torch.int16)).sum()) for n, w in last.items())
        lines.append(
            [f"{rate:g}", str(options.steps), f"{before:.2f}", f"{loss(model, held):.2f}",
             f"{changed / sum(map(len, last.values())):.0%}", f"{differing(last, base):.2f}",
             f"{differing(last, earlier):.2f}", f"{alone(last):.2f}"]
        )  # fmt: skip
    page = options.out / "jit-delta.md"
    page.write_text(rewritten(page.read_text(), "personas", [COLUMNS, *lines]))
    say(f"wrote the table of {page}")


if __name__ == "__main__":
    main()
