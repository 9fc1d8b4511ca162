"""What the board asks: settings never mix, the newest cell counts whole, doubts are named, nothing is left out."""

from dataclasses import replace

import pytest
from made_results import QUICK, SPEED, TEXT, cell, day, metric_row, speed_metrics, text_metrics, write_run

from decodathlon.harness.measure.observations import Observations
from decodathlon.harness.results import shards, store
from decodathlon.leaderboard import queries
from decodathlon.leaderboard.queries import Column, Setting

duckdb = pytest.importorskip("duckdb")

SMOKE = replace(QUICK, scale="smoke")


def by_decoder(cells, column):
    return {c.decoder: c for c in cells if c.column == column}


def test_the_setting_measured_last_comes_first(asked):
    assert [s for s, _ in queries.settings(asked)] == [QUICK, SMOKE]


def test_the_board_does_not_open_on_toys(tmp_path):
    real = cell("r1", "wikitext2", "it", text_metrics(1), started=day(1), slice="joined")
    toy = cell("r2", "ising", "it", started=day(2), slice="ring-4",
               model={"name": "toy", "dtype": "float64", "device": "cpu", "threads": 2}, data={})  # fmt: skip
    runs = [write_run(tmp_path, "r1", [real], started=day(1)), write_run(tmp_path, "r2", [toy], started=day(2))]
    store.ingest(tmp_path / "r.duckdb", runs)
    store.snapshot(tmp_path / "r.duckdb", tmp_path / "copy.duckdb", queries.prepare)
    with duckdb.connect(str(tmp_path / "copy.duckdb")) as connection:
        assert [s.model for s, _ in queries.settings(connection)] == ["tiny", "toy"]


def test_a_setting_holds_its_own_cells_and_no_others(asked):
    cells = queries.cells(asked, QUICK)
    assert {c.decoder for c in cells} == {
        "greedy", "top-p", "top-p[p=0.5]", "top-p[p=0.8]", "hf-generate", "boom[x=1]", "mine", "typical", "temperature",
        "turbo", "late",
    }  # fmt: skip
    assert {c.decoder for c in queries.cells(asked, SMOKE)} == {"elsewhere"}
    assert {c.decoder for c in queries.cells(asked, QUICK, name="top-p")} == {"top-p", "top-p[p=0.5]", "top-p[p=0.8]"}


def test_the_newest_cell_counts_with_all_its_metrics(asked):
    one = by_decoder(queries.cells(asked, QUICK), SPEED)["top-p"]
    assert one.run_id == "demo-3"
    assert set(one.measured.metrics) == {"ratio_to_self", "ratio_to_greedy", "tokens_per_s", "peak_memory_bytes"}
    assert one.measured.metrics["ratio_to_greedy"].estimate.value == pytest.approx(0.94, abs=0.02)
    assert len(one.measured.metrics["ratio_to_greedy"].units.rows) == 10


def test_fewer_metrics_can_be_asked_for(asked):
    one = by_decoder(queries.cells(asked, QUICK, ("tokens_per_s",)), SPEED)["top-p"]
    assert set(one.measured.metrics) == {"tokens_per_s"}


def test_doubts_and_remarks_are_named(asked):
    cells = queries.cells(asked, QUICK)
    assert by_decoder(cells, SPEED)["mine"].doubts == ("changed code",)
    (typical,) = [c for c in cells if c.decoder == "typical"]
    assert (typical.column.dataset, typical.doubts) == ("prose", ("stand-in data", "changed code"))
    assert by_decoder(cells, SPEED)["temperature"].remarks == ("contended: by a neighbour",)
    assert by_decoder(cells, TEXT)["late"].remarks == ("partial: after 9 s 12 of 24 units were measured",)
    assert by_decoder(cells, SPEED)["greedy"].doubts == ()


def test_failures_keep_their_words(asked):
    cells = queries.cells(asked, QUICK)
    (boom,) = [c for c in cells if c.decoder == "boom[x=1]"]
    assert (boom.column.dataset, boom.measured.reason) == ("", "ValueError: <b>boom</b>")
    assert by_decoder(cells, TEXT)["hf-generate"].measured.status == "unsupported"
    (one,) = queries.failures(asked, "boom")
    assert (one["status"], one["log"]) == ("failed", "it said & died\n")
    assert queries.failures(asked, "greedy") == []


