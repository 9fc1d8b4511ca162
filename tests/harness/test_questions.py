"""Question sets: where they come from, what is kept for tuning, and what is wrong with a file."""

import json

import pytest

from decodathlon.harness import datasets
from decodathlon.harness.datasets import mathematics, questions
from decodathlon.harness.datasets.base import registry
from decodathlon.harness.errors import MissingError

SETS = ["aime25", "math-500", "mt-bench", "truthfulqa-choice", "truthfulqa-generation"]


def problem(i, **more):
    return {"id": f"p{i}", "problem": f"What is {i} + 1?", "answer": str(i + 1), "subject": "sums", "level": 1, **more}


def write(folder, rows, name="math-500.test.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_fixed_part_is_kept_for_tuning_and_never_reported(tmp_path):
    write(tmp_path, [problem(i) for i in range(60)])
    test, validation = (datasets.find("math-500", s, str(tmp_path)) for s in ("test", "validation"))
    assert (len(test.rows), len(validation.rows)) == (10, 50)
    assert not set(test.rows) & set(validation.rows)
    assert test.name.startswith("unverified-math-500")
    # another order of the lines, other ids and fields that nobody reads change nothing
    write(tmp_path, [problem(i, id=f"x{i}", note="?") for i in reversed(range(60))])
    assert datasets.find("math-500", "test", str(tmp_path)).rows == test.rows
    first = questions.read(test, 1)[0]
    assert set(first) == {"id", "problem", "answer", "subject", "level"}
    assert first["id"].startswith("math-500-")


def test_the_real_sets_have_their_names_and_sizes(data_folder):
    sizes = {"aime25": (30, 0), "math-500": (450, 50), "mt-bench": (80, 0)}
    sizes |= {"truthfulqa-choice": (767, 50), "truthfulqa-generation": (767, 50)}
    for name, expected in sizes.items():
        found = {split: datasets.find(name, split, str(data_folder)) for split in datasets.splits(name)}
        assert {text.name for text in found.values()} == {name}
        assert tuple(len(found[s].rows) if s in found else 0 for s in ("test", "validation")) == expected


def test_the_two_forms_of_truthfulqa_keep_the_same_questions_for_tuning(data_folder):
    kept = [
        {q["question"].strip() for q in questions.read(datasets.find(name, "validation", str(data_folder)))}
        for name in ("truthfulqa-choice", "truthfulqa-generation")
    ]
    assert kept[0] == kept[1]


def test_references_come_from_the_file_beside_the_questions(tmp_path, data_folder):
    found = questions.read(datasets.find("mt-bench", "test", str(data_folder)))
    assert sum(bool(q["reference"]) for q in found) == 30
    assert all(len(q["reference"]) in (0, 2) for q in found)
    (tmp_path / "mt_bench.questions.jsonl").write_bytes((data_folder / "mt_bench.questions.jsonl").read_bytes())
    bare = datasets.find("mt-bench", "test", str(tmp_path))
    assert not any(q["reference"] for q in questions.read(bare))
    assert bare.name == "mt-bench", "as the hub has it"
    (tmp_path / "mt_bench.reference_gpt4.jsonl").write_text("{}\n")
    with pytest.raises(MissingError, match=r"reference_gpt4.jsonl, line 1 is no reference answer"):
        datasets.find("mt-bench", "test", str(tmp_path))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{"], "line 1 is torn"),
        (["3"], "line 1 is no JSON object"),
        ([json.dumps(problem(1)), json.dumps(problem(2, id="p1"))], "lines 1 and 2 have the same id 'p1'"),
        ([json.dumps(problem(1, answer=2))], "line 1: 'answer' must be a str"),
        ([json.dumps({"problem": "?"})], "line 1: 'id' must be a str"),
        ([""], "has no text"),
    ],
)
def test_what_is_wrong_with_a_file_is_named_by_its_line(tmp_path, rows, message):
    (tmp_path / "math-500.test.jsonl").write_text("\n".join(rows) + "\n")
    with pytest.raises(MissingError, match=message):
        datasets.find("math-500", "test", str(tmp_path))


def test_a_set_too_small_to_keep_anything_is_not_reported(tmp_path):
    write(tmp_path, [problem(i) for i in range(50)])
    with pytest.raises(MissingError, match="has no text"):
        datasets.find("math-500", "test", str(tmp_path))


@pytest.mark.parametrize("name", SETS)
def test_every_set_has_questions_of_our_own_under_another_name(name):
    data = registry.get("dataset", name)
    for split in data.splits:
        text = data.stand_in(split)
        assert text.name == f"own-{name}"
        assert text.source == "stand-in"
        assert len(set(text.rows)) == len(text.rows) > 0


def test_our_own_problems_are_what_they_were_and_their_answers_right():
    once = mathematics.generated(mathematics._INTEGERS, 40, 3)
    assert once == mathematics.generated(mathematics._INTEGERS, 40, 3)
    assert len({q["problem"] for q in once}) == 40
    for q in once:
        if q["subject"] == "linear":
            a, rest = q["problem"].split("$")[3].split("x + ")
            b, c = rest.split(" = ")
            assert int(a) * int(q["answer"]) + int(b) == int(c)
        if q["subject"] == "remainder":
            base, power = q["problem"].split("$")[1].split("^")
            assert int(base) ** int(power.strip("{}")) % int(q["problem"].split("$")[3]) == int(q["answer"])
