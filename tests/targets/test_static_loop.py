"""The fixed-shape step that a GPU captures draws the same tokens as the eager loop (run here without the capture)."""

import pytest
import tiny_models
import torch

from decodathlon import Limits, RowRandom
from decodathlon.harness import decoder as decoders
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.targets import graphs
from decodathlon.harness.targets.transformers import TransformersTarget

load_builtins()
PROMPTS = [[3, 4, 5], [6, 7, 8, 9, 10, 11, 12], [13]]


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def target(request):
    return TransformersTarget(tiny_models.build(request.param), name=request.param)


@pytest.mark.parametrize(
    "spec",
    ["greedy", "temperature", "top-p[p=0.8]", "top-k[k=5]", "min-p[p=0.1]", "reservoir-exact", "reservoir",
     "reservoir[every=2,reuse=cross,size=8,top_k=9]"],
)  # fmt: skip
@pytest.mark.parametrize("ignore_eos", [True, False])
def test_the_static_step_equals_the_eager_loop(target, spec, ignore_eos, monkeypatch):
    monkeypatch.setattr(graphs, "BUCKETS", (8, 16, 32, 64))  # several buckets within one text
    sampler, limits = decoders.build(spec), Limits(40, ignore_eos=ignore_eos)
    eager = sampler.generate(target, PROMPTS, limits, RowRandom(3, range(3)))
    loop = graphs.StaticLoop(sampler, target, rows=3, capacity=47, capture=False)
    for _ in range(2):  # the second run finds the buffers as the first left them
        noise = RowRandom(3, range(3)).uniforms(40, 1 + sampler.uniforms)
        tokens, log_probs = loop.run(PROMPTS, noise, limits)
        for b, completion in enumerate(eager):
            n = len(completion.tokens)
            assert tokens[b, :n].tolist() == completion.tokens
            assert abs(float(log_probs[b, :n].sum()) - completion.log_prob) < 1e-3


def test_what_an_earlier_text_left_does_not_reach_the_next(target):
    loop = graphs.StaticLoop(decoders.build("greedy"), target, rows=3, capacity=47, capture=False)
    noise = RowRandom(3, range(3)).uniforms(8, 1)
    clean, _ = loop.run(PROMPTS, noise, Limits(8, ignore_eos=True))
    for layer in loop.cache.layers:
        layer.keys.fill_(float("nan"))
        layer.values.fill_(float("nan"))
    again, _ = loop.run(PROMPTS, noise, Limits(8, ignore_eos=True))
    assert torch.equal(clean, again)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_captured_graphs_equal_the_eager_loop(target):
    on_gpu = TransformersTarget(tiny_models.build(target.name).float().cuda(), name=target.name)
    on_cpu = TransformersTarget(tiny_models.build(target.name).float(), name=target.name)
    sampler, limits = decoders.build("greedy"), Limits(40, ignore_eos=True)
    captured = sampler.generate(on_gpu, PROMPTS, limits, RowRandom(3, range(3)))
    eager = sampler.generate(on_cpu, PROMPTS, limits, RowRandom(3, range(3)))
    assert [c.tokens for c in captured] == [c.tokens for c in eager]


def test_stop_tokens_are_seen_one_step_late():
    """Rows may end at different steps; the one after the last of them is the last that is made."""
    from types import SimpleNamespace

    ending = graphs.Ending(SimpleNamespace(device=torch.device("cpu"), stop_tokens=frozenset({1, 2})), rows=2)
    steps = [[5, 1], [5, 6], [2, 7], [8, 9]]
    assert [ending.seen(torch.tensor(tokens)) for tokens in steps] == [False, False, False, True]
