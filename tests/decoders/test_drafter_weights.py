"""Rounded weights of drafters: bounds of the error, optimality against brute force, budgets that are kept."""

import itertools

import pytest
import torch

from decodathlon.decoders.speculative import codebook, matrices

SOURCE = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(32, 64, generator=SOURCE)
SQUARE = torch.rand(64, generator=SOURCE).mul(4).exp()


@pytest.mark.parametrize("zeros", [False, True])
def test_four_bits_err_by_half_a_step_inside_the_range_and_clip_beyond(zeros):
    q, scale, zero = matrices.int4(WEIGHT, zeros)
    assert q.unique().tolist() == [float(i) for i in range(16)]
    found = matrices.rounded(WEIGHT, 4, "int", zeros)
    within = (q > 0) & (q < 15)
    steps = scale[..., None].abs().expand(-1, -1, 32).flatten(1)
    assert ((found - WEIGHT).abs()[within] <= 0.51 * steps[within]).all()
    assert bool((zero != 0).any()) == zeros
    assert zero.shape == scale.shape == (32, 2)


@pytest.mark.parametrize(("zeros", "least"), [(False, 21.3), (True, 22.1)])
def test_four_bits_of_a_normal_matrix_leave_so_many_decibels(zeros, least):
    """Reference: the best uniform 16-level quantiser of one normal law has 20.2 dB (Max 1960); a scale per 32 gains."""
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(1))
    error = matrices.rounded(weight, 4, "int", zeros) - weight
    assert 10 * float(torch.log10(weight.square().sum() / error.square().sum())) >= least


def test_a_matrix_made_of_groups_with_zeros_is_repeated():
    """The trap of a checkpoint that was quantised before: the same grid finds it again."""
    steps = torch.randint(0, 16, (32, 64), generator=SOURCE)
    steps[:, ::32], steps[:, 1::32] = 0, 15
    weight = steps * 2.0**-6 - 0.0625
    torch.testing.assert_close(matrices.rounded(weight, 4, "int", zeros=True), weight, atol=2e-4, rtol=0)
    assert (matrices.rounded(weight, 4, "int") - weight).abs().max() > 2e-3


def test_eight_bits_err_by_half_a_step():
    q, scale = matrices.int8(WEIGHT)
    assert int(q.abs().max()) == 127
    assert ((q.float() * scale[:, None] - WEIGHT).abs() <= 0.5001 * scale[:, None]).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_kernels_multiply_by_what_the_numbers_stand_for(bits):
    made = (matrices.Int4 if bits == 4 else matrices.Int8)(WEIGHT, torch.arange(32.0))
    x = torch.randn(2, 3, 64, generator=SOURCE)
    expected = x @ matrices.rounded(WEIGHT, bits, "int").T + torch.arange(32.0)
    torch.testing.assert_close(made(x), expected, atol=1e-4, rtol=1e-4)
    if bits == 4:
        expected = x @ matrices.rounded(WEIGHT, 4, "int", zeros=True).T
        torch.testing.assert_close(matrices.Int4(WEIGHT, None, zeros=True)(x), expected, atol=1e-4, rtol=1e-4)


def test_mxfp4_has_a_power_of_two_per_block_and_eight_magnitudes():
    found = matrices.mxfp4(WEIGHT)
    torch.testing.assert_close(matrices.mxfp4(found), found)
    for block, rounded in zip(WEIGHT.view(-1, 32), found.view(-1, 32), strict=True):
        scale = 2.0 ** (torch.floor(torch.log2(block.abs().max())) - 2)
        assert set((rounded.abs() / scale).tolist()) <= set(matrices.E2M1)
        clipped = block.abs() > 6 * scale
        nearest = torch.tensor([min(matrices.E2M1, key=lambda g: abs(g - float(abs(x) / scale))) for x in block])
        assert torch.equal(rounded.abs()[~clipped], (nearest * scale)[~clipped])
        assert (rounded.abs()[clipped] == 6 * scale).all()
    assert (matrices.mxfp4(torch.zeros(1, 32)) == 0).all()