def test_columns_and_baselines(asked):
    found = queries.columns(asked, QUICK)
    assert set(found) == {SPEED, TEXT, Column("wikitext2", 1, "joined", "prose")}
    assert found[TEXT] == ["coverage", "ppl_epsilon"]
    assert queries.baselines(asked, QUICK) == {"ratio_to_greedy": "greedy"}


def test_who_was_measured_only_elsewhere(asked):
    (one,) = queries.elsewhere(asked, QUICK)
    assert one["name"] == "elsewhere"
    assert Setting(**one["at"]) == SMOKE


def test_runs_describe_what_they_measured(asked):
    suites = queries.suites(asked)
    assert suites["throughput"]["table"][1] == "ratio_to_greedy"
    decoders = queries.decoders(asked)
    assert decoders["top-p"]["parameters"][0]["name"]
    assert decoders["boom"] == {}, "nobody described it, and it is there all the same"
    assert queries.metrics(asked)["ppl_epsilon"].better == "lower"


def test_history_is_in_order_and_has_both_runs(asked):
    found = [(r["run_id"], r["decoder"]) for r in queries.history(asked, QUICK, "top-p", "ratio_to_greedy")]
    assert found == [("demo-1", "top-p"), ("demo-3", "top-p"), ("demo-3", "top-p[p=0.5]"), ("demo-3", "top-p[p=0.8]")]


def test_history_leaves_out_what_cannot_be_drawn(tmp_path):
    cut = metric_row("ppl_epsilon", Observations(["a", "b"], [float("inf"), 1.0], [1, 1], scale="exp"))
    runs = [
        write_run(tmp_path, run, [cell(run, "wikitext2", "it", rows, started=day(i), slice="joined")], started=day(i))
        for i, (run, rows) in enumerate((("r1", text_metrics(1)), ("r2", [cut])), 1)
    ]
    store.ingest(tmp_path / "r.duckdb", runs)
    store.snapshot(tmp_path / "r.duckdb", tmp_path / "copy.duckdb", queries.prepare)
    with duckdb.connect(str(tmp_path / "copy.duckdb")) as connection:
        assert [h["run_id"] for h in queries.history(connection, QUICK, "it", "ppl_epsilon")] == ["r1"]


def test_runs_and_gates(asked):
    assert [r["run_id"] for r in queries.runs(asked)] == ["demo-3", "demo-2", "demo-1"]
    one = queries.run(asked, "demo-2")
    assert (one["git_dirty"], one["environment"]["packages"]["torch"]) == (True, "2.13.0")
    assert [g["outcome"] for g in queries.gates(asked, "demo-3")] == ["fail", "inconclusive", "pass", "not run"]
    cells = queries.run_cells(asked, "demo-1")
    assert [c["status"] for c in cells if c["decoder"] == "boom[x=1]"] == ["failed"]
    assert [c["notes"] for c in queries.run_cells(asked, "demo-3") if c["decoder"] == "temperature"] == [
        ["contended: by a neighbour"]
    ] * 2


