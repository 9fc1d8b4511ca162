"""Same seed, same tokens; a row does not depend on its neighbours; stop tokens end a text; costs add up."""

import pytest
import tiny_models
import torch

from decodathlon import Limits, RowRandom
from decodathlon.harness import decoder as decoders
from decodathlon.harness.errors import ContextOverflowError
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.targets.transformers import TransformersTarget

load_builtins()
PROMPTS = {"a": [3, 4, 5], "b": [6, 7, 8, 9, 10, 11], "c": [13]}


@pytest.fixture(scope="module")
def target():
    return TransformersTarget(tiny_models.build("llama", attention="sdpa"), name="tiny")


def run(target, spec, keys, seed=0, limits=Limits(20)):  # noqa: B008 - frozen
    answers = decoders.build(spec).generate(target, [PROMPTS[k] for k in keys], limits, RowRandom(seed, keys))
    return dict(zip(keys, answers, strict=True))


@pytest.mark.parametrize("spec", ["greedy", "temperature", "top-k", "top-p", "min-p"])
def test_rows_are_their_own(target, spec):
    together = run(target, spec, "abc")
    assert together == run(target, spec, "abc")
    for key in "abc":
        alone = run(target, spec, key)[key]
        assert alone.tokens == together[key].tokens
        assert alone.log_prob == pytest.approx(together[key].log_prob)
    shuffled = run(target, spec, "cab")
    assert all(shuffled[k].tokens == together[k].tokens for k in "abc")


def test_another_seed_draws_other_tokens(target):
    assert run(target, "temperature", "abc", seed=0) != run(target, "temperature", "abc", seed=1)


def test_a_longer_text_begins_with_the_shorter_one(target):
    short = run(target, "temperature", "abc", limits=Limits(5, ignore_eos=True))
    long = run(target, "temperature", "abc", limits=Limits(30, ignore_eos=True))
    assert all(long[k].tokens[:5] == short[k].tokens for k in "abc")


def test_stop_tokens_end_a_text_and_ignore_eos_does_not(target):
    stopped = run(target, "temperature[temperature=3]", "abc", limits=Limits(120))
    assert any(c.stop_reason == "stop" for c in stopped.values())
    for c in stopped.values():
        assert (c.tokens[-1] in target.stop_tokens) == (c.stop_reason == "stop")
        assert not set(c.tokens[:-1]) & target.stop_tokens
    free = run(target, "temperature[temperature=3]", "abc", limits=Limits(120, ignore_eos=True))
    assert {len(c.tokens) for c in free.values()} == {120}
    assert all(free[k].tokens[: len(stopped[k].tokens)] == stopped[k].tokens for k in "abc")


def test_log_prob_is_that_of_the_target_not_of_the_shaped_law(target):
    for key, c in run(target, "top-k[k=2]", "abc").items():
        text = [*PROMPTS[key], *c.tokens]
        assert c.log_prob == pytest.approx(float(target.log_prob([text], given=len(PROMPTS[key]))), abs=1e-5)


def test_costs_count_calls_and_positions(target):
    c = run(target, "greedy", "b", limits=Limits(7, ignore_eos=True))["b"]
    assert (c.cost.target_calls, c.cost.target_positions) == (7, 6 + 6)


def test_greedy_equals_hf_generate_in_float64(target):
    for limits in (Limits(25), Limits(25, ignore_eos=True)):
        ours, theirs = run(target, "greedy", "abc", limits=limits), run(target, "hf-generate", "abc", limits=limits)
        assert {k: c.tokens for k, c in ours.items()} == {k: c.tokens for k, c in theirs.items()}
        assert {k: c.stop_reason for k, c in ours.items()} == {k: c.stop_reason for k, c in theirs.items()}


def test_hf_generate_samples_from_its_seed_and_leaves_the_global_one_alone(target):
    before = torch.random.get_rng_state()
    a = run(target, "hf-generate[sample=true,top_k=5]", "abc")
    assert a == run(target, "hf-generate[sample=true,top_k=5]", "abc")
    assert a != run(target, "hf-generate[sample=true,top_k=5]", "abc", seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    # the target still runs through our own attention
    assert run(target, "greedy", "a") == run(target, "greedy", "a")


def test_a_request_beyond_the_context_is_refused_with_the_numbers(target):
    with pytest.raises(ContextOverflowError, match="at most 128 tokens; the longest prompt has 6"):
        run(target, "greedy", "b", limits=Limits(200))
    with pytest.raises(ContextOverflowError, match="at most 128 tokens"):
        run(target, "hf-generate", "b", limits=Limits(200))
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        run(target, "greedy", "b", limits=Limits(0))


def test_streams_belong_to_keys_not_places():
    a, b = RowRandom(0, ["x", "y"]), RowRandom(0, ["y", "x"])
    assert torch.equal(a.uniforms(4)[0], b.uniforms(4)[1])
    assert not torch.equal(RowRandom(0, ["x"]).uniforms(4), RowRandom(1, ["x"]).uniforms(4))
    assert torch.equal(RowRandom(0, ["x"]).uniforms(9, 2)[:, :4], RowRandom(0, ["x"]).uniforms(4, 2))


def test_a_baseline_with_another_shape_draws_from_that_also_where_the_fused_draw_would_not_know_it(monkeypatch):
    """On a GPU the fused draw has the parameters, not `shape`; a subclass must not lose what it defines."""
    import torch

    from decodathlon.decoders.baselines import TopK
    from decodathlon.harness import law

    class First(TopK):
        def shape(self, logits):
            return law.one_hot(logits)

    class OnGPU(torch.Tensor):
        device = torch.device("cuda")

    logits = torch.zeros(1, 5).as_subclass(OnGPU)
    assert logits.device.type == "cuda"
    drawn = First(k=3).draw(logits, torch.full((1, 1), 0.9, dtype=torch.float64))
    assert int(drawn) == 0
