"""The processed law agrees with transformers' own processors, sums to one, and is drawn from exactly."""

import math

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from decodathlon import draw, process
from decodathlon.harness import law
from decodathlon.harness.measure import exactness


def logits(rows=7, vocabulary=1000, seed=0):
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"top_k": 20}, [TopKLogitsWarper(20)]),
        ({"top_p": 0.9}, [TopPLogitsWarper(0.9)]),
        ({"top_p": 0.9999}, [TopPLogitsWarper(0.9999)]),
        ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        (
            {"temperature": 1.3, "top_k": 50, "top_p": 0.8},
            [TemperatureLogitsWarper(1.3), TopKLogitsWarper(50), TopPLogitsWarper(0.8)],
        ),
        (
            {"temperature": 0.8, "top_p": 0.9, "min_p": 0.05},
            [TemperatureLogitsWarper(0.8), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)],
        ),
    ],
)
def test_process_equals_the_processors_of_transformers(ours, theirs):
    x = logits()
    expected = LogitsProcessorList(theirs)(None, x.clone()).log_softmax(-1)
    assert torch.allclose(process(x, **ours).exp(), expected.exp(), atol=1e-12)


def test_every_law_sums_to_one_also_for_one_token_and_for_ties():
    for x in (logits(), logits(vocabulary=1), torch.zeros(3, 10)):
        for options in ({}, {"top_k": 3}, {"top_p": 0.5}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-3}):
            assert torch.allclose(process(x, **options).exp().sum(-1), torch.ones(len(x), dtype=x.dtype))


def test_the_guessed_nucleus_equals_the_sorted_one(monkeypatch):
    x = logits(vocabulary=5000) * torch.tensor([[3.0], [1], [0.1], [2], [1], [0.01], [1]])  # from sharp to flat
    quick = {p: process(x, top_p=p) for p in (0.3, 0.9, 0.9999)}  # within the guess, and beyond it
    monkeypatch.setattr(law, "_GUESS", 10**9)
    for p, found in quick.items():
        assert torch.equal(found, process(x, top_p=p))
    monkeypatch.setattr(law, "_HISTOGRAM_FROM", 10**9)
    for p, found in quick.items():
        assert torch.equal(found, process(x, top_p=p))


@pytest.mark.parametrize("vocabulary", [4096, 49152])
def test_the_least_keys_by_histogram_are_those_by_sorting(vocabulary, monkeypatch):
    """Sharp and flat laws, ties, tokens that are cut, keys around 0, and masses up to all there is."""
    generator = torch.Generator().manual_seed(vocabulary)
    x = torch.randn(8, vocabulary, generator=generator) * torch.tensor([20.0, 5, 2, 1, 0.3, 0.01, 3, 3])[:, None]
    x[6] = x[6].bfloat16().float()
    x[7, 100:] = -math.inf
    log_p = x.log_softmax(-1)
    p = log_p.double().exp()
    surprise = -log_p
    apart = (surprise - (p * log_p.nan_to_num(neginf=0.0)).sum(-1, keepdim=True).float().neg()).abs()
    masses = (1e-9, 0.1, 0.5, 0.9, 0.999, 0.9999999)
    guessed = [law.least(key, log_p, mass) for key in (surprise, apart) for mass in masses]
    monkeypatch.setattr(law, "_GUESS", 1)
    quick = [law.least(key, log_p, mass) for key in (surprise, apart) for mass in masses]
    monkeypatch.setattr(law, "_HISTOGRAM_FROM", 10**9)
    slow = [law.least(key, log_p, mass) for key in (surprise, apart) for mass in masses]
    for a, b in zip(guessed + quick, slow + slow, strict=True):
        assert float((p * (a ^ b)).sum(-1).max()) < 1e-12, "at most what rounds to nothing differs"
        assert bool(a.any(-1).all())


@pytest.mark.parametrize("attempts", [1, 2, 5])
@pytest.mark.parametrize("mass", [0.5, 0.8, 0.95])
def test_draws_from_the_least_keys_have_the_law_of_that_set(mass, attempts):
    """40,000 draws in float64 laws of 300 tokens; the test of the audit at one in 10,000."""
    generator = torch.Generator().manual_seed(int(100 * mass) + attempts)
    log_p = (2 * torch.randn(1, 300, generator=generator, dtype=torch.float64)).log_softmax(-1)
    key = (log_p + 3).abs()  # neither the likeliest nor the least likely first
    whole = law.only(log_p, law.least(key, log_p, mass))[0].exp()
    u = torch.rand(40_000, attempts, generator=generator, dtype=torch.float64)
    drawn = law.draw_least(key.expand(len(u), -1), log_p.expand(len(u), -1), mass, u)
    assert exactness.p_value(drawn.bincount(minlength=300).numpy(), whole.numpy()) > 1e-4


