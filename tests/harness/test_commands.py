"""The `decodathlon` command: every sub-command does its work, and every mistake is named with its remedy."""

import argparse
import csv
import json
import math
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from decodathlon.harness import datasets
from decodathlon.harness.commands.command import main
from decodathlon.harness.errors import SpecError
from decodathlon.harness.measure.observations import Observations
from decodathlon.harness.measure.statistics import Estimate
from decodathlon.harness.results import environment, store
from decodathlon.harness.results.changes import change_of
from decodathlon.harness.results.measured import Measured, Number

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "leaderboard" / "published"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "r.duckdb"
    store.ingest(path, [PUBLISHED])
    return str(path)


def said(capsys, *words):
    code = main([str(w) for w in words])
    out, err = capsys.readouterr()
    return code, out, err


def test_it_runs_as_a_module_and_as_a_command():
    for words in ([sys.executable, "-m", "decodathlon"], [str(Path(sys.executable).with_name("decodathlon"))]):
        done = subprocess.run([*words, "list", "suites"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "wikitext2" in done.stdout


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("decoders", "locally-typical"), ("suites", "How fast is the decoder"), ("models", "smollm2-135m-instruct"),
        ("metrics", "ratio_to_self"), ("datasets", "wikitext-2-raw-v1"),
    ],
)  # fmt: skip
def test_list(capsys, kind, expected):
    code, out, _ = said(capsys, "list", kind)
    assert (code, expected in out) == (0, True)


