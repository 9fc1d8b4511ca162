"""A model as what it differs in from another: bit for bit, small where they are near, and refused with another base."""

import shutil

import pytest
import tiny_models
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from decodathlon.decoders.jit_delta import against, pack
from decodathlon.harness import models
from decodathlon.harness.commands.command import main
from decodathlon.harness.errors import MissingError, UnsupportedError
from decodathlon.harness.registry import load_builtins

SILENT = [].append
TYPES = {
    "BF16": (torch.bfloat16, torch.int16),
    "F16": (torch.float16, torch.int16),
    "F32": (torch.float32, torch.int32),
}
TEXT, AT = torch.arange(2, 40)[None], torch.arange(38)


@pytest.fixture(scope="module", autouse=True)
def loaders():
    load_builtins()


def patterns(kind, count=3000, seed=0):
    """Of every kind: NaN, infinities, both zeros."""
    source, info = torch.Generator().manual_seed(seed), torch.iinfo(kind)
    found = torch.randint(info.min, info.max, (count,), generator=source, dtype=kind)
    found[:4] = torch.tensor([info.min, info.max, 0, -1], dtype=kind)
    return found


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("way", ["xor", "ordinal"])
def test_both_ways_of_comparing_lead_back(dtype, way):
    kind = TYPES[dtype][1]
    own, base = patterns(kind), patterns(kind, seed=1).flip(0)
    found = against._compare(own, base, way)
    assert torch.equal(against.changed(base, found, way), own)
    assert torch.equal(against.undone(own, found, way), base)


@pytest.mark.parametrize("dtype", TYPES)
def test_an_ordinal_counts_the_numbers_between(dtype):
    number, kind = TYPES[dtype]
    values = torch.tensor([1.0, -1.0, 0.0]).to(number)
    above = torch.nextafter(values.double().to(number), torch.full_like(values, 9.0)) if dtype == "F32" else None
    ordinals = against._ordinal(values.view(kind))
    assert ordinals[1] < ordinals[2] < ordinals[0]
    if above is not None:
        assert (against._ordinal(above.view(kind)) - ordinals).tolist() == [1, 1, 1]
    assert torch.equal(against._ordinal(against._ordinal(patterns(kind))), patterns(kind))


@pytest.mark.parametrize("dtype", TYPES)
def test_a_difference_brings_a_tensor_back(dtype, monkeypatch):
    monkeypatch.setattr(against, "PART", 700)
    number, kind = TYPES[dtype]
    near = (torch.randn(3000) * 0.02).to(number)
    for own, base in (
        (patterns(kind), patterns(kind, seed=1)),
        ((near.float() * 1.001).to(number).view(kind), near.view(kind)),
        (near.view(kind), near.view(kind)),
    ):
        seen = []
        found = against.difference(own.view(torch.uint8), base.view(torch.uint8), dtype, seen.append)
        assert torch.equal(torch.cat(seen), own.view(torch.uint8))
        out = torch.zeros_like(own)
        against.applied(found, base.view(torch.uint8), out.view(torch.uint8), "a tensor")
        assert torch.equal(out, own)
    assert not found.planes, "equal tensors take nothing"
    with pytest.raises(MissingError, match="a tensor: the base is not the one"):
        against.applied(found, (base + 1).view(torch.uint8), out.view(torch.uint8), "a tensor")


@pytest.fixture
def family(tmp_path):
    """A model, and two that were tuned from it; the second has one matrix of another size."""
    base = tiny_models.save_folder(tmp_path / "base", hidden_size=128, intermediate_size=192, head_dim=32)
    hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    tensors, made = load_file(base / "model.safetensors"), {"base": base}
    for seed, name in enumerate(("poet", "clerk")):
        source = torch.Generator().manual_seed(seed)
        tuned = {
            n: (t.float() + 2e-4 * torch.randn(t.shape, generator=source) * ("embed" not in n)).to(t.dtype)
            for n, t in tensors.items()
        }
        made[name] = shutil.copytree(base, tmp_path / name)
        save_file(tuned, made[name] / "model.safetensors", metadata={"format": "pt"})
        pack.pack(made[name], tmp_path / f"{name}-packed", "nested", SILENT, base)
        made[f"{name}-packed"] = tmp_path / f"{name}-packed"
    return made


def load(folder, dtype="bfloat16", options=""):
    return models.load(models.resolve(f"{folder}{options}"), device="cpu", dtype=dtype, say=SILENT)


def test_a_tuned_model_comes_back_and_takes_less(family, tmp_path, capsys):
    out = family["poet-packed"]
    assert main(["verify", str(out)]) == 0
    assert main(["unpack", str(out), str(tmp_path / "back")]) == 0
    whole = (family["poet"] / "model.safetensors").read_bytes()
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == whole
    records = pack.Reader(out).records
    assert records["model.embed_tokens.weight"].disk == 0, "what was not trained"
    assert 8 * sum(r.disk for r in records.values()) / sum(r.count for r in records.values()) < 7
    assert main(["inspect", str(out)]) == 0
    assert f"against {family['base']}" in capsys.readouterr().out


