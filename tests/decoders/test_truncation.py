"""Locally typical, eta and Mirostat against transformers' own processors, or a plain reading of the paper."""

import math

import pytest
import torch
from transformers.generation.logits_process import EtaLogitsWarper, TypicalLogitsWarper

from decodathlon.harness import decoder as decoders
from decodathlon.harness.law import check
from decodathlon.harness.registry import load_builtins

load_builtins()


def logits(rows=40, vocabulary=300, seed=0):
    spread = torch.linspace(0.2, 6.0, rows, dtype=torch.float64)[:, None]
    return spread * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("mass", [0.1, 0.5, 0.95])
def test_locally_typical_is_that_of_transformers(mass):
    x = logits()
    theirs = TypicalLogitsWarper(mass)(None, x).log_softmax(-1)
    ours = decoders.build(f"locally-typical[mass={mass}]").shape(x)
    check(ours, x, "typical")
    assert torch.allclose(ours.exp(), theirs.exp(), atol=1e-12)


def test_locally_typical_may_cut_the_likeliest_token():
    """One of 0.3 among seventy of 0.01: the entropy is near the surprise of the small ones, so the great one goes."""
    x = torch.tensor([[0.7] + [0.3 / 30] * 30]).double().log()
    law = decoders.build("locally-typical[mass=0.2]").shape(x)
    entropy = -(0.7 * math.log(0.7) + 0.3 * math.log(0.01))
    assert abs(-math.log(0.7) - entropy) < abs(-math.log(0.01) - entropy)
    assert law[0, 0] == 0.0
    flat = torch.tensor([[0.3] + [0.7 / 70] * 70]).double().log()
    assert decoders.build("locally-typical[mass=0.2]").shape(flat)[0, 0] == -math.inf


def test_whole_mass_keeps_the_law():
    x = logits()
    assert torch.allclose(decoders.build("locally-typical[mass=1]").shape(x), x.log_softmax(-1), atol=1e-12)
    wide = 3 * torch.randn(4, 49_152, generator=torch.Generator().manual_seed(0))
    assert bool((decoders.build("locally-typical[mass=1]").shape(wide) > -math.inf).all())


@pytest.mark.parametrize("epsilon", [3e-4, 2e-3, 0.05])
def test_eta_is_that_of_transformers(epsilon):
    x = logits()
    theirs = EtaLogitsWarper(epsilon)(None, x).log_softmax(-1)
    ours = decoders.build(f"eta[epsilon={epsilon}]").shape(x)
    check(ours, x, "eta")
    assert torch.allclose(ours.exp(), theirs.exp(), atol=1e-12)


def test_eta_keeps_the_likeliest_token_of_a_flat_law():
    assert bool((decoders.build("eta[epsilon=0.5]").shape(torch.zeros(1, 1000)) > -math.inf).any())


def plain_mirostat(rows, chosen, tau, rate):
    """Algorithm 2 of the paper, one token at a time on lists; returns the law at each step."""
    bound, laws = 2 * tau, []
    for row, token in zip(rows, chosen, strict=True):
        total = sum(math.exp(v) for v in row)
        p = [math.exp(v) / total for v in row]
        kept = [-math.log2(x) <= bound for x in p]
        if not any(kept):
            kept = [x == max(p) for x in p]
        mass = sum(x for x, k in zip(p, kept, strict=True) if k)
        laws.append([x / mass if k else 0.0 for x, k in zip(p, kept, strict=True)])
        bound -= rate * (-math.log2(p[token]) - tau)
    return laws


@pytest.mark.parametrize("tau", [0.3, 2.0, 5.0])
def test_mirostat_follows_the_paper(tau):
    x = logits(rows=60, vocabulary=50, seed=3)
    sampler = decoders.build(f"mirostat[tau={tau},rate=0.5]")
    u = torch.rand(60, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    state, chosen, laws = sampler.start(1), [], []
    for row, noise in zip(x, u, strict=True):
        laws.append(sampler.next_law(row[None], state, noise)[0][0].exp())
        token, state = sampler.choose(row[None], state, noise)
        chosen.append(int(token))
    plain = plain_mirostat(x.tolist(), chosen, tau, 0.5)
    assert torch.allclose(torch.stack(laws), torch.tensor(plain, dtype=torch.float64), atol=1e-12)
    assert any(0 in law for law in plain)


def test_mirostat_steers_the_surprise():
    """On a law of 5.6 bits it settles at 3 bits within a tenth; the state of a row is its own."""
    x = 2 * torch.randn(1, 400, generator=torch.Generator().manual_seed(0)).double().expand(2, -1)
    sampler, bits = decoders.build("mirostat[tau=3]"), []
    state = sampler.start(2)
    u = torch.rand(1500, 2, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for noise in u:
        token, state = sampler.choose(x, state, noise)
        bits.append(-x.log_softmax(-1).gather(-1, token[:, None])[:, 0] / math.log(2))
    assert torch.stack(bits)[500:].mean(0).tolist() == pytest.approx([3.0, 3.0], abs=0.1)
    alone, state = [], sampler.start(1)
    for noise in u:
        token, state = sampler.choose(x[:1], state, noise[:1])
        alone.append(-x[:1].log_softmax(-1).gather(-1, token[:, None])[:, 0] / math.log(2))
    assert torch.equal(torch.stack(alone)[:, 0], torch.stack(bits)[:, 0])
