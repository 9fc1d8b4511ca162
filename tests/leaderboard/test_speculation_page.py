"""The page Speculation: measured beside predicted speed, and sums that must agree."""

import pytest
from board_pages import said
from made_results import cell, day, metric_row, speed_metrics, write_run

from decodathlon.harness.measure import cycles
from decodathlon.harness.measure.cycles import Traced
from decodathlon.harness.results import store
from decodathlon.leaderboard import draft_charts


def answers(accepted):
    each = {"drafted": 4, "draft_s": 0.1, "verify_s": 0.3, "keep_s": 0.1}
    return [Traced(f"pair-{i}-row-0", list(range(20)), [each | {"accepted": n} for n in accepted]) for i in range(7)]


@pytest.fixture
def results(tmp_path):
    made = answers([4, 2, 0, 2])
    metrics = [metric_row(name, found) for name, found in cycles.metrics(made).items()]
    predicted = {"metric": "ratio_predicted", "value": 1.25, "unit": "1", "better": "none", "ci_low": None,
                 "ci_high": None, "n": 7, "baseline": "greedy", "units": None}  # fmt: skip
    drafts = {"accepted": cycles.histogram(made), "stays": cycles.by_position(made), "cycle": cycles.mean_seconds(made)}
    one = cell("spec", "throughput", "prompt-lookup", [*speed_metrics(1, 1.3), *metrics, predicted], started=day(20),
               slice="rag", samples=[{"row": "drafts", "data": drafts}])  # fmt: skip
    run = write_run(tmp_path / "runs", "spec", [one], started=day(20))
    store.ingest(tmp_path / "r.duckdb", [run])
    return tmp_path / "r.duckdb"


def test_measured_and_predicted_speed_stand_side_by_side(opened, results):
    at = opened(results, "speculation")
    assert not at.exception
    text = said(at)
    for part in ("prompt-lookup", "rag", "1.25", "ratio_predicted", "tau"):
        assert part in text
    assert (
        "28 cycles; 56 drafted tokens stayed, and each cycle made one more: 3 tokens per cycle, which is `tau`." in text
    )
    assert "60.0%" in text  # of a cycle goes into the verify pass


def test_charts_show_places_and_counts():
    assert [r["stays"] for r in draft_charts.by_place([0.9, 0.5]).to_dict()["data"]["values"]] == [0.9, 0.5]
    shares = [r["share"] for r in draft_charts.histogram([1, 0, 3]).to_dict()["data"]["values"]]
    assert shares == [0.25, 0, 0.75]
