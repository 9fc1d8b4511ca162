"""Open questions: likelihoods of references against a plain sum, repetition by hand, judges and their abstentions."""

import math
import time

import pytest
import tiny_models

from decodathlon.harness import decoder as decoders
from decodathlon.harness.datasets import questions
from decodathlon.harness.decoder import Completion
from decodathlon.harness.judges import Judge, Reply
from decodathlon.harness.measure import asking, diversity, open_answers, statistics
from decodathlon.harness.registry import load_builtins, registry
from decodathlon.harness.results.lines import Lines
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


def measured(target, spec="temperature", judge=None, some=OWN, versus=None, lines=None, timeout=None, **sizes):
    cell = Cell(
        suite=registry.get("suite", "mt_bench"), decoder=decoders.build(spec), target=target, rivals={}, scale="smoke",
        slice="all", seed=0, texts={}, judge=judge, versus=versus and decoders.build(versus), lines=lines,
        timeout=timeout,
    )  # fmt: skip
    cell.sizes = {"turns": 2, "tokens": 6, **sizes}
    cell.begin()
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
    assert found["judge_of_right"] == found["judge_of_empty"] == 10
    assert any("its grades say nothing" in note for note in cell.notes), "this one is worth nothing, and it shows"
    assert "Right answer" in asked[0], "reasoning and mathematics are guided"
    assert sum("grade" in s["data"] for s in cell.samples) == 4


def test_a_judge_that_never_answers_leaves_no_score(target):
    _, found = measured(target, judge=Judge("down", lambda p: Reply("", "HTTP 500")), some=OWN[:3], turns=1)
    assert found["judge_abstentions"] == 1
    assert "judge_score" not in found
    assert found["answer_tokens"] > 0, "the answers are kept"


def longer(prompt):
    """A judge that prefers the longer answer, wherever it stands, and gives every answer a 5."""
    if "### Assistant A" not in prompt:
        return Reply("[[5]]")
    first, second = (prompt.partition(f"### Assistant {x}\n")[2].partition("\n\n")[0] for x in "AB")
    return Reply("[[A]]" if len(first) > len(second) else "[[B]]" if len(second) > len(first) else "[[tie]]")


def answering(monkeypatch, spec, text):
    """A decoder that always says the same."""

    def generate(self, target, prompts, limits, rng):
        tokens = target.encode(text, special=False)
        return [Completion(tokens, "stop", text=text) for _ in prompts]

    monkeypatch.setattr(type(decoders.build(spec)), "generate", generate)


def test_a_judge_compares_with_the_baseline_in_both_orders(target, monkeypatch, tmp_path):
    answering(monkeypatch, "temperature", "A long answer indeed")
    answering(monkeypatch, "beam", "Short")
    lines = Lines(tmp_path / "lines.jsonl")
    cell, found = measured(target, "temperature", Judge("rule", longer), OWN[:8], "beam[width=2]", lines, turns=2)
    assert found["judge_win_rate(beam[width=2])"] == 1
    assert found["judge_pair_abstentions"] == found["judge_by_place"] == 0
    (row,) = [m for m in cell.metrics if m["metric"].startswith("judge_win_rate")]
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(statistics.wilson(8, 8)[1:3])
    assert sum("/against beam" in s["row"] for s in cell.samples) == 8
    assert sum(s["data"].get("response") == "Short" for s in cell.samples) == 0, "the row is this decoder's"
    lines.close()
    kept = Lines(tmp_path / "lines.jsonl")
    answers = [row for row in kept.earlier if not row.startswith("judge ")]
    assert len(answers) == 32, "two decoders, eight questions, two turns"
    monkeypatch.setattr(type(decoders.build("beam")), "generate", None)  # a resumed run asks for nothing
    monkeypatch.setattr(type(decoders.build("temperature")), "generate", None)
    _, again = measured(target, "temperature", Judge("rule", None), OWN[:8], "beam[width=2]", kept, turns=2)
    assert {k: v for k, v in again.items() if "seconds" not in k} == {
        k: v for k, v in found.items() if "seconds" not in k
    }


@pytest.mark.parametrize(
    ("says", "points", "abstentions", "by_place"),
    [("[[A]]", 0.5, 0, 1), ("[[tie]]", 0.5, 0, 0), ("neither", None, 1, 0)],
)
def test_a_judge_that_does_not_read_shows(target, says, points, abstentions, by_place):
    judge = Judge("rule", lambda prompt: Reply(says))
    cell, found = measured(target, "temperature", judge, OWN[:6], "beam[width=2]", turns=1)
    assert any("it does not read" in note for note in cell.notes) == bool(by_place)
    assert found.get("judge_win_rate(beam[width=2])") == points
    assert (found["judge_pair_abstentions"], found["judge_by_place"]) == (abstentions, by_place)


def test_a_slow_judge_costs_no_answer(target, monkeypatch):
    """The time of the cell is over when the judge begins: what was measured by then stays."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def slow(prompt):
        now[0] += 100.0
        return Reply("Grade: [[5]]")

    cell = measured(target, judge=Judge("slow", slow), some=OWN[:4], versus="beam[width=2]", turns=1, timeout=150.0)[0]
    found = {m["metric"]: m for m in cell.metrics}
    assert found["judge_score"]["n"] < 4
    assert found["answer_tokens"]["n"] == 4
    assert cell.late


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


def test_both_turns_of_a_talk_are_one_unit(target):
    judge = Judge("rule", lambda prompt: Reply("Grade: [[4]]" if "mission" in prompt else "Grade: [[8]]"))
    cell, _ = measured(target, judge=judge, some=OWN[:8], turns=2)
    rows = {m["metric"]: m for m in cell.metrics}
    for metric in ("judge_score", "repetition", "cut_answers", "self_bleu", "answer_tokens"):
        assert len(rows[metric]["units"]["rows"]) == 8, metric
        assert rows[metric]["units"]["counts"] == [2] * 8
