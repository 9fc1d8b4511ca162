"""Rewards of particles: a tiny process reward model against a direct computation, mixtures, programs, bad folders."""

import json
import math
import stat

import pytest
import torch

from decodathlon.decoders.smc.rewards import MARK, steps
from decodathlon.harness import decoder as decoders
from decodathlon.harness import rewards
from decodathlon.harness.errors import MissingError, RewardError, SpecError
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.rewards import Answer

load_builtins()
WORDS = ["<unk>", "<pad>", MARK, "x", "=", "1", "2", "so", "hence", "Q", "box", "\n", " "]


class Scribe:
    """A target whose tokens are words; the user's words stand between two marks."""

    capabilities = frozenset({"logits", "text"})
    device, name = "cpu", "scribe"

    def decode(self, tokens):
        return "".join(tokens)

    def chat(self, messages, *, thinking=True):
        return ["[user] ", messages[0]["content"], " [you] "]


def answer(text, problem="Q x", log_prob=-3.0):
    return Answer(["[user] ", problem, " [you] "], [text], log_prob, Scribe())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A randomly initialised model in the layout, with a tokenizer of words."""
    import tokenizers
    import transformers
    from safetensors.torch import save_file

    where = tmp_path_factory.mktemp("prm")
    config = transformers.Qwen2Config(
        vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(3)
    body = transformers.Qwen2Model(config)
    head = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    for parameter in [*body.parameters(), *head.parameters()]:
        torch.nn.init.normal_(parameter, std=0.7)
    config.save_pretrained(where)
    weights = {f"model.{k}": v for k, v in body.state_dict().items()}
    save_file(weights | {f"score.{k}": v for k, v in head.state_dict().items()}, where / "model.safetensors")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\s"), "isolated")
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>")
    plain.add_special_tokens({"additional_special_tokens": [MARK]})
    plain.save_pretrained(where)
    return where, body.eval(), head, transformers.AutoTokenizer.from_pretrained(where)


def test_a_process_reward_is_the_mean_over_marks(folder):
    """Batched and padded against one at a time, computed here; the problem without the chat template around it."""
    where, body, head, tokenizer = folder
    texts = ["x = 1", "x = 1\n\nso x = 2\n\nhence 2", "so\n\n\n\n hence"]
    found = rewards.build(f"prm:{where}")([answer(t) for t in texts])
    for text, value in zip(texts, found.tolist(), strict=True):
        marked = "".join(part + MARK for part in steps(text))
        ids = tokenizer(f"Q x\n\n{marked}", return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            right = head(body(ids).last_hidden_state).double().softmax(-1)[0, :, 1]
        assert int((ids == WORDS.index(MARK)).sum()) == len(steps(text))
        assert value == pytest.approx(float(right[ids[0] == WORDS.index(MARK)].mean()), abs=1e-6)
    assert 0 < min(found.tolist()) < max(found.tolist()) < 1


def test_what_was_read_is_not_read_again(folder, monkeypatch):
    where = folder[0]
    one = rewards.build(f"prm:{where}")
    first = one([answer("x"), answer("x = 1")]).tolist()
    monkeypatch.setattr(torch.nn.Sequential, "forward", None)  # whoever reads fails
    assert one([answer("x = 1"), answer("x")]).tolist() == first[::-1]
    with pytest.raises(RewardError, match="NoneType"):
        one([answer("x = 2")])


def test_one_answer_to_two_problems_is_read_twice_and_a_mark_in_a_text_is_none(folder):
    where, *_ = folder
    value = rewards.build(f"prm:{where}")
    first, second = value([answer("x = 1", "Q x"), answer("x = 1", "box 2")]).tolist()
    assert first != second
    assert value([answer(f"x = {MARK}1", "Q x")]).tolist() == pytest.approx([first])
    assert value([answer("x = 1", f"Q {MARK}x")]).tolist() == pytest.approx([first])


def test_a_hybrid_is_the_mixture(folder):
    where = folder[0]
    some = [answer("x = 1", log_prob=-5.0), answer("so x", log_prob=-2.0)]
    both = rewards.build(f"hybrid:0.25@{where}")(some)
    expected = 0.25 * rewards.build(f"prm:{where}")(some) + 0.75 * torch.tensor([-5.0, -2.0])
    assert torch.allclose(both, expected.double())
    assert rewards.build("mean-log-prob")([Answer([], ["a", "b"], -3.0, Scribe())]).tolist() == [-1.5]


def test_the_notes_scheme_reads_the_model(folder):
    from decodathlon.harness.decoder import Limits
    from decodathlon.harness.randomness import RowRandom
    from decodathlon.harness.targets import toy

    for score in ("prm_reward", "hybrid_prm_logprob"):
        one = decoders.build(
            f"persistent-smc-steps[score={score},prm={folder[0]},n_particles=3,step_boundary=fixed,fixed_step_tokens=2]"
        )
        (given,) = one.generate(toy.enumerable_lm(4), [[0]], Limits(6), RowRandom(0, "a"))
        assert all(math.isfinite(s) for s in given.trace[-1]["scores"])
        if score == "prm_reward":
            assert all(0 <= s <= 1 for s in given.trace[-1]["scores"])


def changed(folder, tmp_path, name, make):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder[0], copy)
    make(copy / name)
    return copy


def test_bad_folders_are_named(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    def headless(file):
        save_file({k: v for k, v in load_file(file).items() if not k.startswith("score.")}, file)

    def lacking(file):
        save_file({k: v for k, v in load_file(file).items() if k != "model.norm.weight"}, file)

    def without_mark(file):
        file.write_text(file.read_text().replace(MARK, "<other>"))

    def narrow(file):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 7}))

    for i, (name, make, message) in enumerate((
        ("model.safetensors", headless, "has no head of a process reward model.*none of them.*cannot score steps"),
        ("model.safetensors", lacking, "weights are missing or too many: norm.weight"),
        ("tokenizer.json", without_mark, "its tokenizer has no token <extra_0>; it belongs to another model"),
        ("config.json", narrow, "its tokenizer has 14 tokens, its model 7; it belongs to another model"),
        ("config.json", lambda file: file.unlink(), "the folder has no config.json"),
    )):  # fmt: skip
        place = tmp_path / str(i)
        place.mkdir()
        where = changed(folder, place, name, make)
        if name == "tokenizer.json":
            without_mark(where / "tokenizer_config.json")
        with pytest.raises(SpecError, match=message):
            rewards.build(f"prm:{where}")([answer("x")])
    with pytest.raises(SpecError, match="there is no folder /nowhere"):
        rewards.build("prm:/nowhere")
    with pytest.raises(MissingError, match="reward prm:nobody/nothing is not here"):
        rewards.build("prm:nobody/nothing")([answer("x")])
    with pytest.raises(RewardError, match="reads 64 tokens, and an answer with its problem has"):
        rewards.build(f"prm:{folder[0]}")([answer("x " * 80)])
    for text in ("2@x", "x", "a@b"):
        with pytest.raises(SpecError, match="is not of the form SHARE@MODEL"):
            rewards.build(f"hybrid:{text}")


def program(tmp_path, body):
    file = tmp_path / "judge.py"
    file.write_text("#!/usr/bin/env python3\nimport json, sys\n" + body)
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


def test_a_program_judges(tmp_path):
    file = program(tmp_path, "for line in sys.stdin: print(len(json.loads(line)['text']))")
    assert rewards.build(f"verifier:{file}")([answer("abc"), answer("a\nb")]).tolist() == [3, 3]
    for body, message in (
        ("sys.exit('no such unit')", "ended with 1: no such unit"),
        ("print(1)", "gave 1 values for 2 answers"),
        ("print('nan 1')", "is nan for the tokens"),
        ("print('many words')", "raised ValueError: could not convert string to float: 'many'"),
    ):
        with pytest.raises(RewardError, match=message):
            rewards.build(f"verifier:{program(tmp_path, body)}")([answer("a"), answer("b")])
    with pytest.raises(SpecError, match="there is no program '/nowhere'"):
        rewards.build("verifier:/nowhere")
