"""Chunks of an MLP that are read exactly: which they are, what they cost, and both ends: none and all."""

import pytest
import tiny_models
import torch
import transformers as hf

from decodathlon.decoders.jit_delta import contextual, pack
from decodathlon.decoders.jit_delta.contextual import Chunks, Mixed, Parts
from decodathlon.harness import decoder as decoders
from decodathlon.harness import models
from decodathlon.harness.decoder import Limits
from decodathlon.harness.errors import SpecError, UnsupportedError
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.registry import load_builtins

SILENT = [].append
TEXT, AT = torch.arange(2, 40)[None], torch.arange(38)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama whose MLPs have 200 channels: six chunks of 32 and a short one; and the same, packed."""
    load_builtins()
    place = tmp_path_factory.mktemp("contextual")
    made = tiny_models.save_folder(place / "model", hidden_size=128, intermediate_size=200, head_dim=32)
    model = hf.AutoModelForCausalLM.from_pretrained(made, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(4.0 if "mlp" in name else 1.0)  # MLPs that matter
    model.save_pretrained(made)
    pack.pack(made, place / "packed", "nested", SILENT)
    return made


def load(folder, options="", dtype="float32"):
    return models.load(models.resolve(f"{folder}{options}"), device="cpu", dtype=dtype, say=SILENT)


def packed(folder, options="", dtype="float32"):
    return load(folder.with_name("packed"), options, dtype)


def test_a_chunk_is_chosen_by_activation_times_sensitivity():
    """By hand: four channels in two chunks, one exact. A large activation that hardly matters loses."""
    w = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    exact = Parts(lambda x: torch.cat([10 * x, torch.ones_like(x)], -1), lambda h: h @ w.T)
    draft = Parts(lambda x: torch.cat([9 * x, torch.ones_like(x)], -1), lambda h: h @ (2 * w).T)
    chunks = Chunks(torch.tensor([[0, 2], [1, 3]]), torch.tensor([0.01, 1.0, 0.01, 1.0]))
    mlp = Mixed(exact, draft, chunks, share=0.5)
    x = torch.tensor([[5.0, 1.0, 5.0, 1.0]])
    silu = torch.nn.functional.silu
    gate, up = mlp.gate_up(x).chunk(2, -1)
    assert torch.equal(gate, torch.tensor([[45.0, 10.0, 45.0, 10.0]]))
    hidden = silu(gate) * up
    expected = 2 * (hidden[0, 0] + 3 * hidden[0, 2]) + 2 * hidden[0, 1] + 4 * hidden[0, 3]
    assert mlp.down(hidden).item() == pytest.approx(expected.item())
    assert (mlp.read, mlp.there) == (1, 2)
    mlp.gate_up(torch.tensor([[5.0, 1.0, 5.0, 1.0], [500.0, 0.1, 500.0, 0.1]]))
    assert (mlp.read, mlp.there) == (3, 4), "two tokens that want different chunks want both"


def test_sensitivity_is_the_error_by_unit_of_the_activation():
    """By hand, of two tokens and one channel: a drafted activation b for a, a column w drafted as v."""
    a, b = torch.tensor([[2.0], [1.0]]), torch.tensor([[1.0], [3.0]])
    w, v = torch.tensor([[3.0], [4.0]]), torch.tensor([[3.0], [3.0]])

    class Fixed(Parts):
        def activations(self, x):
            return self.gate_up

    found = contextual._chunks(torch.zeros(2, 1), Fixed(a, None), Fixed(b, None), w, v)
    errors = [(2 * w - 1 * v).norm().item(), (1 * w - 3 * v).norm().item()]
    assert found.sensitivity.item() == pytest.approx(sum(errors) / 2 / 2.0)


def test_channels_that_are_active_together_share_a_chunk():
    """Planted: four kinds of tokens, each of which makes its own 32 channels active, whose numbers are shuffled."""
    source = torch.Generator().manual_seed(0)
    kind = torch.randint(0, 4, (200,), generator=source)
    owner = torch.arange(128).remainder(4)[torch.randperm(128, generator=source)]
    scores = (kind[:, None] == owner).float() + 0.05 * torch.rand(200, 128, generator=source)
    found = contextual.together(scores * torch.rand(128, generator=source), 32)
    assert sorted(found.flatten().tolist()) == list(range(128))
    assert all(len(set(owner[chunk].tolist())) == 1 for chunk in found)


@pytest.mark.parametrize("count", [32, 33, 200, 1])
def test_every_channel_is_in_a_chunk(count):
    found = contextual.together(torch.rand(20, count, generator=torch.Generator().manual_seed(1)), 32)
    assert found.shape == (-(-count // 32), 32)
    assert set(found.flatten().tolist()) == set(range(count))


def test_all_chunks_are_the_exact_model_and_more_are_nearer(folder):
    truth = load(folder).logits(TEXT, AT)
    assert torch.equal(packed(folder, "[weights=contextual,share=1]").logits(TEXT, AT), truth)
    errors = []
    for share in (0.01, 0.3, 0.6, 0.9):
        target = packed(folder, f"[weights=contextual,share={share}]")
        errors.append((target.logits(TEXT, AT) - truth).pow(2).mean().item())
        assert any("not that of the exact model" in note for note in target.notes)
        one = target.logits(TEXT[:, :1], AT[:1])
        assert one.shape[1] == 1
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


def test_chosen_chunks_are_better_than_others(folder):
    truth, errors = load(folder).logits(TEXT, AT), {}
    for who in ("chosen", "others"):
        target = packed(folder, "[weights=contextual,share=0.3]")
        if who == "others":
            for mlp in target.mixed:
                mlp.chunks.sensitivity = 1 / mlp.chunks.sensitivity.clamp(min=1e-9) ** 3
        errors[who] = (target.logits(TEXT, AT) - truth).pow(2).mean().item()
    assert errors["chosen"] < errors["others"]


def test_it_is_another_model_and_gives_no_gradient_of_the_exact_one(folder):
    target = packed(folder, "[weights=contextual,share=0.3]")
    assert not target.capabilities & {"gradient", "hf-model"}
    with pytest.raises(UnsupportedError):
        decoders.build("hf-generate").generate(target, [[3]], Limits(2), RowRandom(0, [0]))


@pytest.mark.parametrize("where", ["packed", "plain"])
def test_as_a_drafter_it_changes_no_text(folder, where):
    target = packed(folder) if where == "packed" else load(folder)
    prompts, random = [[3, 4, 5], [6, 7]], RowRandom(0, range(2))
    greedy = decoders.build("greedy").generate(target, prompts, Limits(20, ignore_eos=True), random)
    calls = {}
    for share in (0, 0.5, 1):
        drafting = decoders.build(f"self-delta[k=3,bits=4,share={share}]")
        found = drafting.generate(target, prompts, Limits(20, ignore_eos=True), random)
        assert [c.tokens for c in found] == [c.tokens for c in greedy]
        calls[share] = sum(c.cost.target_calls for c in found)
    assert calls[1] <= calls[0]


@pytest.mark.parametrize("options", ["weights=contextual", "share=0.5", "weights=contextual,share=2"])
def test_a_share_is_of_contextual_weights(folder, options):
    with pytest.raises(SpecError, match="share="):
        packed(folder, f"[{options}]")