def test_the_command_packs_against_a_folder_that_may_be_packed_itself(family, tmp_path):
    pack.pack(family["base"], tmp_path / "base-packed", "nested", SILENT)
    again = tmp_path / "again"
    assert main(["pack", str(family["poet"]), str(again), "--against", str(tmp_path / "base-packed")]) == 0
    assert main(["verify", str(again)]) == 0
    ours, theirs = (pack.Reader(folder).records for folder in (again, family["poet-packed"]))
    assert {n: r.sha256 for n, r in ours.items()} == {n: r.sha256 for n, r in theirs.items()}


def test_it_runs_as_the_model_that_it_is(family):
    for dtype in ("bfloat16", "float32"):
        truth = load(family["poet"], dtype).logits(TEXT, AT)
        assert torch.equal(load(family["poet-packed"], dtype).logits(TEXT, AT), truth)
        assert not torch.equal(load(family["base"], dtype).logits(TEXT, AT), truth)


def test_one_model_becomes_the_others_without_being_loaded_again(family, monkeypatch):
    truth = {name: load(family[name]).logits(TEXT, AT) for name in ("base", "poet", "clerk")}
    target = load(family["poet-packed"])
    monkeypatch.setattr(hf.LlamaForCausalLM, "from_pretrained", None)
    assert torch.equal(target.logits(TEXT, AT), truth["poet"])
    for name in ("clerk", "base", "poet", "poet", "base"):
        target.become(None if name == "base" else family[f"{name}-packed"])
        assert torch.equal(target.logits(TEXT, AT), truth[name]), name


def test_another_base_is_refused_and_nothing_has_changed(family, tmp_path):
    other = shutil.copytree(family["base"], tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 3] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MissingError, match=r"model\.layers\.2\.mlp\.up_proj\.weight .*the base is not the one"):
        load(family["poet-packed"], options=f"[base={other}]")
    pack.pack(family["clerk"], tmp_path / "foreign", "nested", SILENT, other)
    target = load(family["poet-packed"])
    before = target.logits(TEXT, AT)
    with pytest.raises(MissingError, match="against another model than this"):
        target.become(tmp_path / "foreign")
    assert torch.equal(target.logits(TEXT, AT), before)


def test_a_base_that_moved_is_named(family, tmp_path, capsys):
    moved = family["base"].rename(tmp_path / "elsewhere")
    assert main(["verify", str(family["poet-packed"])]) != 0
    assert "which is not in" in capsys.readouterr().err
    for asked in (f"{family['poet-packed']}", f"{family['poet-packed']}[base={tmp_path / 'nowhere'}]"):
        with pytest.raises(MissingError, match="packed against another model, which is not in"):  # before a run begins
            models.check(models.resolve(asked), "cpu")
    assert main(["verify", str(family["poet-packed"]), "--base", str(moved)]) == 0
    assert load(family["poet-packed"], options=f"[base={moved}]").name == "poet-packed"


def test_weights_of_another_type_do_not_change_in_place(family):
    target = load(family["poet-packed"], "float32")
    with pytest.raises(UnsupportedError, match="BF16"):
        target.become(family["clerk-packed"])


def test_a_head_that_is_stored_twice_changes_once(tmp_path):
    base = tiny_models.save_folder(
        tmp_path / "base", hidden_size=128, intermediate_size=192, head_dim=32, tie_word_embeddings=True
    )
    hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    tuned = shutil.copytree(base, tmp_path / "tuned")
    save_file(
        {n: (t.float() * 1.01).to(t.dtype) for n, t in tensors.items()}, tuned / "model.safetensors",
        metadata={"format": "pt"},
    )  # fmt: skip
    pack.pack(tuned, tmp_path / "packed", "nested", SILENT, base)
    target = load(tmp_path / "packed")
    assert torch.equal(target.logits(TEXT, AT), load(tuned).logits(TEXT, AT))
    target.become(None)
    assert torch.equal(target.logits(TEXT, AT), load(base).logits(TEXT, AT))


def test_a_damaged_sibling_changes_nothing(family):
    target = load(family["poet-packed"])
    before = target.logits(TEXT, AT)
    reader = pack.Reader(family["clerk-packed"])
    record = reader.records["model.layers.3.mlp.down_proj.weight"]
    told = record.planes["byte0"]
    file = family["clerk-packed"] / record.file
    data = bytearray(file.read_bytes())
    data[told["at"] + told["stored"] // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(MissingError, match="is damaged"):
        target.become(family["clerk-packed"])
    assert torch.equal(target.logits(TEXT, AT), before)
