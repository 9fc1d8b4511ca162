"""Profiles: the phases are told apart, nothing is lost in folding, and what is stored can be drawn and traced."""

import time

import pytest
import tiny_models
import torch

from decodathlon import Sampler
from decodathlon.harness import decoder as decoders
from decodathlon.harness.measure import profile
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.results import profiles
from decodathlon.harness.targets.transformers import TransformersTarget

load_builtins()


@pytest.fixture(scope="module")
def target():
    return TransformersTarget(tiny_models.build("llama"), name="tiny")


class Sleepy(Sampler):
    """Its draw takes three hundredths of a second, for which nobody else is to blame."""

    claim = "exact"
    spec = "sleepy"

    def check(self, target):
        """It needs nothing."""

    def shape(self, logits):
        time.sleep(0.03)
        return logits.log_softmax(-1)


def test_the_time_of_a_slow_sampler_is_the_sampler_s(target):
    sampler = Sleepy()
    found = profile.profile(sampler, target, [[1, 2, 3]], 8, 0)
    assert found.share("sampler") > 0.7
    assert found.share("forward") < 0.3
    assert sum(found.time.values()) == pytest.approx(found.profiled_seconds, rel=0.25)
    assert "choose" not in vars(sampler)
    assert "open" not in vars(target), "what was watched is left as it was"


@pytest.mark.parametrize("spec", ["top-p", "reservoir", "beam", "reservoir-spatial", "qalign[steps=2]"])
def test_every_kind_of_decoder_has_a_profile(target, spec):
    found = profile.profile(decoders.build(spec), target, [[1, 2, 3]] * 2, 6, 0)
    phases = profiles.shares(found.time)
    assert phases["forward"] + phases.get("prefill", 0) > 0
    assert sum(phases.values()) == pytest.approx(1)
    assert ("sampler" in phases) == (spec in ("top-p", "reservoir"))
    assert any(";forward;" in s for s in found.memory)
    assert found.memory.keys() <= {s for s in found.memory if s.startswith("generate")}


def test_folding_adds_what_is_small_to_what_it_is_part_of():
    values = {"g": 1.0, "g;a": 97.0, "g;a;x": 0.01, "g;b;y;z": 0.02, "g;b": 2.0}
    found = profile.folded(values)
    assert sum(found.values()) == pytest.approx(sum(values.values()))
    assert found == pytest.approx({"g": 1.0, "g;a": 97.01, "g;b": 2.02})


def test_boxes_stand_over_what_called_them():
    values = {"g": 1.0, "g;a": 3.0, "g;a;x": 4.0, "g;b": 2.0}
    boxes = {b.stack: b for b in profiles.flame(values)}
    assert boxes["g"][1:] == (0, 0.0, 1.0, 10.0, 1.0)
    assert boxes["g;a"][1:] == (1, 0.0, 0.7, 7.0, 3.0)
    assert boxes["g;a;x"][1:] == (2, 0.0, 0.4, 4.0, 4.0)
    assert boxes["g;b"].begin == pytest.approx(0.7)
    assert boxes["g;b"].end == pytest.approx(0.9)
    assert profiles.flame({}) == []
    assert {b.stack for b in profiles.flame(values, least=0.5)} == {"g", "g;a"}


def test_a_trace_has_every_event_with_its_phase(target):
    stored = profile.profile(decoders.build("top-k"), target, [[1, 2]], 4, 0).as_sample()
    trace = profiles.chrome_trace(stored)["traceEvents"]
    assert len(trace) == len(stored["events"]) > 50
    assert {"prefill", "forward", "sampler", "host"} <= {e["cat"] for e in trace}
    assert all(e["ph"] == "X" and e["dur"] >= 0 and e["ts"] >= 0 for e in trace)
    starts = [e["ts"] for e in trace]
    assert starts == sorted(starts)


def test_a_failing_decoder_leaves_the_target_as_it_was(target):
    class Broken(Sleepy):
        def shape(self, logits):
            if torch.autograd._profiler_enabled():
                raise RuntimeError("under the profiler")
            return logits.log_softmax(-1)

    with pytest.raises(RuntimeError, match="under the profiler"):
        profile.profile(Broken(), target, [[1, 2, 3]], 4, 0)
    assert "open" not in vars(target)
