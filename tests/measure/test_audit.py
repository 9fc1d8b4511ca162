"""The audit: honest decoders pass over twenty seeds, seeded bugs are caught, definitions and shapes agree."""

import math
from dataclasses import replace

import pytest
import torch

from decodathlon import Completion, Limits, RowRandom, Sampler, decoder
from decodathlon.harness import decoder as decoders
from decodathlon.harness import law as laws
from decodathlon.harness.bench import Bench
from decodathlon.harness.cells import TOY, CellSpec
from decodathlon.harness.measure import draws, exactness
from decodathlon.harness.registry import load_builtins, registry
from decodathlon.harness.targets import toy

load_builtins()
LENGTH, DRAWS, SEEDS = 3, 3000, 20
HONEST = (
    "greedy",
    "temperature",
    "temperature[temperature=0.6]",
    "top-k[k=2]",
    "top-p[p=0.7]",
    "min-p[p=0.3]",
    "eta[epsilon=0.2]",
    "locally-typical[mass=0.6]",
    "arithmetic",
)


@pytest.fixture(scope="module")
def lm():
    return toy.enumerable_lm()


def p_value(one, target, seed, count=DRAWS):
    law = draws.claimed_law(one, target, LENGTH)
    return exactness.p_value(*exactness.counted(draws.answers(one, target, count, LENGTH, seed), law))


def spiky(rows=200, vocabulary=12, seed=0):
    spread = torch.linspace(0.2, 5.0, rows, dtype=torch.float64)[:, None]
    return spread * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    "spec",
    [
        "temperature[temperature=0.6]",
        "top-k[k=3]",
        "top-k[k=3,temperature=2]",
        "top-p[p=0.8]",
        "top-p[p=0.3,temperature=0.5]",
        "min-p[p=0.2]",
        "locally-typical[mass=0.5]",
        "locally-typical[mass=0.9,temperature=1.5]",
        "eta[epsilon=0.1]",
        "eta[epsilon=0.02]",
    ],
)
def test_definitions_and_shapes_are_one_law(spec):
    one = decoders.build(spec)
    logits = spiky()
    defined = torch.tensor([one.definition(row) for row in logits.tolist()], dtype=torch.float64)
    defined = defined / defined.sum(-1, keepdim=True)
    assert torch.allclose(defined, one.shape(logits).exp(), atol=1e-9)
    assert bool((defined == 0).any()) or "temperature" in spec.partition("[")[0], "it cuts something"


def test_every_shaped_sampler_of_ours_is_defined():
    for name in registry.names("decoder"):
        one = decoders.build(name)
        if isinstance(one, Sampler) and one.stateless and one.claim == "shaped":
            assert draws.is_defined(one), name


def test_the_target_has_forty_outcomes_and_the_test_its_power(lm):
    law = draws.claimed_law(decoders.build("temperature"), lm, LENGTH)
    assert len(law) == 40
    assert sum(law.values()) == pytest.approx(1.0)
    _, p = exactness.counted([], law)
    assert exactness.visible_tvd(p, 6000) < 0.1


@pytest.mark.parametrize("spec", HONEST)
def test_honest_decoders_pass(lm, spec):
    """Twenty seeds at a false alarm in a thousand each: one alarm has a chance of 2 % per decoder, two of 0.02 %."""
    count = 300 if spec == "arithmetic" else DRAWS
    found = [p_value(decoders.build(spec), lm, seed, count) for seed in range(SEEDS)]
    assert sum(p < exactness.ALPHA for p in found) <= 1
    if spec != "greedy":
        assert min(found) < 0.5 < max(found), "p-values of honest draws are spread"


@pytest.mark.parametrize("spec", ["gibbs[steps=15]", "gwg[steps=150]", "pncg[steps=100]", "mt-pncg[steps=40,tries=3]"])
def test_honest_chains_pass(lm, spec):
    found = [p_value(decoders.build(spec), lm, seed, 1500) for seed in range(3)]
    assert sum(p < exactness.ALPHA for p in found) == 0


@pytest.fixture
def controls():
    """Decoders with one bug each, registered for one test only."""
    names = []

    def control(name, claim="shaped"):
        names.append(name)
        return decoder(name, claim=claim)

    yield control
    for name in names:
        registry.entries.pop(("decoder", name))


def test_top_p_off_by_one_token_is_caught(lm, controls):
    @controls("control-top-p")
    class OffByOne(Sampler):
        p: float = 0.7

        def shape(self, logits):
            p = logits.softmax(-1)
            ranked, order = p.sort(-1, descending=True)
            kept = ranked.cumsum(-1) < self.p  # leaves out the token that reaches p
            kept[:, 0] = True
            mask = torch.zeros_like(kept).scatter(-1, order, kept)
            return logits.masked_fill(~mask, -math.inf).log_softmax(-1)

        def definition(self, logits):
            return decoders.build("top-p[p=0.7]").definition(logits)

    assert all(p_value(decoders.build("control-top-p"), lm, seed) < exactness.ALPHA for seed in range(SEEDS))


