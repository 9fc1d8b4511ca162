"""The course of particle methods: rows against courses that are known, charts, and the page that shows them."""

import json

import pytest

from decodathlon.harness import decoder as decoders
from decodathlon.harness.decoder import Limits
from decodathlon.harness.measure.asking import Answer
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.targets import toy
from decodathlon.leaderboard import particle_charts, particles

load_builtins()


def test_copies_go_from_parent_to_child_and_lines_that_end_are_told_apart():
    """Three particles: 0 is copied over 2, later 1 over 0."""
    course = [
        {"length": 1, "ess": 0.4, "parents": [0, 1, 0]},
        {"length": 2, "ess": 0.9},
        {"length": 3, "ess": 0.3, "parents": [1, 1, 2]},
        {"length": 4, "ess": 0.8, "weights": [0.2, 0.3, 0.5], "scores": [1.0, 2.0, 3.0], "chosen": 2},
    ]
    found = particles.genealogy(course)
    edges = {(r["x"], r["y"], r["x2"], r["y2"]): r["kept"] for r in found}
    assert edges == {
        (0, 1, 1, 1): "no", (0, 2, 1, 2): "yes", (0, 1, 1, 3): "yes",
        (1, 1, 2, 1): "no", (1, 2, 2, 2): "yes", (1, 3, 2, 3): "yes",
        (2, 2, 3, 1): "yes", (2, 2, 3, 2): "yes", (2, 3, 3, 3): "yes",
    }  # fmt: skip
    assert [r["given"] for r in particles.weights(course)] == ["no", "no", "yes"]
    assert particles.axis(course) == "tokens"
    assert "2 of the first particles have descendants" in particles.in_words(course)
    assert "copied at 2 of them" in particles.in_words(course)


def test_out_of_a_pool_parents_are_of_any_stage():
    course = [
        {"level": 0.4, "ess": 0.9, "pool": 2, "parents": [1, 1]},
        {"level": 1.0, "ess": 0.9, "pool": 4, "parents": [0, 3]},
        {"level": 1.0, "ess": 1.2, "pool": 6, "weights": [0.1] * 6, "chosen": 0},
    ]
    edges = {(r["x"], r["y"], r["x2"], r["y2"]): r["kept"] for r in particles.genealogy(course)}
    assert edges == {(0, 2, 1, 1): "no", (0, 2, 1, 2): "yes", (0, 1, 2, 1): "yes", (1, 2, 2, 2): "yes"}


@pytest.mark.parametrize(
    "spec",
    [
        "persistent-smc[particles=4]",
        "smc[particles=4,every=1,ess=0.9]",
        "twisted-smc[particles=4]",
        "persistent-smc-steps[n_particles=4,step_boundary=fixed,fixed_step_tokens=1]",
        "persistent-smc-steps[variant=seed,n_particles=4,step_boundary=fixed,fixed_step_tokens=1]",
    ],
)
def test_every_particle_method_can_be_drawn(spec):
    (answer,) = decoders.build(spec).generate(toy.enumerable_lm(4), [[0]], Limits(4), RowRandom(1, "a"))
    kept = Answer.of("q", 0, "", answer, 1.0)
    course = json.loads(json.dumps(kept.facts()["particles"]))
    assert Answer.from_line(json.loads(json.dumps(kept.as_line()))) == kept
    axis, rows = particles.axis(course), particles.levels(course)
    assert {"effective particles, over N"} <= {row["line"] for row in rows}
    assert sum(row["weight"] for row in particles.weights(course)) == pytest.approx(1, abs=1e-4)
    for chart in (
        particle_charts.course(rows, axis),
        particle_charts.genealogy(
            particles.genealogy(course) or [{"x": 0, "y": 1, "x2": 1, "y2": 1, "kept": "yes"}], axis
        ),
        particle_charts.weights(particles.weights(course)),
    ):
        assert chart.to_dict()["$schema"]
    assert particles.in_words(course).endswith(".")


def test_what_is_no_particle_method_keeps_no_course():
    (answer,) = decoders.build("temperature").generate(toy.enumerable_lm(4), [[0]], Limits(4), RowRandom(1, "a"))
    assert "particles" not in Answer.of("q", 0, "", answer, 1.0).facts()
