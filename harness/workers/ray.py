"""Workers on a Ray cluster: each is an actor, bound to a node and to one of its GPUs, with an agent (agent.py) in it.

Ray places and counts; it decides nothing: no retries, no restarts. The controller asks every agent for its news, writes
them into the run's own folder, and is the one that says what became of a cell. Messages are small and travel inline, so
that a full object store of a busy cluster stops nobody.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal

from decodathlon.harness.cells import CellSpec, Outcome
from decodathlon.harness.errors import MissingError, SpecError
from decodathlon.harness.results import journal, shards
from decodathlon.harness.results import lines as lines_of
from decodathlon.harness.workers.agent import PIECE_BYTES, Agent
from decodathlon.harness.workers.base import Orders, Place, RefusedError, Worker

REMEDY = "install it on every node: pip install -e '.[ray]'"
BEGIN = "`ray start --head` begins one, --ray-address local is one of this machine alone"
TOKEN = "where `ray start` has put token authentication on, as newer Ray does, set RAY_AUTH_MODE=token here, too"
#: Seconds in which a cluster must answer at all.
REACH = 10.0
#: How long a worker may wait for its GPU while somebody else has it, and how often it says so.
PATIENCE, SAY_EVERY = 600.0, 60.0
#: An agent that does not answer for so long is gone, whatever the cluster says.
LEASE = 120.0
#: How long a cluster may take to notice that the node of a dead actor is dead, too.
NOTICE = 10.0
#: Seconds for one look while we wait for an actor.
LOOK = 1.0


def workers(orders: Orders) -> Sequence[Worker]:
    """One worker per GPU of the cluster, or where it has none (or --device cpu) one per node.

    Raises:
        MissingError: Ray is not installed, or there is no such cluster, or none that this Ray can speak to.
        SpecError: a GPU is asked for, and the cluster has none.
    """
    cluster = _Cluster(orders.ray_address)
    nodes = cluster.nodes()
    with_gpu = {n: int(r.get("GPU", 0)) for n, r in nodes.items() if r.get("GPU", 0) >= 1}
    if orders.device == "cuda" and not with_gpu:
        cluster.leave()
        raise SpecError(f"--device cuda: the Ray cluster at {orders.ray_address} has no GPU; use --device auto or cpu")
    slots: list[tuple[str, int, int]] = []
    if with_gpu and orders.device != "cpu":
        for node, count in with_gpu.items():
            cpus = max(1, int(nodes[node].get("CPU", 1)) // count)
            slots += [(node, 1, cpus)] * count
    else:
        slots = [(node, 0, int(r["CPU"])) for node, r in nodes.items() if r.get("CPU", 0) >= 1]
    if not slots:
        cluster.leave()
        raise SpecError(f"the Ray cluster at {orders.ray_address} has neither a GPU nor a CPU for us")
    if orders.workers is not None and orders.workers > len(slots):
        orders.say(f"  the Ray cluster has room for {len(slots)} workers, not for {orders.workers}")
    chosen = slots[: orders.workers]
    width = len(str(len(chosen)))
    return [
        RayWorker(orders, f"ray {i:0{width}}", cluster, node, gpus=gpus, cpus=cpus)
        for i, (node, gpus, cpus) in enumerate(chosen)
    ]


def _reach(address: str) -> None:
    """
    Raises:
        MissingError: nobody listens there; Ray itself would ask for minutes.
        SpecError: it is no address.
    """
    if address in ("auto", "local"):
        return
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal():
        raise SpecError(f"--ray-address {address}: it is auto, local or HOST:PORT, as `ray start --head` tells it")
    try:
        socket.create_connection((host, int(port)), timeout=REACH).close()
    except OSError as error:
        raise MissingError(f"--executor ray: no cluster at {address}: {error.strerror or error}; {BEGIN}") from None


class _Cluster:
    """The connection that all workers share; the last one to leave closes it."""

    def __init__(self, address: str) -> None:
        try:
            import ray
        except ImportError:
            raise MissingError(f"--executor ray needs Ray; {REMEDY}") from None
        self.ray: Any = ray
        _reach(address)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing of a run goes anywhere
        inside = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGTERM) if inside else None
        try:
            ray.init(
                address=address,
                namespace="decodathlon",
                include_dashboard=False if address == "local" else None,
                log_to_driver=False,
                configure_logging=False,
                logging_level=logging.ERROR,
            )
        except (ConnectionError, ValueError, RuntimeError, TimeoutError, OSError) as error:
            why = str(error).strip().splitlines() or [type(error).__name__]
            told = f"--executor ray: no cluster at {address} that we can speak to: {why[0]}"
            raise MissingError(f"{told}; {TOKEN}; {BEGIN}") from None
        finally:
            if before is not None:  # Ray would end us at once, without a summary
                signal.signal(signal.SIGTERM, before)
        self._users, self._lock = 0, threading.Lock()

    def nodes(self) -> dict[str, dict[str, float]]:
        """What each living node has in all, by its id."""
        return {n["NodeID"]: n["Resources"] for n in self.ray.nodes() if n["Alive"]}

    def join(self) -> None:
        with self._lock:
            self._users += 1

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users <= 0:
                self.ray.shutdown()


class RayWorker(Worker):
    """An agent on one node."""

    may_be_lost: ClassVar[bool] = True

    def __init__(self, orders: Orders, name: str, cluster: _Cluster, node: str, *, gpus: int, cpus: int) -> None:
        """
        Args:
            node: its id in the cluster.
            gpus, cpus: what it reserves there.
        """
        super().__init__(orders, name)
        self._cluster, self._node, self._gpus, self._cpus = cluster, node, gpus, cpus
        self._actor: Any = None
        self._hello: dict[str, Any] = {}
        self._gone: Literal["", "worker", "machine"] = ""
        self._cancelled, self._closed = False, False
        #: Cells that were sent, so that each sending has a name.
        self._orders = 0
        cluster.join()

    @property
    def gone(self) -> Literal["", "worker", "machine"]:
        return self._gone

    @property
    def described(self) -> Mapping[str, Any]:
        return {k: v for k, v in self._hello.items() if k not in ("kind", "host")}

    def open(self) -> Place:
        ray = self._cluster.ray
        what = "a GPU" if self._gpus else f"{self._cpus} CPUs"
        if not self._on_a_living_node:
            raise RefusedError("its node was lost")
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # On this very node: whom it is compared with, and who is on its host, is decided here and not by Ray.
        there = NodeAffinitySchedulingStrategy(node_id=self._node, soft=False)
        self._actor = (
            ray.remote(Agent)
            .options(
                num_gpus=self._gpus,
                num_cpus=self._cpus,
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=2,
                scheduling_strategy=there,
            )
            .remote(self.run_id, self.timeout, self._cpus)
        )
        begun, asked = time.monotonic(), self._actor.hello.remote()
        said = begun
        while True:
            try:
                self._hello = ray.get(asked, timeout=LOOK)
                break
            except ray.exceptions.GetTimeoutError:
                now = time.monotonic()
                if self._cancelled or now - begun > PATIENCE:
                    self._kill()
                    raise RefusedError(f"{what} of its node did not become free in {now - begun:.0f} s") from None
                if now - said > SAY_EVERY:
                    said = now
                    self.say(f"waits for {what} of node {self._node[:8]}, for {now - begun:.0f} s now")
            except ray.exceptions.RayError as error:
                self._kill()
                raise RefusedError(f"it could not begin: {_reason(error)}") from None
        if other := _different(self.orders.same, self._hello):
            self._kill()
            raise RefusedError(f"node {self._hello['host']} is not like this machine: {other}")
        self._gone = ""
        return Place(self.name, str(self._hello["host"]), str(self._hello["kind"]))

    def run(
        self, spec: CellSpec, attempts: Sequence[dict[str, Any]] = (), expected: Mapping[str, str] | None = None
    ) -> Outcome:
        begun, ray = time.monotonic(), self._cluster.ray
        notes = journal.path_of(self.folder, spec.cell_id)
        notes.parent.mkdir(parents=True, exist_ok=True)
        notes.unlink(missing_ok=True)  # of a run that was killed

        def buried(status: Literal["crashed", "cancelled"], reason: str) -> Outcome:
            return self._bury(spec, attempts, status, reason, seconds=time.monotonic() - begun)

        try:
            self._send(spec, attempts, expected or {})
            wrong = self._follow(spec, notes)
        except ray.exceptions.RayError as error:
            self._kill()
            if self._cancelled:
                return buried("cancelled", "interrupted")
            self._gone = "worker" if self._node_lives() else "machine"
            what = "its node was lost" if self._gone == "machine" else "its worker was lost"
            return buried("crashed", f"{what}: {_reason(error)}")
        if self._cancelled:
            return buried("cancelled", "interrupted")
        if wrong:
            self._kill()
            self._gone = "worker"
            return buried("crashed", f"its worker went wrong: {wrong}")
        return Outcome.from_shard(shards.read(self._shard(spec)))

    def _send(self, spec: CellSpec, attempts: Sequence[dict[str, Any]], expected: Mapping[str, str]) -> None:
        """The cell, with the files that it needs of ours."""
        files = {f"{i}/{Path(path).name}": Path(path) for i, path in enumerate(spec.decoder_files)}
        earlier = lines_of.path_of(self.folder, spec.cell_id)
        if earlier.is_file():
            lines_of.Lines(earlier).close()  # which cuts a torn last line off
            files["lines"] = earlier
        for name, path in files.items():
            content = path.read_bytes()
            for begin in range(0, len(content), PIECE_BYTES):
                self._ask("put", name, begin, content[begin : begin + PIECE_BYTES])
        self._orders += 1
        self._ask("begin", f"{spec.cell_id} {self._orders}", asdict(spec), list(attempts), dict(expected))

    def _follow(self, spec: CellSpec, notes: Path) -> str:
        """Write down the news of the cell until it ends; returns what went wrong at the other end, or nothing."""
        kept = lines_of.path_of(self.folder, spec.cell_id)
        have = {"journal": 0, "lines": kept.stat().st_size if kept.is_file() else 0, "shard": 0}
        shard = b""
        while not self._cancelled:
            for message in self._ask("poll", have):
                if "say" in message:
                    self.say(message["say"])
                elif "end" in message:
                    if not message["end"]:
                        shards.write(self._shard(spec), json.loads(shard))
                        notes.unlink(missing_ok=True)
                    return str(message["end"])
                else:
                    part, piece = message["part"], message["bytes"]
                    have[part] += len(piece)
                    if part == "shard":
                        shard += piece
                    else:
                        with (notes if part == "journal" else kept).open("ab") as file:
                            file.write(piece)
        return ""

    def _ask(self, what: str, *words: Any) -> Any:
        """The agent's answer; asked again where the network swallowed it, until the agent counts as gone."""
        ray, deadline = self._cluster.ray, time.monotonic() + LEASE
        while True:
            try:
                return ray.get(
                    getattr(self._actor, what).remote(*words), timeout=max(LOOK, deadline - time.monotonic())
                )
            except ray.exceptions.ActorUnavailableError:
                if time.monotonic() > deadline or self._cancelled or not self._on_a_living_node:
                    raise
                time.sleep(LOOK)

    def _node_lives(self) -> bool:
        """Whether the node is still there, after a moment in which the cluster can notice that it is not."""
        deadline = time.monotonic() + NOTICE
        while time.monotonic() < deadline:
            if not self._on_a_living_node:
                return False
            time.sleep(LOOK / 2)
        return True

    @property
    def _on_a_living_node(self) -> bool:
        return self._node in self._cluster.nodes()

    def cancel(self) -> None:
        self._cancelled = True

    def _kill(self) -> None:
        if self._actor is not None:
            self._cluster.ray.kill(self._actor)
            self._actor = None

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._kill()
            self._cluster.leave()


def _different(here: Mapping[str, Any], there: Mapping[str, Any]) -> str:
    """The first thing that must be the same and is not."""
    for what, mine in here.items():
        theirs = there["packages"].get(what.removeprefix("package ")) if what.startswith("package ") else there[what]
        if theirs != mine:
            return f"{what.removeprefix('package ')} is {theirs} there and {mine} here; bring both to one version"
    return ""


def _reason(error: BaseException) -> str:
    """The line of Ray's message that says most."""
    told = [line.strip() for line in str(error).splitlines() if line.strip()]
    return told[-1][:300] if told else type(error).__name__
