"""Arithmetic sampling: each sample alone is an exact draw, the set is spread, long texts do not run out of digits."""

import math

import pytest
import torch

from decodathlon.harness import decoder as decoders
from decodathlon.harness.decoder import Limits
from decodathlon.harness.generation import autoregressive
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.targets.toy import enumerable_lm, law_of

load_builtins()


class Codes(RowRandom):
    """Chosen codes instead of random ones."""

    def __init__(self, codes):
        super().__init__(0, range(len(codes)))
        self.codes = codes

    def uniforms(self, *shape):
        noise = super().uniforms(*shape)
        noise[:, 0, 0] = self.codes
        return noise


@pytest.mark.parametrize("spec", ["arithmetic", "arithmetic[top_p=0.8]"])
def test_every_code_is_a_text_and_each_text_has_its_probability_of_codes(spec):
    """By enumeration: of M evenly spaced codes each text gets M p(text) to within one."""
    lm, M, T = enumerable_lm(4), 4096, 4
    sampler = decoders.build(spec)
    found = autoregressive(sampler, lm, [[0]] * M, Limits(T), Codes((torch.arange(M).double() + 0.5) / M))
    counts = {}
    for one in found:
        counts[tuple(one.tokens)] = counts.get(tuple(one.tokens), 0) + 1
    law = law_of(lm, [0], T)
    if spec != "arithmetic":
        law = {}
        grow = {(): 1.0}
        for t in range(T):
            p = {x: sampler.shape(lm.open([[0, *x]]).next_logits)[0].exp().tolist() for x in grow}
            grown = {(*x, v): w * q for x, w in grow.items() for v, q in enumerate(p[x]) if q > 0}
            law |= {x: w for x, w in grown.items() if x[-1] in lm.stop_tokens or t + 1 == T}
            grow = {x: w for x, w in grown.items() if x not in law}
    assert set(counts) <= set(law)
    assert max(abs(counts.get(text, 0) - M * p) for text, p in law.items()) <= 1 + 1e-6


def test_a_set_is_a_shifted_lattice_and_each_row_is_uniform():
    lm, sampler = enumerable_lm(4), decoders.build("arithmetic")
    from decodathlon.decoders.arithmetic import _Lattice

    first = []
    for seed in range(2000):
        codes = _Lattice(RowRandom(seed, range(5)), [[0], [0], [2], [0], [0]]).uniforms(3, 1)[:, 0, 0]
        gaps = codes[[0, 1, 3, 4]].sort().values.diff()
        assert torch.allclose(gaps, torch.full((3,), 0.25, dtype=torch.float64), atol=1e-12)
        first.append(float(codes[0]))
    # Kolmogorov's distance of 2,000 uniforms exceeds 0.043 once in 1,000 times
    ranks = torch.tensor(sorted(first), dtype=torch.float64) - torch.arange(2000) / 2000
    assert float(ranks.abs().max()) < 0.043
    same = [sampler.generate(lm, [[0]] * 3, Limits(4), RowRandom(7, range(3))) for _ in range(2)]
    assert [a.tokens for a in same[0]] == [a.tokens for a in same[1]]


def test_the_set_covers_the_law_better_than_independent_draws():
    """16 samples: total variation of their histogram over whole texts, averaged over 40 seeds, falls by a quarter."""
    lm, T, N = enumerable_lm(4), 3, 16
    law = law_of(lm, [0], T)

    def distance(spec, seed):
        found = decoders.build(spec).generate(lm, [[0]] * N, Limits(T), RowRandom(seed, range(N)))
        counts = {}
        for one in found:
            counts[tuple(one.tokens)] = counts.get(tuple(one.tokens), 0) + 1 / N
        return sum(abs(counts.get(x, 0) - p) for x, p in law.items()) / 2

    means = [sum(distance(spec, s) for s in range(40)) / 40 for spec in ("arithmetic", "temperature")]
    assert means[0] < 0.75 * means[1]


def test_long_texts_stay_random_after_the_digits_are_used_up():
    """1,000 fair bits from one code: a float64 alone would repeat zeros after 53. Ones are 500 +- 5 sd (79)."""
    sampler, state, tokens = decoders.build("arithmetic"), None, []
    noise = RowRandom(3, range(4)).uniforms(1000, 1)
    for t in range(1000):
        token, state = sampler.choose(torch.zeros(4, 2), state, noise[:, t])
        tokens.append(token)
    found = torch.stack(tokens)
    assert (found.sum(0) - 500).abs().max() < 79
    assert (found[60:].double().diff(dim=0) != 0).double().mean(0).tolist() == pytest.approx([0.5] * 4, abs=0.08)
    assert not torch.equal(found[60:, 0], found[60:, 1])
    assert float(state.coarseness.min()) == 1.0


def test_its_claim_follows_from_its_parameters():
    assert decoders.build("arithmetic").claim == "exact"
    assert decoders.build("arithmetic[top_p=0.9]").claim == "shaped"
    assert math.isclose(decoders.build("arithmetic[temperature=0.7]").temperature, 0.7)