@pytest.fixture
def twins(tmp_path):
    """Cells that are alike but in one thing that must keep them apart; each decoder's name says which."""
    places = {
        "here": {}, "other-seed": {"seed": 1}, "other-version": {"version": 2}, "other-model": {"model": "large"},
        "other-dtype": {"dtype": "bfloat16"},
    }  # fmt: skip
    cells = []
    for name, other in places.items():
        one = cell("r1", "throughput", name, speed_metrics(1, 1.0), started=day(1), slice="batch-1",
                   model={"name": other.get("model", "tiny"), "dtype": other.get("dtype", "float32"), "device": "cpu",
                          "threads": 2})  # fmt: skip
        one.spec = replace(one.spec, seed=other.get("seed", 0), suite_version=other.get("version", 1))
        cells.append(one)
    for threads, run in ((2, cells), (64, elsewhere := [])):
        run.append(cell("r1" if run is cells else "r2", "wikitext2", "both", started=day(1), slice="joined",
                        model={"name": "tiny", "dtype": "float32", "device": "cpu", "threads": threads}))  # fmt: skip
    elsewhere += [cell("r2", "throughput", "other-hardware", speed_metrics(1, 1.0), started=day(2), slice="batch-1",
                      model={"name": "tiny", "dtype": "float32", "device": "cpu", "threads": 64}),
                 cell("r2", "wikitext2", "unsure", started=day(2), slice="joined",
                      model={"name": "tiny", "dtype": "float32", "device": "cpu", "threads": 64},
                      data={"dataset": "unverified-wikitext", "source": "folder"})]  # fmt: skip
    runs = [write_run(tmp_path, "r1", cells, started=day(1)), write_run(tmp_path, "r2", elsewhere, started=day(2))]
    for run, said in zip(runs, ("an older word", "a newer word"), strict=True):
        record = shards.read(run / shards.RUN_FILE)
        record["about"]["suites"]["throughput"]["asks"] = said
        shards.write(run / shards.RUN_FILE, record)
    store.ingest(tmp_path / "r.duckdb", runs)
    store.snapshot(tmp_path / "r.duckdb", tmp_path / "copy.duckdb", queries.prepare)
    with duckdb.connect(str(tmp_path / "copy.duckdb")) as connection:
        yield connection


def test_nothing_that_differs_in_its_setting_shares_a_table(twins):
    """Seed, model, type, hardware; of a suite's versions only the newest is shown at all."""
    assert {c.decoder for c in queries.cells(twins, QUICK)} == {"other-version", "both"}
    other = queries.cells(twins, replace(QUICK, hardware="a CPU, 64 threads"))
    assert "both" in {c.decoder for c in other}, "the same cell on other hardware is another row"
    for one, decoder in (
        (replace(QUICK, seed=1), "other-seed"),
        (replace(QUICK, model="large"), "other-model"),
        (replace(QUICK, dtype="bfloat16"), "other-dtype"),
        (replace(QUICK, hardware="a CPU, 64 threads"), "other-hardware"),
    ):
        assert [h["decoder"] for h in queries.history(twins, one, decoder, "tokens_per_s")] == [decoder]
        assert queries.history(twins, QUICK, decoder, "tokens_per_s") == []
    found = queries.history(twins, QUICK, "here", "tokens_per_s")
    assert [(h["suite_version"], h["value"]) for h in found] == [(1, pytest.approx(50))], "one metric, not all"


def test_what_differs_in_one_thing_is_another_row(tmp_path):
    def one(run="r1", seed=0, model="tiny", dtype="float32", dataset="a", threads=2, when=2):
        made = cell(run, "wikitext2", "it", text_metrics(1), started=day(when), slice="joined",
                    model={"name": model, "dtype": dtype, "device": "cpu", "threads": threads},
                    data={"dataset": dataset, "source": "folder"})  # fmt: skip
        made.spec = replace(made.spec, seed=seed, dtype=dtype, model=model, data=dataset)
        return made

    others = {"r2": {"seed": 1}, "r3": {"dtype": "bfloat16"}, "r4": {"dataset": "b"}, "r5": {"model": "large"},
              "r6": {"threads": 64}}  # fmt: skip
    runs = [write_run(tmp_path, "r1", [one()], started=day(1))]
    runs += [write_run(tmp_path, run, [one(run, **other)], started=day(2)) for run, other in others.items()]
    store.ingest(tmp_path / "r.duckdb", runs)
    with store.connect(tmp_path / "r.duckdb") as connection:
        assert connection.execute("SELECT count(*) FROM latest_cell").fetchone() == (6,)
    later = [write_run(tmp_path, run, [one(run, when=when)], started=day(5)) for run, when in (("r7", 3), ("r8", 1))]
    store.ingest(tmp_path / "r.duckdb", later)
    with store.connect(tmp_path / "r.duckdb") as connection:
        found = connection.execute("SELECT run_id FROM latest_cell ORDER BY 1").fetchall()
    assert [r for (r,) in found] == ["r2", "r3", "r4", "r5", "r6", "r7"], "the newest by when its cell began"
    broken = cell("r9", "wikitext2", "it", started=day(4), slice="joined", status="failed", data={},
                  model={"name": "tiny", "dtype": "", "device": "cpu", "threads": 2})  # fmt: skip
    broken.spec = one().spec
    store.ingest(tmp_path / "r.duckdb", [write_run(tmp_path, "r9", [broken], started=day(5))])
    with store.connect(tmp_path / "r.duckdb") as connection:
        found = connection.execute("SELECT run_id FROM latest_cell ORDER BY 1").fetchall()
    assert [r for (r,) in found] == ["r2", "r3", "r5", "r6", "r9"], "it stands for every data set until measured again"


