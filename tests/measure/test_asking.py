"""One protocol for all answers: prompts, streams, lengths, costs, and going on where an earlier attempt ended."""

import itertools
import json

import pytest
import tiny_models
import torch

from decodathlon.harness import decoder as decoders
from decodathlon.harness.decoder import Completion
from decodathlon.harness.errors import UnsupportedError
from decodathlon.harness.measure import asking
from decodathlon.harness.registry import load_builtins, registry
from decodathlon.harness.results.lines import Lines
from decodathlon.harness.suite import Cell
from decodathlon.harness.targets import toy
from decodathlon.harness.targets.transformers import TransformersTarget

load_builtins()


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    import transformers

    folder = tiny_models.save_folder(tmp_path_factory.mktemp("model"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return TransformersTarget(model, transformers.AutoTokenizer.from_pretrained(folder), name="bytes")


def a_cell(target, spec="temperature", lines=None):
    return Cell(
        suite=registry.get("suite", "math500"), decoder=decoders.build(spec), target=target, rivals={}, scale="smoke",
        slice="all", seed=0, texts={}, lines=lines,
    )  # fmt: skip


def prompts(target, count=5):
    return {f"q{i}": asking.prompt(target, [("user", "?" * (i + 1))]) for i in range(count)}


def test_a_model_without_a_template_is_asked_plainly(target):
    assert asking.protocol(target) == "plain"
    tokens = asking.prompt(target, [("user", "Why?"), ("assistant", "So."), ("user", "And?")])
    assert target.decode(tokens) == "Question: Why?\n\nAnswer: So.\n\nQuestion: And?\n\nAnswer:"


def test_a_model_with_a_template_is_asked_by_it(target, monkeypatch):
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    monkeypatch.setattr(target.tokenizer, "chat_template", template)
    assert asking.protocol(target) == "chat template"
    assert target.decode(asking.prompt(target, [("user", "Why?")])) == "<user>Why?<a>"


def test_a_target_without_text_is_unsupported():
    with pytest.raises(UnsupportedError, match="needs text"):
        asking.prompt(toy.Ising(4, 0.2), [("user", "?")])


def test_batches_do_not_change_an_answer_and_every_answer_has_a_stream_of_its_own(target):
    every = {}
    for rows in (1, 4, 64):
        found = [
            a for some in asking.ask(a_cell(target), prompts(target), tokens=6, samples=3, rows=rows) for a in some
        ]
        every[rows] = {a.row: a.text for a in found}
    assert every[1] == every[4] == every[64]
    assert len(every[1]) == 15
    assert len({every[1][f"q0/{i}"] for i in range(3)}) > 1


def test_greedy_search_answers_once(target):
    found = list(asking.ask(a_cell(target, "greedy"), prompts(target), tokens=4, samples=3))
    assert [len(some) for some in found] == [1] * 5


def test_what_comes_after_the_next_question_is_no_answer(target, monkeypatch):
    cell = a_cell(target)
    text = "42\n\nQuestion: Why?\n\nAnswer: 43"
    told = decoders.Completion(tokens=[1, 2], stop_reason="length", text=text)
    monkeypatch.setattr(
        type(cell.decoder), "generate", lambda self, target, prompts, limits, rng: [told] * len(prompts)
    )
    ((answer,),) = asking.ask(cell, prompts(target, 1), tokens=4)
    assert answer.text == "42"


def test_a_resumed_cell_draws_only_what_is_missing(target, tmp_path):
    path = tmp_path / "cell.lines.jsonl"
    whole = list(asking.ask(a_cell(target), prompts(target), tokens=6, samples=2, rows=2))
    first = Lines(path)
    begun = asking.ask(a_cell(target, lines=first), prompts(target), tokens=6, samples=2, rows=2)
    assert len(list(itertools.islice(begun, 2))) == 2
    first.close()
    path.write_bytes(path.read_bytes() + b'{"row": "q3/0", "te')  # killed while it wrote
    again = Lines(path)
    assert len(again.earlier) >= 4
    calls = []
    cell = a_cell(target, lines=again)
    generate = type(cell.decoder).generate

    def counted(self, target, prompts, *rest):
        calls.append(len(prompts))
        return generate(self, target, prompts, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(cell.decoder), "generate", counted)
        found = list(asking.ask(cell, prompts(target), tokens=6, samples=2, rows=2))
    assert [[a.text for a in some] for some in found] == [[a.text for a in some] for some in whole]
    assert sum(calls) == 10 - len(again.earlier)
    again.close()
    assert len(Lines(path).earlier) == 10


def test_a_short_context_shortens_answers_or_is_unsupported(target, monkeypatch):
    cell = a_cell(target)
    longest = max(map(len, prompts(target).values()))
    monkeypatch.setattr(target, "context_length", longest + 20)
    found = [a for some in asking.ask(cell, prompts(target), tokens=500) for a in some]
    assert max(a.tokens for a in found) <= 20
    assert cell.notes == ["answers end after 20 tokens, not 500: the model reads " + str(longest + 20)]
    monkeypatch.setattr(target, "context_length", longest + 2)
    with pytest.raises(UnsupportedError, match="needs a context of"):
        list(asking.ask(cell, prompts(target), tokens=500))


def test_costs_are_those_of_the_answers(target):
    found = [a for some in asking.ask(a_cell(target), prompts(target), tokens=6, samples=2) for a in some]
    costs = asking.costs(found, target)
    tokens = torch.tensor([float(a.tokens) for a in found])
    assert costs["answer_tokens"].estimate().value == pytest.approx(float(tokens.mean()))
    assert costs["answer_calls"].estimate().value == pytest.approx(float(tokens.mean()))
    positions = costs["answer_positions"].estimate().value
    assert costs["answer_flops"].estimate().value == pytest.approx(2 * target.parameters * positions)


def test_a_kept_answer_to_another_prompt_is_not_taken(target, tmp_path):
    path = tmp_path / "lines.jsonl"
    lines = Lines(path)
    list(asking.ask(a_cell(target, lines=lines), {"q": [5, 6, 7]}, tokens=4))
    lines.close()
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(kept | {"text": "forged", "prompt": "another"}) + "\n")
    ((answer,),) = list(asking.ask(a_cell(target, lines=Lines(path)), {"q": [5, 6, 7]}, tokens=4))
    assert answer.text == kept["text"]


def test_an_answer_by_a_chat_template_may_ask_a_question_itself(target, monkeypatch):
    said = "Quiz:\n\nQuestion: what is 3 + 4?"
    cell = a_cell(target)
    drawn = [Completion([1], "stop", text=said)]
    monkeypatch.setattr(type(cell.decoder), "generate", lambda self, *given: drawn)
    ((answer,),) = list(asking.ask(cell, {"q": [5, 6, 7]}, tokens=4))
    assert answer.text == "Quiz:"
    monkeypatch.setattr(target, "chat", lambda turns: [1, 2, 3])
    ((answer,),) = list(asking.ask(cell, {"q": [5, 6, 7]}, tokens=4))
    assert answer.text == said
