"""Drafters made of the target's matrices: what lies on disk is what was made, and of this model alone."""

import json

import pytest
import torch

from decodathlon.decoders.speculative import made, sparse
from decodathlon.decoders.speculative.layers import written
from decodathlon.harness import decoder as decoders
from decodathlon.harness.commands.command import main
from decodathlon.harness.decoder import Limits
from decodathlon.harness.errors import SpecError
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.targets import toy
from tests.tiny_models import save_folder

SPECS = [
    "sparse-self[method=wanda]",
    "sparse-self[method=sparsegpt,pattern=2:4]",
    "codebook-self[bits=2]",
    "mixed-precision-self[budget_bits=3]",
    "mixed-precision-self[budget_bits=3,by=layer]",
    "quantised-self",
    "quantised-self[bits=8,head=same]",
    "quantised-self[bits=5,form=float,head=exact]",
    "structured-self[share=0.4]",
    "layer-skip",
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DECODATHLON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def target():
    return toy.enumerable_lm(8)


def said(lines):
    return lambda text: lines.append(text)


def logits(target, decoder):
    context = target.open([[0, 1, 2]], capacity=8, forward=decoder.made(target))
    return context.extend(torch.tensor([[3, 4]])).logits


@pytest.mark.parametrize("spec", SPECS)
def test_what_is_read_is_what_was_made(target, spec, monkeypatch):
    decoder = decoders.build(spec)
    before = logits(target, decoder)
    place = made.build(decoder, target, said([]))
    target.release()
    monkeypatch.setattr(type(decoder), "layers", None)  # it may not be made again
    assert torch.equal(logits(target, decoder), before)
    assert (place / "meta.json").is_file()
    assert [p.name for p in place.parent.iterdir() if p.is_dir()] == [place.name]  # no scratch is left


def test_matrices_of_the_target_are_not_written(target):
    place = made.build(decoders.build("layer-skip"), target, said([]))
    assert [p.name for p in place.iterdir()] == ["meta.json"]
    place = made.build(decoders.build("sparse-self"), target, said([]))
    meta = json.loads((place / "meta.json").read_text())
    assert meta["head"] == "target"
    assert meta["layers"][0] == dict.fromkeys(("qkv", "out", "gate_up", "down"), "dense")


def test_other_parameters_are_another_drafter(target):
    places = {made.folder_of(decoders.build(f"sparse-self[sparsity={s}]"), target) for s in (0.3, 0.5)}
    places |= {made.folder_of(decoders.build("sparse-self[method=magnitude]"), target)}
    assert len(places) == 3
    same = made.folder_of(decoders.build("sparse-self[sparsity=0.3,k=7,controller=svip]"), target)
    assert same in places  # how far it drafts does not matter


def test_a_drafter_of_another_revision_is_refused_with_both(target):
    decoder = decoders.build("sparse-self")
    place = made.build(decoder, target, said([]))
    old = made.fingerprint(target)
    target.release()
    with torch.no_grad():
        next(target.model.parameters()).add_(0.01)
    new = made.fingerprint(target)
    assert old != new
    with pytest.raises(SpecError, match=rf"weights {old}.*weights {new}.*draft build.*remove that folder") as error:
        decoder.generate(target, [[0, 1]], Limits(4), RowRandom(0, [0]))
    assert str(place) in str(error.value)


@pytest.mark.parametrize("harm", ["cut", "gone", "words"])
def test_a_damaged_drafter_is_refused(target, harm):
    decoder = decoders.build("sparse-self")
    place = made.build(decoder, target, said([]))
    target.release()
    file = place / ("meta.json" if harm == "words" else "001.safetensors")
    if harm == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(SpecError, match=r"(is damaged|cannot be read).*draft build"):
        decoder.made(target)


def test_a_choice_of_parts_is_written_by_itself_for_a_model_with_a_revision(target, cache):
    decoder = decoders.build("layer-skip")
    decoder.made(target)
    assert not cache.exists()
    target.release()
    target.revision = "abc"
    first = logits(target, decoder)
    assert len(list(cache.rglob("meta.json"))) == 1
    target.release()
    assert torch.equal(logits(target, decoder), first)


def test_what_wrote_itself_gives_way_to_another_model_of_that_name(target):
    decoder = decoders.build("layer-skip")
    target.revision = "abc"
    decoder.made(target)
    target.release()
    with torch.no_grad():
        for weight in target.model.parameters():
            weight.mul_(1.5)
    decoder.made(target)
    meta = json.loads((made.folder_of(decoder, target) / "meta.json").read_text())
    assert meta["fingerprint"] == made.fingerprint(target)


def test_a_cache_that_cannot_be_written_is_told_and_done_without(target, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("DECODATHLON_CACHE", str(blocked))
    target.revision = "abc"
    decoder = decoders.build("layer-skip")
    with pytest.warns(UserWarning, match="cannot be written .*made anew in every run"):
        assert decoder.made(target) is not None
    with pytest.raises(made.MissingError, match="cannot be written"):
        made.build(decoders.build("sparse-self"), target, said([]))


def test_what_a_killed_builder_left_is_cleared_and_never_listed(target, capsys):
    decoder = decoders.build("sparse-self")
    place = made.folder_of(decoder, target)
    left = place.parent / f".{place.name}-killed"
    left.mkdir(parents=True)
    (left / "meta.json").write_text(json.dumps({"model": "x", "recipe": {"kind": "y"}}))
    assert main(["draft", "list"]) == 0
    assert "y[" not in capsys.readouterr().out
    made.build(decoder, target, said([]))
    assert not left.exists()
    (place / "meta.json").write_text("{}")
    assert main(["draft", "list"]) == 0
    assert f"damaged: {place}" in capsys.readouterr().out
    with pytest.raises(SpecError, match=r"is damaged \(meta.json lacks parts\)"):
        made.stored(decoder, target)


def test_packed_weights_are_of_one_device(target, monkeypatch):
    here = made.folder_of(decoders.build("quantised-self"), target)
    sparse_here = made.folder_of(decoders.build("sparse-self"), target)
    monkeypatch.setattr(target, "device", torch.device("cuda"))
    assert made.folder_of(decoders.build("quantised-self"), target) != here
    assert made.folder_of(decoders.build("sparse-self"), target) == sparse_here


def test_a_disk_that_is_full_is_told_and_leaves_nothing(target, monkeypatch, cache):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(made, "_write", full)
    with pytest.raises(made.MissingError, match=r"cannot be written .*No space left"):
        made.build(decoders.build("sparse-self"), target, said([]))
    assert not [p for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_layers_seen_one_by_one_see_what_the_whole_model_sees(target):
    texts, _ = written(target)
    found = []

    def keep(seen):
        found.append(seen.mean)
        return seen.dense

    list(sparse.over_layers(target, texts, keep, whole=True))
    layers = [layer.mapped(lambda d: sparse.Recorder(d, whole=True)) for layer in target.lean.layers]
    context = target.open([row[:1].tolist() for row in texts], capacity=texts.shape[1])
    context.lent(target.lean.replaced(layers)).extend(texts[:, 1:])
    whole = [m.mean for x in layers for m in (x.attention.qkv, x.attention.out, x.mlp.gate_up, x.mlp.down)]
    for a, b in zip(found, whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_command_builds_lists_and_names_what_is_wrong(tmp_path, capsys):
    model = str(save_folder(tmp_path / "tiny"))
    build = ["draft", "build", "--model", model, "--dtype", "float32"]
    assert main([*build, "--method", "wanda", "--sparsity", "0.5"]) == 0
    assert "sparse-self: made in" in capsys.readouterr().out
    assert main([*build, "--decoder", "quantised-self[bits=8]"]) == 0
    assert main(["draft", "list"]) == 0
    shown = capsys.readouterr().out
    assert "tiny  wanda: sparsity=0.5 " in shown
    assert "tiny  quantised: bits=8" in shown
    assert main([*build, "--method", "wanda", "--sparsity", "0.50"]) == 0
    assert "is there already" in capsys.readouterr().out
    assert main([*build, "--method", "wanda", "--sparsity", "0.5", "--force"]) == 0
    assert "made in" in capsys.readouterr().out
    for words, error in (
        (["--method", "wanda", "--share", "0.5"], "--method wanda takes --sparsity and --pattern, not --share"),
        (["--method", "layer-skip", "--bits", "4"], "--method layer-skip takes nothing more, not --bits"),
        (["--method", "wanda", "--sparsity", "1.5"], "sparsity"),
        (["--method", "wanda", "--sparsity", "0.5", "--pattern", "2:4"], "give one of them"),
        (["--decoder", "prompt-lookup"], "prompt-lookup has no drafter to be made"),
        (["--decoder", "sparse-self", "--bits", "4"], "--bits goes with --method"),
    ):
        assert main([*build, *words]) == 2
        assert error in capsys.readouterr().err
