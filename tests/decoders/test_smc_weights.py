"""The arithmetic of particles against closed forms: effective sizes, resampling, the pool of persistent sampling."""

import math

import pytest
import torch

from decodathlon.decoders.smc import weights
from decodathlon.decoders.smc.pool import Pool
from decodathlon.harness.errors import RewardError

STATES = 50


def logs(*values):
    return torch.tensor([values], dtype=torch.float64).log()


def test_effective_sizes_and_means():
    assert float(weights.ess(logs(1, 1, 1, 1))) == pytest.approx(4)
    assert float(weights.ess(logs(1, 0, 0))) == pytest.approx(1)
    assert float(weights.ess(logs(3, 1))) == pytest.approx(16 / 10)
    assert float(weights.ess(logs(0, 0))) == 0
    assert float(weights.ess(logs(3, 1) - 5000)) == pytest.approx(1.6), "far out of the range of numbers"
    assert float(weights.log_mean(logs(3, 1))) == pytest.approx(math.log(2))


def test_weights_of_nothing_are_refused():
    with pytest.raises(RewardError, match="x: all particles have the weight zero"):
        weights.check(logs(0, 0), "x")
    with pytest.raises(RewardError, match="x: a weight is not a finite number"):
        weights.check(torch.tensor([[0.0, math.nan]]), "x")
    with pytest.raises(RewardError, match="x: a weight is not a finite number"):
        weights.check(torch.tensor([[0.0, math.inf]]), "x")


