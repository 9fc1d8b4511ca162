"""The GPU form of packed weights (interpreted on a CPU): patterns bit for bit, products near the exact ones."""

import pytest
import torch
from delta_cases import CASES, normal

from decodathlon.kernels.delta import reference

triton = pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: The interpreter takes a while for each block.
SMALL = [c for c in CASES if "many times" not in c]


def there(planes):
    return planes._replace(**{n: p.to(DEVICE) for n, p in planes._asdict().items() if isinstance(p, torch.Tensor)})


def short(case):
    return CASES[case] if DEVICE == "cuda" else CASES[case][: 40 * reference.BLOCK - 3]


@pytest.mark.parametrize("case", SMALL)
def test_every_pattern_is_rebuilt(case):
    from decodathlon.kernels.delta import triton as gpu

    bits = short(case)
    for rebuild, planes in (
        (gpu.nested_rebuild, reference.nested(bits)), (gpu.fixed12_rebuild, reference.fixed12(bits))
    ):  # fmt: skip
        out = torch.full((len(bits) + 300,), 0x1234, dtype=torch.int16, device=DEVICE)
        rebuild(there(planes), out[: len(bits)])
        assert torch.equal(out[: len(bits)].cpu(), bits), rebuild
        assert (out[len(bits) :] == 0x1234).all(), "nothing is written behind the end"


@pytest.mark.parametrize("bits", [4, 5, 6])
@pytest.mark.parametrize("case", ["every pattern, shuffled", "two scales", "a block of escapes", "an odd number"])
def test_drafts_are_those_of_the_definition(case, bits):
    from decodathlon.kernels.delta import triton as gpu

    planes = reference.nested(short(case))
    out = torch.full((len(short(case)),), 0x1234, dtype=torch.int16, device=DEVICE)
    gpu.nested_rebuild(there(planes), out, bits)
    expected = reference.nested_draft(planes, bits)
    kept = ~expected.isnan()
    assert torch.equal(out.cpu()[kept], expected.view(torch.int16)[kept])


@pytest.mark.parametrize("form", ["nested", "fixed12", "draft of 4", "draft of 5", "draft of 6"])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 6, 512), (3, 4, 256), (8, 9, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_product_that_decodes_as_it_reads(form, M, N, K, dtype):
    """Against the sum in float64; float32 sums of K products err by no more than K roundings of their parts."""
    from decodathlon.kernels.delta import triton as gpu

    weights = normal(N * K)
    weights[::97] *= 1e-6  # escapes
    weights[5::301] *= 1e5
    planes = getattr(reference, "fixed12" if form == "fixed12" else "nested")(weights.view(torch.int16))
    assert len(planes.escapes) > 5
    bits = int(form[-1]) if form.startswith("draft") else 0
    exact = reference.nested_draft(planes, bits) if bits else weights
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert gpu.fits(K, M)
    y = gpu.product(there(planes), x.to(DEVICE), bits).cpu().double()
    w = exact.view(N, K).double()
    assert y.shape == (M, N)
    bound = K * 2.0**-24 * (x.double().abs() @ w.abs().T)
    assert ((y - x.double() @ w.T).abs() <= bound).all()
    assert torch.equal(gpu.product(there(planes), x.to(DEVICE), bits).cpu().double(), y), "the same at every call"


def test_what_a_product_cannot_read_is_told():
    from decodathlon.kernels.delta import triton as gpu

    assert not gpu.fits(576, 1)
    assert not gpu.fits(512, 9)


def test_reading_reads_every_byte():
    """By hand: the sums of all words, which wrap."""
    from decodathlon.kernels.delta import triton as gpu

    planes = reference.fixed12(CASES["every pattern, shuffled"])
    raw = b"".join(bytes(p.contiguous().view(torch.uint8).flatten().tolist()) for p in planes if torch.is_tensor(p))
    raw += bytes(-len(raw) % 4)
    words = [int.from_bytes(raw[i : i + 4], "little") for i in range(0, len(raw), 4)]
    expected = [sum(words[i : i + 4096]) % 2**32 for i in range(0, len(words), 4096)]
    assert (gpu.reading(there(planes))().long() % 2**32).tolist() == expected
