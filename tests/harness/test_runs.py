"""Runs that hang, are interrupted, killed or resumed: nothing that was measured is lost, and nothing counts twice."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path

import pytest
import tiny_models

from decodathlon.harness.cells import CellSpec, Outcome
from decodathlon.harness.errors import SpecError, StoreError
from decodathlon.harness.results import journal, shards, store
from decodathlon.harness.resuming import find
from decodathlon.harness.run import Run
from decodathlon.harness.workers import local
from decodathlon.harness.workers.base import Orders

ROOT = Path(__file__).parents[2]
KILLS, CELLS = 30, 30

DECODERS = '''
import os, signal, sys, time
import torch
from decodathlon import Sampler, decoder

class Plain(Sampler):
    def shape(self, logits):
        return logits.log_softmax(-1)

@decoder("calm", claim="exact", bounds={"number": "[0, 100]"})
class Calm(Plain):
    number: int = 0

@decoder("slow", claim="exact")
class Slow(Plain):
    def generate(self, *given):
        time.sleep(0.3)
        return super().generate(*given)

@decoder("hangs", claim="exact")
class Hangs(Plain):
    def shape(self, logits):
        print("about to hang", flush=True)
        time.sleep(600)

@decoder("hangs-late", claim="exact")
class HangsLate(Plain):
    """Measures one pair, then hangs."""
    calls = 0
    def generate(self, *given):
        type(self).calls += 1
        if type(self).calls > 9:
            time.sleep(600)
        return super().generate(*given)

@decoder("meddles", claim="exact")
class Meddles(Plain):
    """Changes its process for whoever comes next."""
    def shape(self, logits):
        torch.set_num_threads(3)
        return super().shape(logits)

@decoder("greedy-for-memory", claim="exact")
class Memory(Plain):
    def shape(self, logits):
        raise torch.OutOfMemoryError("CUDA out of memory (on purpose)")

@decoder("forks", claim="exact")
class Forks(Plain):
    """Its child comes back from the cell as if it were the worker."""
    def shape(self, logits):
        if os.fork() == 0:
            raise RuntimeError("I am the child")
        time.sleep(0.5)
        return super().shape(logits)

@decoder("closes", claim="exact")
class Closes(Plain):
    def shape(self, logits):
        try:
            os.close(2)
        except OSError:
            pass
        return super().shape(logits)

@decoder("removes", claim="exact")
class Removes(Plain):
    """Takes the record of its run away."""
    def shape(self, logits):
        for path in __import__("pathlib").Path(os.environ["DECODATHLON_RESULTS_FOR_TEST"]).rglob("run.json"):
            path.unlink()
        return super().shape(logits)

@decoder("killed", claim="exact")
class Killed(Plain):
    def shape(self, logits):
        os.kill(os.getpid(), signal.SIGKILL)

@decoder("interrupts", claim="exact")
class Interrupts(Plain):
    """Ctrl-C for whoever started the worker, in the middle of a cell."""
    number = signal.SIGINT
    def shape(self, logits):
        os.kill(os.getppid(), self.number)
        time.sleep(600)

@decoder("terminates", claim="exact")
class Terminates(Interrupts):
    """What a cluster sends before it kills."""
    number = signal.SIGTERM
'''


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_models.save_folder(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture
def decoders(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(DECODERS)
    return file


def command(*options):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("DECODATHLON_")}
    words = [sys.executable, "-m", "pytest", "suites/", "--benchmark", "--gates", "none", *map(str, options)]
    # A shell's background job ignores Ctrl-C, and so would all that it starts.
    listening = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    environment = inherited | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return {"args": words, "cwd": ROOT, "env": environment, "preexec_fn": listening}


def measure(*options):
    return subprocess.run(**command(*options), capture_output=True, text=True, check=False, timeout=300)


def new_run(results, model, decoders, *names, suite="throughput"):
    chosen = [x for name in names for x in ("--decoder", name)]
    return ["--scale", "smoke", "--model", model, "--results", results, "--suite", suite, "--decoder-file", decoders,
            *chosen]  # fmt: skip


def by_decoder(results):
    (run,) = results.with_suffix(".shards").iterdir()
    return {c["spec"]["decoder"]: c for p in shards.cells(run) for c in [json.loads(p.read_text())]}


def test_late_cells_keep_what_they_measured_and_hanging_ones_are_killed(model, decoders, tmp_path, monkeypatch):
    results = tmp_path / "r.duckdb"
    names = ["slow", "hangs", "hangs-late", "greedy-for-memory", "killed", "calm"]
    began = time.monotonic()
    done = measure(*new_run(results, model, decoders, *names), "--cell-timeout", "1.5")
    assert done.returncode == 1
    assert time.monotonic() - began < 200, "or somebody waited for who hangs"
    found = by_decoder(results)
    assert {d: c["status"] for d, c in found.items()} == {
        "slow": "partial", "hangs": "timeout", "hangs-late": "partial", "greedy-for-memory": "oom", "killed": "crashed",
        "calm": "ok",
    }  # fmt: skip
    assert found["slow"]["reason"] == "after 1.5 s 1 of 2 units were measured"
    assert "tokens_per_s" in {m["metric"] for m in found["slow"]["metrics"]}
    assert "did not come to an end" in found["hangs"]["reason"]
    assert "about to hang" in found["hangs"]["log"]
    assert found["hangs-late"]["metrics"] == []
    assert [s["row"] for s in found["hangs-late"]["samples"]] == ["pair-0"]
    assert found["hangs-late"]["decoder"]["spec"] == "hangs-late"  # from the journal: the worker could not tell
    assert "killed by SIGKILL" in found["killed"]["reason"]
    with store.connect(results) as connection:
        assert connection.execute("SELECT count(*) FROM cell").fetchone() == (6,)
        log = connection.execute("SELECT log FROM cell WHERE decoder = 'hangs'").fetchone()[0]
    assert "about to hang" in log
    assert not list(results.with_suffix(".shards").rglob("*.journal"))


def test_a_decoder_cannot_reach_into_the_next_ones_measurement(model, decoders, tmp_path):
    results, chosen = tmp_path / "r.duckdb", ("calm", "meddles", "calm[number=1]")
    assert measure(*new_run(results, model, decoders, *chosen, suite="wikitext2")).returncode == 0
    found = by_decoder(results)
    assert found["meddles"]["conditions"]["left_behind"] == ["torch_threads"]
    pids = [found[name]["conditions"]["pid"] for name in chosen]
    assert pids[0] == pids[1] != pids[2]
    threads = [found[name]["conditions"]["switches"]["torch_threads"] for name in ("calm", "calm[number=1]")]
    assert threads[0] == threads[1] != 3


def test_nobody_answers_for_another(model, decoders, tmp_path):
    """A forked child, a closed stderr: the cells after them are what they are alone."""
    alone, beside = tmp_path / "alone.duckdb", tmp_path / "beside.duckdb"
    measure(*new_run(alone, model, decoders, "calm", "calm[number=1]", suite="wikitext2"))
    done = measure(*new_run(beside, model, decoders, "forks", "calm", "closes", "calm[number=1]", suite="wikitext2"))
    assert done.returncode == 0, done.stdout
    found, expected = by_decoder(beside), by_decoder(alone)
    assert len(found) == 4
    assert {c["status"] for c in found.values()} == {"ok"}
    for name, cell in expected.items():
        assert found[name]["metrics"] == cell["metrics"]


def test_a_record_that_was_taken_away_is_written_again(model, decoders, tmp_path, monkeypatch):
    results = tmp_path / "r.duckdb"
    monkeypatch.setenv("DECODATHLON_RESULTS_FOR_TEST", str(results.with_suffix(".shards")))
    given = command(*new_run(results, model, decoders, "removes", suite="wikitext2"))
    given["env"]["DECODATHLON_RESULTS_FOR_TEST"] = str(results.with_suffix(".shards"))
    assert subprocess.run(**given, check=False, stdout=subprocess.DEVNULL).returncode == 0
    with store.connect(results) as connection:
        assert connection.execute("SELECT decoder, status FROM cell").fetchall() == [("removes", "ok")]


def test_what_was_in_flight_when_all_was_killed_is_an_attempt_and_other_weights_are_refused(decoders, tmp_path):
    folder, results = tmp_path / "model", tmp_path / "r.duckdb"
    folder.mkdir()
    model = tiny_models.save_folder(folder)
    process = subprocess.Popen(
        **command(*new_run(results, model, decoders, "calm", "hangs", suite="wikitext2")), stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(results.with_suffix(".shards").glob("*/wikitext2-*.json")):
        time.sleep(0.1)
    while time.monotonic() < deadline and not list(results.with_suffix(".shards").glob("*/.wikitext2-*.journal")):
        time.sleep(0.1)
    process.kill()
    process.wait()
    import safetensors.torch

    weights = next(Path(model).glob("*.safetensors"))
    tensors = {k: 1.5 * v for k, v in safetensors.torch.load_file(weights).items()}
    safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    again = measure("--resume", "last", "--results", results, "--cell-timeout", "5")
    assert again.returncode == 1
    found = by_decoder(results)["hangs"]
    assert "the model's weights changed after the run began" in found["reason"]
    assert [a["reason"] for a in found["attempts"]] == ["the whole run was killed"]


@pytest.mark.parametrize("name", ["interrupts", "terminates"])
def test_ctrl_c_and_sigterm_end_cleanly_and_the_printed_command_goes_on(model, decoders, tmp_path, name):
    results = tmp_path / "r.duckdb"
    done = measure(*new_run(results, model, decoders, "calm", name, "calm[number=2]"))
    assert done.returncode == 2
    assert {d: c["status"] for d, c in by_decoder(results).items()} == {"calm": "ok", name: "cancelled"}
    assert "tokens_per_s" in done.stdout  # the summary so far
    (line,) = [x for x in done.stdout.splitlines() if "go on with: pytest" in x]
    assert line.startswith("2 cells not measured")
    again = measure(*line.partition("--benchmark ")[2].split(), "--executor", "local")
    assert again.returncode == 2  # it interrupts again
    found = by_decoder(results)
    assert [a["status"] for a in found[name]["attempts"]] == ["cancelled"]
    with store.connect(results) as connection:
        rows = connection.execute("SELECT decoder, status FROM cell ORDER BY 1").fetchall()
    assert rows == [("calm", "ok"), (name, "cancelled")]


def test_resume_measures_only_what_has_no_result_and_replaces_its_row(model, tmp_path):
    """The decoder fails until a file appears, so that its source stays as it is."""
    file, results = tmp_path / "mine.py", tmp_path / "r.duckdb"
    file.write_text(
        DECODERS
        + f"""