def test_a_column_asked_for_is_one_version_on_one_text(asked):
    assert {c.column for c in queries.cells(asked, QUICK, column=TEXT)} == {TEXT}
    assert queries.cells(asked, QUICK, column=replace(TEXT, version=2)) == []


def test_unverified_data_and_failed_audits_are_doubts(twins):
    (unsure,) = [c for c in queries.cells(twins, replace(QUICK, hardware="a CPU, 64 threads")) if c.name == "unsure"]
    assert unsure.doubts == ("unverified data",)
    twins.execute("UPDATE board SET audit = 'fail' WHERE decoder = 'unsure'")
    (unsure,) = [c for c in queries.cells(twins, replace(QUICK, hardware="a CPU, 64 threads")) if c.name == "unsure"]
    assert unsure.doubts == ("unverified data", "audit failed")


def test_unknown_code_and_a_failed_a_a_test_are_doubts(tmp_path):
    def one(name, log):
        logs = [log + i / 1000 for i in range(9)]
        own = metric_row("ratio_to_self", Observations.each([f"p{i}" for i in range(9)], logs, scale="exp"), "itself")
        return cell("r1", "throughput", name, [own], started=day(1), slice="batch-1")

    run = write_run(tmp_path, "r1", [one("fine", -0.004), one("biased", 0.08), one("hardly", 0.02)], started=day(1))
    noisy = Observations.each([f"p{i}" for i in range(9)], [0.1 * (i - 4) for i in range(9)], scale="exp")
    other = cell(
        "r2", "throughput", "noisy", [metric_row("ratio_to_self", noisy, "itself")], started=day(1), slice="batch-1"
    )
    unknown = write_run(tmp_path, "r2", [other], started=day(1), dirty=None)
    store.ingest(tmp_path / "r.duckdb", [run, unknown])
    store.snapshot(tmp_path / "r.duckdb", tmp_path / "copy.duckdb", queries.prepare)
    with duckdb.connect(str(tmp_path / "copy.duckdb")) as connection:
        found = {c.decoder: c for c in queries.cells(connection, QUICK)}
    assert {d: c.doubts for d, c in found.items()} == {
        "fine": (), "biased": ("A/A failed",), "hardly": (), "noisy": ("unknown code",),
    }  # fmt: skip
    assert found["noisy"].remarks[0].startswith("noisy: its speed against itself spreads by ")
    assert found["fine"].remarks == ()


def test_neither_a_failure_nor_a_doubt_takes_the_place_of_what_counts(tmp_path):
    def text(run, seed, when, **more):
        found = text_metrics(seed) if "status" not in more else []
        return cell(run, "wikitext2", "it", found, started=day(when), slice="joined", **more)

    newer_suite = text("r4", 1, 4, status="failed")
    newer_suite.spec = replace(newer_suite.spec, suite_version=2)
    runs = [
        write_run(tmp_path, "r1", [text("r1", 1, 1)], started=day(1)),
        write_run(tmp_path, "r2", [text("r2", 2, 2)], started=day(2), dirty=True),
        write_run(tmp_path, "r3", [text("r3", 3, 3, status="cancelled", data={}, model={})], started=day(3)),
        write_run(tmp_path, "r4", [newer_suite], started=day(4)),
    ]
    for count, expected in ((1, {("r1", False)}), (2, {("r1", False), ("r2", True)})):
        path = tmp_path / f"{count}.duckdb"
        store.ingest(path, runs[:count])
        store.snapshot(path, tmp_path / f"{count}-copy.duckdb", queries.prepare)
        with duckdb.connect(str(tmp_path / f"{count}-copy.duckdb")) as connection:
            assert {(c.run_id, c.beside) for c in queries.cells(connection, QUICK)} == expected
    store.ingest(tmp_path / "all.duckdb", runs)
    store.snapshot(tmp_path / "all.duckdb", tmp_path / "copy.duckdb", queries.prepare)
    with duckdb.connect(str(tmp_path / "copy.duckdb")) as connection:
        found = {(c.run_id, c.beside) for c in queries.cells(connection, QUICK)}
    assert ("r1", False) in found
    assert ("r3", True) in found
    assert ("r4", False) in found, "another version of the suite is another column"


