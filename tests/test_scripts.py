"""The scripts that make the findings, at sizes that take seconds."""

import csv
import importlib.util
from pathlib import Path

import pytest

from decodathlon.harness.registry import load_builtins
from decodathlon.harness.targets import toy

load_builtins()
SCRIPTS = Path(__file__).parents[1] / "scripts"


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def factorial(monkeypatch, tmp_path):
    made = script("mcmc_factorial")
    small = {
        "WEIGHTS": ("iw",),
        "NORMS": (1,),
        "SIZES": (64.0,),
        "TEMPERATURES": (0.21,),
        "TRIES": (1, 4),
    }
    for name, value in small.items():
        monkeypatch.setattr(made, name, value)
    monkeypatch.setattr(made, "FIGURE", tmp_path / "figure.svg")
    return made


def test_the_factorial_measures_gaps(factorial):
    """One try at alpha 64 has a gap of 0.392."""
    one, four = factorial.measured()
    assert one["gap"] == pytest.approx(0.392, abs=0.0005)
    assert four["gap"] > one["gap"]
    assert four["gap_per_evaluation"] < one["gap_per_evaluation"]


def test_figures_are_drawn(factorial):
    pytest.importorskip("vl_convert")
    factorial.draw([{k: str(v) for k, v in row.items()} for row in factorial.measured()])
    assert factorial.FIGURE.read_text().startswith("<svg")


def test_the_published_factorial_is_whole():
    made = script("mcmc_factorial")
    with made.TABLE.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(made.TEMPERATURES) * len(made.NORMS) * len(made.SIZES) * len(made.WEIGHTS) * len(made.TRIES)
    (one,) = [
        r for r in rows if (r["beta"], r["p"], r["alpha"], r["weight"], r["tries"]) == ("0.21", "1", "64.0", "iw", "1")
    ]
    assert float(one["gap"]) == pytest.approx(0.392, abs=0.0005)


def test_under_a_length_reward_the_chain_comes_nearer_than_truncated_gibbs():
    made = script("length_reward")
    lm = toy.enumerable_lm()
    way = made.Toy(lm, [lm.start_token], room=4, answers=400, budget=4, goal=4, beta=0.5)
    exact = way.exact("qalign[reward=length:4,beta=0.5]")
    assert sum(exact.values()) == pytest.approx(1.0)
    far, chain = (made.distance(made.shares(x), exact) for x in (way.truncated("aligned"), way.chain("qalign", 24)))
    assert chain < 0.1 < far
