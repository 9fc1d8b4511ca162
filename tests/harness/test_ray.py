"""Cells on a real Ray cluster of two nodes on this machine, one of which is killed. Skipped where there is no Ray."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import tiny_models

from decodathlon.harness.cells import CellSpec
from decodathlon.harness.errors import MissingError, SpecError
from decodathlon.harness.results import environment, shards
from decodathlon.harness.resuming import same
from decodathlon.harness.workers import agent
from decodathlon.harness.workers import ray as rays
from decodathlon.harness.workers.base import Orders
from decodathlon.harness.workers.fleet import Fleet
from decodathlon.harness.workers.schedule import Job

ROOT = Path(__file__).parents[2]
DECODERS = '''
import os, signal, subprocess, time
from pathlib import Path
from decodathlon import Sampler, decoder

class Calm(Sampler):
    def shape(self, logits):
        return logits.log_softmax(-1)

@decoder("calm", claim="exact")
class Plain(Calm):
    number: int = 0

@decoder("slow", claim="exact")
class Slow(Calm):
    """Says in a file where it runs, and takes its time."""
    where: str = ""

    def generate(self, *words):
        mark = Path(self.where) / f"{os.getppid()}-{time.monotonic_ns()}"
        mark.write_text(str(os.getpid()))
        time.sleep(0.3)
        return super().generate(*words)

@decoder("patricide", claim="exact")
class Patricide(Calm):
    """Kills the process of the agent above it, once."""
    where: str = ""

    def generate(self, *words):
        mark = Path(self.where) / "done"
        if not mark.exists():
            mark.touch()
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)
        return super().generate(*words)
'''


@pytest.fixture(scope="module")
def cluster():
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A cluster usually takes half a minute to notice that a node is dead.
    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
    head = {"num_cpus": 0, "object_store_memory": 80 << 20, "_system_config": quick}
    made = Cluster(initialize_head=True, head_node_args=head)
    made.add_node(num_cpus=1, object_store_memory=80 << 20)
    made.wait_for_nodes()
    yield made
    made.shutdown()


@pytest.fixture
def spare(cluster):
    """A second node that a test may kill."""
    node = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    cluster.wait_for_nodes()
    yield node
    if node in cluster.worker_nodes:
        cluster.remove_node(node)
    deadline = time.monotonic() + 30
    while sum(n["Alive"] for n in nodes(cluster)) > 2 and time.monotonic() < deadline:
        time.sleep(0.2)


def nodes(cluster):
    import ray

    own = not ray.is_initialized()
    if own:
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
    found = ray.nodes()
    if own:
        ray.shutdown()
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_models.save_folder(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture
def decoders(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(DECODERS)
    return file


def command(cluster, results, model, decoders, *names, options=()):
    chosen = [x for name in names for x in ("--decoder", name)]
    words = ["suites/", "--benchmark", "--gates", "none", "--scale", "smoke", "--suite", "throughput", "--model", model,
             "--decoder-file", decoders, "--results", results, "--executor", "ray", "--ray-address", cluster.address,
             *chosen, *options]  # fmt: skip
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("DECODATHLON_")}
    return {
        "args": [sys.executable, "-m", "pytest", *map(str, words)],
        "cwd": ROOT,
        "env": inherited | {"HF_HUB_OFFLINE": "1"},
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "preexec_fn": partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    }


def cells(results):
    (run,) = results.with_suffix(".shards").iterdir()
    return {c["spec"]["decoder"]: c for p in shards.cells(run) for c in [json.loads(p.read_text())]}


def worker_of(spare):
    """Processes below the raylet of a node."""
    import psutil

    raylet = next(p.process for p in spare.all_processes["raylet"])
    return {child.pid for child in psutil.Process(raylet.pid).children(recursive=True)}


def kill_node_when_it_measures(cluster, spare, marks, seconds=60.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        below = worker_of(spare)
        if any(int(mark.name.partition("-")[0]) in below for mark in marks.iterdir()):
            cluster.remove_node(spare, allow_graceful=False)
            return
        time.sleep(0.1)
    raise AssertionError("no cell ran on the spare node")


def test_a_killed_node_costs_at_most_its_cell_which_is_measured_again(cluster, spare, model, decoders, tmp_path):
    """Without --retry-lost the cell stays `crashed`, as that of a killed agent below does."""
    marks, results = tmp_path / "marks", tmp_path / "r.duckdb"
    marks.mkdir()
    names = [*(f"slow[where={marks}{'/' * i}]" for i in range(3)), *(f"calm[number={i}]" for i in range(3))]
    running = subprocess.Popen(**command(cluster, results, model, decoders, *names, options=["--retry-lost"]))
    kill_node_when_it_measures(cluster, spare, marks)
    out, err = running.communicate(timeout=180)
    found = cells(results)
    assert len(found) == len(names), out + err
    assert running.returncode == 0, out + err
    assert {c["status"] for c in found.values()} == {"ok"}
    (again,) = [c for c in found.values() if c["attempts"]]
    assert again["attempts"][0]["reason"].startswith("its node was lost")
    assert "measured a second time: the first time its machine was lost" in again["notes"]
    assert "go on with" not in out  # every cell has its row
    record = json.loads(next(results.with_suffix(".shards").glob("*/run.json")).read_text())
    assert list(record["nodes"]) == [environment.host()]
    assert record["nodes"][environment.host()]["packages"]["torch"]
    assert record["execution"]["executor"] == "ray"


def test_what_a_lost_cell_had_told_is_kept(cluster, spare, orders, model, decoders, tmp_path):
    marks = tmp_path / "marks"
    marks.mkdir()
    spec = CellSpec("throughput", 3, "batch-1", f"slow[where={marks}]", "tiny", "smoke", 0, model_spec=str(model),
                    decoder_files=(str(decoders),))  # fmt: skip
    on_the_spare = lambda given: [w for w in rays.workers(given) if w._node == spare.node_id]  # noqa: E731
    fleet = Fleet(on_the_spare, orders)
    killer = threading.Thread(target=kill_node_when_it_measures, args=(cluster, spare, marks))
    killer.start()
    (lost,) = fleet.outcomes([Job(spec)], {})
    killer.join()
    fleet.close()
    assert lost.status == "crashed"
    assert lost.reason.startswith("its node was lost")
    assert lost.place["node"] == environment.host()


def test_a_killed_agent_is_a_crash_and_the_next_cell_has_a_new_one(cluster, model, decoders, tmp_path):
    results = tmp_path / "r.duckdb"
    names = [f"patricide[where={tmp_path}]", "calm[number=1]", "calm[number=2]"]
    asked = command(cluster, results, model, decoders, *names, options=["--retry-lost"])
    done = subprocess.run(**asked, timeout=180, check=False)
    found = cells(results)
    assert done.returncode == 1, done.stdout + done.stderr
    assert found[names[0]]["status"] == "crashed"
    assert found[names[0]]["reason"].startswith("its worker was lost")
    assert not found[names[0]]["attempts"]
    assert {found[n]["status"] for n in names[1:]} == {"ok"}
    # taken up again, as after any crash
    again = command(cluster, results, model, decoders)
    place = again["args"].index("suites/")
    again["args"] = [*again["args"][: place + 2], "--gates", "none", "--resume", "last", "--results", str(results),
                     "--executor", "ray", "--ray-address", cluster.address]  # fmt: skip
    done = subprocess.run(**again, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert cells(results)[names[0]]["status"] == "ok"
    assert [a["status"] for a in cells(results)[names[0]]["attempts"]] == ["crashed"]


def test_ctrl_c_cancels_what_is_in_flight_and_says_how_to_go_on(cluster, model, decoders, tmp_path):
    marks, results = tmp_path / "marks", tmp_path / "r.duckdb"
    marks.mkdir()
    running = subprocess.Popen(**command(cluster, results, model, decoders, f"slow[where={marks}]", "calm"))
    deadline = time.monotonic() + 60
    while not any(marks.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 2, out + err
    assert "--resume" in out
    assert cells(results)[f"slow[where={marks}]"]["status"] == "cancelled"
    measuring = {int(m.read_text()) for m in marks.iterdir()}
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in measuring) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(Path(f"/proc/{pid}").exists() for pid in measuring)


@pytest.fixture
def orders(cluster, tmp_path):
    said = []
    made = Orders(run_id="r", folder=tmp_path / "run", timeout=60.0, say=said.append, ray_address=cluster.address,
                  same=same())  # fmt: skip
    object.__setattr__(made, "heard", said)
    yield made
    import ray

    ray.shutdown()


def job(model):
    return Job(CellSpec("throughput", 3, "batch-1", "greedy", "tiny", "smoke", 0, model_spec=str(model)), clocked=True)


def test_other_versions_and_other_code_are_refused_by_name(orders, model):
    import dataclasses

    for what, text in (("package torch", "torch is"), ("code", "code is"), ("python", "python is")):
        other = dataclasses.replace(orders, same=orders.same | {what: "1.0"})
        fleet = Fleet(rays.workers, other)
        (found,) = fleet.outcomes([job(model)], {})
        fleet.close()
        assert found.status == "cancelled"
        assert text in found.reason
        assert "there and 1.0 here; bring both to one version" in found.reason


def test_a_machine_that_somebody_else_keeps_is_waited_for_and_then_done_without(orders, model, monkeypatch):
    import ray

    fleet = Fleet(rays.workers, orders)

    @ray.remote(num_cpus=1)
    class Other:
        def there(self):
            return True

    other = Other.remote()
    ray.get(other.there.remote())
    monkeypatch.setattr(rays, "PATIENCE", 3.0)
    monkeypatch.setattr(rays, "SAY_EVERY", 1.0)
    (found,) = fleet.outcomes([job(model)], {})
    fleet.close()
    assert found.status == "cancelled"
    assert "of its node did not become free in" in found.reason
    assert any("waits for 1 CPUs of node" in line for line in orders.heard)


def test_a_full_object_store_stops_nobody(cluster, orders, model):
    import numpy as np
    import ray

    fleet = Fleet(rays.workers, orders)
    held = []
    try:
        while len(held) < 40:  # until nothing more fits without spilling to disk
            held.append(ray.put(np.zeros(8 << 20, dtype=np.uint8)))
        (found,) = fleet.outcomes([job(model)], {})
    finally:
        del held
        fleet.close()
    assert (found.status, found.reason) == ("ok", "")
    assert len(json.dumps(shards.read(orders.folder / f"{found.spec.cell_id}.json"))) > 1000


def test_more_workers_than_there_are_is_said_and_a_gpu_that_is_not_there_refused(orders):
    import dataclasses

    made = rays.workers(dataclasses.replace(orders, workers=5))
    assert len(made) == 1
    assert orders.heard == ["  the Ray cluster has room for 1 workers, not for 5"]
    for worker in made:
        worker.close()
    with pytest.raises(SpecError, match="has no GPU; use --device auto or cpu"):
        rays.workers(dataclasses.replace(orders, device="cuda"))


def test_no_cluster_and_no_ray_are_told_before_anything_is_loaded(tmp_path, monkeypatch):
    orders = Orders(run_id="r", folder=tmp_path, timeout=1.0, say=print, ray_address="127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingError, match="--executor ray needs Ray; install it on every node"):
        rays.workers(orders)
    monkeypatch.undo()
    pytest.importorskip("ray")
    with pytest.raises(MissingError, match=r"no cluster at 127\.0\.0\.1:1: Connection refused; `ray start --head`"):
        rays.workers(orders)
    with pytest.raises(SpecError, match="--ray-address nowhere: it is auto, local or HOST:PORT"):
        rays._reach("nowhere")


def follow(ours, before=b"", seconds=60.0):
    """Everything an agent says of its cell, put together."""
    parts, deadline = {"journal": b"", "lines": before, "shard": b""}, time.monotonic() + seconds
    while time.monotonic() < deadline:
        have = {part: len(text) for part, text in parts.items()}
        ours.poll(have)  # whose answer is swallowed
        for message in ours.poll(have):
            if "end" in message:
                return parts, message["end"]
            if "part" in message:
                assert len(message["bytes"]) <= agent.PIECE_BYTES
                parts[message["part"]] += message["bytes"]
    raise AssertionError("the agent did not come to an end")


def test_an_agent_sends_the_shard_in_pieces_and_has_files_of_its_own(model, decoders, tmp_path, monkeypatch):
    """Without Ray: the other end of the wire."""
    monkeypatch.setattr(agent, "PIECE_BYTES", 700)
    ours = agent.Agent("r", 60.0, 1)
    hello = ours.hello()
    assert hello["code"] == environment.code()
    text = decoders.read_bytes()
    for i in range(0, len(text), 500):
        ours.put("0/mine.py", i, text[i : i + 500])
        ours.put("0/mine.py", i, text[i : i + 500])
    earlier = b'{"row": "a", "kept": 1}\n'
    ours.put("lines", 0, earlier)
    spec = CellSpec("throughput", 3, "batch-1", "calm", "tiny", "smoke", 0, model_spec=str(model),
                    decoder_files=("/elsewhere/mine.py",))  # fmt: skip
    from dataclasses import asdict

    ours.begin("one", asdict(spec), [], {})
    ours.begin("one", asdict(spec), [], {})
    parts, wrong = follow(ours, earlier)
    assert wrong == ""
    shard = json.loads(parts["shard"])
    assert (shard["cell_id"], shard["status"]) == (spec.cell_id, "ok")
    assert shard["spec"]["decoder_files"] == ["mine.py"]
    assert parts["lines"] == earlier  # those that came are not sent back
    # the journal goes while the cell runs, and when it is done there is none
    assert b'"decoder"' in parts["journal"]
    assert (ours._folder / f"{spec.cell_id}.lines.jsonl").read_bytes() == b'{"row": "a", "kept": 1}\n'
    ours._worker.close()


def test_an_agent_that_goes_wrong_says_so(tmp_path):
    ours = agent.Agent("r", 60.0, 1)
    spec = CellSpec("throughput", 3, "batch-1", "calm", "tiny", "smoke", 0)
    ours._worker.run = lambda *words: 1 / 0
    from dataclasses import asdict

    ours.begin("one", asdict(spec), [], {})
    assert follow(ours)[1] == "ZeroDivisionError: division by zero"
