"""`pytest suites/ --benchmark` as a user meets it: in a process of its own, on a tiny model, without hub or data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models

from decodathlon.harness.results import store

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_models.save_folder(tmp_path_factory.mktemp("tiny-llama"))


def pytest_run(*options, cwd=ROOT, **environment):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("DECODATHLON_")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "suites/", *map(str, options)],
        cwd=cwd, capture_output=True, text=True, check=False, timeout=300,
        env=inherited | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip


def shards_of(results):
    return {
        (c["spec"]["suite"], c["spec"]["decoder"]): c
        for p in results.with_suffix(".shards").glob("*/*-*.json")
        for c in [json.loads(p.read_text())]
    }


DECODERS = '''
import os
from decodathlon import Completion, Decoder, Sampler, decoder, process

@decoder("third", claim="shaped", bounds={"k": "[1, inf)"}, sweep={"k": [2, 4]})
class Third(Sampler):
    """The third way."""
    k: int = 3
    def shape(self, logits):
        return process(logits, top_k=self.k)

@decoder("raises", claim="heuristic")
class Raises(Sampler):
    def shape(self, logits):
        raise RuntimeError("on purpose")

@decoder("exits", claim="heuristic")
class Exits(Sampler):
    def shape(self, logits):
        import sys
        print("last words", file=sys.stderr, flush=True)
        os._exit(3)

@decoder("forks", claim="heuristic")
class Forks(Sampler):
    """Leaves a child that holds whatever it inherited, then dies."""
    def shape(self, logits):
        import time
        if os.fork() == 0:
            time.sleep(120)
        os._exit(4)

@decoder("miscounts", claim="heuristic")
class Miscounts(Decoder):
    def generate(self, target, prompts, limits, rng):
        return [Completion(tokens=[1], stop_reason="length") for _ in prompts]

@decoder("strange", claim="heuristic")
class Strange(Decoder):
    def generate(self, target, prompts, limits, rng):
        return [Completion(tokens=[10**6] * limits.max_new_tokens, stop_reason="length") for _ in prompts]
'''


def test_a_run_measures_shows_and_stores(model, tmp_path):
    results = tmp_path / "r.duckdb"
    done = pytest_run("--benchmark", "--scale", "smoke", "--model", model, "--results", results, "--decoder", "greedy",
                      "--decoder", "top-p[p=0.5]", "--decoder", "hf-generate", "--dtype", "float32")  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "throughput batch-1" in done.stdout
    assert "python-topics (stand-in)" in done.stdout
    assert "s left)" in done.stdout
    assert "34 cells added in" in done.stdout
    assert "unsupported: needs a next-token law" in done.stdout
    with store.connect(results) as connection:
        rows = connection.execute(
            "SELECT suite, decoder, metric, value, dataset, status FROM results WHERE suite = 'throughput'"
        ).fetchall()
        environment, options = connection.execute("SELECT environment, options FROM run").fetchone()
    found = {(d, m): v for _, d, m, v, _, _ in rows}
    assert found["hf-generate", "greedy_match"] == 1.0
    ratios = {key for key in found if key[1].startswith("ratio_")}
    assert ratios == {
        ("greedy", "ratio_to_self"), ("greedy", "ratio_to_hf_generate"), ("top-p[p=0.5]", "ratio_to_greedy"),
        ("top-p[p=0.5]", "ratio_to_hf_generate"), ("hf-generate", "ratio_to_self"), ("hf-generate", "ratio_to_greedy"),
        ("top-p[p=0.5]", "ratio_to_self"),
    }  # fmt: skip
    assert {r[4] for r in rows} == {"python-topics"}
    assert json.loads(environment)["packages"]["torch"]
    assert json.loads(options)["scale"] == "smoke"
    shard = shards_of(results)["wikitext2", "top-p[p=0.5]"]
    assert len(shard["arrays"]["decoder_log_prob"]) == 511
    assert shard["sizes"]["tokens"] == 512
    assert shard["data"]["source"] == "stand-in"


def test_a_failing_crashing_or_lying_decoder_becomes_a_row_and_the_run_goes_on(model, tmp_path):
    file, results = tmp_path / "mine.py", tmp_path / "r.duckdb"
    file.write_text(DECODERS)
    chosen = [x for name in ("raises", "exits", "forks", "miscounts", "strange", "third") for x in ("--decoder", name)]
    done = pytest_run("--benchmark", "--scale", "smoke", "--model", model, "--results", results,
                      "--suite", "throughput",                      "--decoder-file", file, *chosen)  # fmt: skip
    assert done.returncode == 1
    by_decoder = {d: c for (_, d), c in shards_of(results).items()}
    assert {d: c["status"] for d, c in by_decoder.items()} == {
        "raises": "failed", "exits": "crashed", "forks": "crashed", "miscounts": "failed", "strange": "failed",
        "third": "ok",
    }  # fmt: skip
    assert by_decoder["raises"]["reason"] == "RuntimeError: on purpose"
    assert "in shape" in by_decoder["raises"]["error"]
    assert by_decoder["exits"]["reason"] == "the worker ended with exit code 3"
    assert "last words" in by_decoder["exits"]["error"]
    assert "returned 1 tokens where exactly 4 were due" in by_decoder["miscounts"]["reason"]
    assert "outside the vocabulary" in by_decoder["strange"]["reason"]
    with store.connect(results) as connection:
        assert connection.execute("SELECT count(*) FROM cell").fetchone() == (6,)
    assert "crashed: the worker ended with exit code 3" in done.stdout
    published = [p for p in results.with_suffix(".shards").rglob("*.json") if not p.name.startswith(".")]
    everything = "".join(p.read_text() for p in published)
    assert str(model.parent) not in everything.replace(json.dumps(by_decoder["raises"]["error"])[1:-1], "")


def test_inline_and_local_executors_draw_the_same_and_sweeps_add_neighbours(model, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(DECODERS)
    found = {}
    for executor in ("inline", "local"):
        results = tmp_path / f"{executor}.duckdb"
        done = pytest_run("--benchmark", "--scale", "smoke", "--model", model, "--results", results,
                          "--suite", "wikitext2", "--decoder-file", file, "--decoder", "third", "--sweep",
                          "--executor", executor)  # fmt: skip
        assert done.returncode == 0, done.stdout
        found[executor] = {d: c["metrics"] for (_, d), c in shards_of(results).items()}
    assert found["inline"] == found["local"]
    assert set(found["local"]) == {"third", "third[k=2]", "third[k=4]"}


def test_nothing_measured_is_not_a_success(model, tmp_path):
    done = pytest_run("--benchmark", "--scale", "smoke", "--model", model, "--results", tmp_path / "r.duckdb",
                      "--suite", "wikitext2", "--decoder", "hf-generate")  # fmt: skip
    assert done.returncode == 11


def test_without_the_flag_suites_are_deselected_and_say_why():
    done = pytest_run()
    assert done.returncode == 5
    assert "run only with --benchmark" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--decoder", "top-q"], "there is no decoder 'top-q'; did you mean"),
        (["--decoder", "top-p[p=2]"], "p=2 is outside (0, 1]"),
        (["--suite", "wikitext"], "there is no suite 'wikitext'; did you mean 'wikitext2'"),
        (["--baseline", "gredy"], "did you mean 'greedy'"),
        (["--model", "smollm"], "there is no model 'smollm'"),
        (["--data", "/nowhere"], "--data /nowhere: there is no such folder"),
        (["--data", str(ROOT / "docs")], "has no aime_2025.jsonl"),
        (["--results", "/nowhere/r.duckdb"], "does not exist; create it"),
        (["--results", str(ROOT / "pyproject.toml")], "cannot be opened"),
        (["--decoder-file", "none.py"], "there is no such file"),
        (["--seed", "99999999999999999999"], "does not fit into 64 bits"),
        (["--results", "r.shards"], ".shards is the ending of the folder beside it"),
        (["--model", "nobody/nothing"], "is not in the hub cache and HF_HUB_OFFLINE is set"),
        (["--model", "smollm2-135m-instruct[load=nf4]", "--device", "cpu"], "load=nf4 needs CUDA and bitsandbytes"),
        (["--decoder-file", str(ROOT / "tests" / "tiny_models.py")], "registers nothing"),
        (["--gates", "none.toml"], "gates none.toml: No such file"),
        (["--cell-timeout", "0"], "0 is not a positive number of seconds"),
        (["--resume", "20260101T000000-abcdef"], "there is no"),
    ],
)
def test_bad_input_is_a_usage_error_in_one_line(options, message):
    done = pytest_run("--benchmark", *options)
    assert done.returncode == 4, done.stdout
    assert message in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_a_broken_decoder_file_names_its_line(tmp_path):
    (tmp_path / "bad.py").write_text("x = 1\nimport no_such_module\n")
    done = pytest_run("--benchmark", "--decoder-file", tmp_path / "bad.py")
    assert done.returncode == 4
    assert "bad.py, line 2: ModuleNotFoundError" in done.stderr
    (tmp_path / "taken.py").write_text(DECODERS.replace('"third"', '"greedy"'))
    done = pytest_run("--benchmark", "--decoder-file", tmp_path / "taken.py")
    assert done.returncode == 4
    assert "decoder 'greedy' is defined twice: in " in done.stderr
    assert "baselines.py" in done.stderr
    assert "taken.py" in done.stderr


def test_a_package_that_takes_a_name_is_a_usage_error_that_names_both(tmp_path):
    package(tmp_path, "taker_plugin", DECODERS.replace('"third"', '"greedy"'))
    done = pytest_run("--benchmark", PYTHONPATH=str(tmp_path))
    assert done.returncode == 4
    assert "decoder 'greedy' is defined twice" in done.stderr
    assert "taker_plugin.py" in done.stderr


def test_a_cell_that_fails_after_it_reported_has_no_metrics(model, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from decodathlon import suite\n"
        "from decodathlon.harness.measure.statistics import Estimate\n"
        "@suite('late', version=1, asks='?', sizes={'smoke': {}, 'quick': {}, 'full': {}})\n"
        "def test_late(cell):\n"
        "    cell.report('ppl', Estimate(1.0))\n"
        "    cell.sample('raw', seen=1)\n"
        "    raise RuntimeError('too late')\n"
    )
    from decodathlon.harness.bench import Bench
    from decodathlon.harness.cells import CellSpec
    from decodathlon.harness.registry import registry

    spec = CellSpec("late", 1, "all", "greedy", str(model), "smoke", 0, device="cpu", decoder_files=(str(file),))
    try:
        outcome = Bench(lambda text: None).measure(spec, "r")
    finally:
        registry.entries.pop(("suite", "late"), None)
    assert (outcome.status, outcome.reason, outcome.metrics) == ("failed", "RuntimeError: too late", [])
    assert outcome.samples == [{"row": "raw", "data": {"seen": 1}}]


def test_what_happens_while_a_cell_is_measured_is_in_its_row_and_in_no_later_one(tmp_path, model):
    from decodathlon.harness.bench import Bench
    from decodathlon.harness.cells import CellSpec
    from decodathlon.harness.registry import registry

    file = tmp_path / "odd_suite.py"
    file.write_text(
        "from decodathlon import suite\n"
        "from decodathlon.harness.measure.statistics import Estimate\n"
        "@suite('odd', version=1, asks='?', sizes={'smoke': {}, 'quick': {}, 'full': {}})\n"
        "def test_odd(cell):\n"
        "    cell.report('ppl', Estimate(1.0))\n"
        "    for _ in range(3 if cell.seed == 0 else 0):\n"
        "        cell.target.happened('the graph stumbled')\n"
    )
    bench = Bench(lambda text: None)
    try:
        notes = [
            bench.measure(
                CellSpec(
                    "odd", 1, "all", "greedy", str(model), "smoke", seed, device="cpu", decoder_files=(str(file),)
                ),
                "r",
            ).notes
            for seed in (0, 1)
        ]
    finally:
        registry.entries.pop(("suite", "odd"), None)
    assert [n.count("the graph stumbled") for n in notes] == [1, 0]


def package(folder, name, code):
    """A third-party package as pip would leave it: a module and its metadata with an entry point."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[decodathlon.decoders]\n{name.replace('_', '-')} = {name}\n")