@decoder("moody", claim="exact")
class Moody(Plain):
    def shape(self, logits):
        if not os.path.exists({str(tmp_path / "mended")!r}):
            raise RuntimeError("not yet")
        return super().shape(logits)
"""
    )
    first = measure(*new_run(results, model, file, "calm", "moody", suite="wikitext2"))
    assert first.returncode == 1
    before = by_decoder(results)
    (tmp_path / "mended").touch()
    again = measure("--resume", "last", "--results", results)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "1 replaced" in again.stdout
    after = by_decoder(results)
    assert after["calm"] == before["calm"]
    assert after["moody"]["status"] == "ok"
    assert [a["reason"] for a in after["moody"]["attempts"]] == ["RuntimeError: not yet"]
    with store.connect(results) as connection:
        assert connection.execute("SELECT decoder, status FROM cell ORDER BY 1").fetchall() == [
            ("calm", "ok"), ("moody", "ok"),
        ]  # fmt: skip
        assert connection.execute("SELECT count(*) FROM run").fetchone() == (1,)
    nothing_left = measure("--resume", "last", "--results", results)
    assert nothing_left.returncode == 0
    assert by_decoder(results) == after

    file.write_text(file.read_text() + "# changed\n")
    refused = measure("--resume", "last", "--results", results)
    assert refused.returncode == 4
    assert "mine.py has changed since; a run is of one piece" in refused.stderr


def test_a_cell_of_questions_goes_on_behind_its_last_answer(tmp_path):
    """The whole run is killed between two batches of a cell; resumed, it draws only what is missing, and the same."""
    folder = tmp_path / "model"
    folder.mkdir()
    model = tiny_models.save_folder(folder, context=4096)
    file, drawn = tmp_path / "mine.py", tmp_path / "drawn.txt"
    file.write_text(
        DECODERS
        + f"""
