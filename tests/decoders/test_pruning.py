"""Pruning of single matrices: exact shares and patterns, equivalences, and errors against least squares."""

import pytest
import torch

from decodathlon.decoders.speculative import pruning

SOURCE = torch.Generator().manual_seed(0)


def random(*shape):
    return torch.randn(*shape, generator=SOURCE, dtype=torch.float64)


WEIGHT = random(12, 64)
#: A few directions that inputs share, sizes that differ by orders of magnitude, and noise: as in a language model.
INPUTS = (random(400, 6) @ random(6, 64) + 0.5 * random(400, 64)) * random(64).mul(1.5).exp()
SECOND = INPUTS.T @ INPUTS / len(INPUTS)


def error(pruned):
    return float((INPUTS @ (pruned - WEIGHT).T).square().sum())


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_each_row_loses_exactly_its_share(sparsity):
    for score in (pruning.magnitude(WEIGHT), pruning.wanda(WEIGHT, SECOND.diagonal())):
        mask = pruning.kept(score, sparsity)
        assert (mask.sum(1) == round((1 - sparsity) * 64)).all()
        if 0 < sparsity < 1:
            assert score[mask].view(12, -1).amin(1).ge(score[~mask].view(12, -1).amax(1)).all()


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (1, 4)])
def test_a_pattern_holds_in_every_group(pattern):
    n, m = pattern
    mask = pruning.kept(pruning.magnitude(WEIGHT), 0.0, pattern)
    assert (mask.unflatten(1, (-1, m)).sum(-1) == n).all()
    sparse = pruning.sparsegpt(WEIGHT, SECOND, 0.0, pattern)
    assert ((sparse != 0).unflatten(1, (-1, m)).sum(-1) == n).all()
    with pytest.raises(ValueError, match="does not fit a matrix of 63 inputs"):
        pruning.kept(WEIGHT[:, :63], 0.0, pattern)


def test_with_inputs_of_one_size_wanda_is_magnitude():
    same = pruning.kept(pruning.wanda(WEIGHT, torch.full((64,), 3.0)), 0.5)
    assert torch.equal(same, pruning.kept(pruning.magnitude(WEIGHT), 0.5))


def test_sparsegpt_without_sparsity_changes_nothing_and_dead_inputs_go():
    torch.testing.assert_close(pruning.sparsegpt(WEIGHT, SECOND, 0.0), WEIGHT)
    dead = SECOND.clone()
    dead[:, 5] = dead[5] = 0
    assert (pruning.sparsegpt(WEIGHT, dead, 0.5)[:, 5] == 0).all()


def test_one_pruned_weight_is_made_up_for_as_least_squares_does():
    """Of the columns behind it: those before are done with."""
    damped = 2 * SECOND + pruning.DAMPING * (2 * SECOND).diagonal().mean() * torch.eye(64, dtype=torch.float64)
    row = WEIGHT[:1].clone()
    j = 0
    row[0, j] = 1e-6  # the one that goes
    row[0, 1:] += 10.0
    pruned = pruning.sparsegpt(row, SECOND, 1 / 64)
    gone = (pruned == 0).nonzero()[:, 1].tolist()
    assert gone == [j]
    # minimise (w' - w)^T H (w' - w) over w' with w'_j = 0
    rest = [i for i in range(64) if i != j]
    change = torch.zeros(64, dtype=torch.float64)
    change[j] = -row[0, j]
    change[rest] = torch.linalg.solve(damped[rest][:, rest], -damped[rest, j] * change[j])
    torch.testing.assert_close(pruned[0], row[0] + change, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("sparsity", "pattern"), [(0.5, None), (0.75, None), (0.0, (2, 4))])
def test_updates_err_less_than_none_and_statistics_less_than_sizes(sparsity, pattern):
    mask = pruning.kept(pruning.wanda(WEIGHT, SECOND.diagonal()), sparsity, pattern)
    by_wanda, by_size = WEIGHT * mask, WEIGHT * pruning.kept(pruning.magnitude(WEIGHT), sparsity, pattern)
    updated = pruning.sparsegpt(WEIGHT, SECOND, sparsity, pattern, mask)
    assert torch.equal(updated != 0, mask)
    assert error(updated) < 0.9 * error(by_wanda)
    assert error(by_wanda) < 0.5 * error(by_size)
    own = pruning.sparsegpt(WEIGHT, SECOND, sparsity, pattern)
    assert float((own == 0).double().mean()) == pytest.approx(sparsity if pattern is None else 0.5, abs=1e-3)
    assert error(own) < 0.9 * error(by_wanda)


def test_the_size_of_blocks_does_not_matter_where_it_is_known_what_goes(monkeypatch):
    mask = pruning.kept(pruning.magnitude(WEIGHT), 0.5)
    whole = pruning.sparsegpt(WEIGHT, SECOND, 0.5, mask=mask)
    monkeypatch.setattr(pruning, "BLOCK", 10)
    torch.testing.assert_close(pruning.sparsegpt(WEIGHT, SECOND, 0.5, mask=mask), whole)


def test_wanda_weighs_by_the_norm_of_the_input():
    score = pruning.wanda(torch.tensor([[2.0, -3.0]]), torch.tensor([4.0, 0.25]))
    assert score.tolist() == [[4.0, 1.5]]


def test_a_pruned_target_has_its_share_of_zeros_and_sees_what_pruned_layers_make():
    from decodathlon.decoders.speculative.layers import written
    from decodathlon.decoders.speculative.sparse import Recorder, SparseSelf, over_layers
    from decodathlon.harness.registry import load_builtins
    from decodathlon.harness.targets import toy

    load_builtins()
    target = toy.enumerable_lm(8)
    texts, _ = written(target)
    seen = []

    def same(recorder):
        seen.append(recorder.mean.diagonal().sum())
        return recorder.dense

    unchanged = list(over_layers(target, texts, same, whole=True))
    assert len(seen) == 8
    assert all(a.mlp.down is b.mlp.down for a, b in zip(unchanged, target.lean.layers, strict=True))
    for layer in over_layers(target, texts, SparseSelf(sparsity=0.5).changed, whole=False):
        for dense in (layer.attention.qkv, layer.attention.out, layer.mlp.gate_up, layer.mlp.down):
            assert float((dense.weight == 0).double().mean()) == 0.5
    # the second layer's inputs are those that the pruned first one makes
    first, other = [], []
    prune = SparseSelf(sparsity=0.9).changed
    list(over_layers(target, texts, lambda r: first.append(r.mean) or prune(r), whole=False))
    list(over_layers(target, texts, lambda r: other.append(r.mean) or r.dense, whole=False))
    assert torch.equal(first[0], other[0])
    assert not torch.allclose(first[4], other[4])
    assert isinstance(Recorder(target.lean.layers[0].mlp.down, whole=False).mean, torch.Tensor)
