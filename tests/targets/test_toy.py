"""The exactly known targets agree with closed forms, and decoders draw from them what they claim."""

import itertools
import math

import numpy as np
import pytest
import torch

from decodathlon import Chain, Limits, RowRandom
from decodathlon.harness import decoder as decoders
from decodathlon.harness.errors import ContextOverflowError
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.targets import toy

load_builtins()


def test_ising_partition_function_equals_the_transfer_matrix():
    n, beta, field = 8, 0.42, 0.1
    spins = (-1, 1)
    transfer = np.array([[math.exp(beta * a * b + field * (a + b) / 2) for b in spins] for a in spins])
    log_z = math.log(np.trace(np.linalg.matrix_power(transfer, n)))
    ising = toy.Ising(n, beta, field)
    up = torch.ones(1, n, dtype=torch.long)
    assert math.isclose(float(-ising.energy(up)) - log_z, float(ising.log_law[-1]), abs_tol=1e-12)
    assert math.isclose(float(ising.log_law.exp().sum()), 1.0, abs_tol=1e-12)


def test_ising_conditionals_multiply_to_the_law():
    ising = toy.Ising(4, 0.42, 0.2)
    states = list(itertools.product((0, 1), repeat=4))
    assert torch.allclose(ising.log_prob(states, given=0), ising.log_law, atol=1e-12)
    law = toy.law_of(ising, [], 4)
    assert np.allclose([law[s] for s in states], ising.log_law.exp().numpy(), atol=1e-12)


def test_ising_gradient_is_that_of_the_energy():
    ising = toy.Ising(5, 0.7, 0.3)
    s = torch.tensor([[0, 1, 1, 0, 1]])
    spins = 2.0 * s.double() - 1
    score, gradient = ising.embedding_gradient(s)
    expected = ising.beta * (spins.roll(1, -1) + spins.roll(-1, -1)) + ising.field
    assert torch.allclose(gradient[..., 0], expected)
    assert torch.allclose(score, -ising.energy(s))


def test_ising_context_keeps_selects_and_reads_trees():
    ising = toy.Ising(6, 0.42, 0.1)
    context = ising.open([[0], [1, 1]])
    tree = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    step = context.extend(torch.tensor([[0, 1, 0], [1, 0, 1]]), tree=tree)
    assert torch.equal(step.logits[1, 2], ising.next_logits_of([1, 1, 1, 1]))
    context.keep([2, 1], path=torch.tensor([[0, 2], [0, 1]]))
    assert context.lengths.tolist() == [3, 3]
    assert torch.equal(context.next_logits[0], ising.next_logits_of([0, 0, 0]))
    context.select([1, 1, 0])
    assert torch.equal(context.next_logits[0], ising.next_logits_of([1, 1, 1]))
    with pytest.raises(ContextOverflowError):
        context.extend(torch.zeros(3, 4, dtype=torch.long))


def test_the_enumerable_lm_sums_to_one_and_agrees_with_log_prob():
    lm = toy.enumerable_lm()
    law = toy.law_of(lm, [0], 4)
    assert math.isclose(sum(law.values()), 1.0, abs_tol=1e-12)
    texts = list(law)[::7]
    direct = lm.log_prob([[0, *t] for t in texts], given=1).exp()
    assert np.allclose(direct.numpy(), [law[t] for t in texts], atol=1e-12)


def exact_law(decoder, target, prompt, length):
    """Law of a stateless sampler's completions, by enumeration of its own next-token law."""

    class Shaped:
        def __init__(self):
            self.vocab_size, self.stop_tokens = target.vocab_size, target.stop_tokens

        def open(self, prompts, capacity):
            context = target.open(prompts, capacity=capacity)
            context.next_logits = decoder.shape(context.next_logits)
            return context

    return toy.law_of(Shaped(), prompt, length)


