"""The founding note's scheme: what its code does, and that the repaired form approaches what it says."""

import math

import pytest
import torch

from decodathlon.decoders.smc.scores import Scoring
from decodathlon.harness import decoder as decoders
from decodathlon.harness import law
from decodathlon.harness.decoder import Limits
from decodathlon.harness.errors import RewardError, SpecError, UnsupportedError
from decodathlon.harness.measure import exactness
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.rewards import Answer
from decodathlon.harness.targets import toy

load_builtins()
LENGTH = 3
STEPS = "step_boundary=fixed,fixed_step_tokens=1,top_p=1,temperature=1"


@pytest.fixture(scope="module")
def lm():
    return toy.enumerable_lm(4)


def drawn(spec, lm, n, length=LENGTH, seed=0, **limits):
    return decoders.build(spec).generate(lm, [[0]] * n, Limits(length, **limits), RowRandom(seed, range(n)))


# --- The note's code -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", ["", ",resample=topN", ",tau=0.5", ",alpha_start=0.9,alpha_end=1"])
def test_the_notes_code_is_self_consistency(lm, more):
    """Its level never leaves 0, nothing is ever copied, and the answers are those of a vote among as many draws."""
    spec = f"persistent-smc-steps[variant=seed,n_particles=6,answer=vote,{STEPS}{more}]"
    mine = drawn(spec, lm, 60, 12, ignore_eos=True)
    votes = drawn("self-consistency[n=6,temperature=1,top_p=1]", lm, 60, 12, ignore_eos=True)
    assert [a.tokens for a in mine] == [a.tokens for a in votes]
    assert all(entry["level"] == 0 and not entry["resampled"] for a in mine for entry in a.trace[:-1])
    assert all(len(a.trace) == 12 for a in mine)
    spread = [max(a.trace[-1]["scores"]) - min(a.trace[-1]["scores"]) for a in mine]
    assert min(spread) > 0.5, "the scores differ, so that a level above 0 would show"


def test_the_repaired_form_leaves_level_zero_and_copies(lm):
    answers = drawn(f"persistent-smc-steps[n_particles=6,{STEPS}]", lm, 60, 12, ignore_eos=True)
    assert all(a.trace[0]["level"] > 0 for a in answers)
    assert sum(any(entry["resampled"] for entry in a.trace) for a in answers) > 50


def test_with_a_fixed_schedule_the_notes_code_does_copy_from_its_pool(lm):
    """What is drawn from the pool may be shorter than what it replaces, and goes on from there."""
    spec = f"persistent-smc-steps[variant=seed,n_particles=4,schedule=fixed_linear,beta_max=8,policy=always,{STEPS}]"
    answers = drawn(spec.replace("policy", "max_steps=12,policy"), lm, 20, 12, ignore_eos=True)
    assert all(any(entry["resampled"] for entry in a.trace[:-1]) for a in answers)
    assert any(len(a.tokens) < 12 for a in answers), "steps were spent on shorter ones"


# --- Repaired --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["true", "false"])
@pytest.mark.parametrize("schedule", ["fixed_linear", "adaptive_ess", "fixed_linear,policy=always"])
def test_the_estimated_constant_is_right_on_average(lm, pool, schedule):
    """Of p(y) exp(l(y)) over all texts, with and without the pool: 1,000 estimates, four standard errors.

    A schedule that looks at the particles makes the estimate depend on them a little: 2 % is allowed for that.
    """
    spec = f"persistent-smc-steps[n_particles=4,max_steps=3,answer=draw,pool={pool},schedule={schedule},{STEPS}]"
    law = torch.tensor(list(toy.law_of(lm, [0], LENGTH).values()), dtype=torch.float64)
    z = float(law.square().sum())  # exp(l) is p itself
    found = [math.exp(a.trace[-1]["log_z"]) / z for a in drawn(spec, lm, 1000)]
    ratio = torch.tensor(found, dtype=torch.float64)
    slack = 0.02 if "adaptive" in schedule else 0.0
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / math.sqrt(1000) + slack