@pytest.mark.parametrize("mass", [0.6, 0.9, 0.99])
def test_the_set_in_float32_is_that_of_a_plain_reading_in_float64(mass):
    """As large and as flat as a language model's laws: guess, histogram and rejection, against sorting in float64."""
    x = torch.randn(4, 49_152, generator=torch.Generator().manual_seed(1)) * torch.tensor([[1.0], [2], [3], [5]])
    p, order = x.double().softmax(-1).sort(-1, descending=True)
    before = torch.nn.functional.pad(p.cumsum(-1)[:, :-1], (1, 0))
    plain = torch.zeros_like(x, dtype=torch.bool).scatter(-1, order, before < mass)
    log_p = x.log_softmax(-1)
    kept = law.least(-log_p, log_p, mass)
    apart = (x.double().softmax(-1) * (kept ^ plain)).sum(-1)
    assert float(apart.max()) < 1e-5
    u = torch.rand(4, 200, law.ATTEMPTS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for draws in u.unbind(1):
        drawn = law.draw_least(-log_p, log_p, mass, draws)
        assert bool(kept.gather(1, drawn[:, None]).all())


def test_ties_are_kept_together_whatever_the_device_sorts_first(monkeypatch):
    x = logits(rows=50, vocabulary=2000).bfloat16().float()
    quick = {p: process(x, top_p=p) for p in (0.3, 0.9)}
    monkeypatch.setattr(law, "_GUESS", 10**9)
    for p, found in quick.items():
        assert torch.equal(found, process(x, top_p=p))
        turned = process(x.flip(-1), top_p=p).flip(-1)
        assert torch.equal(found > -math.inf, turned > -math.inf)
    assert process(torch.zeros(1, 8), top_p=0.5).exp().tolist() == [[0.125] * 8]


def test_one_hot_takes_the_first_of_the_greatest():
    assert law.one_hot(torch.tensor([[1.0, 5.0, 5.0]])).exp().tolist() == [[0.0, 1.0, 0.0]]


def test_draw_inverts_the_cumulative_law_exactly():
    p = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]], dtype=torch.float64)
    below_one = math.nextafter(1.0, 0.0)
    for u, token in [(0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (below_one, 4)]:
        assert draw(p.log(), torch.tensor([u], dtype=torch.float64)).item() == token


@pytest.mark.parametrize("vocabulary", [3, 255, 256, 257, 1000, 4096])
def test_draw_equals_a_search_in_the_plain_cumulative_law(vocabulary):
    x = process(logits(rows=50, vocabulary=vocabulary))
    u = torch.rand(50, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    cumulative = x.exp().cumsum(-1)
    plain = [int((row > level * row[-1]).nonzero()[0]) for row, level in zip(cumulative, u, strict=True)]
    assert draw(x, u).tolist() == plain


def test_draw_leaves_the_law_as_it_was():
    x = process(logits())
    before = x.clone()
    draw(x, torch.full((7,), 0.5, dtype=torch.float64))
    assert torch.equal(x, before)


def test_draw_never_returns_a_cut_token():
    x = process(logits(rows=1, vocabulary=50_000).float(), top_k=3)
    edges = [0.0, math.nextafter(0.0, 1.0), math.nextafter(1.0, 0.0), 0.5]
    levels = x[0].double().exp().cumsum(0)
    edges += [float(level) + d for level in levels[x[0] > float("-inf")] for d in (-1e-16, 0.0, 1e-16)]
    u = torch.tensor([e for e in edges if e < 1], dtype=torch.float64)
    tokens = draw(x.expand(len(u), -1), u)
    assert bool((x[0, tokens] > float("-inf")).all())


def test_draws_have_the_frequencies_of_the_law():
    """Chi-square over 20 tokens and 50,000 draws, alpha 1e-4: a total variation of 0.02 would be seen nearly always."""
    x = process(logits(rows=1, vocabulary=20))
    u = torch.rand(50_000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    counts = torch.bincount(draw(x.expand(50_000, -1), u), minlength=20).double()
    expected = 50_000 * x[0].exp()
    assert float(((counts - expected) ** 2 / expected).sum()) < 53.0