@decoder("watched", claim="exact")
class Watched(Plain):
    def generate(self, target, prompts, limits, rng):
        with open({str(drawn)!r}, "a") as log:
            log.write("\\n".join(rng.keys) + "\\n")
        if os.path.exists({str(tmp_path / "kill")!r}) and len(open({str(drawn)!r}).readlines()) > 8:
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().generate(target, prompts, limits, rng)
"""
    )

    def new(results):
        chosen = ["--scale", "quick", "--suite", "math500", "--decoder-file", file, "--decoder", "watched"]
        return measure("--model", model, "--results", results, *chosen)

    def answers(results):
        with store.connect(results) as connection:
            return connection.execute(
                "SELECT row, data->>'response', data->>'says' FROM sample ORDER BY place"
            ).fetchall()

    calm = tmp_path / "calm.duckdb"
    done = new(calm)
    assert done.returncode == 0, done.stdout + done.stderr
    everything = drawn.read_text().split()
    assert len(everything) == len(set(everything)) == 16, "8 problems, 2 answers each"

    drawn.unlink()
    (tmp_path / "kill").touch()
    results = tmp_path / "r.duckdb"
    assert new(results).returncode != 0
    first = drawn.read_text().split()
    assert len(first) == 16, "it was killed as it began the second batch"
    assert not results.exists()
    (tmp_path / "kill").unlink()
    drawn.unlink()
    again = measure("--resume", "last", "--results", results)
    assert again.returncode == 0, again.stdout + again.stderr
    assert drawn.read_text().split() == everything[8:], "only the second batch"
    assert answers(results) == answers(calm)
    with store.connect(results) as connection:
        ((attempts,),) = connection.execute("SELECT attempts->>'$[*].reason' FROM cell").fetchall()
    assert attempts == ["the whole run was killed"]


def test_what_cannot_be_resumed_is_a_usage_error(model, tmp_path):
    results = tmp_path / "r.duckdb"
    done = measure("--resume", "last", "--results", results)
    assert done.returncode == 4
    assert "there is no run to resume" in done.stderr
    done = measure("--resume", "last", "--results", results, "--decoder", "greedy")
    assert done.returncode == 4
    assert "leave --decoder out" in done.stderr
    folder = results.with_suffix(".shards") / "20260101T000000-abcdef"
    shards.write(folder / shards.RUN_FILE, {"run_id": folder.name})
    shards.write(folder / shards.PLAN_FILE, {"cells": []})
    with pytest.raises(SpecError, match=r"no such run .* did you mean '20260101T000000-abcdef'"):
        find(results, "20260101T000000-abcdee")


COUNTING = """
import time
from functools import partial
from decodathlon import suite
from decodathlon.harness.measure.statistics import Estimate
from decodathlon.harness.registry import registry


