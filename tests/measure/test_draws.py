"""Draws on targets with a known law: the right law is asked for, every draw is counted, a wrong sampler is seen."""

import numpy as np
import pytest
import torch

from decodathlon import Sampler, decoder
from decodathlon.harness import decoder as decoders
from decodathlon.harness import models, plan
from decodathlon.harness.bench import Bench
from decodathlon.harness.cells import TOY, CellSpec
from decodathlon.harness.errors import SpecError, UnsupportedError
from decodathlon.harness.measure import draws, exactness
from decodathlon.harness.registry import load_builtins, registry
from decodathlon.harness.targets import toy


@pytest.fixture(autouse=True)
def _builtins():
    load_builtins()


@pytest.fixture
def ring():
    return toy.Ising(4, 0.21, 0.3)


def test_the_law_that_is_claimed_is_the_one_that_is_asked_for(ring):
    exact = draws.claimed_law(decoders.build("temperature"), ring, 4)
    assert list(exact.values()) == pytest.approx(ring.log_law.exp().tolist())
    hot = draws.claimed_law(decoders.build("temperature[temperature=2]"), ring, 4)
    by_hand = 1.0
    for place, spin in enumerate((1, 0, 0, 1)):
        halved = (ring.next_logits_of((1, 0, 0, 1)[:place]) / 2).softmax(-1)
        by_hand *= float(halved[spin])
    assert hot[1, 0, 0, 1] == pytest.approx(by_hand)
    assert draws.claimed_law(decoders.build("dula"), ring, 4) == exact, "what a chain without a claim aims at"
    greedy = draws.claimed_law(decoders.build("greedy"), ring, 4)
    assert sorted(greedy.values())[-2:] == [0.0, 1.0], "one text"
    for spec in ("beam", "contrastive"):
        with pytest.raises(UnsupportedError, match="a law that can be enumerated"):
            draws.claimed_law(decoders.build(spec), ring, 4)


@pytest.mark.parametrize("spec", ["temperature", "arithmetic", "gibbs", "pncg"])
def test_every_draw_is_counted_once(ring, spec):
    law = draws.claimed_law(decoders.build(spec), ring, 4)
    found = list(draws.trials(decoders.build(spec), ring, law, 3, 50, seed=0))
    assert [t.counts.sum() for t in found] == [50, 50, 50]
    if decoders.build(spec).independent:  # else all three may cover the law equally well
        assert len({tuple(t.counts) for t in found}) == 3
    again = list(draws.trials(decoders.build(spec), ring, law, 3, 50, seed=0))
    assert all((a.counts == b.counts).all() for a, b in zip(found, again, strict=True))
    assert all((t.accepted is not None) == (spec in ("gibbs", "pncg")) for t in found)


def test_a_chain_is_counted_state_by_state(ring):
    """Over many draws its shares are the law's, state by state: no outcome takes another's place."""
    law = draws.claimed_law(decoders.build("gibbs"), ring, 4)
    (one,) = draws.trials(decoders.build("gibbs"), ring, law, 1, 20_000, seed=1)
    assert exactness.tvd(one.counts, np.array([*law.values(), 0.0])) < 0.03


def cell_of(spec, part="ring-4", **more):
    suite = registry.get("suite", "ising")
    return CellSpec("ising", suite.version, part, spec, TOY, "smoke", 0, model_spec=suite.targets[part], **more)


def measured(spec):
    return Bench(lambda text: None).measure(cell_of(spec), "r")


def test_the_suite_tells_honest_decoders_from_others(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from decodathlon import Sampler, decoder\n"
        "@decoder('sharper-than-it-says', claim='exact')\nclass Sharper(Sampler):\n"
        "    def shape(self, logits):\n        return (3 * logits).log_softmax(-1)\n"
    )
    honest, chain = measured("temperature"), measured("gibbs")
    assert (honest.status, chain.status) == ("ok", "ok")
    numbers = {m["metric"]: m["value"] for m in honest.metrics}
    assert numbers["goodness_p"] > 0.001
    assert 0.7 < numbers["tvd_floor_ratio"] < 1.3
    assert honest.model["name"] == TOY
    assert "accept_rate" in {m["metric"] for m in chain.metrics}
    assert "goodness_p" not in {m["metric"] for m in chain.metrics}, "its draws depend on one another"
    wrong = Bench(lambda text: None).measure(cell_of("sharper-than-it-says", decoder_files=(str(file),)), "r")
    assert {m["metric"]: m["value"] for m in wrong.metrics}["goodness_p"] < 1e-6
    assert measured("beam").status == "unsupported"


def test_a_suite_with_targets_of_its_own_ignores_the_model(tmp_path):
    chosen = plan.cells(plan.Options(suite=["ising", "wikitext2"], decoder=["gibbs"], scale="quick"))
    assert {(c.suite, c.model) for c in chosen} == {("ising", TOY), ("wikitext2", "smollm2-135m-instruct")}
    suite = registry.get("suite", "ising")
    assert {c.slice: c.model_spec for c in chosen if c.suite == "ising"} == suite.targets
    assert set(suite.targets) == set(suite.slices("quick"))


def test_toys_can_be_named_as_models_and_say_what_is_wrong():
    found = models.load(models.resolve("ising[n=9,beta=1.5,rows=3]"), device="cpu", dtype="auto", say=lambda text: None)
    assert (found.name, found.n, found.beta) == ("ising-3x3", 9, 1.5)
    for text, message in (("ising[n=99]", "outside"), ("ising[n=9,rows=2]", "no 2 rows"), ("ising[x=1]", "x")):
        with pytest.raises(SpecError, match=message):
            models.load(models.resolve(text), device="cpu", dtype="auto", say=lambda text: None)


def test_a_law_that_the_decoder_states_falsely_is_not_its_law(ring):
    """A sampler whose draws are not of the law that it shapes."""

    class Careless(Sampler):
        def shape(self, logits):
            return logits.log_softmax(-1)

        def next_law(self, logits, state, u):
            return (2 * logits).log_softmax(-1), state

    made = decoder("careless-of-its-law", claim="shaped")(Careless)
    try:
        # its texts are followed by the law that it draws from, whatever `shape` says
        law = draws.claimed_law(made(), toy.Ising(3, 0.4), 3)
        assert law != toy.law_of(toy.Ising(3, 0.4), [], 3)
        assert sum(law.values()) == pytest.approx(1.0)
        assert not made().stateless
    finally:
        registry.entries.pop(("decoder", "careless-of-its-law"))
    assert torch.allclose(ring.log_law.exp().sum(), torch.tensor(1.0, dtype=torch.float64))


def test_what_a_drafter_counts_and_never_did_is_told():
    """Texts of three tokens leave no room for a second draft, so nothing that was refused is ever put into one."""
    target = toy.enumerable_lm(4)
    seeded = decoders.build("dflash[suffix_seed=dense,temperature=1]")
    assert draws.untouched(seeded, target, 3, 0) == ["seeded"]
    assert draws.untouched(seeded, target, 8, 0) == []
    for spec in ("dflash[temperature=1]", "temperature"):
        assert draws.untouched(decoders.build(spec), target, 3, 0) == []