def test_a_random_number_used_twice_is_caught(lm, controls):
    """Every token alone is drawn right; together they are not."""

    @controls("control-reused", claim="exact")
    class Reused(Sampler):
        def shape(self, logits):
            return logits.log_softmax(-1)

        def start(self, rows):
            return {"u": None}

        def choose(self, logits, state, u):
            state = {"u": u if state["u"] is None else state["u"]}
            return laws.draw(self.shape(logits), state["u"][:, 0]), state

    one = decoders.build("control-reused")
    assert all(p_value(one, lm, seed) < exactness.ALPHA for seed in range(SEEDS))
    firsts = [a[:1] for a in draws.answers(one, lm, DRAWS, LENGTH, 0)]
    assert exactness.p_value(*exactness.counted(firsts, toy.law_of(lm, [lm.start_token], 1))) > exactness.ALPHA


def test_a_beam_that_claims_a_law_is_caught(lm, controls):
    beam = type(decoders.build("beam"))

    @controls("control-beam", claim="exact")
    class Claiming(beam):
        pass

    assert p_value(decoders.build("control-beam"), lm, 0, 200) < 1e-9


def test_a_chain_without_its_test_is_caught(lm, controls):
    dula = type(decoders.build("dula"))

    @controls("control-unadjusted", claim="exact")
    class Unadjusted(dula):
        alpha: float = 64.0
        steps: int = 60

    assert all(p_value(decoders.build("control-unadjusted"), lm, seed, 1500) < exactness.ALPHA for seed in range(5))


def test_per_position_acceptance_is_caught(lm, controls):
    """Each position taken or left by the ratio of the whole: a mistake that ports of p-NCG make."""
    pncg = type(decoders.build("pncg"))

    @controls("control-per-position", claim="exact")
    class PerPosition(pncg):
        alpha: float = 64.0
        steps: int = 60

        def uniforms(self, length):
            return 2 * length

        def step(self, target, state, u):
            from decodathlon.decoders.mcmc.proposals import drawn

            table, N = self.log_proposal(state), state.tokens.shape[1]
            proposed = self.at(target, state, drawn(table, u[:, :N]))
            accept = u[:, N:].log() < self.log_ratio(state, table, proposed)[:, None]
            mixed = torch.where(accept, proposed.tokens, state.tokens)
            return replace(self.at(target, state, mixed), accepted=state.accepted)

    assert all(p_value(decoders.build("control-per-position"), lm, seed, 3000) < exactness.ALPHA for seed in range(3))


def test_a_search_that_is_not_greedy_is_caught(lm, controls):
    greedy = type(decoders.build("greedy"))

    @controls("control-greedy", claim="greedy-exact")
    class Second(greedy):
        def generate(self, target, prompts, limits, rng):
            found = super().generate(target, prompts, limits, rng)
            wrong = Completion([(found[0].tokens[0] + 1) % 4], "stop")
            return [*found[:-1], wrong]

    assert p_value(decoders.build("control-greedy"), lm, 0, 200) == 0.0


def test_the_suite_says_who_failed(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from decodathlon import Sampler, decoder\n"
        "@decoder('sharper-than-audited', claim='exact')\nclass Sharper(Sampler):\n"
        "    def shape(self, logits):\n        return (3 * logits).log_softmax(-1)\n"
    )
    suite = registry.get("suite", "audit")

    def measured(spec, **more):
        cell = CellSpec("audit", suite.version, "lm", spec, TOY, "smoke", 0, model_spec=suite.targets["lm"], **more)
        return Bench(lambda text: None).measure(cell, "r")

    good, bad = measured("top-p[p=0.7]"), measured("sharper-than-audited", decoder_files=(str(file),))
    assert (good.status, bad.status) == ("ok", "ok")
    assert not [n for n in good.notes if n.startswith("audit")]
    assert [n for n in bad.notes if n.startswith("audit: ")]
    assert measured("greedy").status == "ok"
    assert measured("beam").status == "unsupported"


def test_answers_are_independent_and_repeatable(lm):
    one = decoders.build("arithmetic")
    assert draws.answers(one, lm, 40, LENGTH, 1) == draws.answers(one, lm, 40, LENGTH, 1)
    together = one.generate(lm, [[0]] * 40, Limits(LENGTH), RowRandom(1, [f"draw-{i}" for i in range(40)]))
    assert draws.answers(one, lm, 40, LENGTH, 1) != [tuple(a.tokens) for a in together]
