"""Persistent sampling on a transformer of 40 texts: its law, its constant, what happens on the way, what it refuses."""

import math

import pytest
import torch

from decodathlon.harness import decoder as decoders
from decodathlon.harness.decoder import Limits
from decodathlon.harness.errors import UnsupportedError
from decodathlon.harness.measure import draws, exactness
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.rewards import Answer
from decodathlon.harness.targets import toy

load_builtins()
LENGTH = 3


@pytest.fixture(scope="module")
def lm():
    return toy.enumerable_lm(4)


def drawn(spec, lm, n, length=LENGTH, seed=0, **limits):
    return decoders.build(spec).generate(
        lm, [[lm.start_token]] * n, Limits(length, **limits), RowRandom(seed, range(n))
    )


def distance(spec, lm, n):
    sampler = decoders.build(spec)
    law = draws.claimed_law(sampler, lm, LENGTH)
    counts, p = exactness.counted([tuple(a.tokens) for a in drawn(spec, lm, n)], law)
    return exactness.tvd(counts, p), exactness.p_value(counts, p)


@pytest.mark.parametrize(
    "more", ["beta=0.4", "reward=length:2,beta=0.3", "beta=0.4,tries=3,moves=1", "alpha=2,moves=1"]
)
def test_with_many_particles_its_law_is_the_tilted_one(lm, more):
    """1,200 draws; of two particles the same test sees that they are not enough."""
    _, p = distance(f"persistent-smc[particles=32,{more}]", lm, 1200)
    assert p > 1e-3


def test_with_few_it_is_not_and_says_so(lm):
    sampler = decoders.build("persistent-smc[particles=2,moves=1,beta=0.3]")
    assert sampler.claim == "heuristic"
    _, p = distance(sampler.spec, lm, 3000)
    assert p < 1e-6
    assert decoders.build("persistent-smc[particles=32]").claim == "sharpened"
    assert decoders.build("persistent-smc[particles=32,answer=best]").claim == "heuristic"


def test_the_weighted_pool_nears_the_law_as_the_square_root(lm):
    """The pool of one answer as a law: its mean distance halves from 16 to 64 particles, and again to 256."""
    sampler = decoders.build("persistent-smc[beta=0.4]")
    law = draws.claimed_law(sampler, lm, LENGTH)
    texts, p = list(law), torch.tensor(list(law.values()), dtype=torch.float64)
    mean = []
    for particles, answers in ((16, 60), (64, 30), (256, 15)):
        found = []
        for answer in drawn(f"persistent-smc[particles={particles},moves=1,beta=0.4]", lm, answers):
            last, mass = answer.trace[-1], torch.zeros(len(texts), dtype=torch.float64)
            for tokens, weight in zip(last["texts"], last["weights"], strict=True):
                mass[texts.index(tuple(tokens))] += weight
            found.append(float((mass - p).abs().sum()) / 2)
        mean.append(sum(found) / len(found))
    assert mean[0] / mean[1] == pytest.approx(2, abs=0.5)
    assert mean[1] / mean[2] == pytest.approx(2, abs=0.5)


def test_the_constant_is_estimated(lm):
    """300 estimates of log Z with 32 particles: the mean of Z within four standard errors and 2 % of bias."""
    sampler = decoders.build("persistent-smc[particles=32,beta=0.4]")
    law = toy.law_of(lm, [lm.start_token], LENGTH, sampler.shape)
    answers = [Answer([lm.start_token], list(t), math.log(p), lm) for t, p in law.items()]
    log_z = float((torch.tensor([a.log_prob for a in answers]).double() + sampler.log_tilt(answers)).logsumexp(0))
    found = torch.tensor([math.exp(a.trace[-1]["log_z"] - log_z) for a in drawn(sampler.spec, lm, 300)]).double()
    assert abs(float(found.mean()) - 1) < 4 * float(found.std()) / math.sqrt(300) + 0.02


