"""Self-distillation of drafters made of the target's own matrices: what is gone stays gone, and the rest learns."""

import json

import pytest
import tiny_models
import torch

from decodathlon.decoders.speculative import made
from decodathlon.decoders.training import corpus, features
from decodathlon.decoders.training.repair import Repair, Repairable, Scaled
from decodathlon.decoders.training.trainer import Recipe
from decodathlon.harness import decoder as decoders
from decodathlon.harness import models
from decodathlon.harness.commands.command import main
from decodathlon.harness.decoder import Limits
from decodathlon.harness.errors import MissingError, SpecError
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.registry import load_builtins

load_builtins()


@pytest.fixture(autouse=True)
def kept_here(tmp_path, monkeypatch):
    monkeypatch.setenv("DECODATHLON_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model that chats, of widths that 4-bit groups fit."""
    import transformers

    folder = tiny_models.save_folder(
        tmp_path_factory.mktemp("model") / "model", intermediate_size=64, initializer_range=0.25, num_key_value_heads=4
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def target(folder):
    return models.load(models.resolve(str(folder)), device="cpu", dtype="float32", say=lambda text: None)


@pytest.fixture
def states(target, tmp_path):
    prompts = [[1, 5 + i, 9, 40 - i] for i in range(24)]
    found = decoders.build("greedy").generate(
        target, prompts, Limits(16, ignore_eos=True), RowRandom(0, range(len(prompts)))
    )
    texts = [corpus.Written(p, a.tokens) for p, a in zip(prompts, found, strict=True)]
    features.make(target, [], [texts[:12], texts[12:]], tmp_path / "states", lambda text: None)
    return tmp_path / "states"


def repair(target, spec, states, recipe, held_out=()):
    decoder = decoders.build(spec)
    drafter = Repairable(decoder.made(target), target.lean, rounded="quantised" in spec)
    return Repair(drafter, target, states, [0, 1], held_out, recipe, dict(decoder.recipe))


DRAFTERS = [
    "sparse-self[sparsity=0.6]",
    "structured-self[share=0.5]",
    "quantised-self[zeros=true]",
    "quantised-self[bits=8]",
]


@pytest.mark.parametrize("spec", ["sparse-self[sparsity=0.5]", "structured-self[share=0.4]"])
def test_what_it_guesses_from_is_what_decoding_has(target, states, spec):
    """States of many texts at once, against the drafter as it reads one, token by token."""
    one = repair(target, spec, states, Recipe())
    heads = {layer.attention.key_heads or 4 for layer in one.drafter.reading.layers}
    assert (heads == {4}) == ("sparse" in spec), "or it shows nothing of fewer heads"
    texts = features.load(states, 0)[:3]
    texts[1] = features.Seen(texts[1].tokens[:9], texts[1].states[:9], texts[1].last[:9], texts[1].begin)
    last = len(target.lean.layers) + 1
    with torch.no_grad():
        together = one.outputs(texts)
        for text, found in zip(texts, together, strict=True):
            assert len(found) == len(text.tokens) - text.begin
            reading = target.open([text.tokens[:1].tolist()], capacity=32, forward=one.drafter.reading)
            for i, token in enumerate(text.tokens[1:-1]):
                state = reading.extend(token.view(1, 1), hidden=[last]).hidden[last][0, 0]
                reading.keep([1])
                if i + 2 >= text.begin:
                    assert torch.allclose(found[i + 2 - text.begin], state, atol=1e-5)


@pytest.mark.parametrize("spec", DRAFTERS)
def test_it_learns_and_what_is_gone_stays_gone(target, states, tmp_path, spec):
    held_out = features.load(states, 1)
    one = repair(
        target,
        spec,
        states,
        Recipe(steps=60, rate=5e-3 if "quantised" in spec else 3e-3, soft=1.0, decay=0.1),
        held_out,
    )
    before = decoders.build(spec).made(target)
    losses = [float(one.loss(held_out, torch.Generator()).detach())]
    assert one.run(tmp_path / "state.pt", lambda text: None)
    losses.append(float(one.loss(held_out, torch.Generator()).detach()))
    least = 1e-4 if "bits=8" in spec else 0.01  # in eight bits there is hardly anything to learn
    assert losses[1] < losses[0] - least, losses
    decoder = decoders.build(spec)
    made.write(tmp_path / "out", decoder, target, one.drafter.settled(target.dtype), told=range(4))
    after = decoders.build(spec.removesuffix("]") + f",weights={tmp_path / 'out'}]").made(target)
    for was, now in zip(before.layers, after.layers, strict=True):
        a, b = was.mlp.down, now.mlp.down
        assert type(a) is type(b)
        if "bits=8" in spec:
            assert torch.equal(a.weight, b.weight)
            assert not torch.equal(a.scale, b.scale)
        elif "quantised" in spec:
            assert torch.equal(a.packed, b.packed)
            assert not torch.equal(a.scales, b.scales)
        else:
            assert torch.equal(a.weight == 0, b.weight == 0)
            assert not torch.equal(a.weight, b.weight)
            assert now.mlp.gate_up.weight.shape == was.mlp.gate_up.weight.shape


@pytest.mark.parametrize("spec", DRAFTERS)
def test_untrained_it_is_what_it_was(target, states, tmp_path, spec):
    """Written without a step: the same matrices, so nothing but training changes what the drafter says."""
    one = repair(target, spec, states, Recipe())
    decoder = decoders.build(spec)
    made.write(tmp_path / "out", decoder, target, one.drafter.settled(target.dtype), told=range(4))
    trained = decoders.build(spec.removesuffix("]") + f",weights={tmp_path / 'out'}]")
    x = torch.randn(3, target.lean.layers[0].mlp.gate_up.weight.shape[1], generator=torch.Generator().manual_seed(0))
    for was, now in zip(decoder.made(target).layers, trained.made(target).layers, strict=True):
        assert torch.equal(was.mlp.gate_up(x), now.mlp.gate_up(x))


@pytest.mark.parametrize("spec", ["quantised-self", "quantised-self[zeros=true]", "quantised-self[bits=8]"])
def test_a_scaled_matrix_is_the_kernel_s(target, states, spec):
    one = repair(target, spec, states, Recipe())
    matrix = next(m for m in one.drafter.free if isinstance(m, Scaled))
    x = torch.randn(5, matrix.weight.shape[1], generator=torch.Generator().manual_seed(0))
    assert torch.allclose(matrix(x), matrix.matrix(x), atol=2e-3)


def test_a_repaired_drafter_decodes_as_its_target_does(target, states, tmp_path):
    spec = "sparse-self[sparsity=0.6]"
    one = repair(target, spec, states, Recipe(steps=10, rate=1e-3))
    one.run(tmp_path / "state.pt", lambda text: None)
    place = made.write(
        tmp_path / "out", decoders.build(spec), target, one.drafter.settled(target.dtype), told=range(4),
        trained={"told": "10 steps"},
    )  # fmt: skip
    trained = decoders.build(f"sparse-self[sparsity=0.6,weights={place}]")
    drafted, plain = (
        d.generate(target, [[1, 6, 7]], Limits(12, ignore_eos=True), RowRandom(0, [0]))[0].tokens
        for d in (trained, decoders.build("greedy"))
    )
    assert drafted == plain
    assert trained.remarks(target) == ["drafter: changed by training, 10 steps"]
    assert any(file.suffix == ".safetensors" for file in trained.sources())


def test_a_folder_of_another_drafter_is_refused(target, states, tmp_path):
    one = repair(target, "sparse-self[sparsity=0.6]", states, Recipe())
    decoder = decoders.build("sparse-self[sparsity=0.6]")
    place = made.write(tmp_path / "out", decoder, target, one.drafter.settled(target.dtype), told=range(4))
    with pytest.raises(SpecError, match=r"is a kind=wanda sparsity=0\.6, and this decoder drafts with kind=wanda spar"):
        decoders.build(f"sparse-self[weights={place}]").made(target)
    meta = json.loads((place / "meta.json").read_text())
    (place / "meta.json").write_text(json.dumps(meta | {"fingerprint": "0"}))
    with pytest.raises(SpecError, match="was made of"):
        decoders.build(f"sparse-self[sparsity=0.6,weights={place}]").made(target)
    (place / "meta.json").write_text(json.dumps(meta | {"version": 1}))
    with pytest.raises(SpecError, match="another version"):
        decoders.build(f"sparse-self[sparsity=0.6,weights={place}]").made(target)


def test_numbers_that_are_laid_out_for_another_machine_are_refused(target, states, tmp_path):
    one = repair(target, "quantised-self", states, Recipe())
    place = made.write(
        tmp_path / "out", decoders.build("quantised-self"), target, one.drafter.settled(target.dtype), told=range(4)
    )
    meta = json.loads((place / "meta.json").read_text())
    assert meta["computed_by"][0] == "cpu"
    (place / "meta.json").write_text(json.dumps(meta | {"computed_by": ["cpu", "9.9", "AVX9"]}))
    with pytest.raises(SpecError, match=r"laid out for .*AVX9"):
        decoders.build(f"quantised-self[weights={place}]").made(target)


def test_a_folder_that_was_written_anew_is_read_anew(target, states, tmp_path):
    spec, recipe = "sparse-self[sparsity=0.6]", Recipe(steps=3, rate=1e-2)
    one = repair(target, spec, states, recipe)

    def write():
        return made.write(
            tmp_path / "out", decoders.build(spec), target, one.drafter.settled(target.dtype), told=range(4)
        )

    trained = decoders.build(f"sparse-self[sparsity=0.6,weights={write()}]")
    before = trained.made(target).layers[0].mlp.down.weight
    one.run(tmp_path / "state.pt", lambda text: None)
    write()
    assert not torch.equal(trained.made(target).layers[0].mlp.down.weight, before)


def test_the_mask_goes_on_with_the_training(target, states, tmp_path):
    """Made anew it could be another one, which would set to zero what was trained."""
    one = repair(target, "sparse-self[sparsity=0.6]", states, Recipe(steps=2))
    one.run(tmp_path / "state.pt", lambda text: None)
    other = repair(target, "sparse-self[sparsity=0.3]", states, Recipe(steps=2))
    other.identity = one.identity
    other.load(tmp_path / "state.pt")
    assert torch.equal(other.drafter.free[0].mask, one.drafter.free[0].mask)


def test_weights_that_are_not_there_are_told_before_a_model_is_loaded(tmp_path):
    with pytest.raises(MissingError, match="is no folder with a drafter; decodathlon draft train"):
        decoders.build(f"structured-self[weights={tmp_path}]")


# -- the command ---------------------------------------------------------------------------------------------------


def train(folder, out, *words):
    given = ["--shards", "3", "--answer-tokens", "16", "--steps", "2", *words]
    return main(
        [
            "draft",
            "train",
            "--method",
            "self-distillation",
            "--model",
            str(folder),
            "--dtype",
            "float32",
            "--out",
            str(out),
            *given,
        ]
    )


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(corpus, "ROWS", 6)
    monkeypatch.setattr(corpus, "ASKED", 60)
    monkeypatch.setattr(corpus, "suite_grams", lambda folder, say: {})


@pytest.mark.usefixtures("small")
def test_the_command_repairs_a_drafter(folder, target, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(folder, out, "--decoder", "structured-self[share=0.4,k=3]") == 0
    told = capsys.readouterr().out
    assert f"--decoder 'structured-self[k=3,share=0.4,weights={out / 'drafter'}]' takes it" in told
    account = json.loads((out / "drafter" / "meta.json").read_text())["trained"]
    assert [h["step"] for h in account["history"]] == [0, 2]
    decoders.build(f"structured-self[share=0.4,weights={out / 'drafter'}]").made(target)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name it with --decoder"),
        (["--decoder", "codebook-self"], "nothing that could be trained"),
        (["--decoder", "greedy"], "nothing that could be trained"),
        (["--decoder", "sparse-self", "--soft", "2"], "--soft 2.0 is no share"),
        (["--decoder", "sparse-self", "--steps", "0"], "--steps 0: the least is 1"),
        (["--decoder", "sparse-self", "--block", "8"], "--block is of --method dflash, not of self-distillation"),
        (["--decoder", "sparse-self", "--data", "/nowhere"], "--data /nowhere is no folder"),
        (["--decoder", "quantised-self[form=float]"], "form=float has no scales"),
    ],
)
def test_what_cannot_be_repaired_is_told_before_a_model_is_loaded(tmp_path, capsys, words, message):
    assert train(tmp_path / "nothing", tmp_path / "out", *words) != 0
    assert message in capsys.readouterr().err
