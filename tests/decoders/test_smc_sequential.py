"""SMC with and without twists, on a transformer of 40 texts: unbiased constants, laws, and the optimal twist."""

import dataclasses
import math

import pytest
import torch

from decodathlon.decoders.particles import Particles
from decodathlon.harness import decoder as decoders
from decodathlon.harness.decoder import Limits
from decodathlon.harness.errors import RewardError, SpecError, UnsupportedError
from decodathlon.harness.measure import draws, exactness
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.registry import load_builtins, registry
from decodathlon.harness.rewards import Answer, reward
from decodathlon.harness.targets import toy

load_builtins()
LENGTH = 3


@pytest.fixture(scope="module")
def lm():
    return toy.enumerable_lm(4)


@pytest.fixture
def rewards_of_this_file():
    before = dict(registry.entries)
    yield
    registry.entries.clear()
    registry.entries.update(before)


def constant(sampler, lm):
    """Z by enumeration."""
    law = toy.law_of(lm, [lm.start_token], LENGTH, sampler.shape)
    answers = [Answer([lm.start_token], list(text), math.log(p), lm) for text, p in law.items() if p > 0]
    return float((torch.tensor([a.log_prob for a in answers]).double() + sampler.log_tilt(answers)).logsumexp(0))


def drawn(sampler, lm, n, seed=0):
    return sampler.generate(lm, [[lm.start_token]] * n, Limits(LENGTH), RowRandom(seed, range(n)))


@pytest.mark.parametrize(
    "spec",
    [
        "smc[particles=1,every=1]",
        "smc[particles=4,every=1]",
        "smc[particles=4,every=2,ess=1]",
        "smc[particles=4,every=8]",
        "smc[particles=4,every=1,ess=0.9,reward=length:2,beta=0.5,resample=residual]",
        "smc[particles=4,every=1,ess=0.9,resample=multinomial,temperature=0.7]",
        "twisted-smc[particles=3]",
        "twisted-smc[particles=3,ess=1,reward=length:2,beta=0.5,candidates=2]",
        "twisted-smc[particles=2,temperature=0.7,beta=0.4]",
    ],
)
def test_the_estimated_constant_is_right_on_average(lm, spec):
    """1,500 estimates: the mean within four standard errors of the enumerated constant, at any number of particles."""
    sampler = decoders.build(spec)
    found = [math.exp(a.trace[-1]["log_z"] - constant(sampler, lm)) for a in drawn(sampler, lm, 1500)]
    ratio = torch.tensor(found, dtype=torch.float64)
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / math.sqrt(1500)
    assert float(ratio.std()) / math.sqrt(1500) < 0.03, "the test can see six per cent at two standard errors"


@pytest.mark.parametrize("spec", ["smc[particles=64,every=1]", "twisted-smc[particles=64,reward=length:2,beta=0.5]"])
def test_with_many_particles_the_law_is_the_tilted_one(lm, spec):
    sampler = decoders.build(spec)
    assert sampler.claim == ("sharpened" if sampler.reward == "log-power" else "heuristic")
    law = draws.claimed_law(sampler, lm, LENGTH)
    counts, p = exactness.counted([tuple(a.tokens) for a in drawn(sampler, lm, 1500)], law)
    assert exactness.p_value(counts, p) > 1e-3
    few = decoders.build(spec.replace("64", "2"))
    assert few.claim == "heuristic"
    counts, _ = exactness.counted([tuple(a.tokens) for a in drawn(few, lm, 3000)], law)
    assert exactness.p_value(counts, p) < 1e-6, "and the test sees that two are not enough"


@pytest.mark.parametrize("more", ["particles=3", "particles=1,reward=length:2,beta=0.3"])
def test_the_optimal_twist_has_no_variance(lm, more):
    """Every weight is Z, so that one particle is an exact draw from the tilted law."""
    sampler = decoders.build(f"twisted-smc[twist=optimal,{more}]")
    answers = drawn(sampler, lm, 3000)
    log_z = constant(sampler, lm)
    assert all(abs(entry["log_z"] - log_z) < 1e-7 for a in answers for entry in a.trace[-1:])
    assert all(abs(entry["ess"] - 1) < 1e-7 for a in answers for entry in a.trace)
    law = draws.claimed_law(sampler, lm, LENGTH)
    counts, p = exactness.counted([tuple(a.tokens) for a in answers], law)
    assert exactness.p_value(counts, p) > 1e-3


def test_the_optimal_twist_is_refused_where_nobody_can_know_it(lm):
    with pytest.raises(UnsupportedError, match="all answers of 12 of 4 tokens"):
        decoders.build("twisted-smc[twist=optimal]").generate(lm, [[0]], Limits(12), RowRandom(0, "a"))


