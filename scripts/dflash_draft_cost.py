"""What drafting a block costs beside the pass that verifies it, in bytes that have to be read and in seconds.

    python scripts/dflash_draft_cost.py                          # an 8B-shaped model of random weights, on a GPU
    python scripts/dflash_draft_cost.py --layers 4 --width 256 --device cpu

Where a pass of so few tokens takes as long as its weights take to be read, a drafter costs its share of them and little
more. Both are timed by turns, as decoding does them (the model's pass is no graph); the ratio is a median over turns
with a 95 % interval.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from decodathlon.decoders.dflash import checkpoint
from decodathlon.decoders.dflash.drafter import seen_by
from decodathlon.decoders.dflash.network import Network
from decodathlon.harness import decoder as decoders
from decodathlon.harness.measure.observations import Observations
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.targets.transformers import TransformersTarget


def model_of(options: argparse.Namespace) -> Any:
    """A target of Qwen3's kind with random weights."""
    config = transformers.Qwen3Config(
        hidden_size=options.width, intermediate_size=3 * options.width, num_hidden_layers=options.layers,
        num_attention_heads=options.width // 128 or 1, num_key_value_heads=max(1, options.width // 512), head_dim=128,
        vocab_size=options.vocabulary, max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    torch.set_default_dtype(dtype)  # in which the weights are made; in a wider one they might have no room
    with torch.device(options.device):
        model = transformers.Qwen3ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return TransformersTarget(model.eval(), name="random")


def size(module: Any) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--drafter-layers", type=int, default=5)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--text", type=int, default=1024, help="tokens before")
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args(words)
    if options.turns < 6 or options.layers < 4:
        parser.error("give at least 6 turns, for an interval, and 4 layers, some of which the drafter looks at")
    load_builtins()
    torch.manual_seed(0)
    target = model_of(options)
    fused = min(5, options.layers - 3)
    config = checkpoint.shape_for(target, layers=options.drafter_layers, fused=fused, block=options.block)
    network = Network(config).to(device=target.device, dtype=target.dtype).eval().requires_grad_(False)
    target.kept["dflash", checkpoint.RANDOM] = network
    decoder = decoders.build(f"dflash[checkpoint=random,block={options.block}]")
    head = size(target.model.get_output_embeddings())
    share = (size(network) + head) / (size(target.model) - size(target.model.get_input_embeddings()))
    prompts = [[t % 1000 for t in range(options.text)]]
    context = target.open(prompts, capacity=options.text + options.block + options.turns + 8, hidden=seen_by(network))
    drafter = decoder.drafter(target, context, prompts)
    tokens = torch.zeros(1, options.block, dtype=torch.long)

    def wait() -> float:
        if options.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def verify() -> float:
        begun = wait()
        step = context.extend(tokens, hidden=seen_by(network))
        step.logits.argmax(-1)
        context.keep([1])
        drafter.settle([0], step.hidden)
        seconds = wait() - begun
        context.rewind([options.text])
        return seconds

    def draft() -> float:
        begun = wait()
        laws = drafter.laws(prompts, [options.block - 1])
        laws.argmax(-1)
        return wait() - begun

    ratios: list[float] = []
    told: list[tuple[float, float]] = []
    with torch.no_grad():
        drafter.laws(prompts, [options.block - 1])
        for turn in range(-3, options.turns):  # the first ones warm up, and record graphs
            verifying, drafting = verify(), draft()
            if turn >= 0:
                ratios.append(math.log(drafting / verifying))
                told.append((drafting, verifying))
    found = Observations.each([f"turn-{i}" for i in range(len(ratios))], ratios, scale="exp").estimate()
    drafting, verifying = (sorted(x)[len(told) // 2] * 1e3 for x in zip(*told, strict=True))
    sys.stdout.write(
        f"{target.device}: drafting {drafting:.2f} ms, verifying {verifying:.2f} ms, ratio {found.value:.3f} "
        f"[{found.low:.3f}, {found.high:.3f}]; bytes {share:.3f}; {found.value / share:.2f} times its share\n"
    )
    for note in target.notes:
        sys.stdout.write(note + "\n")


if __name__ == "__main__":
    main()