def test_the_decoders_of_a_named_file_join_the_headline_set_and_exits_are_caught(tmp_path):
    (tmp_path / "mine.py").write_text(DECODERS)
    done = pytest_run("--benchmark", "--decoder-file", tmp_path / "mine.py", "--collect-only", "-q")
    assert "test_wikitext2[third-joined]" in done.stdout
    assert "test_wikitext2[greedy-joined]" in done.stdout
    (tmp_path / "quits.py").write_text("import sys\nsys.exit(0)\n")
    done = pytest_run("--benchmark", "--decoder-file", tmp_path / "quits.py")
    assert done.returncode == 4
    assert "quits.py, line 2: SystemExit" in done.stderr


def test_third_party_packages_join_and_a_broken_one_becomes_a_failed_row(model, tmp_path):
    packages = tmp_path / "site"
    packages.mkdir()
    package(packages, "good_plugin", DECODERS)
    package(packages, "broken_plugin", "import a_module_that_is_not_there\n")
    results = tmp_path / "r.duckdb"
    done = pytest_run("--benchmark", "--scale", "smoke", "--model", model, "--results", results, "--suite", "wikitext2",
                      "--decoder", "third", PYTHONPATH=str(packages))  # fmt: skip
    assert done.returncode == 1
    found = shards_of(results)
    assert found["wikitext2", "third"]["status"] == "ok"
    broken = found["wikitext2", "broken-plugin"]
    assert broken["status"] == "failed"
    assert "a_module_that_is_not_there" in broken["reason"]
    assert "broken_plugin" in broken["error"]