def test_weights_are_carried_where_nothing_is_copied(lm):
    """With ess=0 nobody is copied, and the final weights are those of importance sampling."""
    sampler = decoders.build("smc[particles=8,every=1,ess=0]")
    for answer in drawn(sampler, lm, 20):
        assert not any(entry["resampled"] for entry in answer.trace)
        last = answer.trace[-1]
        expected = torch.tensor(last["scores"], dtype=torch.float64).softmax(0)
        assert last["weights"] == pytest.approx(expected.tolist(), rel=1e-9)


def test_rows_do_not_depend_on_their_neighbours(lm):
    for spec in ("smc[particles=4,every=1,ess=0.9]", "twisted-smc[particles=4,ess=0.9]", "persistent-smc[particles=4]"):
        sampler = decoders.build(spec)
        together = sampler.generate(lm, [[0], [0, 2], [0]], Limits(4), RowRandom(1, "abc"))
        for i, prompt in enumerate(([0], [0, 2], [0])):
            alone = sampler.generate(lm, [prompt], Limits(4), RowRandom(1, "abc"[i]))[0]
            assert alone.tokens == together[i].tokens, spec
            for mine, theirs in zip(alone.trace, together[i].trace, strict=True):
                assert mine["log_z"] == pytest.approx(theirs["log_z"], abs=1e-9)
                assert mine.get("parents") == theirs.get("parents")


def test_all_may_end_at_the_first_token(lm):
    """A law that only stops: one token, even weights, nothing to resample."""

    class Stops:
        def __getattr__(self, name):
            return getattr(lm, name)

        def open(self, prompts, **options):
            context = lm.open(prompts, **options)
            stop = next(iter(lm.stop_tokens))
            context.next_logits = torch.full_like(context.next_logits, -1e9).index_fill(1, torch.tensor([stop]), 0.0)
            return context

    for spec in ("smc[particles=4]", "twisted-smc[particles=4]"):
        (answer,) = decoders.build(spec).generate(Stops(), [[0]], Limits(5), RowRandom(0, "a"))
        assert answer.tokens == [next(iter(lm.stop_tokens))]
        assert answer.stop_reason == "stop"
        assert answer.trace[-1]["ess"] == pytest.approx(1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "spec", ["smc[particles=4,every=1]", "twisted-smc[particles=4]", "persistent-smc[particles=4]"]
)
def test_a_score_that_is_no_number_is_named(lm, value, spec, rewards_of_this_file):
    @reward("broken")
    def broken(answers):
        return [value for _ in answers]

    with pytest.raises(RewardError, match=r"reward broken is .*it must be finite"):
        drawn(decoders.build(spec.replace("]", ",reward=broken]")), lm, 1)


def test_a_reward_that_leaves_no_weight_is_named(lm, rewards_of_this_file):
    @reward("abyss")
    def abyss(answers):
        return [-1e308 for _ in answers]

    with pytest.raises(RewardError, match="all particles have the weight zero"):
        drawn(decoders.build("smc[particles=4,every=1,reward=abyss,beta=0.1]"), lm, 1)


def test_a_reward_beyond_all_numbers_is_named(lm, rewards_of_this_file):
    @reward("heaven")
    def heaven(answers):
        return [1e308 for _ in answers]

    for name in ("smc[particles=4,every=1", "twisted-smc[particles=4", "persistent-smc[particles=4"):
        with pytest.raises(RewardError, match="a weight is not a finite number"):
            drawn(decoders.build(f"{name},reward=heaven,beta=0.1]"), lm, 1)


@pytest.mark.parametrize("more", ["temperature=0.02", "beta=0.001", "beta=0.005,reward=length:1"])
def test_the_optimal_twist_of_sharp_tilts_is_a_number(lm, more):
    (answer,) = drawn(decoders.build(f"twisted-smc[twist=optimal,particles=2,{more}]"), lm, 1)
    assert math.isfinite(answer.trace[-1]["log_z"])


@pytest.mark.parametrize(
    "spec", ["persistent-smc[particles=4,beta=0.5]", "persistent-smc[tries=2]", "smc", "twisted-smc"]
)
def test_an_empty_prompt_is_one_where_no_start_token_is_wanted(spec):
    target = toy.Ising(5, 0.3)
    answers = decoders.build(spec).generate(target, [[], [1], []], Limits(3), RowRandom(0, "abc"))
    assert [len(a.tokens) for a in answers] == [3, 3, 3]


def test_claims_are_made_for_mild_tilts_alone():
    for spec in ("smc[particles=64,every=1]", "twisted-smc[particles=64]", "persistent-smc[particles=32]"):
        assert decoders.build(spec).claim == "sharpened"
        for more in ("beta=0.1", "temperature=0.2", "answer=best", "resample=topN"):
            assert decoders.build(spec.replace("]", f",{more}]")).claim == "heuristic", more
    assert decoders.build("persistent-smc[particles=32,stages=1]").claim == "heuristic"
    assert decoders.build("twisted-smc[twist=optimal,particles=1,beta=0.01]").claim == "sharpened"


