"""The page Profile, and the trace on the command line."""

import json

import pytest
from board_pages import said
from made_results import PROFILE, demo

from decodathlon.harness.commands.command import main
from decodathlon.harness.results import profiles
from decodathlon.leaderboard import charts


@pytest.fixture
def results(tmp_path):
    return demo(tmp_path / "r.duckdb")


def test_phases_and_both_speeds_are_shown(opened, results):
    at = opened(results, "profile")
    assert not at.exception
    text = said(at)
    assert "53.3%" not in text
    # 0.45 of 0.75 s; 0.15; 0.1; 0.05
    for phase, share in (("forward", "60.0%"), ("sampler", "20.0%"), ("prefill", "13.3%"), ("host", "6.7%")):
        assert phase in text
        assert share in text
    assert "took 0.5 s, and under the profiler 0.75 s (1.50 times as long)" in text


def test_flame_graphs_have_names_colours_and_words():
    boxes = profiles.flame(PROFILE["time"])
    drawn = json.dumps(charts.flame(boxes, "s").to_dict(), ensure_ascii=False)
    assert "generate › forward › linear › mm" in drawn
    assert '"share": "53.3%"' in drawn
    assert "400 ms" in drawn
    assert charts.flame_in_words(boxes, "s").startswith("Most by themselves: generate forward linear mm 400 ms; ")
    assert "2.86 MiB" in json.dumps(charts.flame(profiles.flame(PROFILE["memory"]), "B").to_dict())


def test_a_trace_is_exported(results, tmp_path, capsys):
    from decodathlon.harness.results import store

    with store.connect(results) as connection:
        ((cell,),) = connection.execute("SELECT cell_id FROM sample WHERE row = 'profile'").fetchall()
    out = tmp_path / "trace.json"
    assert main(["export", "--results", str(results), "--trace", cell, "--out", str(out)]) == 0
    assert [e["cat"] for e in json.loads(out.read_text())["traceEvents"]] == ["host", "forward", "forward"]
    assert main(["export", "--results", str(results), "--trace", "last", "--out", str(tmp_path / "last.json")]) == 0
    assert (tmp_path / "last.json").read_text() == out.read_text()
    assert main(["export", "--results", str(results), "--trace", "throughput-0"]) != 0
    assert f"no profile of that cell is stored; there are {cell}" in capsys.readouterr().err
