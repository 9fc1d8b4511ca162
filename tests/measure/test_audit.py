"""The audit: honest decoders pass over twenty seeds, seeded bugs are caught, definitions and shapes agree."""

import sys
from pathlib import Path

import pytest
import torch

from decodathlon import Chain, Limits, RowRandom, Sampler
from decodathlon.harness import decoder as decoders
from decodathlon.harness.bench import Bench
from decodathlon.harness.cells import TOY, CellSpec
from decodathlon.harness.measure import draws, exactness
from decodathlon.harness.registry import load_builtins, registry
from decodathlon.harness.results import audited, table
from decodathlon.harness.targets import toy

load_builtins()
LENGTH, DRAWS, SEEDS = 3, 3000, 20
DISHONEST = Path(__file__).parents[2] / "docs/examples/dishonest.py"
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
    "arithmetic[temperature=0.6]",
    "mirostat[tau=1]",
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
    assert exactness.visible_tvd(p, 12_000) < 0.05


@pytest.mark.parametrize("spec", HONEST)
def test_honest_decoders_pass(lm, spec):
    """Twenty seeds at a false alarm in a thousand each: one alarm has a chance of 2 % per decoder, two of 0.02 %."""
    count = 300 if spec.startswith("arithmetic") else DRAWS
    found = [p_value(decoders.build(spec), lm, seed, count) for seed in range(SEEDS)]
    assert sum(p < exactness.ALPHA for p in found) <= 1
    if spec != "greedy":
        assert min(found) < 0.5 < max(found), "p-values of honest draws are spread"


def p_values(spec, target, count):
    """Of every seed its own draws, all in one batch: no row depends on its neighbours."""
    one = decoders.build(spec)
    law = draws.claimed_law(one, target, LENGTH)
    rng = RowRandom(0, [(seed, i) for seed in range(SEEDS) for i in range(count)])
    found = one.generate(target, [[target.start_token]] * (SEEDS * count), Limits(LENGTH), rng)
    texts = [tuple(a.tokens) for a in found]
    parts = [texts[seed * count : (seed + 1) * count] for seed in range(SEEDS)]
    return [exactness.p_value(*exactness.counted(part, law)) for part in parts]


@pytest.mark.parametrize(
    "spec",
    [
        "gibbs[steps=12]",
        "gwg[steps=80]",
        "dlp[steps=50]",
        "pncg[steps=50]",
        "pncg[steps=30,burn_in=20]",
        "pncg[steps=100,scan=single]",
        "mt-pncg[steps=25,tries=3]",
        "qalign[steps=30]",
        "qalign[steps=40,reward=length:2,temperature=0.7]",
        "quest[steps=30]",
        "mt-quest[steps=15,tries=4]",
        "mt-quest[steps=15,tries=4,diverse=false]",
        "mt-quest[steps=20,tries=4,law=reward,beta=0.5]",
        "dishonest-speculation[renormalise=true]",
    ],
)
def test_honest_chains_pass(lm, dishonest, spec):
    found = p_values(spec, lm, 200)
    assert sum(p < exactness.ALPHA for p in found) <= 1
    assert min(found) < 0.5 < max(found)


@pytest.fixture(scope="module")
def dishonest():
    """The decoders of docs/examples/dishonest.py, registered for these tests only."""
    before = dict(registry.entries)
    registry.load_file(DISHONEST)
    yield sorted(name for kind, name in registry.entries if kind == "decoder" and name.startswith("dishonest"))
    registry.entries.clear()
    registry.entries.update(before)
    for name in [n for n in sys.modules if n.endswith("docs_examples_dishonest_py")]:
        del sys.modules[name]


def test_every_dishonest_decoder_is_caught(lm, dishonest):
    assert len(dishonest) == 9
    for name in dishonest:
        if name in ("dishonest-beam", "dishonest-greedy"):  # they give one text, over and over
            assert p_value(decoders.build(name), lm, 0, 200) < 1e-9, name
        else:
            chain = isinstance(decoders.build(name), Chain)
            found = p_values(f"{name}[steps=20]" if chain else name, lm, 600 if chain else 2000)
            assert max(found) < exactness.ALPHA, (name, found)


def test_a_law_is_held_against_its_definition_where_the_target_is_too_small(lm, dishonest):
    """Fifty likeliest of four tokens cut nothing; on laws of 64 tokens the comparison sees one token too few."""

    def gap(spec):
        found = draws.definition_gap(decoders.build(spec), lm, LENGTH)
        return None if found is None else found.value

    assert gap("top-k") < 1e-12
    assert gap("top-p") < 1e-12
    assert gap("dishonest-top-p") > 0.01
    assert gap("temperature") is None
    assert gap("qalign") is None


def test_a_chain_is_held_against_its_own_transition_matrix(lm, dishonest):
    for spec in ("gibbs", "gwg", "pncg", "pncg[scan=single]", "dlp", "mt-pncg"):
        found = draws.definition_gap(decoders.build(spec), lm, LENGTH)
        assert found.value < 1e-12, spec
        assert found.n == 64
    assert draws.definition_gap(decoders.build("dishonest-chain"), lm, LENGTH).value > 1e-3, "no Metropolis test"
    assert draws.definition_gap(decoders.build("dula"), lm, LENGTH) is None, "it claims nothing"
    assert draws.definition_gap(decoders.build("pncg[burn_in=20]"), lm, LENGTH) is None


def test_a_matrix_that_an_heir_has_made_untrue_is_not_used(lm, dishonest):
    """`PerPosition` overrides the step of p-NCG, whose matrix therefore is not its own."""
    heir = decoders.build("dishonest-positions")
    assert heir.transitions.__qualname__.startswith("PNCG")
    assert draws.definition_gap(heir, lm, LENGTH) is None


def test_a_random_number_used_twice_leaves_each_token_right(lm, dishonest):
    firsts = [a[:1] for a in draws.answers(decoders.build("dishonest-random-number"), lm, DRAWS, LENGTH, 0)]
    assert exactness.p_value(*exactness.counted(firsts, toy.law_of(lm, [lm.start_token], 1))) > exactness.ALPHA


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
    plain = measured("temperature[temperature=0.6]")
    assert audited.verdicts([good, bad, plain]) == {
        "top-p[p=0.7]": "weak",  # 500 draws see little
        "temperature[temperature=0.6]": "weak",
        "sharper-than-audited": "fail",
    }
    text = "\n".join(table.tables([good, bad]))
    assert "! sharper-than-audited: audit failed" in text
    assert measured("greedy").status == "ok"
    assert measured("beam").status == "unsupported"


def test_answers_are_independent_and_repeatable(lm):
    one = decoders.build("arithmetic")
    assert draws.answers(one, lm, 40, LENGTH, 1) == draws.answers(one, lm, 40, LENGTH, 1)
    together = one.generate(lm, [[0]] * 40, Limits(LENGTH), RowRandom(1, [f"draw-{i}" for i in range(40)]))
    assert draws.answers(one, lm, 40, LENGTH, 1) != [tuple(a.tokens) for a in together]
