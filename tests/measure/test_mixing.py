"""Effective sample size, R-hat and gaps against closed forms."""

import numpy as np
import pytest
import torch

from decodathlon import Limits, RowRandom
from decodathlon.harness import decoder as decoders
from decodathlon.harness.measure import mixing
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.targets import toy
from decodathlon.harness.targets.base import Spent

load_builtins()


def autoregressive(rho, chains, steps, seed=0):
    """AR(1) chains that start in their own law."""
    noise = np.random.default_rng(seed).normal(size=(chains, steps))
    values = np.empty((chains, steps))
    values[:, 0] = noise[:, 0] / np.sqrt(1 - rho**2)
    for t in range(1, steps):
        values[:, t] = rho * values[:, t - 1] + noise[:, t]
    return values


@pytest.mark.parametrize("rho", [-0.3, 0.0, 0.5, 0.9])
def test_effective_sample_size_of_an_autoregression(rho):
    """n (1 - rho) / (1 + rho); the mean of 20 estimates lies within 10 % of it."""
    chains, steps = 4, 2000
    found = np.mean([mixing.ess(autoregressive(rho, chains, steps, seed)) for seed in range(20)])
    assert found == pytest.approx(chains * steps * (1 - rho) / (1 + rho), rel=0.1)


def test_chains_that_disagree_have_hardly_any_effective_draws():
    apart = autoregressive(0.0, 4, 500) + np.array([[0.0], [5.0], [10.0], [15.0]])
    assert mixing.ess(apart) < 20
    assert mixing.split_rhat(apart) > 3


def test_split_rhat_sees_a_drift_within_chains():
    calm = autoregressive(0.3, 4, 1000)
    assert mixing.split_rhat(calm) == pytest.approx(1.0, abs=0.02)
    assert mixing.split_rhat(calm + np.linspace(0, 5, 1000)) > 1.2


def test_split_rhat_by_hand():
    """Two chains of four: halves (0, 2), (4, 6), (1, 3), (5, 7): W = 2, means 1 5 2 6, B = 2 * 17/3."""
    values = np.array([[0.0, 2, 4, 6], [1.0, 3, 5, 7]])
    assert mixing.split_rhat(values) == pytest.approx(np.sqrt(0.5 + (2 * 17 / 3) / (2 * 2)))


def test_what_never_moves_has_no_number():
    assert np.isnan(mixing.ess(np.ones((4, 100))))
    assert np.isnan(mixing.split_rhat(np.ones((4, 100))))
    assert mixing.split_rhat(np.repeat([[1.0], [2.0]], 100, 1)) == float("inf")


def test_gap_of_a_chain_of_two_states():
    """Leaving with probabilities a and b the second eigenvalue is 1 - a - b."""
    matrix = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64)
    law = torch.tensor([0.75, 0.25], dtype=torch.float64)
    assert mixing.gap(matrix) == pytest.approx(0.4)
    assert mixing.gap(matrix, law) == pytest.approx(0.4)


@pytest.mark.parametrize(("spec", "exact"), [("pncg[p=1,alpha=64]", 0.392), ("pncg[p=1,alpha=0.25]", None)])
def test_gaps_of_p_ncg_on_the_ring_of_four(spec, exact):
    """0.392 at alpha 64; 40,000 moves from each state tell it to 0.01."""
    target, chain = toy.Ising(4, 0.21), decoders.build(spec)
    law = target.log_law.exp()
    found = mixing.gap(mixing.kernel(chain, target, 4, 40_000), law)
    stated = mixing.spectral_gap(chain, target, 4)
    assert found == pytest.approx(stated.value, abs=0.01)
    assert stated.n == 16
    if exact is not None:
        assert stated.value == pytest.approx(exact, abs=0.0005)
    else:
        assert found < 0.15, "nearly frozen"