def test_a_failed_audit_fails_the_run_unless_nobody_asks_for_rules(tmp_path):
    options = ["--suite", "audit", "--scale", "smoke", "--results", str(tmp_path / "r.duckdb")]
    options += ["--decoder-file", str(ROOT / "docs/examples/dishonest.py"), "--decoder", "dishonest-random-number"]
    done = pytest_run("suites/", "--benchmark", *options)
    assert done.returncode == 1, done.stdout
    assert "FAIL audit: dishonest-random-number does not draw from the law that it claims" in done.stdout
    assert pytest_run("suites/", "--benchmark", *options, "--gates", "none").returncode == 0


def test_sizes_of_the_users_own_make_a_setting_of_their_own(model, tmp_path):
    results = tmp_path / "r.duckdb"
    done = pytest_run("--benchmark", "--scale", "smoke", "--model", model, "--results", results, "--suite", "wikitext2",
                      "--decoder", "greedy", "--size", "tokens=128", "-k", "joined")  # fmt: skip
    assert done.returncode == 0, done.stdout
    with store.connect(results) as connection:
        rows = connection.execute("SELECT scale, sizes->>'tokens' FROM cell").fetchall()
    assert rows == [("smoke[tokens=128]", "128")]


def test_what_a_decoders_file_says_in_vain_is_told_and_a_second_file_is_refused(tmp_path):
    one, other = tmp_path / "a.yaml", tmp_path / "b.yaml"
    one.write_text("system: {seed: 3}\ngeneration: {stop_tokens: [x], max_steps: 3}\n")
    other.write_text("generation: {max_steps: 4}\n")
    options = ["--benchmark", "--collect-only", "--suite", "math500", "--decoder", "persistent-smc-steps"]
    options += ["--results", tmp_path / "r.duckdb", "--decoder-config", one]
    done = pytest_run(*options)
    assert (
        "left aside, for the harness has its own options or needs none: system, generation.stop_tokens" in done.stdout
    )
    assert "max_steps=3" in done.stdout
    again = pytest_run(*options, "--decoder-config", other)
    assert again.returncode == 4
    assert "--decoder-config: given twice" in again.stderr