def test_parameters_out_of_bounds_are_named():
    for spec, message in (
        ("smc[particles=0]", "outside"),
        ("smc[ess=1.5]", r"ess=1.5 is outside \[0, 1\]"),
        ("smc[resample=stratified]", "is not one of systematic, residual, multinomial, topN"),
        ("twisted-smc[twist=learned]", "is not one of reward, optimal"),
        ("persistent-smc[alpha=0]", "alpha=0 is outside"),
        ("smc[answer=all]", "is not one of draw, best, vote"),
    ):
        with pytest.raises(SpecError, match=message):
            decoders.build(spec)
    with pytest.raises(UnsupportedError, match="answer=vote reads final answers"):
        decoders.build("smc[answer=vote]").check(toy.Ising(4, 0.3))


def test_the_best_and_the_weighted_are_what_they_say(lm):
    for answer in drawn(decoders.build("smc[particles=8,every=1,answer=best]"), lm, 10):
        last = answer.trace[-1]
        assert last["scores"][last["chosen"]] == max(last["scores"])


# --- Particles -----------------------------------------------------------------------------------------------------


def law_behind(lm, tokens):
    return lm.open([tokens], capacity=12).next_logits[0].double().log_softmax(-1)


def test_copies_and_those_that_wait_read_what_they_hold(lm):
    """Copied, waiting, ended or rewritten: the next law is always that behind the particle's own tokens."""
    prompts, generator = [[0], [0, 2, 1]], torch.Generator().manual_seed(0)
    found = Particles(lm, prompts, 3, Limits(9, ignore_eos=True))
    for turn in range(8):
        growing = found.growing
        logits = found.next_logits()
        for row, i in zip(logits, growing, strict=True):
            one = found.all[i]
            assert torch.allclose(row.double().log_softmax(-1), law_behind(lm, [*prompts[one.prompt], *one.tokens]))
        found.take(torch.randint(0, 4, (len(growing),), generator=generator), logits, logits)
        if turn == 1:
            found.copy([2, 0, 0, 3, 3, 4])
        if turn == 2:
            found.all[1].waits = found.all[5].waits = True
        if turn == 4:
            found.all[1].waits = found.all[5].waits = False
            found.all[0].dropped = True
        if turn == 5:
            found.copy([1, 1, 2, 5, 4, 3])
        if turn == 6:
            found.become([found.all[2], found.all[2], found.all[0], found.all[5], found.all[3], found.all[3]])
    with pytest.raises(ValueError, match="its own prompt"):
        found.copy([3, 1, 2, 3, 4, 5])


def test_what_is_read_is_what_is_counted(lm):
    sampler = decoders.build("smc[particles=4,every=1,ess=0]")
    before = lm.spent.positions
    (answer,) = sampler.generate(lm, [[0, 1, 2]], Limits(5, ignore_eos=True), RowRandom(0, "a"))
    assert answer.cost.target_positions == lm.spent.positions - before == 3 + 4 * 4
    assert answer.cost.target_calls == 5


class Talker:
    """The toy with words for its tokens."""

    def __init__(self, lm):
        self._lm, self.capabilities = lm, frozenset({"logits", "text"})

    def __getattr__(self, name):
        return getattr(self._lm, name)

    def decode(self, tokens):
        return "".join(("a ", "b ", "\n", "end")[t] for t in tokens)


@pytest.mark.parametrize("variant", ["repaired", "seed,schedule=fixed_linear,beta_max=8,policy=always,max_steps=4"])
def test_what_those_that_wait_or_begin_anew_read_is_counted_too(lm, variant):
    spec = f"persistent-smc-steps[variant={variant},n_particles=8,temperature=1,top_p=1]"
    before, target = dataclasses.replace(lm.spent), Talker(lm)
    (answer,) = decoders.build(spec).generate(target, [[0, 1, 2]], Limits(12, ignore_eos=True), RowRandom(0, "a"))
    spent = lm.spent.since(before)
    assert answer.cost.target_calls == spent.calls
    if variant == "repaired":
        assert answer.cost.target_positions == spent.positions
    else:  # what is begun anew has different lengths, and the target reads padding as well
        assert 0.8 * spent.positions < answer.cost.target_positions <= spent.positions


def test_what_a_decoder_borrows_belongs_to_its_sources(tmp_path):
    def names(spec):
        return {file.name for file in decoders.build(spec).sources()}

    assert {"suffix.py", "writing.py", "particles.py", "choosing.py"} <= names("persistent-smc")
    assert {"best_of.py", "particles.py", "choosing.py"} <= names("self-consistency")
    assert "arithmetic.py" in names("reservoir-spatial")
    assert names("top-p") == {"baselines.py"}
    program = tmp_path / "judge.sh"
    program.write_text("#!/bin/sh\n")
    assert "judge.sh" in names(f"smc[reward=verifier:{program}]")
    assert "judge.sh" in names(f"smc[reward=hybrid:0.5@{tmp_path}]")
    assert "judge.sh" in names(f"persistent-smc-steps[score=prm_reward,prm={tmp_path}]")
