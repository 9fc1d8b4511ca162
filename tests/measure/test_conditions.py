"""What else the machine did is recorded, and said aloud where it matters."""

import multiprocessing
import time
from pathlib import Path

import pytest
import tiny_models
import torch

from decodathlon.harness.measure import conditions, identity
from decodathlon.harness.measure.conditions import Conditions
from decodathlon.harness.results import environment
from decodathlon.harness.targets.toy import Ising
from decodathlon.harness.targets.transformers import TransformersTarget

SMI = """#!/bin/sh
case "$*" in
  *clocks_event_reasons*) exit 2 ;;
  *clocks_throttle_reasons*) echo "1980, 3201, 64, 690.1, 100, 5120, 0x0000000000000024" ;;
  *compute-apps*) echo "4242"; echo "77" ;;
  *) echo "An H200, GPU-abc, 570.1, 143771, 700.00, 1980, 3201, Enabled, Enabled, Disabled, Default" ;;
esac
"""


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A driver's tool that answers as an older driver would."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(SMI)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


def burn(until):
    while time.monotonic() < until.value:
        sum(range(1000))


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc/stat")
def test_other_processes_are_noticed():
    watch = Conditions()
    watch.begin(torch.device("cpu"))
    # spawned by a process of its own, so that its time is not counted as a child's before it is waited for
    until = multiprocessing.Value("d", time.monotonic() + 1.5)
    busy = [multiprocessing.Process(target=burn, args=(until,)) for _ in range(2)]
    for process in busy:
        process.start()
    time.sleep(1.2)
    found = watch.end()
    for process in busy:
        process.join()
    assert found["others_share_of_cores"] > conditions.CONTENDED
    assert "contended: other processes used" in watch.remarks[0]
    assert found["switches"]["torch_threads"] == torch.get_num_threads()
    assert found["load_before"] is not None


def test_what_reaches_into_the_next_cell_is_noticed():
    watch = Conditions()
    watch.begin(torch.device("cpu"))
    try:
        torch.set_default_dtype(torch.float64)
        found = watch.end()
    finally:
        torch.set_default_dtype(torch.float32)
    assert found["left_behind"] == ["default_dtype"]
    assert any("which was replaced: default_dtype" in remark for remark in watch.remarks)


def test_without_a_beginning_there_is_nothing_to_say():
    assert Conditions().end() == {}


def test_a_gpus_throttling_and_guests_are_told(nvidia_smi):
    look = conditions.gpu_look("GPU-abc")
    assert look["clocks.sm"] == "1980"
    assert look["pids"] == [4242, 77]
    assert conditions.gpu_remarks([look], own=77) == [
        "throttled: power cap, software thermal slowdown",
        "contended: 1 other processes on the GPU",
    ]
    assert conditions.gpu_remarks([{"reasons": "0x1", "pids": [77]}], own=77) == []  # idle is no throttling
    (gpu,) = environment.gpus()
    assert (gpu["name"], gpu["uuid"], gpu["ecc.mode.current"]) == ("An H200", "GPU-abc", "Enabled")


def test_no_tool_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert conditions.gpu_look(None) == {}
    assert environment.gpus() == []


def test_other_weights_have_another_fingerprint():
    model = tiny_models.build("llama")
    before = identity.weights_fingerprint(model)
    assert identity.weights_fingerprint(tiny_models.build("llama")) == before
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.001)
    assert identity.weights_fingerprint(model) != before


def test_a_target_is_recorded_as_far_as_it_can_tell():
    assert identity.record(Ising(4, 0.4)) == {
        "name": "ising-4", "dtype": "float64", "device": "cpu", "parameters": 0, "threads": torch.get_num_threads(),
    }  # fmt: skip
    found = identity.record(TransformersTarget(tiny_models.build("llama"), name="tiny"))
    assert len(found["weights_fingerprint"]) == 32
    assert found["architecture"] == "LlamaForCausalLM"