def load(name, *, device, dtype):
    from decodathlon.harness.targets.toy import Ising

    return Ising(4, 0.42)


registry.add("model-loader", "ising-for-kills", load, __file__)


@suite("counting", version=1, asks="?", sizes={s: {"units": 4} for s in ("smoke", "quick", "full")})
def test_counting(cell):
    for unit in cell.until_late(range(cell.sizes["units"])):
        time.sleep(0.02)
        cell.sample(f"unit-{unit}", square=unit * cell.decoder.k)
    cell.report("generated_tokens", Estimate(float(cell.decoder.k), n=4))
"""


def test_a_killed_run_keeps_every_finished_cell(tmp_path):
    """Killed at 30 random moments and resumed each time, runs end with the rows of one that nobody touched."""
    rng = random.Random(4)
    suite = tmp_path / "test_counting.py"
    suite.write_text(COUNTING)
    new = ["--model", "ising-for-kills", "--suite", "counting", "--decoder-file", suite]
    new += [x for k in range(1, CELLS + 1) for x in ("--decoder", f"top-k[k={k}]")]

    def run(results, *options):
        given = command("--results", results, *options)
        given["args"][3] = str(suite)
        return subprocess.Popen(**given, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    calm = tmp_path / "calm.duckdb"
    began = time.monotonic()
    assert run(calm, *new).wait() == 0
    whole, expected = time.monotonic() - began, rows_of(calm)
    assert len(expected) == CELLS

    moments = [rng.uniform(0.2, 1.0) * whole for _ in range(KILLS)]
    finished_runs = 0
    while moments or finished_runs == 0:
        results, options, seen = tmp_path / f"killed-{len(moments)}.duckdb", new, {}
        while True:
            process = run(results, *options)
            try:
                process.wait(timeout=moments.pop() if moments else 120)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            # Until plan and record are written there is nothing to go on with, and no cell has begun.
            begun = [f for f in results.with_suffix(".shards").glob("*") if (f / shards.RUN_FILE).exists()]
            assert len(begun) <= 1
            if begun:
                options = ["--resume", "last"]
                now = {p.name: p.read_bytes() for p in shards.cells(begun[0])}
                for name, content in seen.items():
                    assert now[name] == content or json.loads(content)["status"] != "ok"
                seen = now
            if process.returncode == 0:
                break
            assert process.returncode == -signal.SIGKILL
        assert rows_of(results) == expected
        finished_runs += 1
    time.sleep(2)
    assert orphans() == []


def rows_of(path):
    with store.connect(path) as connection:
        assert connection.execute("SELECT count(*) FROM sample").fetchone() == (4 * CELLS,)
        return connection.execute(
            "SELECT decoder, status, metric, value, n FROM results ORDER BY decoder, metric"
        ).fetchall()


def orphans():
    """Workers whose controller is gone."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
            parent = (entry.parent / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if b"decodathlon.harness.workers.worker" in words and parent == "1":
            found.append(entry.parent.name)
    return found


def test_two_runs_may_write_one_file(model, decoders, tmp_path):
    results = tmp_path / "r.duckdb"
    both = [
        subprocess.Popen(**command(*new_run(results, model, decoders, name, suite="wikitext2")), stdout=subprocess.PIPE)
        for name in ("calm", "calm[number=1]")
    ]
    for process in both:
        process.communicate(timeout=300)
        assert process.returncode == 0
    with store.connect(results) as connection:
        assert connection.execute("SELECT count(*), count(DISTINCT run_id) FROM cell").fetchone() == (2, 2)


def test_a_disk_that_fills_up_stops_the_run_and_loses_nothing_before(model, decoders, tmp_path):
    """A file system of one megabyte would need root; instead the second shard's name is taken by a folder."""
    results = tmp_path / "r.duckdb"
    planned = measure(*new_run(results, model, decoders, "calm", "calm[number=1]", "calm[number=2]", suite="wikitext2"))
    assert planned.returncode == 0
    (run,) = results.with_suffix(".shards").iterdir()
    cells = {json.loads(p.read_text())["spec"]["decoder"]: p for p in shards.cells(run)}
    cells["calm[number=2]"].unlink()
    cells["calm[number=1]"].unlink()
    cells["calm[number=1]"].mkdir()
    kept = cells["calm"].read_bytes()
    done = measure("--resume", "last", "--results", results)
    assert done.returncode == 4
    assert "is not a whole shard" in done.stderr
    assert cells["calm"].read_bytes() == kept


def test_a_resumed_run_stays_on_the_hardware_that_it_began_on(tmp_path, model, decoders, monkeypatch):
    results = tmp_path / "r.duckdb"
    done = measure(*new_run(results, model, decoders, "calm", "calm[number=1]", suite="wikitext2"))
    assert done.returncode == 0
    cells = by_decoder(results)
    kind = cells["calm"]["place"]["kind"]
    assert kind.endswith("threads")
    (run,) = results.with_suffix(".shards").iterdir()
    (run / f"{cells['calm[number=1]']['cell_id']}.json").unlink()
    first = run / f"{cells['calm']['cell_id']}.json"
    first.write_text(first.read_text().replace(kind, "another CPU, 64 threads"))
    done = measure("--resume", "last", "--results", results)
    assert done.returncode == 1
    left = by_decoder(results)["calm[number=1]"]
    assert left["status"] == "cancelled"
    assert "cells that it is compared with ran on another CPU, 64 threads" in left["reason"]


def executor(folder, timeout=60.0):
    return local.LocalWorker(Orders(run_id="r", folder=folder, timeout=timeout, say=lambda text: None))


def test_a_shard_that_cannot_be_written_is_told_and_the_worker_ends(tmp_path, monkeypatch):
    spec = CellSpec("wikitext2", 1, "all", "greedy", "m", "smoke", 0, broken="ImportError: not here")
    blocked = tmp_path / "taken"
    blocked.write_text("a file where the folder should be")
    ours = executor(blocked)
    with pytest.raises(StoreError, match="cannot be written"):
        ours.run(spec)
    assert ours._process is None


def test_a_worker_that_the_kernel_killed_for_memory_is_oom(tmp_path, monkeypatch):
    counts = iter([3, 4])
    monkeypatch.setattr(local, "kernel_kills", lambda: next(counts))
    monkeypatch.setenv("DECODATHLON_TEST", "1")
    file = tmp_path / "mine.py"
    file.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    spec = CellSpec("wikitext2", 1, "all", "greedy", "m", "smoke", 0, decoder_files=(str(file),))
    outcome = executor(tmp_path / "run").run(spec)
    assert (outcome.status, outcome.reason) == ("oom", "the system killed the worker for want of memory")
    assert local.kernel_kills.__name__ == "<lambda>"


def test_the_journal_is_read_up_to_its_torn_end(tmp_path):
    path = tmp_path / "c.journal"
    book = journal.Journal(path)
    book.write("decoder", {"spec": "greedy"})
    book.write("samples", {"row": "a", "data": {"x": float("inf")}})
    book.write("samples", {"row": "b", "data": {}})
    book.close()
    path.write_text(path.read_text() + '{"samples": {"row": "torn')
    found = journal.read(path)
    assert [s["row"] for s in found["samples"]] == ["a", "b"]
    assert found["decoder"] == {"spec": "greedy"}
    assert journal.read(tmp_path / "none")["samples"] == []


def test_a_later_attempt_remembers_the_earlier_ones(tmp_path):
    outcome = Outcome(CellSpec("wikitext2", 1, "all", "greedy", "m", "smoke", 0), "r", status="timeout", reason="late")
    assert outcome.as_attempt()["reason"] == "late"
    assert "metrics" not in outcome.as_attempt()


def test_who_interrupts_the_storing_hears_how_to_go_on(tmp_path, monkeypatch):
    def ingest(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "ingest", ingest)
    ending = types.SimpleNamespace(
        _began=0.0, run_id="r", outcomes=[], folder=tmp_path, closing=[], failed_to_ingest=False,
        settings=types.SimpleNamespace(results=tmp_path / "r.duckdb"), _ingest_command="decodathlon ingest r",
    )  # fmt: skip
    Run._ingest(ending)
    assert ending.failed_to_ingest
    assert ending.closing[-1] == "NOT INGESTED, the shards are safe: interrupted. Then: decodathlon ingest r"
