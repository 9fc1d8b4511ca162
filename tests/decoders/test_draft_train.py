"""`draft train`: the texts that a model writes for it, which of them are kept, and the command."""

import contextlib
import json

import pytest
import torch

from decodathlon.decoders.training import corpus, prepare
from decodathlon.harness import decoder as decoders
from decodathlon.harness import models
from decodathlon.harness.commands.command import main
from decodathlon.harness.decoder import Limits
from decodathlon.harness.errors import MissingError, SpecError
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.registry import load_builtins

load_builtins()


class Speaker:
    """A target that only chats: its template has a beginning, the words, and an end."""

    name = "speaker"

    def chat(self, messages, *, thinking=True):
        return [1, 2, 3, *(10 + ord(c) % 50 for c in messages[0]["content"]), 4]

    def decode(self, tokens):
        return " ".join(f"w{t}" for t in tokens)


def test_an_empty_turn_is_what_templates_have_in_common():
    assert corpus.empty_turn(Speaker()) == [1, 2, 3]
    silent = Speaker()
    silent.chat = lambda messages, **more: None
    with pytest.raises(SpecError, match="no chat template"):
        corpus.empty_turn(silent)


def test_texts_of_the_suites_are_found_out():
    suites = {
        "a": corpus.looked_for("w11 w12 w13 w14 w15 w16 w17 w18 w19"), "b": corpus.looked_for("x " * 20),
        "short": corpus.looked_for("w21 w22 w23 w24 w25 w26"),
    }  # fmt: skip
    texts = [
        corpus.Written([9, 9, 9, 9, 9, 9, 9, 9], [11, 12, 13, 14, 15, 16, 17, 18]),
        corpus.Written([9, 9, 9, 9, 9, 9, 9, 9], [11, 12, 13, 14, 15, 16, 17, 17]),
        corpus.Written([12, 13, 14, 15, 16, 17, 18, 19], [7]),
        corpus.Written([9, 9], [5, 21, 22, 23, 24, 25, 26, 8]),
        corpus.Written([9, 9], [5, 21, 22, 23, 24, 25, 8]),
    ]
    assert corpus.overlaps(Speaker(), texts, suites) == [{"a"}, set(), {"a"}, {"short"}, set()]


def test_rows_of_suites_are_read_as_the_texts_that_they_hold():
    row = json.dumps({"turns": ["one two three four\nfive six", {"more": "a b c d e f g h"}], "id": 7})
    assert corpus._words(row) == ["one two three four\nfive six", "a b c d e f g h"]
    assert corpus.looked_for(corpus._words("plain words of four")[0]) == set()
    assert corpus.looked_for("Plain words, of five now") == {("plain", "words", "of", "five", "now")}
    with pytest.raises(MissingError, match=r"--data .*nowhere has no"):
        corpus.suite_grams("/nowhere", lambda text: None)


def test_of_texts_that_begin_alike_a_few_are_kept():
    texts = [
        [corpus.Written([7, i], [*range(prepare.OPENING), i]) for i in range(prepare.ALIKE + 3)],
        [corpus.Written([7, 99], [8])],
    ]
    kept, report = prepare._fit(Speaker(), texts, {})
    assert list(map(len, kept)) == [prepare.ALIKE, 1]
    assert "and 3 that begin as 16 others do" in report["told"]
    assert report["texts"] == prepare.ALIKE + 1


def test_shards_that_are_there_are_not_written_again(tmp_path, monkeypatch):
    asked = []

    def written(target, shards, tokens, seed):
        asked.append([shard.number for shard in shards])
        return [[corpus.Written([1], [shard.number, 2])] for shard in shards]

    monkeypatch.setattr(corpus, "_written", written)
    shards = [corpus.Shard(n) for n in range(5)]
    corpus.write(None, tmp_path, shards[:4], 8, 0, lambda text: None)
    shards[1].file(tmp_path).unlink()
    corpus.write(None, tmp_path, shards, 8, 0, lambda text: None)
    assert asked == [[0, 1, 2], [3], [1, 4]]
    assert corpus.read(tmp_path, shards[1]) == [corpus.Written([1], [1, 2])]
    assert json.loads(shards[3].file(tmp_path).read_text()) == {"prompt": [1], "answer": [3, 2]}


def test_a_shard_is_the_same_whatever_is_written_beside_it(tmp_path, model):
    found = models.load(models.resolve(str(model)), device="cpu", dtype="float32", say=lambda text: None)
    shards = [corpus.Shard(0), corpus.Shard(1), corpus.Shard(0, "Sums.")]
    three = corpus._written(found, shards, 12, 0)
    assert sum(map(len, three)) > 4
    assert three[0] != three[2]
    assert [corpus._written(found, [shard], 12, 0)[0] for shard in shards] == three
    assert len({shard.file(tmp_path) for shard in shards}) == 3


