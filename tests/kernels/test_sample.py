"""The fused draw: its noise, its law, and the GPU form (interpreted on a CPU) against the definition."""

import math

import pytest
import torch

from decodathlon.harness import law
from decodathlon.kernels.sample import dispatch, reference

SETTINGS = [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_k": 1}, {"top_p": 0.8}, {"top_p": 0.999}, {"min_p": 0.1},
            {"top_k": 50, "min_p": 0.02}, {"top_p": 0.9, "min_p": 0.05, "temperature": 1.7}]  # fmt: skip


@pytest.fixture(scope="module")
def fused():
    """The GPU form; without a GPU in Triton's interpreter (conftest.py)."""
    pytest.importorskip("triton")
    from decodathlon.kernels.sample.triton import sample

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return lambda logits, key, **setting: sample(logits.to(device), key.to(device), **setting).cpu()


def test_philox_is_philox():
    """Known answers: Random123's first words for the zero and the all-ones key, and Triton's documented uniforms."""
    zero = reference.philox(torch.tensor([0]), torch.tensor([0]))
    assert int(zero) == 0x6627E8D5
    found = reference.uniforms(torch.tensor([42]), torch.arange(4))[0]
    assert found.tolist() == pytest.approx([0.774080, 0.024563, 0.348266, 0.540801], abs=1e-6)


def test_gumbel_noise_is_gumbel():
    """Its quantiles, from the finest numbers on; and 2^20 of them by Kolmogorov's test at one in a thousand."""
    u = torch.tensor([0.0, 2.0**-31, 1e-5, 9.99e-4, 1.001e-3, 0.5, 0.999])
    exact = -(-torch.log1p(-(u.double() + 2.0**-32))).log()
    assert torch.allclose(reference.gumbel(u).double(), exact, atol=2e-6)
    n = 1 << 20
    noise = reference.gumbel(reference.uniforms(torch.tensor([7]), torch.arange(n)))[0].double().sort().values
    cdf = (-(-noise).exp()).exp()
    distance = (cdf - (torch.arange(n).double() + 0.5) / n).abs().max()
    assert float(distance) * math.sqrt(n) < 1.95


@pytest.mark.parametrize("setting", [*SETTINGS, {"top_k": 9, "top_p": 0.7}, {"top_k": 40, "top_p": 0.9, "min_p": 0.1}])
def test_what_is_kept_is_what_the_harness_s_law_keeps(setting):
    logits = 3 * torch.randn(20, 301, generator=torch.Generator().manual_seed(0))
    logits[3] = logits[3].bfloat16().float()  # ties
    temperature = setting.get("temperature", 1.0)
    cut = {k: v for k, v in setting.items() if k != "temperature"}
    ours = reference.kept(logits / temperature, **cut)
    assert torch.equal(ours, law.process(logits, **setting) > -math.inf)


@pytest.mark.parametrize("setting", SETTINGS)
def test_draws_have_the_law(setting):
    """100,000 draws of one law of 12 tokens: chi-square at one in a thousand."""
    from decodathlon.harness.measure import exactness

    logits = 1.5 * torch.randn(1, 12, generator=torch.Generator().manual_seed(4))
    keys = reference.keys(torch.rand(100_000, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
    drawn = reference.sample(logits.expand(100_000, -1), keys, **setting)
    p = law.process(logits.double(), **setting)[0].exp().numpy()
    assert exactness.p_value(torch.bincount(drawn, minlength=12).double().numpy(), p) > 1e-3


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("B", "V"), [(1, 7), (3, 1000), (32, 129), (2, 49152), (1, 50257), (1, 151936)])
def test_the_fused_form_draws_the_same_tokens(fused, B, V, setting):
    if V > 10_000 and setting not in ({}, {"top_p": 0.8}, {"top_k": 5}):
        pytest.skip("the interpreter is slow")
    generator = torch.Generator().manual_seed(V + B)
    logits = 4 * torch.randn(B, V, generator=generator)
    key = reference.keys(torch.rand(B, generator=generator, dtype=torch.float64))
    wide = torch.full((B, V + 3), float("nan"))  # what lies between the rows must not be read
    wide[:, :V] = logits
    args = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | setting
    assert torch.equal(fused(wide[:, :V], key, **args), reference.sample(logits, key, **setting))


@pytest.mark.parametrize("setting", SETTINGS)
def test_cut_tokens_ties_and_a_single_one(fused, setting):
    logits = torch.full((4, 777), -math.inf)
    logits[0, 13] = 2.0  # a single finite logit
    logits[1, ::7] = 0.0  # ties
    logits[2, :9] = torch.randn(9, generator=torch.Generator().manual_seed(1))
    logits[3] = torch.randn(777, generator=torch.Generator().manual_seed(2)).bfloat16().float()
    args = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | setting
    for seed in range(6):
        key = reference.keys(torch.rand(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
        found = fused(logits, key, **args)
        assert torch.equal(found, reference.sample(logits, key, **setting))
        assert int(found[0]) == 13
        assert int(found[1]) % 7 == 0


def test_it_is_an_operation_that_torch_can_hold():
    logits, key = torch.randn(3, 50), torch.arange(3)
    torch.library.opcheck(dispatch.sample, (logits, key, 1.0, 0, 0.9, 0.0))
    compiled = torch.compile(lambda x: dispatch.sample(x, key, 1.0, 0, 0.9, 0.0), backend="eager", fullgraph=True)
    assert torch.equal(compiled(logits), reference.sample(logits, key, top_p=0.9))
