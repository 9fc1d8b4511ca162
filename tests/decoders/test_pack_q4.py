"""A 4-bit file that is there already as the base of `int4-delta`: `pack --q4`."""

import importlib
from pathlib import Path

import gguf
import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from decodathlon.decoders.jit_delta import container, pack, schemes
from decodathlon.decoders.jit_delta.container import Reader
from decodathlon.harness import models
from decodathlon.harness.commands.command import main
from decodathlon.harness.errors import MissingError, SpecError

SCRIPTS = Path(__file__).parents[2] / "scripts"
LAYERS, HEADS, KEY_HEADS = 2, 4, 2
Q4, Q8 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0
#: As the file calls them: written down here, for the code under test asks gguf.
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(folder, its tensors): a random Llama whose matrices are large enough to be packed."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_models.save_folder(
        folder, hidden_size=128, intermediate_size=192, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS, head_dim=32, dtype="bfloat16",
    )  # fmt: skip
    tensors = load_file(folder / "model.safetensors")
    assert all(t.dtype == torch.bfloat16 for t in tensors.values())
    return folder, tensors


def as_llama_cpp_has_it(name, weight):
    """Rows of queries and keys in pairs of a rotation, which transformers undoes when it reads such files."""
    heads = HEADS if "q_proj" in name else KEY_HEADS if "k_proj" in name else 0
    if not heads:
        return weight
    return weight.view(heads, 2, len(weight) // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def write(path, tensors, kind=Q4, embedding=Q8):
    """A GGUF file of the model. Returns what its matrices say, by the name of the model, in bfloat16."""
    writer, says = gguf.GGUFWriter(path, "llama"), {}
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    for layer in range(LAYERS):
        for ours, theirs in NAMES.items():
            name = f"model.layers.{layer}.{ours}.weight"
            there = as_llama_cpp_has_it(name, tensors[name].float()).contiguous()
            data = gguf.quants.quantize(there.numpy(), kind)
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", data, raw_dtype=kind)
            own = gguf.quants.quantize(
                tensors[name].float().numpy(), kind
            )  # groups lie along rows, so order is no matter
            says[name] = torch.from_numpy(gguf.quants.dequantize(own, kind)).to(torch.bfloat16)
    data = gguf.quants.quantize(tensors["model.embed_tokens.weight"].float().numpy(), embedding)
    writer.add_tensor("token_embd.weight", data, raw_dtype=embedding)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return says


def test_the_base_is_what_the_file_says_and_the_rest_brings_the_weights_back(model, tmp_path):
    folder, tensors = model
    says = write(tmp_path / "q4.gguf", tensors)
    told = []
    pack.pack(folder, tmp_path / "packed", "int4-delta", told.append, q4=tmp_path / "q4.gguf")
    line = next(text for text in told if "stand on" in text)
    assert line.startswith("14 of 16 matrices stand on the numbers of q4.gguf, which lacks ")
    assert "1 have their own (Q8_0 in the file)" in line
    assert "1 have their own (not in the file" in line  # the head
    assert pack.verify(tmp_path / "packed", told.append) == len(tensors)
    reader = Reader(tmp_path / "packed")
    for name, expected in says.items():
        found = torch.empty_like(expected)
        schemes.decode(reader.read(name), found.view(-1).view(torch.uint8), 4)
        assert torch.equal(found, expected), name


def test_it_runs_as_the_file_does_and_as_the_model(model, tmp_path):
    folder, tensors = model
    says = write(tmp_path / "q4.gguf", tensors)
    assert (
        main(["pack", str(folder), str(tmp_path / "p"), "--scheme", "int4-delta", "--q4", str(tmp_path / "q4.gguf")])
        == 0
    )
    text, at = torch.tensor([[5, 7, 11, 13]]), torch.arange(4)
    plain = models.load(models.resolve(str(folder)), device="cpu", dtype="bfloat16", say=print)
    exact = models.load(models.resolve(str(tmp_path / "p")), device="cpu", dtype="bfloat16", say=print)
    assert torch.equal(exact.logits(text, at), plain.logits(text, at))
    assert any("on q4.gguf" in note for note in exact.notes)
    rough = models.load(models.resolve(f"{tmp_path / 'p'}[weights=base]"), device="cpu", dtype="bfloat16", say=print)
    state = plain.model.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):  # these have a base of their own
        says[name] = torch.empty_like(state[name])
        schemes.decode(Reader(tmp_path / "p").read(name), says[name].view(-1).view(torch.uint8), 4)
    with torch.no_grad():
        for name, value in says.items():
            state[name].copy_(value)
    assert torch.equal(rough.logits(text, at), plain.logits(text, at))
    assert not torch.equal(rough.logits(text, at), exact.logits(text, at))


def test_a_run_that_was_interrupted_counts_all(model, tmp_path, monkeypatch):
    """What an earlier run has packed stands on the file, too."""
    folder, tensors = model
    write(tmp_path / "q4.gguf", tensors)
    add, count = container.Writer.add, [0]

    def stumble(self, *given):
        count[0] += 1
        if count[0] == 8:
            raise KeyboardInterrupt
        return add(self, *given)

    monkeypatch.setattr(container.Writer, "add", stumble)
    with pytest.raises(KeyboardInterrupt):
        pack.pack(folder, tmp_path / "packed", "int4-delta", print, q4=tmp_path / "q4.gguf")
    told = []
    pack.pack(folder, tmp_path / "packed", "int4-delta", told.append, q4=tmp_path / "q4.gguf")
    (line,) = (text for text in told if "stand on" in text)
    assert line.startswith("14 of 16 matrices")
    assert "1 have their own (Q8_0 in the file)" in line


