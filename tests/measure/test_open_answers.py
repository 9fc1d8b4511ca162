"""Open questions: likelihoods of references against a plain sum, repetition by hand, judges and their abstentions."""

import math

import pytest
import tiny_models

from decodathlon.harness import decoder as decoders
from decodathlon.harness.datasets import questions
from decodathlon.harness.judges import Judge, Reply
from decodathlon.harness.measure import asking, diversity, open_answers
from decodathlon.harness.registry import load_builtins, registry
from decodathlon.harness.suite import Cell
from decodathlon.harness.targets.transformers import TransformersTarget

load_builtins()


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    import transformers

    folder = tiny_models.save_folder(tmp_path_factory.mktemp("model"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.config.max_position_embeddings = 4096
    return TransformersTarget(model, transformers.AutoTokenizer.from_pretrained(folder), name="bytes")


OWN = questions.of_package("mt_bench.jsonl")


def measured(target, spec="temperature", judge=None, some=OWN, **sizes):
    cell = Cell(
        suite=registry.get("suite", "mt_bench"), decoder=decoders.build(spec), target=target, rivals={}, scale="smoke",
        slice="all", seed=0, texts={}, judge=judge,
    )  # fmt: skip
    cell.sizes = {"turns": 2, "tokens": 6, **sizes}
    open_answers.measure(cell, some)
    return cell, {m["metric"]: m["value"] for m in cell.metrics}


def test_references_are_scored_under_the_decoders_law(target):
    known = [q for q in OWN if q["reference"]]
    assert len(known) == 6
    _cell, found = measured(target, turns=1)
    nats = tokens = 0.0
    for q in known:
        head = asking.prompt(target, [("user", q["turns"][0])])
        rest = target.encode(" " + q["reference"][0].strip(), special=False)
        nats -= float(target.log_prob([[*head, *rest]], len(head))[0])
        tokens += len(rest)
    assert found["cross_entropy"] == pytest.approx(nats / tokens, rel=1e-4)
    assert found["ppl_model"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert found["ppl_mixture"] == pytest.approx(found["ppl_model"], rel=1e-3), "mixing a law with itself"
    assert found["coverage"] == 1


def test_a_law_that_cuts_references_is_infinite_and_says_how_often(target):
    _, found = measured(target, "top-k[k=3]", turns=1)
    assert found["cross_entropy"] == math.inf
    assert 0 < found["coverage"] < 1
    assert found["ppl_model"] <= found["ppl_mixture"] * 1.001 < math.inf


def test_without_references_or_a_law_nothing_is_said_of_them(target):
    cell, found = measured(target, some=[q for q in OWN if not q["reference"]][:3], turns=1)
    assert "cross_entropy" not in found
    assert any("0 of the questions have a reference" in note for note in cell.notes)
    cell, found = measured(target, "beam[width=2]", turns=1, some=OWN[4:8])
    assert "cross_entropy" not in found
    assert any("no likelihood of reference answers" in note for note in cell.notes)


def test_the_second_turn_sees_the_first_answer(target, monkeypatch):
    seen = []
    monkeypatch.setattr(target, "chat", lambda turns: seen.append([t["content"] for t in turns]) or None)
    cell, _found = measured(target, some=OWN[:2])
    second = [talk for talk in seen if len(talk) == 3]
    assert [talk[0] for talk in second] == [q["turns"][0] for q in OWN[:2]]
    assert [talk[2] for talk in second] == [q["turns"][1] for q in OWN[:2]]
    answers = {s["row"]: s["data"]["response"] for s in cell.samples}
    assert [talk[1] for talk in second] == [answers[f"{q['id']}#1/0"] for q in OWN[:2]]
    assert len(answers) == 4


def test_a_judge_grades_and_its_abstentions_are_no_zeros(target):
    asked = []

    def rule(prompt):
        asked.append(prompt)
        return Reply("hm") if len(asked) == 1 else Reply("Grade: [[10]]")

    cell, found = measured(target, judge=Judge("rule", rule), some=OWN[4:8], turns=1)
    assert found["judge_abstentions"] == 0.25
    assert found["judge_score"] == 10
    assert found["judge_of_right"] == found["judge_of_empty"] == 10, "this one is worth nothing, and it shows"
    assert "Right answer" in asked[0], "reasoning and mathematics are guided"
    assert sum("grade" in s["data"] for s in cell.samples) == 4


def test_a_judge_that_never_answers_leaves_no_score(target):
    _, found = measured(target, judge=Judge("down", lambda p: Reply("", "HTTP 500")), some=OWN[:3], turns=1)
    assert found["judge_abstentions"] == 1
    assert "judge_score" not in found
    assert found["answer_tokens"] > 0, "the answers are kept"


def test_repetition_by_hand():
    assert diversity.repetition("a b c d") == 0
    assert diversity.repetition("a a a a a a a") == 0.75
    assert diversity.repetition("a b") == 0
    assert diversity.distinct(["a b c", "a b d"]) == 3 / 4
    assert diversity.distinct([""]) is None
    same = diversity.self_bleu(["the cat sat on the mat", "the cat sat on the mat", "dogs bark loudly at night often"])
    assert same[0] == same[1] == pytest.approx(1)
    assert same[2] < 0.2
    assert diversity.self_bleu(["", "a b"])[0] == 0
