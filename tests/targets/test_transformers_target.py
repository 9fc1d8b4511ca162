"""Whatever way a context is built, its logits are those of the plain forward over the same text (float64)."""

import pytest
import tiny_models
import torch

from decodathlon.harness.errors import ContextOverflowError, UnsupportedError
from decodathlon.harness.targets import attention
from decodathlon.harness.targets.lean import FAMILY
from decodathlon.harness.targets.transformers import TransformersTarget

CLOSE = 1e-9
KINDS = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "mixtral", "qwen3-moe", "gpt2", "gpt-oss"]
TREE_PARENTS = [-1, 0, 0, 1, 1]  # at most the smallest window of nodes


FORWARDS = [(kind, False) for kind in KINDS] + [(kind, True) for kind in sorted(FAMILY)]


@pytest.fixture(scope="module", params=FORWARDS, ids=lambda p: f"{p[0]}-{'lean' if p[1] else 'hf'}")
def pair(request):
    kind, lean = request.param
    target = TransformersTarget(tiny_models.build(kind), name=kind, lean=lean)
    assert (target._lean is not None) == lean
    reference = tiny_models.build(kind)

    def truth(tokens):
        with torch.no_grad():
            return reference(torch.tensor([tokens]), use_cache=False).logits[0]

    return target, truth


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, tiny_models.VOCABULARY, (24,), generator=torch.Generator().manual_seed(1)).tolist()


