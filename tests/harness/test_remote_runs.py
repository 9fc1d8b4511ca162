"""Whole runs on a server: a double that dies and comes back, and `transformers serve` itself."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import engine_double
import pytest
from engine_double import Double

from decodathlon.harness import embedded
from decodathlon.harness.results import shards

ROOT = Path(__file__).parents[2]


def measure(*options, timeout=300):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("DECODATHLON_")}
    words = [sys.executable, "-m", "pytest", "suites/", "--benchmark", "--gates", "none", *map(str, options)]
    return subprocess.run(
        words, cwd=ROOT, env=inherited | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
        timeout=timeout,
    )  # fmt: skip


def cells(results):
    (run,) = results.with_suffix(".shards").iterdir()
    found = [json.loads(p.read_text()) for p in shards.cells(run)]
    return {(c["spec"]["suite"], c["spec"]["decoder"]): c for c in found}


def test_a_run_goes_through_and_says_what_a_server_cannot(tmp_path):
    server, results = engine_double.serve(Double()), tmp_path / "r.duckdb"
    try:
        done = measure(
            "--model", "openai:m[hardware=a double]", "--model-url", server.url, "--scale", "smoke",
            "--results", results, "--decoder", "greedy", "--decoder", "top-p", "--decoder", "beam",
            "--decoder", "qalign[steps=3,reward=length:4]",
        )  # fmt: skip
    finally:
        server.close()
    assert done.returncode == 0, done.stdout + done.stderr
    found = cells(results)
    measured = {suite for (suite, decoder), c in found.items() if decoder == "top-p" and c["status"] == "ok"}
    assert {"aime25", "math500", "mt_bench", "serving", "audit", "ising"} <= measured
    assert "wikitext2" not in {suite for suite, _ in found}  # of its logits, which a server does not show
    assert found["math500", "beam"]["status"] == "unsupported"
    assert "is a server, which shows none" in found["math500", "beam"]["reason"]
    assert found["math500", "qalign[reward=length:4,steps=3]"]["status"] == "ok"
    row = found["math500", "top-p"]
    assert row["model"]["name"].startswith("openai:m@")
    assert row["model"]["processor"] == "a double, vllm 0.33.0"
    assert row["place"]["hardware"] == "a double, vllm 0.33.0"
    assert server.url not in json.dumps(list(found.values()))
    assert found["audit", "top-p"]["model"]["name"] == "toy"


def test_a_server_that_dies_costs_nothing_that_it_answered(tmp_path):
    options = ("--scale", "smoke", "--suite", "math500", "--size", "questions=6", "--size", "samples=3",
               "--decoder", "temperature", "--decoder", "top-p")  # fmt: skip
    whole, whole_results = Double(), tmp_path / "whole.duckdb"
    server = engine_double.serve(whole)
    calm = measure("--model", "openai:m", "--model-url", server.url, "--results", whole_results, *options)
    server.close()
    assert calm.returncode == 0, calm.stdout + calm.stderr
    probes = len(whole.asked) - 2 * 18

    port, results = server.server_address[1], tmp_path / "r.duckdb"
    dying = Double(dies_after=probes + 11)
    server = engine_double.serve(dying, port=port)
    done = measure("--model", "openai:m", "--model-url", server.url, "--results", results, *options)
    server.close()
    assert done.returncode == 1, done.stdout + done.stderr
    first, second = cells(results).values()
    assert {first["status"], second["status"]} == {"failed"}
    assert f"127.0.0.1:{port}" not in json.dumps([first, second])  # rows are published
    assert "the server is gone" in first["reason"] + second["reason"]

    back = Double()
    server = engine_double.serve(back, port=port)
    done = measure("--resume", "last", "--results", results)
    server.close()
    assert done.returncode == 0, done.stdout + done.stderr
    answered = dying.counts() + back.counts()
    wanted = {body for body in whole.counts() if json.loads(body)["max_tokens"] == 16}
    assert len(wanted) == 36
    assert {body: answered[body] for body in wanted} == dict.fromkeys(wanted, 1)  # all, and each of them once
    untimed = lambda c: [m for m in c["metrics"] if "seconds" not in m["metric"]]  # noqa: E731
    for key, cell in cells(whole_results).items():
        again = cells(results)[key]
        assert again["status"] == cell["status"] == "ok"
        assert untimed(again) == untimed(cell)


def test_an_option_that_does_not_fit_is_told_before_anything_is_asked(tmp_path):
    done = measure("--model", "openai:m", "--results", tmp_path / "r.duckdb")
    assert done.returncode == 4
    assert "--model openai:m needs --model-url" in done.stderr
    done = measure("--model-url", "http://127.0.0.1:1/v1", "--results", tmp_path / "r.duckdb")
    assert "it goes with --model openai:NAME" in done.stderr
    done = measure("--model", "openai:m", "--model-url", "http://127.0.0.1:1/v1", "--results", tmp_path / "r.duckdb")
    assert "no server answers there" in done.stderr


def free_port():
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return some.getsockname()[1]


@pytest.fixture
def transformers_serve():
    """`transformers serve` with the embedded model, on loopback; its address and the model's folder."""
    missing = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"transformers serve needs {', '.join(missing)}")
    if not embedded.is_ready():
        pytest.skip("the embedded model is not at hand")
    folder = embedded.folder()
    port = free_port()
    words = ["serve", str(folder), "--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("transformers")), *words],
        env=os.environ | quiet, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=1).close()
            break
        except OSError:
            time.sleep(0.3)
    else:
        process.kill()
        pytest.fail(f"transformers serve did not start: {process.stdout.read().decode()[-2000:]}")
    yield f"{url}/v1", folder
    process.kill()
    process.wait()


def test_a_real_server_writes_what_the_model_writes_here(transformers_serve, tmp_path):
    url, folder = transformers_serve
    common = ("--scale", "smoke", "--suite", "math500", "--decoder", "greedy", "--results")
    done = measure(
        "--model", f"openai:{folder}[tokenizer={folder}]", "--model-url", url, *common, tmp_path / "there.duckdb",
        "--decoder", "qalign[steps=2,reward=length:6]", "--decoder", "persistent-smc-steps", "--size", "tokens=8",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the server was seen to have: chat, greedy, min_p, prefix, temperature, top_k, top_p" in done.stdout
    here = measure(*common, tmp_path / "here.duckdb", "--dtype", "float32", "--size", "tokens=8")
    assert here.returncode == 0, here.stdout + here.stderr
    there, local = cells(tmp_path / "there.duckdb"), cells(tmp_path / "here.duckdb")
    said = lambda c: [s["data"]["response"] for s in c["samples"]]  # noqa: E731
    assert said(there["math500", "greedy"]) == said(local["math500", "greedy"])
    assert there["math500", "greedy"]["model"]["processor"] == "hardware unstated, transformers"
    moved = there["math500", "qalign[reward=length:6,steps=2]"]
    assert moved["status"] == "ok"
    assert any("as text" in note for note in moved["notes"])
    steps = there["math500", "persistent-smc-steps"]
    assert steps["status"] == "unsupported"
    assert "log-probs of the model" in steps["reason"]