@pytest.mark.parametrize(
    "spec", ["temperature", "temperature[temperature=0.6]", "top-k[k=2]", "top-p[p=0.7]", "min-p[p=0.4]"]
)
def test_samplers_draw_from_the_law_they_state(spec):
    """Chi-square at alpha 1e-4 on 6,000 completions; a total variation of 0.06 is seen with power above 0.9."""
    lm, decoder, length = toy.enumerable_lm(), decoders.build(spec), 3
    law = exact_law(decoder, lm, [0], length)
    N = 6000
    counts = dict.fromkeys(law, 0)
    for completion in decoder.generate(lm, [[0]] * N, Limits(length), RowRandom(1, range(N))):
        counts[tuple(completion.tokens)] += 1
        assert law[tuple(completion.tokens)] > 0
    cells = [(counts[t], p * N) for t, p in law.items() if p * N >= 5]
    rest = (N - sum(c for c, _ in cells), N - sum(e for _, e in cells))
    cells += [rest] if rest[1] >= 5 else []
    chi2 = sum((c - e) ** 2 / e for c, e in cells)
    freedom = len(cells) - 1
    # Wilson-Hilferty: 3.72 is the normal quantile of 1 - 1e-4
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi2 < limit


def test_greedy_follows_the_likeliest_token():
    lm = toy.enumerable_lm()
    (found,) = decoders.build("greedy").generate(lm, [[0]], Limits(5), RowRandom(0, [0]))
    text = [0]
    for token in found.tokens:
        assert token == int(lm.open([text]).next_logits[0].argmax())
        text.append(token)
    assert math.isclose(found.log_prob, float(lm.log_prob([text], given=1)), abs_tol=1e-6)


def test_a_chain_runs_through_the_energy_seam():
    class Gibbs(Chain):
        steps = 60

        def uniforms(self, length):
            return length

        def step(self, target, state, u):
            sequences = state.sequences.clone()
            for i in range(sequences.shape[1]):
                energies = []
                for value in (0, 1):
                    sequences[:, i] = value
                    energies.append(target.energy(sequences))
                sequences[:, i] = (u[:, i] < torch.sigmoid(energies[0] - energies[1])).long()
            return self.begin(target, sequences, state.free)

    ising = toy.Ising(4, 0.42, 0.1)
    N = 4000
    answers = Gibbs().generate(ising, [[]] * N, Limits(4), RowRandom(0, range(N)))
    counts = np.bincount([int("".join(map(str, a.tokens)), 2) for a in answers], minlength=16)
    tvd = 0.5 * np.abs(counts / N - ising.log_law.exp().numpy()).sum()
    # independent exact draws of this size stay below 0.045 in 999 of 1000 cases
    assert tvd < 0.045


def test_a_torus_has_the_bonds_of_its_neighbours():
    """3 x 3, every bond counted once, by the sum over the grid."""
    ising = toy.Ising(9, 0.3, 0.1, rows=3)
    spins = torch.tensor([1, 0, 1, 1, 1, 0, 0, 1, 0])
    grid = (2.0 * spins - 1).view(3, 3)
    energy = -(0.3 * ((grid * grid.roll(-1, 0)).sum() + (grid * grid.roll(-1, 1)).sum()) + 0.1 * grid.sum())
    assert float(ising.energy(spins[None])) == pytest.approx(float(energy))
    _, gradient = ising.embedding_gradient(spins[None])
    with torch.enable_grad():
        s = (2.0 * spins - 1).double().requires_grad_(True)
        (expected,) = torch.autograd.grad(-ising._energy_of_spins(s[None]).sum(), s)
    assert torch.allclose(gradient[0, :, 0], expected)
    with pytest.raises(ValueError, match="no 2 rows"):
        toy.Ising(9, 0.3, rows=2)


def test_tosses_have_the_powers_that_they_state():
    """Of three tosses, all eight texts."""
    coins = toy.Coins(0.3)
    law = toy.law_of(coins, [0], 3)
    for b in (1.0, 2.0, 0.5):
        weights = {text: p**b for text, p in law.items()}
        ones, log_z = coins.power(b, 3)
        assert log_z == pytest.approx(math.log(sum(weights.values())))
        assert ones == pytest.approx(sum(w * sum(text) for text, w in weights.items()) / sum(weights.values()))
