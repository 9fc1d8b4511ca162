"""The schedule and the fleet: nothing is lost or given twice, hardware never mixes, times run alone where asked."""

import json
import random
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from decodathlon.harness.cells import CellSpec, Outcome
from decodathlon.harness.errors import StoreError
from decodathlon.harness.results import shards
from decodathlon.harness.workers.base import Orders, Place, RefusedError, Worker
from decodathlon.harness.workers.fleet import Fleet
from decodathlon.harness.workers.schedule import Job, Schedule
from decodathlon.harness.workers.simulation import Failures, simulate

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import schedule_simulation


def cell(decoder, suite="wikitext2", model="m", part="all"):
    return CellSpec(suite, 1, part, decoder, model, "smoke", 0)


def jobs(count, *, suite="wikitext2", model="m", part="all", clocked=False, seconds=1.0):
    return [Job(cell(f"d[n={i}]", suite, model, part), clocked=clocked, seconds=seconds) for i in range(count)]


def test_a_worker_that_is_alone_keeps_the_order():
    some = [replace(job, seconds=s) for job, s in zip(jobs(4), (1, 9, 2, 5), strict=True)]
    plan = Schedule(some, in_order=True)
    plan.came(Place("a", "h", "cpu"))
    taken = []
    while (job := plan.take("a")) is not None:
        taken.append(job)
        plan.settled("a")
    assert taken == some


def test_several_take_the_longest_first_and_stay_with_their_model():
    plan = Schedule([*jobs(3, model="small"), *(replace(j, seconds=50) for j in jobs(2, model="large"))])
    for name in "ab":
        plan.came(Place(name, "h", "cpu"))
    assert plan.take("a").spec.model == "large"
    assert plan.take("b").spec.model == "large"  # 50 s of it are left for one more worker, against 3 s of the small one
    plan.settled("a")
    assert plan.take("a").spec.model == "small"
    plan.settled("a")
    plan.settled("b")
    assert plan.take("a").spec.model == "small"


def test_cells_that_are_compared_stay_on_one_kind_of_hardware():
    plan = Schedule([*jobs(4, part="x"), *jobs(4, part="y")])
    plan.came(Place("old", "h1", "RTX 3090"))
    plan.came(Place("new", "h2", "H200"))
    kinds = {}
    while plan.waiting:
        for name in ("old", "new"):
            job = plan.take(name)
            if job is not None:
                kinds.setdefault(job.spec.slice, set()).add(plan.places[name].kind)
                plan.settled(name)
    assert all(len(found) == 1 for found in kinds.values())
    assert {kind for found in kinds.values() for kind in found} == {"RTX 3090", "H200"}


def test_when_a_kind_is_gone_only_what_nothing_was_measured_of_goes_elsewhere():
    plan = Schedule([*jobs(2, part="begun"), *jobs(1, part="fresh")])
    plan.came(Place("old", "h1", "RTX 3090"))
    first = plan.take("old")
    plan.settled("old")
    second = plan.take("old")
    assert {first.spec.slice, second.spec.slice} == {"begun"}
    third = plan.settled("old")
    assert third is second
    plan.came(Place("new", "h2", "H200"))
    fresh = plan.take("old")
    plan.in_flight.pop("old")
    plan.put_back(fresh)
    plan.went("old")
    assert plan.take("new") is fresh


def test_times_run_alone_on_their_host_and_after_all_others():
    plan = Schedule([*jobs(2, suite="throughput", clocked=True), *jobs(2)], exclusive=True)
    for name, host in (("a", "h1"), ("b", "h1"), ("c", "h2")):
        plan.came(Place(name, host, "cpu"))
    assert not plan.take("a").clocked
    assert not plan.take("b").clocked
    assert plan.take("c").clocked  # another host, where nothing else runs
    plan.settled("a")
    assert plan.take("a") is None  # b still measures beside it
    plan.settled("b")
    assert plan.take("a").clocked
    assert plan.take("b") is None


def test_ten_thousand_cells_on_workers_that_come_and_go_are_each_settled_once():
    rng = random.Random(7)
    every = [
        replace(job, seconds=rng.expovariate(1))
        for model in "abcd" for part in map(str, range(20)) for job in jobs(25, model=model, part=part)
    ]  # fmt: skip
    plan = Schedule(every)
    settled, number = Counter(), 0
    for i in range(16):
        plan.came(Place(f"w{i}", f"h{i // 8}", f"kind {i % 2}"))
    while plan.waiting or plan.in_flight:
        name = rng.choice(sorted(plan.places))
        if name in plan.in_flight:
            if rng.random() < 0.05:
                plan.put_back(plan.in_flight.pop(name))
                plan.went(name)
                number += 1
                plan.came(Place(f"new{number}", "h", f"kind {number % 2}"))
                plan.came(Place(f"more{number}", "h", f"kind {(number + 1) % 2}"))
            else:
                settled[plan.settled(name).spec.cell_id] += 1
        else:
            plan.take(name)
        if len(plan.places) > 40:
            for idle in [n for n in plan.places if n not in plan.in_flight][:20]:
                if len({p.kind for n, p in plan.places.items() if n != idle}) == 2:
                    plan.went(idle)
    assert number > 50
    assert settled == Counter(job.spec.cell_id for job in every)


