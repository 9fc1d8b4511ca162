"""Mathematical problems from question to number: right answers are right, the pipeline is proved, nothing is lost."""

import json

import pytest
import tiny_models

from decodathlon.harness import decoder as decoders
from decodathlon.harness.datasets import mathematics
from decodathlon.harness.decoder import Completion, Cost
from decodathlon.harness.measure import problems
from decodathlon.harness.measure.grading import Grader
from decodathlon.harness.registry import load_builtins, registry
from decodathlon.harness.results.lines import Lines
from decodathlon.harness.suite import Cell
from decodathlon.harness.targets.transformers import TransformersTarget

load_builtins()
OWN = mathematics.generated((*mathematics._INTEGERS, mathematics._fraction, mathematics._factors), 12, 7)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    import transformers

    folder = tiny_models.save_folder(tmp_path_factory.mktemp("model"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.config.max_position_embeddings = 4096
    return TransformersTarget(model, transformers.AutoTokenizer.from_pretrained(folder), name="bytes")


def a_cell(target, lines=None, spec="temperature"):
    cell = Cell(
        suite=registry.get("suite", "math500"), decoder=decoders.build(spec), target=target, rivals={}, scale="smoke",
        slice="all", seed=0, texts={}, lines=lines,
    )  # fmt: skip
    cell.sizes = {"tokens": 8, "samples": 4}
    return cell


def reported(cell):
    return {m["metric"]: m["value"] for m in cell.metrics}


def test_answers_that_say_the_same_in_other_words_are_one(target):
    with Grader() as grader:
        different = {}
        texts = ["1/2", "3", "0.5", "3"]
        said = [problems._first_like(grader, different, i, grader.same("1/2", t)) for i, t in enumerate(texts)]
        assert said == [0, 1, 0, 1]
        # math-verify takes `3,4` and `4,3` for the same, and only the first for the pair (3,4)
        different, texts = {}, ["3,4", "4,3", "4,3"]
        said = [problems._first_like(grader, different, i, grader.same("(3,4)", t)) for i, t in enumerate(texts)]
    assert said == [0, 1, 1], "a right answer and a wrong one never say the same"


def test_particles_leave_how_often_they_resampled(target, monkeypatch):
    cell = a_cell(target)
    trace = [{"ess": 0.9, "resampled": False}, {"ess": 0.4, "resampled": True}, {"level": 3}]

    def generate(self, target, prompts, limits, rng):
        return [Completion([1], "stop", text="?", trace=trace) for _ in prompts]

    monkeypatch.setattr(type(cell.decoder), "generate", generate)
    problems.measure(cell, OWN[:1])
    assert (cell.samples[0]["data"]["resample_count"], cell.samples[0]["data"]["final_ess"]) == (1, 0.4)


def answering(monkeypatch, cell, right):
    """A decoder that solves the problems whose number `right` says, by the first two of its four answers."""
    drawn = []

    def generate(self, target, prompts, limits, rng):
        found = []
        for prompt, key in zip(prompts, rng.keys, strict=True):
            question, number = key.rpartition("/")[::2]
            place = [q["id"] for q in OWN].index(question)
            answer = OWN[place]["answer"] if right(place) and int(number) < 2 else "-1"
            tokens = target.encode(f"So \\boxed{{{answer}}}.", special=False)
            text = target.decode(tokens)
            found.append(
                Completion(tokens, "stop", log_prob=-float(int(number)), text=text, cost=Cost(len(tokens), 99))
            )
            drawn.append(key)
            assert "put your final answer within" in target.decode(prompt)
        return found

    monkeypatch.setattr(type(cell.decoder), "generate", generate)
    return drawn


def test_what_is_right_is_counted_right(target, monkeypatch):
    cell = a_cell(target)
    answering(monkeypatch, cell, lambda place: place < 6)
    problems.measure(cell, OWN)
    found = reported(cell)
    assert found["oracle"] == 1
    assert found["pass_at_1"] == pytest.approx(0.25)
    assert found["pass_at_k"] == pytest.approx(0.5)
    assert found["maj_at_k"] == pytest.approx(0.25), "two against two: the tie is shared"
    assert found["best_of_k"] == pytest.approx(0.5), "its first answer is its likeliest"
    assert found["answered"] == 1
    assert found["samples"] == 4
    assert found["grader_timeouts"] == 0
    sample = cell.samples[0]["data"]
    assert set(sample) >= {"problem_idx", "ground_truth", "response", "extracted_answer", "correct", "timing"}
    assert set(sample["timing"]) == {"total", "generation", "scoring"}


def test_a_model_that_solves_nothing_has_an_interval_and_no_answers(target):
    cell = a_cell(target)
    problems.measure(cell, OWN[:3])
    found = reported(cell)
    assert found["pass_at_1"] == 0
    assert found["answered"] == 0
    assert {s["data"]["trouble"] for s in cell.samples} == {"no box"}


def test_a_pipeline_that_calls_right_answers_wrong_fails_its_cell(target, monkeypatch):
    cell = a_cell(target)
    monkeypatch.setattr(type(target), "decode", lambda self, tokens: "x")
    with pytest.raises(RuntimeError, match=r"the right answer to own-0 \(12 of 12\) was graded as wrong"):
        problems.measure(cell, OWN)
    assert reported(cell) == {"oracle": 0}


def test_a_pipeline_that_calls_empty_answers_right_fails_its_cell(target, monkeypatch):
    from decodathlon.harness.measure.grading import Verdict

    monkeypatch.setattr(Grader, "grade", lambda self, gold, text: Verdict(True, text))
    with pytest.raises(RuntimeError, match="an empty answer to own-0 was graded as right"):
        problems.measure(a_cell(target), OWN)


def test_every_answer_is_a_line_with_its_prompt(target, tmp_path, monkeypatch):
    lines = Lines(tmp_path / "cell.lines.jsonl")
    cell = a_cell(target, lines)
    answering(monkeypatch, cell, lambda place: True)
    problems.measure(cell, OWN[:2])
    lines.close()
    kept = [json.loads(line) for line in (tmp_path / "cell.lines.jsonl").read_text().splitlines()]
    assert len(kept) == 8
    assert OWN[0]["problem"] in kept[0]["prompt"]
    again = a_cell(target, Lines(tmp_path / "cell.lines.jsonl"))
    drawn = answering(monkeypatch, again, lambda place: False)
    problems.measure(again, OWN[:2])
    assert drawn == []
    assert reported(again)["pass_at_1"] == reported(cell)["pass_at_1"] == 0.5
