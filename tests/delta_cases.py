"""Bit patterns of BF16 weights, usual and unusual, to pack."""

import torch

EVERY = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)


def normal(count, scale=0.02, seed=0):
    made = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * scale
    return made.to(torch.bfloat16)


def shuffled(seed):
    return EVERY[torch.randperm(len(EVERY), generator=torch.Generator().manual_seed(seed))]


CASES = {
    "every pattern": EVERY,
    "every pattern, shuffled": shuffled(0),
    "every pattern, many times": torch.cat([shuffled(seed) for seed in range(3)] + [normal(70_000).view(torch.int16)]),
    "nothing": EVERY[:0],
    "one": EVERY[77:78],
    "zeros": torch.zeros(1000, dtype=torch.int16),
    "negative zeros": torch.full((300,), -32768, dtype=torch.int16),
    "NaN with a payload": torch.full((513,), 0x7FC3, dtype=torch.int16),
    "subnormals": torch.arange(1, 128, dtype=torch.int16),
    "largest exponents": torch.arange(0x7F00, 0x7F80, dtype=torch.int16),
    "an odd number": normal(4_095).view(torch.int16),
    "two scales": torch.cat([normal(5_000), normal(5_000, 1e-20)]).view(torch.int16),
    "a block of escapes": torch.cat([normal(2_560), normal(256, 1e9), normal(2_560)]).view(torch.int16),
}