@pytest.mark.parametrize("mantissa", [1, 2])
def test_leading_bits_leave_sign_and_exponent_and_err_by_half_of_the_last_bit(mantissa):
    found = matrices.nested(WEIGHT, mantissa)
    kept = found != 0
    assert (found.sign() == WEIGHT.sign())[kept].all()
    assert torch.equal(torch.frexp(found).exponent[kept], torch.frexp(WEIGHT).exponent[kept])
    assert ((found - WEIGHT).abs() / WEIGHT.abs())[kept].max() <= 2.0 ** -(mantissa + 1)
    greatest = int(torch.frexp(WEIGHT).exponent.max())
    assert torch.equal(kept, torch.frexp(WEIGHT).exponent > greatest - 7)
    assert (matrices.nested(torch.zeros(2, 2), mantissa) == 0).all()


def cost(rounded, weight, square):
    return float(((rounded - weight).double().square() * square.double()).sum())


def test_buckets_are_as_good_as_any_on_a_small_matrix():
    """All ways to split nine numbers into two neighbouring buckets."""
    weight, square = torch.randn(3, 3, generator=SOURCE), torch.tensor([1.0, 5.0, 0.2])
    found = codebook.codebook(weight, square, 1)
    assert len(found.unique()) == 2
    values, order = weight.flatten().sort()
    importance = square.expand_as(weight).flatten()[order]

    def split(at):
        parts = [(values[:at], importance[:at]), (values[at:], importance[at:])]
        return sum(float((w * (v - (w * v).sum() / w.sum()) ** 2).sum()) for v, w in parts)

    assert cost(found, weight, square) == pytest.approx(min(split(at) for at in range(1, 9)), rel=1e-4)


def test_more_buckets_err_less_and_what_matters_is_moved_least():
    costs = [cost(codebook.codebook(WEIGHT, SQUARE, bits), WEIGHT, SQUARE) for bits in (1, 2, 3, 4)]
    assert all(b < 0.5 * a for a, b in itertools.pairwise(costs))
    even = codebook.codebook(WEIGHT, torch.ones(64), 3)
    assert cost(codebook.codebook(WEIGHT, SQUARE, 3), WEIGHT, SQUARE) < cost(even, WEIGHT, SQUARE)


@pytest.mark.parametrize("budget", [0.5, 2.0, 4.0, 16.0])
def test_bits_keep_their_budget_and_beat_as_many_for_all(budget):
    bits = codebook.allotted(WEIGHT, SQUARE, budget)
    assert float(bits.double().mean()) <= budget
    assert set(bits.tolist()) <= set(codebook.BITS)
    found = cost(codebook.rounded_channels(WEIGHT, bits), WEIGHT, SQUARE)
    if budget in codebook.BITS:
        same = torch.full((64,), int(budget))
        assert found <= cost(codebook.rounded_channels(WEIGHT, same), WEIGHT, SQUARE) * 1.0001
    if budget == 16:
        assert found == 0
    else:
        assert SQUARE[bits == bits.max()].mean() > SQUARE[bits == bits.min()].mean()


def test_bits_are_shared_out_nearly_as_well_as_in_any_way():
    """All ways for five units: greedy steps lose little, and nothing where every step costs the same."""
    source = torch.Generator().manual_seed(3)
    for sizes in ([1] * 5, [1, 2, 3, 1, 4]):
        for _ in range(10):
            scale = torch.rand(5, generator=source).mul(3).exp()
            errors = [[float(s) * 4.0**-b for b in codebook.BITS] for s in scale]
            for budget in (1.0, 3.0, 5.5):
                left = budget * sum(sizes)
                ways = [
                    sum(e[i] for e, i in zip(errors, way, strict=True))
                    for way in itertools.product(range(5), repeat=5)
                    if sum(codebook.BITS[i] * n for i, n in zip(way, sizes, strict=True)) <= left
                ]
                found = codebook.shared_out(errors, sizes, budget)
                assert sum(b * n for b, n in zip(found, sizes, strict=True)) <= left
                mine = sum(e[codebook.BITS.index(b)] for e, b in zip(errors, found, strict=True))
                nothing = sum(e[0] for e in errors)
                assert mine - min(ways) <= 0.25 * (nothing - min(ways))
    assert codebook.shared_out([[4.0, 1.0, 0.5, 0.1, 0.0]], [7], 16) == [16]
    assert codebook.shared_out([[1.0, 1.0, 1.0, 1.0, 1.0]], [7], 16) == [0]  # nothing to be gained
