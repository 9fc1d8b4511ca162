"""A model with natural weights out of one that was rounded to 4 bits: noise of one step of the grid on every weight.

    python scripts/dithered_model.py OUT [--model smollm2-135m-instruct] [--seed 0]

The embedded model came back from a 4-bit file, so its weights lie on a grid, on which any 4-bit base repeats them
exactly: what packed weights take, or how well their first bits draft, cannot be told from it. Uniform noise as wide as
the grid's step fills the gaps: as wide as the rounding was, so the model is about as much worse as rounding once more
would make it. It is made up, and every number of it says so by its name.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from decodathlon.harness import embedded, models
from decodathlon.harness.commands.command import say

#: Weights of a group of the grid (Q4_0, Q4_1).
GROUP = 32


def dithered(weight: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    """The weights (rows, columns) with uniform noise as wide as the least step of their group of 32 in a row, rounded
    to bfloat16."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    steps = groups.sort(-1).values.diff(dim=-1)
    least = torch.where(steps > 1e-4 * groups.abs().amax(-1, keepdim=True), steps, torch.inf).amin(-1, keepdim=True)
    least = torch.where(least.isfinite(), least, 0.0)
    noise = torch.rand(groups.shape, generator=source) - 0.5
    return (groups + least * noise).flatten(1).to(torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default=embedded.NAME)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.out.exists() and any(options.out.iterdir()):
        raise SystemExit(f"{options.out} is not empty; take another folder")
    folder = Path(models.fetch(models.resolve(options.model), say))
    source = torch.Generator().manual_seed(options.seed)
    shutil.copytree(folder, options.out, dirs_exist_ok=True)
    for path in sorted(options.out.glob("*.safetensors")):
        tensors = load_file(path)
        for name, tensor in sorted(tensors.items()):
            if tensor.dim() == 2 and tensor.shape[1] % GROUP == 0:
                tensors[name] = dithered(tensor, source)
            elif tensor.is_floating_point():
                tensors[name] = tensor.to(torch.bfloat16)
        save_file(tensors, path, metadata={"format": "pt"})
    say(f"{options.out}: {options.model} with noise of one step of its grid on every matrix; weights of no real model")


if __name__ == "__main__":
    main()