def test_the_level_rises_to_one_and_nothing_is_thrown_away(lm):
    for answer in drawn("persistent-smc[particles=8,beta=0.05]", lm, 20):
        *stages, last = answer.trace
        levels = [entry["level"] for entry in stages]
        assert levels == sorted(levels)
        assert levels[0] > 0
        assert levels[-1] == 1.0
        assert [entry["pool"] for entry in stages] == [8 * (t + 1) for t in range(len(stages))]
        assert len(last["weights"]) == 8 * (len(stages) + 1)
        assert all(max(entry["parents"]) < entry["pool"] for entry in stages)
        assert list(answer.tokens) == last["texts"][last["chosen"]]


def test_more_effective_particles_than_there_are_in_a_stage(lm):
    few, many = (drawn(f"persistent-smc[particles=16,alpha={a},beta=0.1]", lm, 20) for a in (0.9, 3))
    assert sum(a.trace[-1]["ess"] for a in many) / 20 > 2.5
    assert sum(len(a.trace) for a in many) > 1.5 * sum(len(a.trace) for a in few)


def test_the_last_stage_is_the_last_in_any_case(lm):
    for answer in drawn("persistent-smc[particles=8,alpha=3,stages=2,beta=0.05]", lm, 5):
        assert len(answer.trace) == 3
        assert answer.trace[1]["level"] == 1.0


def test_prompts_of_other_lengths_and_paces_do_not_mix(lm):
    """Every answer is what it is alone, though some finish stages before others."""
    sampler, prompts = decoders.build("persistent-smc[particles=4,beta=0.02]"), [[0], [0, 2], [0], [0, 1]]
    together = sampler.generate(lm, prompts, Limits(5), RowRandom(7, "abcd"))
    assert len({len(a.trace) for a in together}) > 1
    for i, prompt in enumerate(prompts):
        assert sampler.generate(lm, [prompt], Limits(5), RowRandom(7, "abcd"[i]))[0].tokens == together[i].tokens


class Full:
    """A target whose rows are very large."""

    def __init__(self, lm):
        self._lm = lm

    def __getattr__(self, name):
        return getattr(self._lm, name)

    def row_bytes(self, capacity):
        return capacity * 10**12


@pytest.mark.parametrize(
    "spec", ["persistent-smc", "smc", "twisted-smc", "best-of-n", "persistent-smc-steps[n_particles=7]"]
)
def test_more_particles_than_memory_allows_are_refused_before_anything_is_read(lm, spec):
    before = lm.spent.calls
    with pytest.raises(
        UnsupportedError, match=r"needs .* GB of memory: 1 times \d+ particles of up to 6 tokens take about"
    ):
        decoders.build(spec).generate(Full(lm), [[0]], Limits(5), RowRandom(0, "a"))
    assert lm.spent.calls == before


def test_the_estimate_of_a_row_is_that_of_its_cache(lm):
    context = lm.open([[0]] * 3, capacity=20)
    held = sum(t.numel() * t.element_size() for layer in context.cache.layers for t in (layer.keys, layer.values))
    assert lm.row_bytes(20) - 36 * lm.vocab_size == held / 3


def test_particles_share_what_is_read_of_the_prompt(lm):
    """The prompt once, then every token of every particle and its moves; 8 prompts would be 160 tokens alone."""
    before = lm.spent.positions
    sampler = decoders.build("persistent-smc[particles=8,beta=1000]")  # one level, as the tilt is next to nothing
    (answer,) = sampler.generate(lm, [[0] * 20], Limits(2, ignore_eos=True), RowRandom(0, "a"))
    assert len(answer.trace) == 2
    assert lm.spent.positions - before <= 20 + 8 * 2 + 8 * 3


def test_moves_change_the_particles(lm):
    for answer in drawn("persistent-smc[particles=8,beta=0.3]", lm, 10, length=6, ignore_eos=True):
        assert sum(entry["accepted"] for entry in answer.trace[:-1]) > 0