def test_a_pool_is_without_bias_wherever_the_last_answer_ends(lm):
    """With equal weights Z is 1; steps at which everything has ended already must count, too."""
    spec = "persistent-smc-steps[n_particles=2,max_steps=6,policy=always,resample=multinomial,schedule=fixed_linear,"
    found = drawn(f"{spec}beta_min=1,tau=1000000,answer=draw,{STEPS}]", lm, 4000, 6)
    ratio = torch.tensor([math.exp(a.trace[-1]["log_z"]) for a in found], dtype=torch.float64)
    error = float(ratio.std()) / math.sqrt(4000)
    assert abs(float(ratio.mean()) - 1) < 4 * error
    assert error < 0.005, "without those steps the mean is 0.9"


@pytest.mark.parametrize("pool", ["true", "false"])
def test_with_many_particles_the_law_is_the_tilted_one(lm, pool):
    spec = f"persistent-smc-steps[n_particles=64,max_steps=3,answer=draw,pool={pool},{STEPS}]"
    law = {text: p * p for text, p in toy.law_of(lm, [0], LENGTH).items()}
    law = {text: p / sum(law.values()) for text, p in law.items()}
    counts, p = exactness.counted([tuple(a.tokens) for a in drawn(spec, lm, 1500)], law)
    assert exactness.p_value(counts, p) > 1e-3
    counts, _ = exactness.counted([tuple(a.tokens) for a in drawn(spec.replace("=64", "=1"), lm, 1500)], law)
    assert exactness.p_value(counts, p) < 1e-6