def fresh(shape, seed=2):
    return torch.randint(3, tiny_models.VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def close(a, b):
    return (a - b).abs().max().item() < CLOSE


def ancestors(parents):
    mask = torch.eye(len(parents), dtype=torch.bool)
    for i, p in enumerate(parents):
        if p >= 0:
            mask[i] |= mask[p]
    return mask


def test_prefill_equals_the_native_forward_past_its_window(pair, ids):
    target, truth = pair
    assert close(target.open([ids]).next_logits[0], truth(ids)[-1])


def test_extend_by_many_equals_single_steps(pair, ids):
    target, truth = pair
    together = target.open([ids[:9]]).extend(torch.tensor([ids[9:16]])).logits[0]
    context = target.open([ids[:9]])
    for i, token in enumerate(ids[9:16]):
        step = context.extend(torch.tensor([[token]])).logits[0, 0]
        context.keep(1)
        assert close(step, together[i])
        assert close(context.next_logits[0], together[i])
    assert close(together, truth(ids[:16])[9:])


def test_keep_then_extend_equals_a_fresh_prefill(pair, ids):
    target, truth = pair
    context = target.open([ids[:9]])
    context.extend(fresh((1, 7)))
    context.extend(torch.tensor([ids[9:16]]))  # overwrites what was not kept
    context.keep(3)
    assert close(context.next_logits[0], truth(ids[:12])[-1])
    assert close(context.extend(torch.tensor([ids[12:15]])).logits[0], truth(ids[:15])[12:])


def test_a_row_equals_the_same_row_alone_when_rows_differ_in_length(pair, ids):
    target, truth = pair
    prompts = [ids[:3], ids[:11], ids[5:12]]
    context = target.open(prompts)
    tokens = fresh((3, 4))
    step = context.extend(tokens).logits
    for b, prompt in enumerate(prompts):
        assert close(context.next_logits[b], truth(prompt)[-1])
        assert close(step[b], truth(prompt + tokens[b].tolist())[-4:])
    counts = [1, 4, 0]
    context.keep(counts)
    assert context.lengths.tolist() == [4, 15, 7]
    more = fresh((3, 2), seed=3)
    step = context.extend(more).logits
    for b, prompt in enumerate(prompts):
        kept = prompt + tokens[b, : counts[b]].tolist()
        assert close(context.next_logits[b], truth(kept)[-1])
        assert close(step[b], truth(kept + more[b].tolist())[-2:])


def test_select_equals_a_batch_built_that_way(pair, ids):
    target, truth = pair
    prompts = [ids[:3], ids[:11], ids[5:12]]
    context = target.open(prompts)
    rows = [2, 2, 0, 1]
    context.select(rows)
    tokens = fresh((4, 3))
    step = context.extend(tokens).logits
    for j, b in enumerate(rows):
        assert close(context.next_logits[j], truth(prompts[b])[-1])
        assert close(step[j], truth(prompts[b] + tokens[j].tolist())[-3:])
    context.select([3])
    assert context.rows == 1
    assert close(context.extend(tokens[:1]).logits[0], truth(prompts[1] + tokens[0].tolist())[-3:])


def test_each_tree_path_equals_that_path_alone(pair, ids):
    target, truth = pair
    prompts = [ids[:8], ids[2:15]]
    mask = ancestors(TREE_PARENTS)
    context = target.open(prompts)
    tokens = fresh((2, len(TREE_PARENTS)))
    step = context.extend(tokens, tree=mask).logits
    for b, prompt in enumerate(prompts):
        for node in range(len(TREE_PARENTS)):
            path = mask[node].nonzero()[:, 0]
            assert close(step[b, node], truth(prompt + tokens[b, path].tolist())[-1])
    path = torch.tensor([[0, 2, 2], [0, 1, 4]])
    counts = [2, 3]
    context.keep(counts, path=path)
    more = fresh((2, 2), seed=3)
    kept = [prompts[b] + tokens[b, path[b, : counts[b]]].tolist() for b in range(2)]
    for b in range(2):
        assert close(context.next_logits[b], truth(kept[b])[-1])
    step = context.extend(more).logits
    for b in range(2):
        assert close(step[b], truth(kept[b] + more[b].tolist())[-2:])


def test_log_prob_and_logits_at_agree_with_the_plain_forward(pair, ids):
    target, truth = pair
    sequences = [ids[:9], ids[3:8]]
    expected = [truth(s).log_softmax(-1)[torch.arange(1, len(s) - 1), s[2:]].sum() for s in sequences]
    assert close(target.log_prob(sequences, given=2), torch.stack(expected))
    whole = target.logits(torch.tensor([ids[:12], ids[12:]]), torch.tensor([0, 5, 11]))
    assert close(whole[0], truth(ids[:12])[[0, 5, 11]])
    assert close(whole[1], truth(ids[12:])[[0, 5, 11]])
    assert close(
        whole, super(TransformersTarget, target).logits(torch.tensor([ids[:12], ids[12:]]), torch.tensor([0, 5, 11]))
    )
    some = target.open([ids[:4]]).extend(torch.tensor([ids[4:12]]), logits_at=torch.tensor([2, 7])).logits[0]
    assert close(some, truth(ids[:12])[[6, 11]])


def test_hidden_states_are_the_residual_stream(pair, ids):
    target, _ = pair
    step = target.open([ids[:5]]).extend(torch.tensor([ids[5:9]]), hidden=(0, 2, 4))
    reference = tiny_models.build(target.name)
    with torch.no_grad():
        states = reference(torch.tensor([ids[:9]]), use_cache=False, output_hidden_states=True).hidden_states
    assert close(step.hidden[0][0], states[0][0, 5:])
    assert close(step.hidden[2][0], states[2][0, 5:])
    assert step.hidden[4].shape == (1, 4, 32)
    # one beyond the last block is what transformers calls the last hidden state; prompts have theirs on demand
    opened = target.open([ids[:9]], hidden=(2, 5)).prompt_hidden
    assert close(opened[5][0], states[4][0])
    assert close(opened[2][0], states[2][0])


def test_embedding_gradient_equals_finite_differences_and_the_native_gradient(pair, ids):
    target, _ = pair
    sequence = torch.tensor([ids[:8], ids[8:16]])
    scores, gradient = target.embedding_gradient(sequence, given=2)
    assert close(scores, target.log_prob(sequence.tolist(), given=2))
    reference = tiny_models.build(target.name)
    inputs = reference.get_input_embeddings()(sequence).detach().requires_grad_(True)
    law = reference(inputs_embeds=inputs, use_cache=False).logits[:, 1:-1].log_softmax(-1)
    law.gather(-1, sequence[:, 2:, None]).sum().backward()
    assert close(gradient, inputs.grad)
    assert target.embeddings.shape == (tiny_models.VOCABULARY, 32)


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama():
    return TransformersTarget(tiny_models.build("llama"), name="tiny")


def test_context_overflow_is_refused_with_the_numbers(llama):
    context = llama.open([[3, 4, 5]], capacity=6)
    with pytest.raises(ContextOverflowError, match="3 tokens cannot take 4 more: this context was opened for 6"):
        context.extend(fresh((1, 4)))
    with pytest.raises(ContextOverflowError, match="at most 128 tokens; the longest prompt has 130"):
        llama.open([[3] * 130], capacity=140)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([], "no prompts"), ([[]], "no tokens; give it at least a BOS"), ([[3, 61]], "outside the vocabulary of 61")],
)
def test_bad_prompts_are_named(llama, prompts, message):
    with pytest.raises(ValueError, match=message):
        llama.open(prompts)