@pytest.mark.parametrize("scheme", ["systematic", "residual"])
@pytest.mark.parametrize("shares", [(0.5, 0.25, 0.25), (0.1, 0.2, 0.3, 0.4), (1.0, 0.0), (0.05,) * 20, (0.31, 0.69)])
def test_copies_are_the_floor_of_their_share_or_more(scheme, shares):
    """Systematic: no more than the ceiling; of both the mean is the share (10,000 uniforms, four standard errors)."""
    n, W = 8, torch.tensor(shares, dtype=torch.float64)
    u = torch.rand(10_000, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = weights.parents(W.log().expand(len(u), -1), n, u, scheme)
    counts = torch.stack([(found == i).sum(1) for i in range(len(W))], 1).double()
    assert bool((counts >= (n * W - 1e-9).floor()).all())
    if scheme == "systematic":
        assert bool((counts <= (n * W + 1e-9).ceil()).all())
    assert bool((counts[:, W == 0] == 0).all())
    error = counts.std(0) / math.sqrt(len(u))
    assert bool(((counts.mean(0) - n * W).abs() <= 4 * error + 1e-9).all())


def test_multinomial_copies_have_the_binomial_variance():
    W = torch.tensor([0.2, 0.8], dtype=torch.float64)
    u = torch.rand(20_000, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    counts = (weights.parents(W.log().expand(len(u), -1), 10, u, "multinomial") == 0).sum(1).double()
    assert float(counts.mean()) == pytest.approx(2.0, abs=4 * math.sqrt(1.6 / 20_000))
    assert float(counts.var()) == pytest.approx(1.6, rel=0.05)


def test_the_best_are_no_sample_of_all():
    found = weights.parents(logs(1, 4, 2), 2, torch.zeros(1, 2), "topN")
    assert found.tolist() == [[1, 2]]
    assert weights.parents(logs(1, 4), 3, torch.zeros(1, 3), "topN").tolist() == [[1, 0, 1]]


@pytest.mark.parametrize("scheme", ["systematic", "residual", "multinomial"])
def test_the_ends_of_the_uniforms_fall_on_no_weight_of_zero(scheme):
    W = torch.tensor([[0.0, 0.5, 0.5, 0.0]], dtype=torch.float64).log()
    for value in (0.0, 1 - 2.0**-53):
        found = weights.parents(W, 5, torch.full((1, 5), value, dtype=torch.float64), scheme)
        assert set(found[0].tolist()) <= {1, 2}


# --- The pool ------------------------------------------------------------------------------------------------------


def target():
    """50 states: a prior and a log-likelihood that differ enough for several levels."""
    generator = torch.Generator().manual_seed(5)
    prior = torch.rand(STATES, generator=generator, dtype=torch.float64).log().log_softmax(0)
    return prior, 2.0 * torch.randn(STATES, generator=generator, dtype=torch.float64)


def walked(N, alpha, runs, seed):
    """Persistent sampling whose moves are exact draws; a run per row. Estimates, iterations, effective sizes, E[l]."""
    prior, ell = target()
    generator = torch.Generator().manual_seed(seed)

    def draw(level):
        law = (prior + level[:, None] * ell).softmax(1)
        return ell[torch.multinomial(law, N, replacement=True, generator=generator)]

    found = []
    for _ in range(runs):
        pool, rounds = Pool.of_draws(draw(torch.zeros(1, dtype=torch.float64))), 0
        while True:
            level = pool.raised(alpha * N)
            log_z = weights.log_mean(pool.log_weights(level))
            pool, rounds = pool.grown(draw(level), level, log_z), rounds + 1
            if float(level) == 1.0:
                break
        final = pool.log_weights(level)
        mean = float((final.softmax(1) * pool.log_likelihood).sum())
        found.append((float(weights.log_mean(final)), rounds, float(weights.ess(final)) / N, mean, pool))
    return found


def test_of_one_stage_the_weights_are_importance_weights():
    _, ell = target()
    pool = Pool.of_draws(ell[None, :10])
    for level in (0.3, 1.0):
        assert torch.allclose(pool.log_weights(torch.tensor([level]).double()), level * ell[None, :10], atol=1e-12)


def test_equal_levels_have_equal_weights():
    _, ell = target()
    zero, none = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    pool = Pool.of_draws(ell[None, :8]).grown(ell[None, 8:16], zero, none).grown(ell[None, 16:24], zero, none)
    assert float(weights.ess(pool.log_weights(zero))) == pytest.approx(24), "t N: more than N is possible"


def test_the_expected_constant_of_the_first_stage_is_the_constant():
    """Two draws, all pairs of 50 states: E[mean weight] = Z to rounding."""
    prior, ell = target()
    pairs = torch.cartesian_prod(torch.arange(STATES), torch.arange(STATES))
    pool = Pool.of_draws(ell[pairs])
    level = torch.ones(len(pairs), dtype=torch.float64)
    estimate = weights.log_mean(pool.log_weights(level)).exp()
    chance = prior.exp()[pairs].prod(1)
    assert float((chance * estimate).sum()) == pytest.approx(float((prior + ell).exp().sum()), rel=1e-12)


@pytest.mark.parametrize(("N", "alpha", "rounds", "effective"), [(16, 0.9, 4.5, 1.0), (64, 3.0, 12, 3.0)])
def test_the_constant_the_mean_and_the_effective_size_on_50_states(N, alpha, rounds, effective):
    """200 runs: the estimate of Z within two standard errors of it, E[l] within 0.05, ESS above N possible."""
    prior, ell = target()
    log_z, mean = float((prior + ell).logsumexp(0)), float(((prior + ell).softmax(0) * ell).sum())
    found = walked(N, alpha, 200, seed=3)
    ratio = torch.tensor([math.exp(f[0] - log_z) for f in found], dtype=torch.float64)
    assert abs(float(ratio.mean()) - 1) < 2 * float(ratio.std()) / math.sqrt(200)
    assert sum(f[3] for f in found) / 200 == pytest.approx(mean, abs=0.05)
    assert 1 < sum(f[1] for f in found) / 200 <= rounds
    assert sum(f[2] for f in found) / 200 > effective
    for *_, pool in found[:20]:
        levels = pool.levels[0].tolist()
        assert levels == sorted(levels)
        assert levels[-1] == 1.0
        assert 0 < float(weights.ess(pool.log_weights(pool.levels[:, -1]))) <= pool.log_likelihood.shape[1]
        if alpha < 1:
            assert levels[1] > 0, "the level rises at once: a bisection the wrong way round would stay at 0"


def test_a_level_is_the_highest_at_which_enough_are_effective():
    _, ell = target()
    pool = Pool.of_draws(ell[None, :32])
    level = pool.raised(16.0)
    assert float(weights.ess(pool.log_weights(level))) == pytest.approx(16, abs=1e-6)
    assert float(weights.ess(pool.log_weights(level + 1e-6))) < 16
    assert float(pool.raised(33.0)) == 0, "more than there are: it stays, until another stage has added some"
    flat = Pool.of_draws(torch.full((1, 8), -3.0, dtype=torch.float64))
    assert float(flat.raised(7.9)) == 1.0, "where all are equally likely there is nothing to temper"


def test_numbers_far_out_of_range_stay_numbers():
    ell = torch.tensor([[-2000.0, 0.0, 2000.0, 1999.0]], dtype=torch.float64)
    pool = Pool.of_draws(ell)
    one = torch.ones(1, dtype=torch.float64)
    assert float(weights.log_mean(pool.log_weights(one))) == pytest.approx(2000 + math.log((1 + math.exp(-1)) / 4))
    pool = pool.grown(ell, one, weights.log_mean(pool.log_weights(one)))
    assert bool(torch.isfinite(pool.log_weights(one)).all())
