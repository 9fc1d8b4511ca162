"""Which GPUs the workers of this machine get. nvidia-smi is a program of the test's own: no GPU is needed."""

import pytest

from decodathlon.harness.errors import SpecError
from decodathlon.harness.workers import executors, gpus
from decodathlon.harness.workers.base import Orders

ROW = "NVIDIA H200, GPU-{}, 580.1, 143771, 700.00, 1980, 3201, Enabled, Enabled, Disabled, Default"


@pytest.fixture
def two_gpus(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{ROW.format('aaaa')}'\necho '{ROW.format('bbbb')}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.mark.parametrize(
    ("outer", "found"),
    [
        ("", []),
        ("-1", []),
        ("NoDevFiles", ["NoDevFiles"]),
        ("5", ["5"]),
        ("3, 1", ["3", "1"]),
        ("2,-1,0", ["2"]),
        ("1,1", []),
        ("GPU-8f2e,MIG-77", ["GPU-8f2e", "MIG-77"]),
    ],
)
def test_the_outer_list_is_read_as_cuda_reads_it(outer, found):
    assert gpus.visible({"CUDA_VISIBLE_DEVICES": outer}) == found


def test_without_a_list_gpus_are_pinned_by_uuid(two_gpus):
    assert gpus.visible() == ["GPU-aaaa", "GPU-bbbb"]


def test_without_a_driver_there_are_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.visible({}) == []


def made(tmp_path, **options):
    orders = Orders(run_id="r", folder=tmp_path, timeout=1.0, say=lambda text: None, **options)
    return executors.local(orders)


def test_one_worker_per_gpu_with_its_share_of_the_cores(two_gpus, tmp_path, monkeypatch):
    monkeypatch.setattr(gpus.environment, "cores", lambda: 15)
    first, second = made(tmp_path)
    assert first._own == {"CUDA_VISIBLE_DEVICES": "GPU-aaaa"} | dict.fromkeys(gpus.THREADS, "7")
    assert second._own["CUDA_VISIBLE_DEVICES"] == "GPU-bbbb"
    assert [w.open().kind for w in (first, second)] == ["NVIDIA H200"] * 2
    assert first.open().host == second.open().host


def test_the_outer_list_says_which_gpus_they_are(two_gpus, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,GPU-aaaa,7")
    assert [w._own["CUDA_VISIBLE_DEVICES"] for w in made(tmp_path)] == ["1", "GPU-aaaa", "7"]
    assert [w.open().kind for w in made(tmp_path)] == ["NVIDIA H200", "NVIDIA H200", "a GPU"]


def test_outer_threads_are_divided(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    assert gpus.share_of_threads(4) == 1
    assert gpus.share_of_threads(2) == 3
    assert gpus.share_of_threads(1) == 0


def test_one_worker_leaves_everything_as_it_is(two_gpus, tmp_path):
    (only,) = made(tmp_path, workers=1)
    assert only._own == {}
    (cpu,) = made(tmp_path, device="cpu")
    assert cpu._own == {}


def test_two_workers_never_share_a_gpu(two_gpus, tmp_path):
    with pytest.raises(SpecError, match="--workers 3: this machine has 2 GPUs, and two workers never share one"):
        made(tmp_path, workers=3)
    with pytest.raises(SpecError, match="cores, and two workers never share one"):
        made(tmp_path, workers=100_000, device="cpu")
    with pytest.raises(SpecError, match="--executor inline measures in one process"):
        executors.inline(Orders(run_id="r", folder=tmp_path, timeout=1.0, say=print, workers=2))
