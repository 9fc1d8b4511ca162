"""What only a GPU can show: `pytest tests -m gpu` on a machine that has one. Elsewhere these are skipped."""

import json

import pytest
import tiny_models
import torch

from decodathlon.harness import decoder as decoders
from decodathlon.harness.bench import Bench
from decodathlon.harness.cells import CellSpec
from decodathlon.harness.decoder import Limits
from decodathlon.harness.measure import exactness
from decodathlon.harness.measure.conditions import gpu_look
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.registry import load_builtins, registry
from decodathlon.harness.results import environment, shards
from decodathlon.harness.targets.transformers import TransformersTarget
from decodathlon.harness.workers.base import Orders
from decodathlon.harness.workers.local import LocalWorker

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
load_builtins()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_models.save_folder(tmp_path_factory.mktemp("tiny-llama"))


def cell(model, decoder, suite="throughput", **places):
    version = registry.get("suite", suite).version
    return CellSpec(suite, version, "batch-1" if suite == "throughput" else "joined", decoder, str(model), "smoke", 0,
                    device="cuda", **places)  # fmt: skip


@pytest.mark.parametrize("suite", ["throughput", "wikitext2"])
@pytest.mark.parametrize("name", registry.names("decoder"))
def test_every_decoder_runs_on_the_gpu(model, name, suite):
    outcome = Bench(lambda text: None).measure(cell(model, name, suite), "r")
    assert outcome.status in ("ok", "unsupported"), outcome.error
    assert not [n for n in outcome.notes if "without CUDA graphs" in n]
    if outcome.status == "ok":
        assert outcome.model["processor"] == torch.cuda.get_device_name()


def test_every_sampler_draws_on_the_gpu_what_it_draws_on_the_cpu():
    """Float32, 40 tokens: graphs and buckets give the same text for the same seed, where the draw is the same."""
    targets = [TransformersTarget(tiny_models.build("llama").float().to(d), name=d) for d in ("cpu", "cuda")]
    for name in (
        "greedy",
        "eta",
        "mirostat",
        "arithmetic",
    ):
        texts = [
            [
                c.tokens
                for c in decoders.build(name).generate(t, [[5, 6], [7]], Limits(40, True), RowRandom(3, range(2)))
            ]
            for t in targets
        ]
        assert texts[0] == texts[1], name


@pytest.mark.parametrize("name", ["temperature", "top-k[k=20]", "top-p[p=0.8]", "min-p", "locally-typical[mass=0.7]"])
def test_what_a_gpu_draws_in_a_way_of_its_own_has_the_law(name):
    """40,000 draws from one law of 300 tokens; the test of the audit at one in 10,000."""
    sampler = decoders.build(name)
    logits = 2 * torch.randn(1, 300, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    u = torch.rand(40_000, 1 + sampler.uniforms, generator=generator, dtype=torch.float64).cuda()
    drawn = sampler.draw(logits.cuda().expand(40_000, 300).contiguous(), u)
    law = sampler.shape(logits.double())[0].exp()
    assert exactness.p_value(drawn.cpu().bincount(minlength=300).numpy(), law.numpy()) > 1e-4


def test_out_of_gpu_memory_is_a_row_and_the_next_cell_runs(model, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\nfrom decodathlon import Sampler, decoder\n"
        "@decoder('hungry', claim='exact')\nclass Hungry(Sampler):\n    def shape(self, logits):\n"
        "        torch.empty(1 << 46, dtype=torch.uint8, device=logits.device)\n        return logits.log_softmax(-1)\n"
    )
    executor = LocalWorker(Orders(run_id="r", folder=tmp_path / "run", timeout=60.0, say=lambda text: None))
    try:
        hungry = executor.run(cell(model, "hungry", decoder_files=(str(file),)))
        after = executor.run(cell(model, "greedy"))
    finally:
        executor.close()
    assert (hungry.status, after.status) == ("oom", "ok")
    assert "OutOfMemoryError" in hungry.reason


def test_the_record_names_the_gpu_and_what_it_did(model, tmp_path):
    executor = LocalWorker(Orders(run_id="r", folder=tmp_path / "run", timeout=60.0, say=lambda text: None))
    try:
        outcome = executor.run(cell(model, "greedy"))
    finally:
        executor.close()
    assert outcome.status == "ok", outcome.error
    (first, *_) = environment.gpus()
    assert first["uuid"].startswith("GPU-")
    assert float(gpu_look(first["uuid"])["clocks.sm"]) > 0
    shard = json.loads((tmp_path / "run" / f"{outcome.spec.cell_id}.json").read_text())
    assert shards.restored(shard["conditions"])["gpu"]