class Fake(Worker):
    """Measures nothing, in `seconds`; as its subclass of the moment fails."""

    may_be_lost = True

    def __init__(self, orders, name, host="h", kind="cpu", seconds=0.0, ways=None):
        super().__init__(orders, name)
        self.place, self.seconds, self.ways = Place(name, host, kind), seconds, ways or {}
        self.last, self.opened, self.closed = "", 0, False
        self.stop = threading.Event()

    def open(self):
        self.opened += 1
        if "refuse" in self.ways or (self.last == "machine"):
            raise RefusedError(self.ways.get("refuse", "its node was lost"))
        self.last = ""
        return self.place

    @property
    def gone(self):
        return self.last

    def run(self, spec, attempts=(), expected=None):
        self.stop.wait(self.seconds)
        how = self.ways.pop(spec.decoder, "")
        model = {"weights_fingerprint": how.removeprefix("weights ")} if how.startswith("weights") else {}
        outcome = Outcome(spec, "r", attempts=list(attempts), model=model)
        if how in ("worker", "machine"):
            self.last = how
            outcome.status, outcome.reason = "crashed", f"its {how} was lost"
        if self.stop.is_set():
            outcome.status, outcome.reason = "cancelled", "interrupted"
        shards.write(self._shard(spec), outcome.as_shard())
        if how == "disk":
            raise StoreError("no room")
        return outcome

    def cancel(self):
        self.stop.set()

    def close(self):
        self.closed = True


def fleet(tmp_path, *workers, said=None, **options):
    made = []

    def build(orders):
        made.extend(Fake(orders, **w) for w in workers)
        return made

    say = said.append if said is not None else lambda text: None
    return Fleet(build, Orders(run_id="r", folder=tmp_path, timeout=1.0, say=say), **options), made


def shard(tmp_path, spec):
    return json.loads((tmp_path / f"{spec.cell_id}.json").read_text())


def test_all_outcomes_come_once_and_the_workers_end(tmp_path):
    ours, made = fleet(tmp_path, *({"name": f"w{i}", "seconds": 0.001} for i in range(4)))
    found = list(ours.outcomes(jobs(50), {}))
    assert Counter(o.spec.cell_id for o in found) == Counter(j.spec.cell_id for j in jobs(50))
    assert all(w.closed for w in made)
    ours.close()


def test_times_side_by_side_on_one_host_are_told_of_one_another(tmp_path):
    beside, _ = fleet(tmp_path, {"name": "a", "seconds": 0.2}, {"name": "b", "seconds": 0.2})
    found = list(beside.outcomes(jobs(2, clocked=True), {}))
    assert all("contended: 1 other cell ran on its host" in o.notes[0] for o in found)
    assert shard(tmp_path, found[0].spec)["notes"] == found[0].notes
    apart, _ = fleet(tmp_path, {"name": "a", "host": "x", "seconds": 0.2}, {"name": "b", "host": "y", "seconds": 0.2})
    assert not any(o.notes for o in apart.outcomes(jobs(2, clocked=True), {}))
    alone, _ = fleet(tmp_path, {"name": "a", "seconds": 0.1}, {"name": "b", "seconds": 0.1}, exclusive=True)
    assert not any(o.notes for o in alone.outcomes(jobs(2, clocked=True), {}))


@pytest.mark.parametrize("retry", [False, True])
def test_a_lost_machine_is_a_crash_and_where_asked_one_more_try(tmp_path, retry):
    ours, _ = fleet(
        tmp_path, {"name": "a", "seconds": 0.05, "ways": {"d[n=0]": "machine"}},
        {"name": "b", "seconds": 0.05, "ways": {"d[n=0]": "machine"}}, {"name": "c", "seconds": 0.3},
        retry_lost=retry,
    )  # fmt: skip
    found = {o.spec.decoder: o for o in ours.outcomes(jobs(6), {})}
    assert len(found) == 6
    lost = found.pop("d[n=0]")
    assert all(o.status == "ok" for o in found.values())
    if not retry:
        assert (lost.status, lost.attempts) == ("crashed", [])
    else:  # at most once: if both losing workers had it, it has crashed for good
        assert len(lost.attempts) == 1
        assert lost.attempts[0]["reason"] == "its machine was lost"
        assert "measured a second time: the first time its machine was lost" in shard(tmp_path, lost.spec)["notes"]


def test_a_worker_that_was_killed_is_no_reason_to_measure_again_and_comes_back(tmp_path):
    ours, made = fleet(
        tmp_path, {"name": "a", "ways": {"d[n=1]": "worker"}, "seconds": 0.01}, {"name": "b", "ways": {"refuse": "no"}},
        retry_lost=True,
    )  # fmt: skip
    found = {o.spec.decoder: o.status for o in ours.outcomes(jobs(5), {})}
    assert found == {f"d[n={i}]": "crashed" if i == 1 else "ok" for i in range(5)}
    assert made[0].opened == 2