def test_tokens_are_drawn_at_the_temperature_and_scored_by_the_model(lm):
    plain = decoders.build("persistent-smc-steps")
    logits = 3 * torch.randn(4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(plain.shape(logits), law.process(logits, temperature=0.7, top_p=0.95))
    for variant in ("repaired", "seed"):
        cold = (
            f"persistent-smc-steps[variant={variant},n_particles=3,{STEPS.replace('temperature=1', 'temperature=0.5')}]"
        )
        for answer in drawn(cold, lm, 10, 6):
            last = answer.trace[-1]
            assert last["scores"][last["chosen"]] == pytest.approx(answer.log_prob, abs=1e-6)


def test_a_pool_drops_the_oldest_or_the_lowest(lm):
    spec = f"persistent-smc-steps[n_particles=8,max_steps=6,pool_size=3,answer=draw,prune=PRUNE,{STEPS}]"
    low = [min(a.trace[-1]["scores"]) for a in drawn(spec.replace("PRUNE", "lowest_score"), lm, 80, 6)]
    old = [min(a.trace[-1]["scores"]) for a in drawn(spec.replace("PRUNE", "oldest"), lm, 80, 6)]
    assert sum(low) > sum(old) + 20, "who drops the lowest keeps no low ones"


def test_levels_rise_and_thresholds_follow_their_schedule(lm):
    one = decoders.build("persistent-smc-steps[max_steps=5,alpha_start=0.5,alpha_end=0.9]")
    assert [round(one.threshold(s), 3) for s in (1, 3, 5)] == [0.5, 0.7, 0.9]
    assert decoders.build("persistent-smc-steps[alpha_schedule=constant]").threshold(20) == 0.5
    cosine = decoders.build("persistent-smc-steps[max_steps=5,schedule=fixed_cosine,beta_max=2]")
    assert [round(cosine.fixed_level(s), 3) for s in (1, 3, 5)] == [0, 1, 2]
    for answer in drawn(f"persistent-smc-steps[n_particles=8,{STEPS}]", lm, 20, 8, ignore_eos=True):
        levels = [entry["level"] for entry in answer.trace]
        assert levels == sorted(levels)


def test_a_pool_keeps_no_more_than_it_may(lm):
    for prune in ("oldest", "lowest_score"):
        spec = f"persistent-smc-steps[n_particles=8,pool_size=3,prune={prune},{STEPS}]"
        for answer in drawn(spec, lm, 20, 6):
            assert answer.trace[-1]["pool"] <= 3 + 8
    everything = drawn(f"persistent-smc-steps[n_particles=8,{STEPS}]", lm, 20, 6)
    assert max(a.trace[-1]["pool"] for a in everything) > 5


def test_every_answer_is_in_the_pool_once(lm):
    for answer in drawn(f"persistent-smc-steps[n_particles=16,answer=draw,{STEPS}]", lm, 20, 3):
        assert answer.trace[-1]["pool"] <= 40, "as many texts there are"


def test_rows_do_not_depend_on_their_neighbours(lm):
    for variant in ("repaired", "seed,schedule=fixed_linear,beta_max=8,policy=always"):
        one = decoders.build(f"persistent-smc-steps[variant={variant},n_particles=4,max_steps=9,{STEPS}]")
        limits = Limits(7, ignore_eos=True)
        together = one.generate(lm, [[0], [0, 2], [0]], limits, RowRandom(1, "abc"))
        for i, prompt in enumerate(([0], [0, 2], [0])):
            assert one.generate(lm, [prompt], limits, RowRandom(1, "abc"[i]))[0].tokens == together[i].tokens


def test_one_particle_is_the_model(lm):
    law = toy.law_of(lm, [0], LENGTH)
    found = drawn(f"persistent-smc-steps[n_particles=1,{STEPS}]", lm, 1500)
    counts, p = exactness.counted([tuple(a.tokens) for a in found], law)
    assert exactness.p_value(counts, p) > 1e-3


class Talker:
    """A target that says some words over and over, and lines with them."""

    words = ("a ", "b. ", "\n", "end")

    def __init__(self, lm):
        self._lm = lm
        self.capabilities = frozenset({"logits", "text"})

    def __getattr__(self, name):
        return getattr(self._lm, name)

    def decode(self, tokens):
        return "".join(self.words[t] for t in tokens)


@pytest.mark.parametrize(("boundary", "ends"), [("newline", ("\n",)), ("sentence", ("\n", ". "))])
def test_steps_end_where_lines_or_sentences_do(lm, boundary, ends):
    """Every step but the last ends at a boundary or at the limit, holds more than blanks, and is no longer."""
    from decodathlon.decoders.particles import Particles
    from decodathlon.decoders.smc.steps import Noise

    talker = Talker(lm)
    spec = f"persistent-smc-steps[n_particles=8,step_boundary={boundary},max_tokens_per_step=6,temperature=1,top_p=1]"
    one, rng, limits = decoders.build(spec), RowRandom(0, "ab"), Limits(30, ignore_eos=True)
    found, noise = Particles(talker, [[0], [0, 1]], 8, limits), Noise(rng, 8, 30)
    seen = 0
    for _ in range(6):
        before = [len(p.tokens) for p in found.all]
        one.grow(found, noise)
        for length, particle in zip(before, found.all, strict=True):
            step = particle.tokens[length:]
            text = talker.decode(step)
            assert len(step) <= 6
            if len(step) < 6 and len(particle.tokens) < 30:
                assert text.endswith(ends)
                assert text.strip()
                seen += 1
            inner = [talker.decode(step[:k]) for k in range(1, len(step))]
            assert not any(t.strip() and t.endswith(ends) for t in inner), "it did not stop at the first one"
    assert seen > 20


# --- Scores ----------------------------------------------------------------------------------------------------------


def scoring(**changes):
    parameters = {
        "score": "logprob_power", "prm": "none", "tau": 1.0, "alpha": 0.5, "min_score": 0.0, "max_score": 1e300,
        "length_prior": "none", "lambda_len": 1.0, "lambda_poisson": 10.0, "p_geometric": 0.1, "mu_lognormal": 2.0,
        "sigma_lognormal": 0.5, "penalty_linear": 0.01,
    }  # fmt: skip
    return Scoring(**parameters | changes)


def test_scores_are_what_the_note_says(lm):
    answer = Answer([0], [1, 2, 3, 1], -8.0, lm)
    assert scoring()([answer]) == [-8.0]
    assert scoring(tau=2.0)([answer]) == [-4.0]
    assert scoring(score="logprob_avg")([answer]) == [-2.0]
    assert scoring(min_score=math.exp(-3))([answer]) == [pytest.approx(-3)]
    assert scoring(max_score=math.exp(-9))([answer]) == [pytest.approx(-9)]
    assert scoring(length_prior="linear_penalty", penalty_linear=0.5, lambda_len=2.0)([answer]) == [-8 - 2 * 0.5 * 4]


@pytest.mark.parametrize("prior", ["poisson", "geometric", "lognormal"])
def test_priors_on_the_length_are_laws(prior):
    """Poisson and geometric sum to one over all lengths, 0 included; the lognormal density integrates to one."""
    one = scoring(length_prior=prior)
    lengths = range(1, 400) if prior != "lognormal" else [x / 100 for x in range(1, 20000)]
    mass = sum(math.exp(one.log_length(n)) for n in lengths)
    mass = mass / 100 if prior == "lognormal" else mass + math.exp(one.log_length(0))
    assert mass == pytest.approx(1, abs=1e-3)


# --- Bad input -------------------------------------------------------------------------------------------------------


def test_a_hybrid_score_has_its_share_of_the_reward(monkeypatch, lm):
    monkeypatch.setattr(
        "decodathlon.decoders.smc.scores.rewards.build", lambda name: lambda a: torch.tensor([0.5] * len(a))
    )
    found = scoring(score="hybrid_prm_logprob", prm="somewhere", alpha=0.2, tau=2.0)([Answer([0], [2, 3], -3.0, lm)])
    assert found == pytest.approx([(0.2 * 0.5 + 0.8 * -3.0) / 2.0])


def test_bad_settings_are_named():
    for settings, message in (
        ("alpha_start=1.5", r"alpha_start=1.5 is outside \[0, 1\]"),
        ("n_particles=0", "n_particles=0 is outside"),
        ("beta_min=2", "beta_max=1 is below beta_min=2"),
        ("min_score=2,max_score=1", "max_score=1 is not above min_score=2"),
        ("min_tokens_per_step=10,max_tokens_per_step=2", "min_tokens_per_step=10 is above max_tokens_per_step=2"),
        ("score=prm_reward", "score=prm_reward needs a process reward model: prm=FOLDER"),
        ("generation.n_partikles=3", "no parameter 'generation.n_partikles'.*generation.n_particles"),
        ("n_particles=3,generation.n_particles=3", "'n_particles' is given twice, once as 'generation.n_particles'"),
        ("system.seed=3", "no parameter 'system.seed'"),
    ):
        with pytest.raises(SpecError, match=message):
            decoders.build(f"persistent-smc-steps[{settings}]")
    dotted = decoders.build("persistent-smc-steps[generation.n_particles=16,ps.resample.method=multinomial]")
    assert dotted == decoders.build("persistent-smc-steps[n_particles=16,resample=multinomial]")
    assert dotted.spec == "persistent-smc-steps[n_particles=16,resample=multinomial]"


def test_lines_need_text():
    with pytest.raises(UnsupportedError, match="step_boundary=newline reads it"):
        decoders.build("persistent-smc-steps").check(toy.Ising(4, 0.3))


def test_weights_that_all_vanish_are_named(lm, monkeypatch):
    monkeypatch.setattr(Scoring, "__call__", lambda self, answers: [-math.inf for _ in answers])
    with pytest.raises(RewardError, match="all particles have the weight zero"):
        drawn(f"persistent-smc-steps[schedule=fixed_linear,beta_min=1,{STEPS}]", lm, 1)