def test_a_kernel_of_gibbs_forgets_in_a_sweep_what_single_sites_do_not():
    target = toy.Ising(4, 0.21)
    law = target.log_law.exp()
    sweep = mixing.kernel(decoders.build("gibbs"), target, 4, 20_000)
    single = mixing.kernel(decoders.build("gwg"), target, 4, 20_000)
    assert torch.allclose(sweep.sum(1), torch.ones(16, dtype=torch.float64))
    assert float((law @ sweep - law).abs().max()) < 0.01, "it leaves the law alone"
    assert mixing.gap(sweep) > mixing.gap(single, law)
    assert float((sweep - mixing.transitions(decoders.build("gibbs"), target, 4)).abs().max()) < 0.015


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        (lambda law: law.expand(4, 4), "is not the matrix of its steps"),
        (lambda law: torch.ones(3, 3) / 3, r"must give a \(4, 4\) matrix"),
        (lambda law: torch.ones(4, 4), "rows sum to 1"),
    ],
)
def test_a_matrix_that_is_not_that_of_the_steps_is_refused(stated, message, monkeypatch):
    target, chain = toy.Ising(2, 1.0), decoders.build("gwg")
    monkeypatch.setattr(type(chain), "transitions", lambda self, target, state: stated(target.log_law.exp()))
    with pytest.raises(ValueError, match=message):
        mixing.spectral_gap(chain, target, 2)


def test_a_step_that_gives_nothing_is_named(monkeypatch):
    chain = decoders.build("gwg")
    monkeypatch.setattr(type(chain), "step", lambda self, target, state, u: None)
    with pytest.raises(TypeError, match=r"gwg: step\(\) gave NoneType, not the State"):
        chain.generate(toy.Ising(2, 1.0), [[]], Limits(2), RowRandom(0, [0]))


def test_a_chain_that_states_no_matrix_is_tried():
    target = toy.Ising(2, 0.21)
    chain = decoders.build("qalign[reward=length:2]")
    assert mixing.transitions(chain, target, 2) is None
    tried = mixing.spectral_gap(chain, target, 2)
    assert tried.n == mixing.MOVES * 4
    assert 0 < tried.value < 1


def test_operations_are_counted_forward_and_backward():
    class Model:
        parameters = 1000

    assert mixing.flops(Model(), Spent(calls=3, positions=50, backward=20)) == 2 * 1000 * 70


def test_the_machine_multiplies():
    assert mixing.peak_flops("cpu", torch.float32, repeats=1) > 1e8


def test_a_chain_with_a_burn_in_has_no_kernel_of_single_moves():
    with pytest.raises(ValueError, match="burn-in"):
        mixing.kernel(decoders.build("pncg[burn_in=20]"), toy.Ising(4, 0.21), 4, 10)


def test_the_interval_of_the_excess_covers_as_it_says():
    """Two samples of one law, 8 against 64: 95 % of the intervals hold 0."""
    rng = np.random.default_rng(0)
    found = [mixing.excess(rng.normal(size=8), rng.normal(size=64), 20) for _ in range(2000)]
    assert np.mean([f.low <= 0 <= f.high for f in found]) == pytest.approx(0.95, abs=0.02)
    assert mixing.excess(np.array([41.0, 43.0]), np.array([2.0, 2.0]), 20).value == 2.0


def test_what_does_not_run_is_not_measured(monkeypatch):
    """Independent draws are those of the decoder itself, by its own code."""
    lm = toy.enumerable_lm()
    one = decoders.build("temperature")
    sequences, log_probs, seconds = mixing.drawn(one, lm, 500, 3, 0)
    assert sequences.shape == (500, 4)
    reference = mixing.ancestral(lm, 500, 3, 0).log_prob
    assert seconds > 0
    assert log_probs.mean() == pytest.approx(reference.mean(), abs=0.2)

    class Broken(type(one)):
        def generate(self, *args):
            raise RuntimeError("it never runs")

    with pytest.raises(RuntimeError, match="never runs"):
        mixing.drawn(Broken(), lm, 5, 3, 0)


def test_a_frozen_chain_has_no_effective_draws():
    still = np.repeat([[40.123456], [41.654321]], 100, 1)
    assert np.isnan(mixing.ess(still))
    assert mixing.split_rhat(still) == float("inf")
    assert np.isnan(mixing.split_rhat(np.ones((2, 3))))


def test_the_reward_of_texts_is_that_of_the_decoder():
    lm = toy.enumerable_lm()
    independent = mixing.ancestral(lm, 50, 3, 0)
    assert independent.sequences.shape == (50, 4)
    assert np.allclose(lm.score(independent.sequences, 1).numpy(), independent.log_prob)
    found = mixing.rewards(decoders.build("qalign"), lm, independent.sequences, independent.log_prob)
    assert np.allclose(found, independent.log_prob), "log-power"
