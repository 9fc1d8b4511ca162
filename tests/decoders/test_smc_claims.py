"""What particle methods claim, and that every parameter of them does something."""

import pytest
import torch

from decodathlon.decoders import particles
from decodathlon.decoders.mcmc.suffix import SuffixChain
from decodathlon.decoders.smc.persistent import distinct
from decodathlon.harness import decoder as decoders
from decodathlon.harness.decoder import Limits
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.targets import toy

load_builtins()


@pytest.fixture(scope="module")
def lm():
    return toy.enumerable_lm(4)


@pytest.mark.parametrize(
    "spec",
    [
        "persistent-smc[particles=32]", "persistent-smc[particles=32,beta=0.3,temperature=0.5,stages=20,alpha=0.5]",
        "smc[particles=64]", "smc[particles=64,beta=0.3,temperature=0.5,every=8]", "twisted-smc[particles=64]",
        "twisted-smc[twist=optimal,particles=1]",
    ],
)  # fmt: skip
def test_many_particles_and_a_mild_tilt_claim_a_law(spec):
    assert decoders.build(spec).claim == "sharpened"


@pytest.mark.parametrize(
    "spec",
    [
        "persistent-smc", "smc", "twisted-smc", "persistent-smc[particles=31]",
        "persistent-smc[particles=32,beta=0.29]",
        "persistent-smc[particles=32,temperature=0.49]", "persistent-smc[particles=32,stages=19]",
        "persistent-smc[particles=32,alpha=0.49]", "persistent-smc[particles=32,resample=topN]",
        "persistent-smc[particles=32,answer=best]", "persistent-smc[particles=32,reward=length:2]",
        "smc[particles=63]", "smc[particles=64,beta=0.29]", "smc[particles=64,temperature=0.49]",
        "smc[particles=64,every=9]", "smc[particles=64,reward=length:2]", "smc[particles=64,resample=topN]",
        "twisted-smc[particles=63]", "twisted-smc[particles=64,reward=length:2]",
        "twisted-smc[twist=optimal,particles=1,resample=topN]", "twisted-smc[twist=optimal,particles=1,answer=best]",
        "persistent-smc-steps",
    ],
)  # fmt: skip
def test_fewer_particles_sharper_tilts_and_rewards_of_unknown_size_claim_nothing(spec):
    assert decoders.build(spec).claim == "heuristic"


def test_persistent_sampling_draws_and_moves_at_its_temperature_as_often_as_it_says(lm, monkeypatch):
    found = decoders.build("persistent-smc[temperature=0.5,tries=3,beta=2]")
    assert (found.chain.temperature, found.chain.tries, found.chain.beta) == (0.5, 3, 2)
    steps, one = [], SuffixChain.step
    monkeypatch.setattr(SuffixChain, "step", lambda *a: steps.append(1) or one(*a))
    for moves in (1, 3):
        steps.clear()
        answer = decoders.build(f"persistent-smc[moves={moves}]").generate(lm, [[0]], Limits(3), RowRandom(0, [0]))[0]
        assert len(steps) == moves * (len(answer.trace) - 1)


def test_tries_count_as_particles_in_memory(lm, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "decodathlon.decoders.smc.persistent.check_memory", lambda t, p, each, limits: seen.append(each)
    )
    decoders.build("persistent-smc[tries=3,particles=4]").generate(lm, [[0]], Limits(3), RowRandom(0, [0]))
    assert seen == [12]


def test_copies_that_no_move_has_parted_count_as_one_answer(lm):
    assert distinct([[1], [1], [2]], [0.25, 0.25, 0.5]) == pytest.approx(2)
    assert distinct([[1], [1]], [0.5, 0.5]) == pytest.approx(1)
    for a in decoders.build("persistent-smc").generate(lm, [[0]] * 5, Limits(3), RowRandom(0, range(5))):
        assert a.trace[-1]["distinct"] <= a.trace[-1]["ess"] + 1e-9


@pytest.mark.parametrize("spec", ["smc", "best-of-n", "self-consistency", "persistent-smc-steps[step_boundary=fixed]"])
def test_logits_with_nan_are_named(lm, monkeypatch, spec):
    class Broken(particles.Particles):
        def next_logits(self):
            self._context.next_logits = torch.full_like(self._context.next_logits, float("nan"))
            return super().next_logits()

    for module in ("best_of", "smc.sequential", "smc.steps"):
        monkeypatch.setattr(f"decodathlon.decoders.{module}.Particles", Broken)
    with pytest.raises(ValueError, match="enumerable-lm-4: the model's logits have NaN"):
        decoders.build(spec).generate(lm, [[0]], Limits(3), RowRandom(0, [0]))
