"""Bit-exact BF16 weights in fewer bits: every pattern comes back, sizes are those that were promised."""

import math

import pytest
import torch
from delta_cases import CASES, EVERY, normal

from decodathlon.kernels.delta import int4, native, reference

FORMS = {
    "nested": (reference.nested, reference.nested_exact),
    "fixed12": (reference.fixed12, reference.fixed12_exact),
    "int4_delta": (int4.int4_delta, int4.int4_delta_exact),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", FORMS)
def test_every_pattern_comes_back(form, case):
    encode, decode = FORMS[form]
    assert torch.equal(decode(encode(CASES[case])), CASES[case])


@pytest.mark.parametrize("case", [c for c in CASES if c != "nothing"])
@pytest.mark.parametrize("form", FORMS)
def test_some_blocks_alone_are_what_they_are_among_all(form, case):
    encode, decode = FORMS[form]
    planes = encode(CASES[case])
    whole = torch.cat([CASES[case], CASES[case].new_zeros(-len(CASES[case]) % reference.BLOCK)]).view(-1, 256)
    count = len(whole)
    for blocks in ([0], [count - 1, 0, count // 2, 0], list(range(count)) * 2, []):
        found = decode(reference.gathered(planes, torch.tensor(blocks, dtype=torch.long))).view(-1, 256)
        for got, b in zip(found, blocks, strict=True):
            kept = 256 if b < count - 1 or len(CASES[case]) % 256 == 0 else len(CASES[case]) % 256
            assert torch.equal(got[:kept], whole[b][:kept])


NATIVE = pytest.mark.skipif(native.library() is None, reason="no C compiler")


@NATIVE
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_compiled_form_does_what_the_definition_does(case, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    bits, c = CASES[case], native.library()
    for padding in (0, 1):  # nothing is written behind the end
        for form, (encode, _) in FORMS.items():
            out = torch.full((len(bits) + padding,), 0x1234, dtype=torch.int16)
            getattr(native, f"{form}_exact")(c, encode(bits), out[: len(bits)])
            assert torch.equal(out[: len(bits)], bits), form
            assert (out[len(bits) :] == 0x1234).all()
    planes = reference.nested(bits)
    for width in (4, 5, 6):
        out = torch.zeros_like(bits)
        native.nested_draft(c, planes, width, out)
        expected = reference.nested_draft(planes, width)
        nan = expected.isnan()
        assert torch.equal(out[~nan], expected.view(torch.int16)[~nan])
    base, out = int4.int4_delta(bits), torch.zeros_like(bits)
    native.int4_draft(c, base, out)
    assert torch.equal(out, int4.int4_draft(base).view(torch.int16))


def test_parts_make_up_the_whole():
    bits = CASES["every pattern, many times"]
    known = reference.plan(sum(reference.patterns(part) for part in bits.split(50_000)))
    whole, part = reference.nested(bits), reference.SPAN * reference.BLOCK
    parts = [reference.nested(some, known) for some in bits.split(part)]
    ahead = torch.tensor([0, *(len(p.escapes) for p in parts)]).cumsum(0)
    for name in ("code", "first", "second", "middle", "last", "escapes", "before"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name)), name
    assert torch.equal(torch.cat([p.spans + n for p, n in zip(parts, ahead, strict=False)]), whole.spans)
    assert torch.equal(known.means, whole.means)
    parts = [reference.fixed12(some, known) for some in bits.split(part)]
    whole = reference.fixed12(bits)
    assert torch.equal(torch.cat([p.escape_at + i * part for i, p in enumerate(parts)]), whole.escape_at)


def stored(planes):
    return 8 * sum(p.numel() * p.element_size() for p in planes if isinstance(p, torch.Tensor))


def test_a_normal_matrix_takes_the_bits_that_were_promised():
    """11 and a little: 8 for each escape and 16 per 256 weights; 12 and hardly anything."""
    weights = normal(2**21)
    planes = reference.nested(weights.view(torch.int16))
    outside = len(planes.escapes) / len(weights)
    assert 0.015 < outside < 0.035
    assert stored(planes) / len(weights) == pytest.approx(11 + 8 * outside + 16 / 256, abs=0.002)
    assert stored(planes) / len(weights) < 11.35
    assert stored(reference.fixed12(weights.view(torch.int16))) / len(weights) < 12.02


@pytest.mark.parametrize(("bits", "decibels"), [(4, 14.0), (5, 19.5), (6, 25.0)])
def test_a_draft_is_as_near_as_its_bits_allow(bits, decibels):
    weights = torch.cat([normal(2**16), normal(200, 3.0, seed=1)])  # outliers are escapes, and are kept as well
    found = reference.nested_draft(reference.nested(weights.view(torch.int16)), bits)
    error = (found.double() - weights.double()).square().sum() / weights.double().square().sum()
    assert -10 * math.log10(error) > decibels
    assert torch.equal(found.signbit(), weights.signbit() | (found == 0) & found.signbit())


def test_a_draft_keeps_sign_and_exponent_and_is_the_mean_of_what_looks_alike():
    """By hand: 1.0 and 1.75 in one binade, weighed alike; 4 and 7.5, of which the energy counts 16 times as much."""
    weights = torch.tensor([1.0, -1.75, 4.0, 7.5], dtype=torch.bfloat16)
    planes = reference.nested(weights.view(torch.int16))
    mean = (1.0 + 1.75 + 16 * 1.0 + 16 * 1.875) / 34
    expected = torch.tensor([mean, -mean, 4 * mean, 4 * mean]).to(torch.bfloat16)
    assert torch.equal(reference.nested_draft(planes, 4), expected)
    low, high = 1.0, (1.75 + 16 * 1.875) / 17
    expected = torch.tensor([low, -high, 4 * low, 4 * high]).to(torch.bfloat16)
    assert torch.equal(reference.nested_draft(planes, 5), expected)


def test_drafts_of_what_is_no_usual_number():
    odd = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e-40, 1.5], dtype=torch.bfloat16)
    found = reference.nested_draft(reference.nested(odd.view(torch.int16)), 6)
    assert found[:2].tolist() == [0.0, 0.0]
    assert found[2:4].tolist() == [math.inf, -math.inf]
    assert abs(found[4]) < 1e-37
    assert found[5] == 1.5


def test_a_base_of_four_bits_takes_more_and_drafts_as_well_as_five():
    """4.25 of the base, 8 of the delta, 8 more where the base is 0, and 16 per 256 weights."""
    weights = normal(2**21)
    planes = int4.int4_delta(weights.view(torch.int16))
    none = len(planes.escapes) / len(weights)
    assert 0.1 < none < 0.16
    assert len(planes.patches) == 0
    met = planes.low[reference.unnibbled(planes.code) != 8] == 0
    assert 0.01 < met.float().mean() < 0.02, "hardly one in fifty is its base: the delta is not sparse"
    assert stored(planes) / len(weights) == pytest.approx(4.25 + 8 + 8 * none + 16 / 256, abs=0.002)
    error = (int4.int4_draft(planes).double() - weights.double()).square().sum() / weights.double().square().sum()
    assert -10 * math.log10(error) > 20


@pytest.mark.parametrize("per", [4, 8])
@pytest.mark.parametrize("case", [c for c in CASES if c != "nothing"])
def test_whatever_the_base_is_the_delta_brings_it_back(case, per):
    bits = CASES[case]
    blocks, source = -(-len(bits) // reference.BLOCK), torch.Generator().manual_seed(0)
    q = torch.randint(-8, 8, (blocks, reference.BLOCK), generator=source, dtype=torch.int32)
    finite = EVERY[EVERY.view({4: torch.bfloat16, 8: torch.float16}[per]).isfinite()]
    scales = finite[torch.randint(0, len(finite), (blocks, per), generator=source)]
    planes = int4.int4_delta(bits, (q, scales))
    assert torch.equal(int4.int4_delta_exact(planes), bits)
    if len(bits) > 1:
        assert len(planes.patches) > 0
    if native.library() is not None:
        out = torch.zeros_like(bits)
        native.int4_delta_exact(native.library(), planes, out)
        assert torch.equal(out, bits)
        native.int4_draft(native.library(), planes, out)
        assert torch.equal(out, int4.int4_draft(planes).view(torch.int16))