def test_what_has_no_data_set_stands_beside_as_well(tmp_path):
    """Cells of suites that read no text: a doubted newer one does not hide among the sound."""
    cells = [cell(run, "ising", "it", speed_metrics(1, None), started=day(when), data={}, slice="ring-4")
             for run, when in (("r1", 1), ("r2", 2))]  # fmt: skip
    runs = [write_run(tmp_path, "r1", cells[:1], started=day(1)),
            write_run(tmp_path, "r2", cells[1:], started=day(2), dirty=True)]  # fmt: skip
    store.ingest(tmp_path / "r.duckdb", runs)
    store.snapshot(tmp_path / "r.duckdb", tmp_path / "copy.duckdb", queries.prepare)
    with duckdb.connect(str(tmp_path / "copy.duckdb")) as connection:
        assert {(c.run_id, c.beside) for c in queries.cells(connection, QUICK)} == {("r1", False), ("r2", True)}


def test_the_files_of_a_decoder_are_those_of_its_newest_run(tmp_path):
    run = write_run(tmp_path, "r1", [cell("r1", "wikitext2", "it", text_metrics(1), started=day(1))], started=day(1))
    record = shards.read(run / shards.RUN_FILE)
    record["options"]["decoder_file"] = ["it.py"]
    shards.write(run / shards.RUN_FILE, record)
    store.ingest(tmp_path / "r.duckdb", [run])
    store.snapshot(tmp_path / "r.duckdb", tmp_path / "copy.duckdb", queries.prepare)
    with duckdb.connect(str(tmp_path / "copy.duckdb")) as connection:
        assert queries.decoder_files(connection, "it") == ["it.py"]
        assert queries.decoder_files(connection, "other") == []


def test_what_the_newest_run_says_of_a_suite_counts(twins):
    assert queries.suites(twins)["throughput"]["asks"] == "a newer word"


def test_every_number_of_a_setting_can_be_had_as_rows(asked):
    rows = queries.numbers_as_rows(asked, QUICK)
    assert len({r["cell_id"] for r in rows}) == len(queries.cells(asked, QUICK))
    assert {r["metric"] for r in rows if r["decoder"] == "boom[x=1]"} == {None}


def test_ratios_to_different_baselines_are_different_metrics(tmp_path):
    cells = []
    for decoder, baseline in (("a", "top-p"), ("b", "min-p")):
        ratio = Observations.each([f"pair-{i}" for i in range(8)], [0.1 + i / 100 for i in range(8)], scale="exp")
        rows = [*speed_metrics(1, 1.0), metric_row("ratio_to_baseline", ratio, baseline)]
        cells.append(cell("r", "throughput", decoder, rows, started=day(1), slice="batch-1"))
    store.ingest(tmp_path / "r.duckdb", [write_run(tmp_path, "r", cells, started=day(1))])
    store.snapshot(tmp_path / "r.duckdb", tmp_path / "copy.duckdb", queries.prepare)
    with duckdb.connect(str(tmp_path / "copy.duckdb")) as connection:
        (names,) = queries.columns(connection, QUICK).values()
        assert {"ratio_to_baseline(top-p)", "ratio_to_baseline(min-p)"} <= set(names)
        assert queries.metrics(connection)["ratio_to_baseline(min-p)"].kind == "speed"
        assert set(queries.baselines(connection, QUICK).values()) == {"greedy", "top-p", "min-p"}
        (one,) = [c for c in queries.cells(connection, QUICK) if c.decoder == "a"]
        assert "ratio_to_baseline(top-p)" in one.measured.metrics