def test_who_is_left_with_nobody_is_cancelled_with_the_reason(tmp_path):
    said = []
    ours, _ = fleet(
        tmp_path, {"name": "a", "ways": {"refuse": "torch is 2.12 there and 2.13 here"}},
        {"name": "b", "ways": {"refuse": "no GPU became free"}}, said=said,
    )  # fmt: skip
    found = list(ours.outcomes(jobs(2), {}))
    assert [o.status for o in found] == ["cancelled", "cancelled"]
    assert "a: torch is 2.12 there and 2.13 here; b: no GPU became free" in found[0].reason
    assert any("torch is 2.12" in line for line in said)
    assert shard(tmp_path, found[0].spec)["status"] == "cancelled"


def test_the_rest_of_a_comparison_does_not_go_to_other_hardware(tmp_path):
    ways = {f"d[n={i}]": "machine" for i in (0, 1)}
    ours, _ = fleet(
        tmp_path, {"name": "old", "kind": "RTX 3090", "ways": ways, "seconds": 0.01},
        {"name": "new", "kind": "H200", "seconds": 0.5},
    )  # fmt: skip
    found = list(ours.outcomes(jobs(4), {}, {jobs(1)[0].group: "RTX 3090"}))
    assert Counter(o.status for o in found) in (
        Counter(crashed=1, cancelled=3), Counter(ok=1, crashed=1, cancelled=2), Counter(ok=2, crashed=1, cancelled=1)
    )  # fmt: skip
    left = [o for o in found if o.status == "cancelled"]
    assert all("cells that it is compared with ran on RTX 3090" in o.reason for o in left)


def test_of_two_that_found_other_weights_only_the_first_counts(tmp_path):
    ways = {"d[n=0]": "weights one", "d[n=1]": "weights two"}
    ours, _ = fleet(
        tmp_path, {"name": "a", "ways": ways, "seconds": 0.05}, {"name": "b", "ways": dict(ways), "seconds": 0.1}
    )
    found = list(ours.outcomes(jobs(2), {}))
    assert [o.status for o in found] == ["ok", "failed"]
    assert "the model's weights are not what cells before it found" in found[1].reason
    assert shard(tmp_path, found[1].spec)["status"] == "failed"


def test_who_stops_listening_cancels_what_is_in_flight(tmp_path):
    ours, made = fleet(tmp_path, {"name": "a", "seconds": 30}, {"name": "b"})
    coming = ours.outcomes(jobs(3), {})
    next(coming)
    begun = time.monotonic()
    ours.close()
    assert time.monotonic() - begun < 5
    states = Counter(json.loads(p.read_text())["status"] for p in shards.cells(tmp_path))
    assert states["cancelled"] == 1
    assert all(w.closed for w in made)


def test_what_goes_wrong_in_a_thread_is_raised_where_outcomes_are_waited_for(tmp_path):
    ours, _ = fleet(tmp_path, {"name": "a", "ways": {"d[n=0]": "disk"}}, {"name": "b", "ways": {"d[n=0]": "disk"}})
    with pytest.raises(StoreError, match="no room"):
        list(ours.outcomes(jobs(1), {}))
    ours.close()


@pytest.mark.parametrize("exclusive", [False, True])
def test_a_simulated_run_with_lost_hosts_loses_nothing_and_splits_nothing(exclusive):
    work = schedule_simulation.jobs(2000)
    there = schedule_simulation.places(64)
    failures = Failures(host_hours=4, back_hours=0.2, crashes=0.05)
    found = simulate(work, there, exclusive=exclusive, loading=60.0, failures=failures)
    assert schedule_simulation.wrong(work, found) == []
    assert found.lost_hosts > 5
    assert found.retried > 20
    assert found.statuses["crashed"] > 60
    assert found.controller / len(work) < 0.02


def test_a_schedule_that_forgets_is_seen(monkeypatch):
    """A seeded bug: what was in flight on a lost host is not put back."""
    monkeypatch.setattr(Schedule, "put_back", lambda self, job: None)
    work = schedule_simulation.jobs(500)
    failures = Failures(host_hours=2, back_hours=0.2)
    assert schedule_simulation.wrong(work, simulate(work, schedule_simulation.places(64), failures=failures))


def test_the_simulated_time_is_what_the_times_add_up_to():
    work = [replace(job, seconds=100.0) for job in jobs(64)]
    four = [Place(f"w{i}", "h", "cpu") for i in range(4)]
    found = simulate(work, four, loading=10.0)
    assert found.seconds == 16 * 100 + 10
    assert found.busy == 64 * 100 + 4 * 10
    assert found.loads == 4
    alone = simulate([replace(job, clocked=True) for job in work], four, exclusive=True)
    assert alone.seconds == 64 * 100


def test_the_real_fleet_brings_every_cell_of_the_simulation_home(tmp_path):
    work = schedule_simulation.jobs(300)
    assert schedule_simulation.through_the_fleet(work, schedule_simulation.places(64), tmp_path) > 0
    assert len(list(shards.cells(tmp_path))) == 300