def test_bad_keep_and_tree_are_refused(llama):
    context = llama.open([[3, 4, 5]])
    context.extend(fresh((1, 2)))
    with pytest.raises(ValueError, match="0 to 2 tokens per row"):
        context.keep(3)
    with pytest.raises(ValueError, match="parents before their children"):
        context.extend(fresh((1, 2)), tree=torch.tensor([[True, True], [False, True]]))


def test_a_path_must_lead_from_the_root_and_rows_are_numbers(llama):
    context = llama.open([[3, 4, 5]])
    context.extend(fresh((1, 5)), tree=ancestors(TREE_PARENTS))
    for wrong in ([0, 2, 3], [1], [0, 0]):
        with pytest.raises(ValueError, match="is not a path from the root"):
            context.keep([len(wrong)], path=torch.tensor([wrong]))
    with pytest.raises(ValueError, match="row numbers, not a mask"):
        context.select(torch.tensor([True]))


def test_trees_longer_than_the_window_are_refused_by_name():
    target = TransformersTarget(tiny_models.build("mistral"), name="tiny-mistral")
    with pytest.raises(UnsupportedError, match="tiny-mistral has a window of 5 tokens, the tree has 6 nodes"):
        target.open([[3, 4]]).extend(fresh((1, 6)), tree=ancestors([-1, 0, 0, 1, 1, 2]))


def test_models_whose_layers_cannot_be_rolled_back_are_refused_by_name():
    import transformers as hf

    config = hf.Qwen3NextConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, linear_num_value_heads=4, linear_num_key_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8,
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="linear_attention layers"):
        TransformersTarget(hf.AutoModelForCausalLM.from_config(config), name="qwen3-next")


# -- the probe catches seeded bugs ---------------------------------------------------------------------------------


def test_the_probe_refuses_a_forward_that_forgets_the_window(monkeypatch):
    honest = attention.attend
    monkeypatch.setattr(attention, "attend", lambda *a, window=None, **k: honest(*a, window=None, **k))
    with pytest.raises(UnsupportedError, match="off by"):
        TransformersTarget(tiny_models.build("gemma3"), name="windowless")


def test_the_probe_leaves_a_wrong_lean_forward_aside(monkeypatch):
    from decodathlon.harness.targets import lean

    monkeypatch.setattr(lean, "rotate", lambda x, cos, sin: x * cos - x * sin)
    target = TransformersTarget(tiny_models.build("llama"), name="tiny")
    assert target._lean is None
    assert "lean forward left aside" in target.notes[0]


def test_real_windows_are_back_after_the_probe():
    target = TransformersTarget(tiny_models.build("mistral"), name="tiny")
    assert target.smallest_window == tiny_models.WINDOW
    assert set(target._lean.windows) == {tiny_models.WINDOW}