def test_parts_and_a_last_block_that_is_not_whole(tmp_path, monkeypatch):
    """Queries (82,944 numbers, their rows turned) are asked for in two parts; embeddings end within a block."""
    monkeypatch.setattr(schemes, "PART", 1 << 16)
    tiny_models.save_folder(
        tmp_path / "m", hidden_size=288, intermediate_size=320, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS, head_dim=72, dtype="bfloat16",
    )  # fmt: skip
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    says = write(tmp_path / "q4.gguf", tensors, embedding=Q4)
    pack.pack(tmp_path / "m", tmp_path / "packed", "int4-delta", print, q4=tmp_path / "q4.gguf")
    assert pack.verify(tmp_path / "packed", print) == len(tensors)
    name = "model.embed_tokens.weight"
    assert tensors[name].numel() % 256
    own = gguf.quants.quantize(tensors[name].float().numpy(), Q4)
    says[name] = torch.from_numpy(gguf.quants.dequantize(own, Q4)).to(torch.bfloat16)
    for name, expected in says.items():
        found = torch.empty_like(expected)
        schemes.decode(Reader(tmp_path / "packed").read(name), found.view(-1).view(torch.uint8), 4)
        assert torch.equal(found, expected), name


def test_a_file_of_another_model_is_no_base(model, tmp_path):
    folder, tensors = model
    write(tmp_path / "right.gguf", tensors)
    turned = {name: t[torch.randperm(len(t))] if t.dim() == 2 else t for name, t in tensors.items()}
    wide = {name: torch.cat([t, t], 1) if "layers" in name and t.dim() == 2 else t for name, t in tensors.items()}
    for name, other in (("turned", turned), ("wide", wide)):
        write(tmp_path / f"{name}.gguf", other)
        with pytest.raises(SpecError, match=rf"{name}\.gguf is of another model: 14 matrices .* 0 are near"):
            pack.pack(folder, tmp_path / "packed", "int4-delta", print, q4=tmp_path / f"{name}.gguf")
    pack.pack(folder, tmp_path / "packed", "int4-delta", print, q4=tmp_path / "right.gguf")


def test_a_matrix_that_is_not_the_models_has_a_base_of_its_own(model, tmp_path):
    folder, tensors = model
    name = "model.layers.1.mlp.up_proj.weight"
    write(tmp_path / "q4.gguf", tensors | {name: -tensors[name]})
    told = []
    pack.pack(folder, tmp_path / "packed", "int4-delta", told.append, q4=tmp_path / "q4.gguf")
    assert any("13 of 16 matrices" in text and "1 have their own (other than the model's" in text for text in told)
    assert pack.verify(tmp_path / "packed", print) == len(tensors)


def test_what_can_be_no_base_is_told(model, tmp_path):
    folder, tensors = model
    write(tmp_path / "q8.gguf", tensors, Q8)
    (tmp_path / "torn.gguf").write_bytes((tmp_path / "q8.gguf").read_bytes()[:40])
    for name, scheme, error, said in (
        ("q8.gguf", "int4-delta", SpecError, r"nothing in Q4_0.*15 x Q8_0"),
        ("q8.gguf", "nested", SpecError, "pack with --scheme int4-delta"),
        ("torn.gguf", "int4-delta", MissingError, "no GGUF file"),
        ("nowhere.gguf", "int4-delta", MissingError, r"nowhere\.gguf cannot be read"),
    ):
        with pytest.raises(error, match=said):
            pack.pack(folder, tmp_path / "packed", scheme, print, q4=tmp_path / name)
        assert not (tmp_path / "packed").exists(), "nothing is written before it is known that it can be"


def test_the_script_writes_such_a_file(model, tmp_path, monkeypatch):
    """scripts/as_q4.py: sizes out of another file, numbers of the model; the same bytes as those written by hand."""
    folder, tensors = model
    nothing = {name: torch.zeros_like(t) for name, t in tensors.items()}
    write(tmp_path / "like.gguf", nothing)
    write(tmp_path / "by-hand.gguf", tensors)
    monkeypatch.syspath_prepend(SCRIPTS)
    as_q4 = importlib.import_module("as_q4")
    monkeypatch.setattr("sys.argv", ["as_q4", str(folder), str(tmp_path / "like.gguf"), str(tmp_path / "out.gguf")])
    as_q4.main()
    made, by_hand = (gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in ("out", "by-hand"))
    assert [t.name for t in made.tensors] == [t.name for t in by_hand.tensors]
    for ours, theirs in zip(made.tensors, by_hand.tensors, strict=True):
        assert ours.tensor_type == theirs.tensor_type
        assert (ours.data == theirs.data).all(), ours.name


def test_what_a_fine_tune_takes(model, monkeypatch):
    """scripts/persona_sizes.py: nothing where nothing was learnt, and what changed comes back."""
    monkeypatch.syspath_prepend(SCRIPTS)
    script = importlib.import_module("persona_sizes")
    own = AutoModelForCausalLM.from_pretrained(model[0], dtype=torch.float32)
    tokens = torch.randint(2, 250, (400,), generator=torch.Generator().manual_seed(0))
    before = script.loss(own, tokens)
    states = list(script.trained(own, tokens, 1e-3, 3))
    assert len(states) == 4
    assert script.differing(states[0], states[0]) == 0
    assert 1 < script.differing(states[3], states[2]) < 16
    assert script.loss(own, tokens) < before