def test_one_decoder_is_listed_parameter_by_parameter(capsys):
    assert main(["list", "decoders", "persistent-smc-steps"]) == 0
    said = capsys.readouterr().out
    (line,) = [row for row in said.splitlines() if row.startswith("alpha_start")]
    assert line.split() == ["alpha_start", "0.5", "[0,", "1]", "0.3,", "0.5,", "0.7", "ps.resample.alpha_start"]
    assert main(["list", "decoders"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) < 450, "a table that nobody can read"
    assert main(["list", "rewards", "prm"]) == 2
    assert "list rewards takes no name" in capsys.readouterr().err


def test_list_runs_and_the_newest_is_last(capsys, results):
    code, out, _ = said(capsys, "list", "runs", "--results", results)
    assert code == 0
    assert any(p.name in out for p in PUBLISHED.iterdir())


def test_listing_imports_no_torch():
    where = "decodathlon.harness.commands.command"
    code = f"import sys; from {where} import main; main(['list']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_doctor_names_what_is_missing(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("DECODATHLON_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DECODATHLON_DATA", raising=False)
    code, out, _ = said(capsys, "doctor", "--results", tmp_path / "r.duckdb")
    assert code == 0
    assert "not fetched yet" in out
    assert "stand-in text" in out
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("DECODATHLON_DATA", str(tmp_path / "data"))
    (tmp_path / "foreign.duckdb").write_bytes(b"something else")
    code, out, _ = said(capsys, "doctor", "--results", tmp_path / "foreign.duckdb")
    assert code == 1
    assert "results file    FAIL  " in out
    assert "data            FAIL  " in out


@pytest.mark.parametrize("form", ["csv", "jsonl", "markdown", "parquet"])
def test_export_has_every_row(capsys, results, tmp_path, form):
    import duckdb

    out = tmp_path / f"rows.{form}"
    code, said_out, _ = said(capsys, "export", "--format", form, "--results", results, "--out", out)
    assert code == 0
    with store.connect(Path(results)) as connection:
        count = connection.execute("SELECT count(*) FROM latest").fetchone()[0]
    if form == "csv":
        with out.open(newline="") as handle:
            found = list(csv.DictReader(handle))
    elif form == "jsonl":
        found = [json.loads(line) for line in out.read_text().splitlines()]
    elif form == "markdown":
        found = out.read_text().splitlines()[2:]
    else:
        found = duckdb.sql(f"SELECT * FROM '{out}'").fetchall()
    assert len(found) == count
    assert f"{count} rows in" in said_out
    if form == "jsonl":
        assert isinstance(found[0]["params"], dict)


def test_export_of_one_run_and_suite_to_the_terminal(capsys, results):
    measured, other = {}, {}
    with store.connect(Path(results)) as connection:
        for run, suite in connection.execute("SELECT DISTINCT run_id, suite FROM cell").fetchall():
            (measured if suite == "wikitext2" else other)[run] = suite
    asked = ("export", "--suite", "wikitext2", "--results", results, "--run")
    code, out, _ = said(capsys, *asked, next(iter(measured)))
    assert code == 0
    assert {row["suite"] for row in csv.DictReader(out.splitlines())} == {"wikitext2"}
    assert {row["run_id"] for row in csv.DictReader(out.splitlines())} == {next(iter(measured))}
    run = next(r for r in other if r not in measured)
    code, _, err = said(capsys, *asked, run)
    assert code != 0
    assert f"there are no such rows in {results}; the run or view has {other[run]}" in err


def test_two_decoders_are_compared_unit_by_unit(capsys, results):
    code, out, _ = said(capsys, "compare", "--decoder", "temperature", "--decoder", "top-p", "--metric", "ppl_epsilon",
                        "--results", results)  # fmt: skip
    assert code == 0
    (line,) = [x for x in out.splitlines() if x.startswith("wikitext2")]
    assert line.endswith("B is worse"), "truncation costs"
    with store.connect(Path(results)) as connection:
        run, metric, value = connection.execute(
            "SELECT run_id, metric, value FROM results WHERE decoder = 'top-p' AND metric = 'ppl_epsilon' "
            "AND scale = 'quick' ORDER BY started LIMIT 1"
        ).fetchone()
    code, out, _ = said(capsys, "compare", run, "--decoder", "temperature", "--decoder", "top-p", "--results", results)
    assert code == 0
    assert f" {value:.4g} " in next(x for x in out.splitlines() if metric in x)


def test_what_cannot_be_compared_is_named(capsys, results):
    for words, message in (
        (["last"], "takes two runs"),
        (["--decoder", "top-p"], "takes --decoder twice"),
        (["--decoder", "top-p", "--decoder", "topk"], "has no cell of 'topk' that was measured; did you mean 'top-k'?"),
    ):
        code, _, err = said(capsys, "compare", *words, "--results", results)
        assert code != 0
        assert message in err


def test_a_board_whose_port_is_taken_says_so(capsys, results):
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
        code, _, err = said(capsys, "board", "--port", port, "--results", results)
    assert code != 0
    assert f"localhost:{port} cannot be used" in err
    code, _, err = said(capsys, "board", "--address", "no.such.host.invalid", "--results", results)
    assert code != 0
    assert "no.such.host.invalid:8501 cannot be used" in err


@pytest.mark.parametrize("name", ["none", "true", "all", "harness", "torch", "random", "json", "conftest-of-none"])
def test_a_new_decoder_takes_no_name_that_means_something_else(capsys, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    code, _, err = said(capsys, "new", "decoder", name)
    assert (code != 0) == (name != "conftest-of-none"), err
    assert len(list(tmp_path.iterdir())) == (name == "conftest-of-none")


def test_where_results_go_if_nothing_is_said(monkeypatch, tmp_path):
    monkeypatch.delenv(environment.RESULTS_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    assert environment.results_file() == ROOT / "results.duckdb", "in a clone, wherever one stands"
    monkeypatch.setattr(environment, "ROOT", tmp_path / "site-packages")
    assert environment.results_file() == tmp_path / "results.duckdb"
    monkeypatch.setenv(environment.RESULTS_VARIABLE, "elsewhere.duckdb")
    assert environment.results_file() == Path("elsewhere.duckdb")


def test_a_copy_inside_another_repository_does_not_take_its_commit(tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for words in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    assert environment.git_state(tmp_path)[1] is False
    assert environment.git_state(copy) == ("", None, "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("export", "--format", "parquet"), "needs --out FILE"),
        (("export", "--suite", "wikitxt2"), "did you mean 'wikitext2'"),
        (("export", "--run", "nope"), "has no run 'nope'"),
        (("export", "--out", "/no/such/folder/x.csv"), "does not exist; create it"),
        (("compare", "last", "nope"), "has no run 'nope'"),
        (("compare", "last", "last", "--metric", "pp"), "there is no metric 'pp'"),
        (("gates", "check", "--gates", "/no/such.toml"), "No such file"),
        (("gates", "check", "--run", "nope"), "has no run 'nope'"),
        (("ingest", "/no/such/run"), "there is no such file or folder"),
        (("list", "--decoder-file", "/no/such.py"), "there is no such file"),
        (("models", "fetch", "smolm"), "there is no model 'smolm'"),
    ],
)
def test_every_mistake_is_named(capsys, results, words, message):
    if words[0] not in ("models", "list"):
        words = (*words, "--results", results)
    code, _, err = said(capsys, *words)
    assert code == 2
    assert message in err
    assert err.startswith("decodathlon: ")


def test_the_board_is_streamlit_on_this_machine_only_unless_told_otherwise(tmp_path):
    from decodathlon.harness.commands import board

    def command(*words):
        parser = argparse.ArgumentParser()
        board._arguments(parser)
        return board.command(parser.parse_args([*map(str, words)]))

    words = command("--results", tmp_path / "r.duckdb")
    assert Path(words[4]).is_file()
    assert "--server.address=localhost" in words
    assert "--server.headless=false" in words
    assert "--server.headless=true" in command("--no-browser", "--results", tmp_path / "r.duckdb")
    for bad in (["--port", 0], ["--port", 70000], ["--results", tmp_path], ["--results", tmp_path / "no" / "r.duckdb"]):
        with pytest.raises(SpecError, match=r"--port|--results"):
            command(*bad)


def test_a_missing_results_file_says_what_to_do(capsys, tmp_path):
    code, _, err = said(capsys, "list", "runs", "--results", tmp_path / "none.duckdb")
    assert (code, "run `pytest suites/ --benchmark` first" in err) == (2, True)


def test_ingest_tells_conflicts_by_its_exit_code(capsys, results, tmp_path):
    other = tmp_path / "other"
    run = next(p.parent for p in PUBLISHED.glob("*/throughput-*.json") if '"n":8' in p.read_text())
    (other / run.name).mkdir(parents=True)
    for path in run.iterdir():
        (other / run.name / path.name).write_text(path.read_text().replace('"n":8', '"n":9'))
    assert said(capsys, "ingest", PUBLISHED, "--results", results)[0] == 0
    code, out, _ = said(capsys, "ingest", other, "--results", results)
    assert code == 1
    assert "conflict: run" in out


def test_a_run_against_itself_shows_no_change(capsys, results):
    run = next(p.parent.name for p in PUBLISHED.glob("*/throughput-*.json"))
    code, out, _ = said(capsys, "compare", run, run, "--metric", "ratio_to_greedy", "--results", results)
    assert code == 0
    assert "is better" not in out
    assert "is worse" not in out
    assert "throughput" in out


def cell(**metrics):
    numbers = {
        name: Number(units.estimate(), "1/s" if name == "tokens_per_s" else "1", "higher", units)
        for name, units in metrics.items()
    }
    return Measured("c", "throughput", 1, "all", "quick", "top-p", "m", "float32", "cpu", "d", 0, "ok", "", numbers)


def units(values):
    return Observations.each([f"pair-{i}" for i in range(len(values))], values, scale="exp")


def test_a_change_is_claimed_only_beyond_the_noise_of_both():
    calm, noisy = units([0.001 * (-1) ** i for i in range(20)]), units([0.2 * (-1) ** i for i in range(20)])
    before = units([0.01 * (i % 3) for i in range(20)])
    after = units([0.05 + 0.01 * (i % 3) for i in range(20)])
    quiet = [cell(ratio_to_greedy=x, ratio_to_self=calm) for x in (before, after)]
    change = change_of("ratio_to_greedy", *quiet)
    assert change.verdict == "B is better"
    assert change.estimate.value == pytest.approx(math.exp(0.05))
    assert change_of("ratio_to_greedy", quiet[1], quiet[0]).verdict == "B is worse"
    loud = [cell(ratio_to_greedy=x, ratio_to_self=noisy) for x in (before, after)]
    assert change_of("ratio_to_greedy", *loud).verdict == "no change seen"
    assert change_of("tokens_per_s", cell(tokens_per_s=before), cell(tokens_per_s=after)).verdict.endswith("not ranked")
    other = Observations.each(["elsewhere"], [0.0], scale="exp")
    assert (
        change_of("ratio_to_greedy", cell(ratio_to_greedy=before), cell(ratio_to_greedy=other)).verdict == "not paired"
    )
    assert isinstance(change.estimate, Estimate)


def test_what_is_carried_arrives_whole_or_is_refused(tmp_path):
    """Packed in parts, unpacked elsewhere, and the shards of a run brought back and ingested."""
    carry = [sys.executable, str(ROOT / "scripts" / "carry.py")]
    data = tmp_path / "data"
    data.mkdir()
    (data / "some.txt").write_text("words")
    out, there = tmp_path / "parts", tmp_path / "there"
    packed = subprocess.run([*carry, "pack", out, "--data", data, "--part-mib", "1"], capture_output=True, text=True)
    assert packed.returncode == 0, packed.stderr
    alone = [sys.executable, str(out / "carry.py"), "unpack", str(out), str(there)]
    unpacked = subprocess.run(alone, capture_output=True, text=True)
    assert unpacked.returncode == 0, unpacked.stderr
    assert "pytest tests -m gpu" in unpacked.stdout
    assert (there / "data" / "some.txt").read_text() == "words"
    assert (there / "code" / "src" / "decodathlon" / "harness" / "plugin.py").is_file()  # through its link
    code = there / "code"
    commit, dirty, _ = environment.git_state(ROOT)
    assert environment.git_state(code)[:2] == (commit, dirty), "it says what it was packed from"
    (code / "harness" / "law.py").write_text("changed")
    assert environment.git_state(code)[1] is True, "and that it was changed since"
    part = out / "part-000"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    damaged = subprocess.run([*alone[:-1], str(tmp_path / "again")], capture_output=True, text=True)
    assert damaged.returncode == 1
    assert "part-000 was damaged on the way" in damaged.stderr

    bundle = tmp_path / "run.tar.gz"
    run = next(p.parent for p in PUBLISHED.glob("*/throughput-*.json") if '"n":8' in p.read_text())
    assert subprocess.run([*carry, "results", bundle, run]).returncode == 0
    with tarfile.open(bundle) as archive:
        assert all(name.startswith(f"{run.name}/") for name in archive.getnames())
    back = tmp_path / "back"
    assert subprocess.run([*carry, "unpack", bundle, back], stdout=subprocess.DEVNULL).returncode == 0
    assert store.ingest(tmp_path / "r.duckdb", [back]).added > 0


def test_data_sets_are_listed_by_their_resolver():
    assert datasets.find("wikitext-2-raw-v1", "test", None).name
