"""Guesses of what a cell will take, and `decodathlon plan` that shows them."""

from dataclasses import replace

import pytest

from decodathlon.harness.cells import CellSpec
from decodathlon.harness.commands.command import main
from decodathlon.harness.results import environment, past
from decodathlon.harness.results.past import Past, Row

HERE = "EPYC, 2 threads"
ROW = Row("math500", "all", "quick", "top-p[p=0.9]", "m", HERE, 10.0, 4.0, None)
SPEC = CellSpec("math500", 1, "all", "top-p[p=0.9]", "m", "quick", 0)


def test_the_nearest_rows_judge():
    rows = [
        ROW, ROW._replace(seconds=12.0), ROW._replace(seconds=50.0), ROW._replace(decoder="top-p", seconds=20.0),
        ROW._replace(decoder="greedy", seconds=1.0), ROW._replace(hardware="H200", seconds=0.1),
    ]  # fmt: skip
    known = Past(rows, HERE)
    assert known.of(SPEC) == past.Guess(12.0, "this cell", 3)
    assert known.of(replace(SPEC, decoder="top-p[p=0.5]")) == past.Guess(16.0, "its decoder with other parameters", 4)
    assert known.of(replace(SPEC, decoder="min-p")) == past.Guess(12.0, "other decoders", 5)
    assert known.of(replace(SPEC, model="other")) == past.Guess(11.0, "other models", 6)
    assert known.of(replace(SPEC, suite="aime25")) is None
    assert known.of(replace(SPEC, sizes=(("tokens", 9),))) is None  # another setting takes another time


def test_what_is_unsupported_takes_no_time_and_says_nothing_of_others():
    known = Past([ROW._replace(seconds=0.0, supported=False), ROW._replace(decoder="greedy", seconds=9.0)], HERE)
    assert known.of(SPEC) == past.Guess(0.0, "this cell", 1)
    assert known.of(replace(SPEC, decoder="min-p")) == past.Guess(9.0, "other decoders", 1)


def test_rows_of_other_hardware_count_where_there_are_no_others():
    known = Past([ROW._replace(hardware="H200", seconds=3.0)], HERE)
    assert known.of(SPEC) == past.Guess(3.0, "other hardware", 1)
    assert known.of(replace(SPEC, decoder="min-p")) == past.Guess(3.0, "other models", 1)


def test_memory_is_the_greatest_that_was_seen():
    others = [ROW._replace(decoder="top-p", memory=7.0), ROW._replace(decoder="beam", memory=9.0)]
    known = Past([ROW._replace(memory=5.0), *others])
    assert known.memory(SPEC) == 5.0
    assert known.memory(replace(SPEC, decoder="top-p[p=0.1]")) == 7.0
    assert known.memory(replace(SPEC, decoder="new")) == 9.0
    assert known.memory(replace(SPEC, model="other")) is None
    assert known.loading("m") == 4.0
    assert known.loading("other") == 0.0


def test_plan_speaks_of_the_published_rows(capsys):
    if not (environment.ROOT / "results.duckdb").exists():
        pytest.skip("no results here")
    published = str(environment.ROOT / "results.duckdb")
    two = ["--decoder", "greedy", "--decoder", "top-p"]
    assert main(["plan", *two, "--suite", "throughput", "--results", published]) == 0
    out = capsys.readouterr().out
    assert "4 cells of 2 decoders" in out
    assert "this cell" in out
    assert "GiB" in out
    assert main(["plan", "--suite", "throughput", "--gpus", "16", "--sweep", "--results", published]) == 0
    assert "on 16 workers" in capsys.readouterr().out


def test_plan_without_rows_says_what_to_do(capsys, tmp_path):
    assert main(["plan", "--decoder", "greedy", "--suite", "math500", "--results", str(tmp_path / "none.duckdb")]) == 0
    out = capsys.readouterr().out
    assert "nothing: never measured" in out
    assert "nothing like them was ever measured at quick" in out
    assert main(["plan", "--decoder", "gredy"]) == 2
    # neither the model nor a GPU is here yet
    ahead = ["--model", "qwen3-8b", "--device", "cuda", "--gpus", "8", "--suite", "math500"]
    assert main(["plan", *ahead, "--results", str(tmp_path / "none.duckdb")]) == 0
    assert main(["plan", "--gpus", "0", "--decoder", "greedy"]) == 2
