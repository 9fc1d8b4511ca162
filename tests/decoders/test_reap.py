"""Which experts matter: by hand on a mixture of two, and a model without those that no token was routed to."""

import json

import pytest
import tiny_models
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from decodathlon.decoders.jit_delta import reap
from decodathlon.decoders.jit_delta.reap import Saliency
from decodathlon.harness import models
from decodathlon.harness.commands.command import main
from decodathlon.harness.errors import SpecError, UnsupportedError

SILENT = [].append
TEXT, AT = torch.arange(2, 40)[None], torch.arange(38)


def load(folder):
    target = models.load(models.resolve(str(folder)), device="cpu", dtype="float32", say=SILENT)
    if hasattr(target.model, "set_experts_implementation"):
        target.model.set_experts_implementation("eager")
    return target


@pytest.fixture(params=["qwen3-moe", "mixtral"])
def mixture(request, tmp_path):
    """Four experts, two by token; expert 2 is never chosen, for its row of the router points away from everything."""
    folder = tiny_models.save_folder(tmp_path / "mixture")
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    config = tiny_models.CONFIGS[request.param]()
    config.vocab_size = 258
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("post_attention_layernorm.weight"):
            tensor[0] = 10.0
        if name.endswith("embed_tokens.weight"):
            tensor[:, 0] = 1.0
        if name.endswith(".gate.weight"):
            tensor[2, 0] = -50.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_saliency_is_the_mean_of_weight_times_norm(mixture):
    """Beside plain loops over tokens and experts, from what goes into each layer's experts."""
    target, seen = load(mixture), {}
    for name, module in target.model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(lambda m, given, name=name: seen.setdefault(name, (m, given)) and None)
    target.logits(TEXT, AT)
    seen_before = dict(seen)
    found = reap.saliency(target, TEXT)
    assert found.keys() == seen_before.keys()
    for name, (module, (x, chosen, weights)) in seen_before.items():
        sums, counts = [0.0] * 4, [0] * 4
        for t in range(len(x)):
            for k in range(chosen.shape[1]):
                j = int(chosen[t, k])
                gate, up = (module.gate_up_proj[j].double() @ x[t].double()).chunk(2)
                output = module.down_proj[j].double() @ (torch.nn.functional.silu(gate) * up)
                sums[j] += float(weights[t, k]) * output.norm().item()
                counts[j] += 1
        assert found[name].tokens.tolist() == counts
        expected = [s / c if c else 0.0 for s, c in zip(sums, counts, strict=True)]
        assert found[name].mean.tolist() == pytest.approx(expected, rel=1e-5)
        assert counts[2] == 0


def test_a_model_without_an_expert_that_was_never_chosen_is_the_same(mixture, tmp_path):
    whole, stay = load(mixture), {f"model.layers.{i}.mlp.experts": [0, 1, 3] for i in range(4)}
    reap.prune(mixture, tmp_path / "smaller", stay)
    smaller = load(tmp_path / "smaller")
    assert torch.allclose(smaller.logits(TEXT, AT), whole.logits(TEXT, AT), atol=1e-5)
    assert smaller.parameters < whole.parameters


def test_the_command_tells_who_matters_and_writes_the_model_of_the_others(mixture, tmp_path, capsys):
    out = tmp_path / "half"
    assert main(["experts", str(mixture), "--texts", "2", "--tokens", "24", "--prune", "0.5", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "least first" in told
    assert told.count(".experts ") == 4
    assert any(json.loads((out / "config.json").read_text()).get(n) == 2 for n in reap.COUNTS)
    assert load(out).logits(TEXT, AT).isfinite().all()


def test_those_that_matter_least_go():
    found = {"a.0.experts": Saliency(torch.tensor([8.0, 1.0, 0.0, 9.0]), torch.tensor([4, 1, 0, 3]))}
    assert found["a.0.experts"].mean.tolist() == [2.0, 1.0, 0.0, 3.0]
    assert reap.kept(found, 0.5) == {"a.0.experts": [0, 3]}
    assert reap.kept(found, 0.0) == {"a.0.experts": [0, 1, 2, 3]}
    many = {"a.0.experts": Saliency(torch.arange(100.0), torch.ones(100, dtype=torch.long))}
    assert reap.kept(many, 0.29)["a.0.experts"] == list(range(29, 100)), "0.29 of 100 are 29"


def test_what_cannot_be_pruned_is_told(mixture, tmp_path):
    with pytest.raises(UnsupportedError, match="experts"):
        reap.saliency(load(tiny_models.save_folder(tmp_path / "dense")), TEXT)
    stay = {f"model.layers.{i}.mlp.experts": [1] for i in range(4)}
    with pytest.raises(SpecError, match="1 experts would be left, and a token is routed to 2"):
        reap.prune(mixture, tmp_path / "one", stay)
    with pytest.raises(SpecError, match="would leave 1 of 4 experts, and a token is routed to 2"):
        reap.check_prunable(mixture, tmp_path / "new", 0.75)
    with pytest.raises(SpecError, match="is not an empty folder"):
        reap.prune(mixture, mixture, stay)
    assert main(["experts", str(mixture), "--prune", "0.5"]) != 0
    config = json.loads((mixture / "config.json").read_text())
    (mixture / "config.json").write_text(json.dumps(config | {"n_group": 2}))
    with pytest.raises(SpecError, match="routed to by groups"):
        reap.check_prunable(mixture, tmp_path / "new")
    (mixture / "config.json").write_text(json.dumps(config))
    tensors = load_file(mixture / "model.safetensors")
    renamed = {n.replace(".gate.weight", ".router.weight"): t for n, t in tensors.items()}
    save_file(renamed, mixture / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SpecError, match="keeps its experts or its routers otherwise"):
        reap.check_prunable(mixture, tmp_path / "new")