def test_what_the_model_is_told_stands_before_an_empty_turn_and_not_before_an_answer(tmp_path, model):
    found = models.load(models.resolve(str(model)), device="cpu", dtype="float32", say=lambda text: None)
    assert found.decode(corpus.empty_turn(found, "Sums.")) == "<system>Sums.<user>"
    (texts,) = corpus._written(found, [corpus.Shard(0, "Sums.")], 8, 0)
    assert texts
    assert not any("Sums." in found.decode(w.prompt) for w in texts)


def test_a_line_is_put_behind_the_turns_of_a_shard_alone(tmp_path, model):
    found = models.load(models.resolve(str(model)), device="cpu", dtype="float32", say=lambda text: None)
    plain, lined = corpus.Shard(0, "Sums."), corpus.Shard(0, "Sums.", "Be brief.")
    assert plain.file(tmp_path) != lined.file(tmp_path)
    one, two, again = corpus._written(found, [plain, lined, plain], 8, 0)
    assert one
    assert one == again
    assert all("\nBe brief." in found.decode(w.prompt) for w in two)
    assert not any("Be brief." in found.decode(w.prompt) for w in one)


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A folder with a tiny model that chats, and small shards."""
    import tiny_models
    import transformers

    folder = tiny_models.save_folder(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr(corpus, "ROWS", 6)
    monkeypatch.setattr(corpus, "ASKED", 60)
    monkeypatch.setattr(corpus, "suite_grams", lambda folder, say: {})
    return folder


def train(model, out, **options):
    given = {"shards": 4, "answer-tokens": 20, "fused": 1, "layers": 1, "block": 4, "steps": 2, **options}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return main(["draft", "train", "--method", "dflash", "--model", str(model), "--out", str(out), *words])


def test_the_command_makes_a_drafter_that_decodes(model, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(model, out) == 0
    assert "run again to go on" not in capsys.readouterr().out
    told = json.loads((out / "training.json").read_text())
    assert (told["recipe"]["steps"], told["seed"], told["texts"]["left_out"]) == (2, 0, {})
    found = models.load(models.resolve(str(model)), device="cpu", dtype="float32", say=lambda text: None)
    drafted, plain = (
        decoders.build(spec).generate(found, [[5, 6]], Limits(12, ignore_eos=True), RowRandom(0, [0]))[0].tokens
        for spec in (f"dflash[checkpoint={out}]", "greedy")
    )
    assert drafted == plain
    assert train(model, out) == 0, "what is finished is left as it is"
    assert json.loads((out / "training.json").read_text())["history"] == told["history"]


def test_a_folder_in_which_somebody_trains_is_refused(model, tmp_path, capsys):
    from decodathlon.harness.locks import file_lock

    out = tmp_path / "out"
    with file_lock(out / ".lock"):
        assert train(model, out) != 0
    assert "somebody else trains there now" in capsys.readouterr().err


def test_shards_about_something_are_held_out_too(model, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(model, out, about="2:Sums.") == 0
    assert len(list((out / "texts").glob("*.jsonl"))) == 6
    assert len(list((out / "states").glob("*.safetensors"))) == 6
    assert torch.load(out / "state.pt", weights_only=True)["shards"] == [1, 2, 3, 5]
    for wrong, said in (("0:x", "give a number of shards"), ("x", "is not N:TEXT")):
        with contextlib.suppress(SystemExit):
            assert train(model, tmp_path / "other", about=wrong) != 0
        assert said in capsys.readouterr().err


def test_the_command_goes_on_where_its_time_was_over(model, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(model, out, hours=1e-9) == 0
    assert "the texts are not all there" in capsys.readouterr().out
    assert not (out / "model.safetensors").exists()
    assert train(model, out) == 0
    assert (out / "model.safetensors").exists()


def test_the_command_refuses_what_was_made_otherwise(model, tmp_path, capsys):
    out = tmp_path / "out"
    train(model, out, hours=1e-9)
    assert train(model, out, seed=3) != 0
    assert "was made with seed 0, not 3" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert train(model, tmp_path / "file") != 0
    assert "is no folder" in capsys.readouterr().err


def test_the_same_turns_twice_are_refused(model, tmp_path, capsys):
    words = ["--out", str(tmp_path / "out"), "--model", str(model), "--about", "1:Sums.", "--about", "2:Sums."]
    assert main(["draft", "train", "--method", "dflash", *words]) != 0
    assert "--about: the same text twice" in capsys.readouterr().err


def test_a_line_behind_turns_needs_turns(model, tmp_path, capsys):
    assert train(model, tmp_path / "out", behind="Be brief.") != 0
    assert "--behind Be brief. stands behind the turns of --about" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [({"block": 1}, "--block 1: the least is 2"), ({"block": 65}, "--block 65: the most is 64"),
     ({"shards": 1}, "--shards 1: the least is 2"), ({"rate": 2}, "--rate 2.0 is no learning rate"),
     ({"hours": -1}, "no time to train")],
)  # fmt: skip
def test_options_without_a_meaning_are_told_before_a_model_is_loaded(options, said, tmp_path, capsys):
    assert train(tmp_path / "no-model", tmp_path / "out", **options) != 0
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
