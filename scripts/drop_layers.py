"""Save a model without some of its layers as a model of its own: a drafter with the same tokens, for `draft-model`.

    python scripts/drop_layers.py smollm2-135m-instruct OUT --drop 18-27
    pytest suites/ --benchmark --suite throughput --decoder 'draft-model[model=OUT]' --baseline 'hf-assisted[model=OUT]'

Nothing is trained, so it agrees with the model less than any released drafter would: it is a pair to try things on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decodathlon.harness import models
from decodathlon.harness.commands.command import say
from decodathlon.harness.errors import DecodathlonError, SpecError
from decodathlon.harness.registry import load_builtins


def numbers(text: str) -> list[int]:
    """`3,7-9` as 3, 7, 8, 9.

    Raises:
        SpecError: it is not such a list.
    """
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise SpecError(f"--drop {text}: numbers of layers such as 3,7-9, not {part!r}")
        if int(last or first) < int(first):
            raise SpecError(f"--drop {text}: {part.strip()} runs backwards")
        found |= set(range(int(first), int(last or first) + 1))
    return sorted(found)


def without(target: Any, gone: Sequence[int]) -> Any:
    """The Hugging Face model of a target without these layers; it is changed in place.

    Raises:
        SpecError: it has no such layers, or none would be left.
    """
    import torch

    model, own = target.model, target.model.base_model
    if gone and gone[-1] >= target.layers:
        raise SpecError(f"{target.name} has layers 0 to {target.layers - 1}, not {gone[-1]}")
    if len(gone) == target.layers:
        raise SpecError(f"{target.name} would have no layer left")
    own.layers = torch.nn.ModuleList(layer for i, layer in enumerate(own.layers) if i not in set(gone))
    for i, layer in enumerate(own.layers):
        layer.self_attn.layer_idx = i
    model.config.num_hidden_layers = len(own.layers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [t for i, t in enumerate(model.config.layer_types) if i not in set(gone)]
    return model


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--drop", required=True, metavar="N,M-K")
    options = parser.parse_args(words)
    load_builtins()
    try:
        gone = numbers(options.drop)
        if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
            raise SpecError(f"{options.out} is not an empty folder; name another")
        target = models.load(models.resolve(options.model), device="cpu", dtype="bfloat16", say=say)
        model = without(target, gone)
        # the fused matrices of our forward are views of one tensor, which safetensors does not write
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        tied = getattr(model.config, "tie_word_embeddings", False)
        model.save_pretrained(
            options.out, state_dict={k: v for k, v in state.items() if not (tied and k == "lm_head.weight")}
        )
        if target.tokenizer is not None:
            target.tokenizer.save_pretrained(options.out)
    except DecodathlonError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    say(f"{options.out}: {len(model.base_model.layers)} of {target.layers} layers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
