"""Rewards: the registry, the model reward against the model itself, and lists."""

import pytest
import tiny_models
import torch

from decodathlon import Limits, RowRandom
from decodathlon.harness import decoder as decoders
from decodathlon.harness import rewards
from decodathlon.harness.commands.command import main
from decodathlon.harness.errors import MissingError, SpecError
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.rewards import Answer
from decodathlon.harness.targets.transformers import TransformersTarget

load_builtins()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.save_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def target(folder):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return TransformersTarget(model, transformers.AutoTokenizer.from_pretrained(folder), name="bytes")


def judge(folder, labels):
    """A random sequence classifier with the same tokenizer, as a folder."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    config.num_labels = len(labels)
    config.id2label, config.pad_token_id = dict(enumerate(labels)), 1
    torch.manual_seed(1)
    where = folder.parent / f"judge-{len(labels)}"
    model = transformers.LlamaForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight, std=5.0)
    model.save_pretrained(where)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(where)
    return where


def answers(target, texts=("good", "a bad one", "")):
    prompt = target.encode("Say: ", special=False)
    return [Answer(prompt, target.encode(t, special=False), -1.0, target) for t in texts]


def test_a_reward_model_gives_its_logit_whatever_the_batch(folder, target):
    import transformers

    where = judge(folder, ["reward"])
    found = rewards.build(f"model:{where}")(answers(target))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(where).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        alone = [
            float(model(**tokenizer(f"Say: {t}", return_tensors="pt")).logits[0, 0]) for t in ("good", "a bad one", "")
        ]
    assert found.tolist() == pytest.approx(alone, abs=1e-4)
    assert len(set(alone)) == 3


def test_of_several_labels_one_is_named(folder, target):
    where = judge(folder, ["bad", "good"])
    good = rewards.build(f"model:{where}@good")(answers(target))
    bad = rewards.build(f"model:{where}@bad")(answers(target))
    assert torch.allclose(good.exp() + bad.exp(), torch.ones(3, dtype=torch.float64), atol=1e-6)
    with pytest.raises(SpecError, match="labels bad, good; name one"):
        rewards.build(f"model:{where}")(answers(target))


def test_a_folder_without_a_model_is_missing(target, tmp_path):
    with pytest.raises(MissingError, match="cannot be loaded"):
        rewards.build(f"model:{tmp_path}")(answers(target))


def test_a_chain_goes_by_a_reward_model(folder, target):
    """With a small beta its answers have a higher reward than the model's own."""
    where = judge(folder, ["reward"])
    prompts, rng = [target.encode("x")] * 24, RowRandom(0, range(24))
    value = rewards.build(f"model:{where}")
    means = {}
    for spec in (f"qalign[reward=model:{where},beta=0.2,steps=25]", "temperature"):
        found = decoders.build(spec).generate(target, prompts, Limits(6), rng)
        means[spec] = float(value([Answer(prompts[0], a.tokens, 0.0, target) for a in found]).mean())
    aligned, plain = means.values()
    assert aligned > plain + 1.0


def test_lengths_and_log_probabilities(target):
    some = answers(target)
    assert rewards.build("length:4")(some).tolist() == [0.0, -5.0, -4.0]
    assert rewards.build("log-power")(some).tolist() == [-1.0] * 3


def test_rewards_are_listed(capsys):
    assert main(["list", "rewards"]) == 0
    out = capsys.readouterr().out
    for name in ("log-power", "length:", "model:"):
        assert name in out


def test_a_reward_is_checked_when_it_registers():
    with pytest.raises(SpecError, match="takes answers, argument"):
        rewards.reward("test-too-few", argument=int)(lambda answers: [])
    with pytest.raises(SpecError, match="takes answers"):
        rewards.reward("test-too-many")(lambda answers, more: [])
    with pytest.raises(SpecError, match="list of capabilities"):
        rewards.reward("test-needs", needs="text")(lambda answers: [])


def test_a_decoder_is_told_apart_by_what_its_reward_rests_on(folder, tmp_path):
    """Its source is also the reward's: another judge in the same folder makes another decoder."""
    from decodathlon.harness.bench import describe

    where = judge(folder, ["reward"])
    spec = f"qalign[reward=model:{where}]"
    before = describe(decoders.build(spec))["source_sha256"]
    assert before == describe(decoders.build(spec))["source_sha256"]
    assert before != describe(decoders.build("qalign"))["source_sha256"]
    file = where / "config.json"
    text = file.read_text()
    file.write_text(text.replace("{", "{\n", 1))
    assert describe(decoders.build(spec))["source_sha256"] != before
    file.write_text(text)
    quest = {p.name for p in decoders.build("quest").sources()}
    assert {"suffix.py", "writing.py", "rewards.py"} <= quest


def test_a_label_that_is_not_there_is_no_label(folder, target):
    with pytest.raises(SpecError, match="labels reward"):
        rewards.build(f"model:{judge(folder, ['reward'])}@nonsense")(answers(target))


@pytest.mark.parametrize("goal", ["-3", "0", "abc", "2.5", ""])
def test_a_length_is_a_whole_number_from_one_on(goal):
    with pytest.raises(SpecError, match="length"):
        rewards.build(f"length:{goal}")


def test_a_reward_that_gives_nothing_is_told_what_it_must_give(target):
    from decodathlon.harness.errors import RewardError

    nothing = rewards.Reward("mine", lambda answers: None, frozenset(), rewards.Path(__file__))
    with pytest.raises(RewardError, match="it gave NoneType; it must give one number per answer"):
        nothing(answers(target))


def test_a_reward_with_moods_cannot_be_audited(monkeypatch):
    import itertools

    from decodathlon.harness.errors import RewardError
    from decodathlon.harness.measure import draws
    from decodathlon.harness.targets import toy

    moods = itertools.count()
    moody = rewards.Registered(lambda answers: [next(moods)] * len(answers), None, frozenset())
    monkeypatch.setitem(
        rewards.registry.entries,
        ("reward", "moody"),
        type(rewards.registry.entries["reward", "log-power"])("reward", "moody", moody, __file__),
    )
    with pytest.raises(RewardError, match="gave equal answers different values"):
        draws.claimed_law(decoders.build("qalign[reward=moody]"), toy.enumerable_lm(), 2)


def test_rewards_may_read_the_letters_of_the_tiny_transformer():
    from decodathlon.harness.targets import toy

    lm = toy.enumerable_lm()
    assert lm.encode("ab") == [0, 2, 3]
    assert lm.decode([0, 2, 3, 1]) == "ab"
    assert Answer([0], [3, 3, 1], -1.0, lm).text == "bb"