def test_workers_of_xdist_are_refused():
    pytest.importorskip("xdist")
    done = pytest_run("--benchmark", "--suite", "throughput", "-n", "2")
    assert done.returncode == 4
    assert "-n would measure decoders beside one another" in done.stderr


def test_problems_are_measured_to_their_end(model, tmp_path):
    results = tmp_path / "r.duckdb"
    options = ["--benchmark", "--suite", "throughput", "--workload", "problems", "--scale", "smoke"]
    done = pytest_run(*options, "--model", model, "--results", results, "--decoder", "prompt-lookup")
    assert done.returncode == 0, done.stdout
    with store.connect(results) as connection:
        found = dict(connection.execute("SELECT metric, value FROM results WHERE slice = 'aime25'").fetchall())
    assert found["length_to_greedy"] == 1
    assert {"tau_per_target_s", "tpot_behind_draft_s", "ratio_to_greedy"} <= set(found)


def test_a_workload_takes_the_place_of_the_prompts_and_cycles_are_kept_when_asked_for(model, tmp_path):
    results = tmp_path / "r.duckdb"
    options = ["--benchmark", "--suite", "throughput", "--workload", "spec-bench", "--cycle-trace", "--scale", "smoke"]
    done = pytest_run(*options, "--model", model, "--results", results, "--decoder", "prompt-lookup")
    assert done.returncode == 0, done.stdout
    assert "own-spec-bench (stand-in)" in done.stdout
    with store.connect(results) as connection:
        found = dict(connection.execute("SELECT metric, value FROM results WHERE slice = 'mt_bench'").fetchall())
        kept = connection.execute("SELECT data FROM sample WHERE row LIKE 'cycles-%'").fetchall()
    assert found["tau"] >= 1
    assert 0 <= found["draft_share"] <= 1
    assert {"ratio_predicted", "looping_share", "keep_share", "ratio_to_greedy"} <= set(found)
    cycle = json.loads(kept[0][0])["cycles"][0]
    assert {"drafted", "accepted", "context", "position", "draft_s", "verify_s", "keep_s"} <= set(cycle)
    wrong = pytest_run("--benchmark", "--suite", "throughput", "--workload", "spec-bensh")
    assert wrong.returncode == 4
    assert "--workload spec-bensh: no chosen suite has it; did you mean 'spec-bench'?" in wrong.stderr
