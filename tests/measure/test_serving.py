"""Servers under load, against a double whose delays are known; and quantiles against closed forms."""

import math
import time
from collections import Counter

import engine_double
import numpy as np
import pytest
from engine_double import Double

from decodathlon.harness.engines.client import Client, EngineDownError
from decodathlon.harness.engines.dialects import DIALECTS, Engine, Law
from decodathlon.harness.measure import serving, statistics
from decodathlon.harness.targets.remote import Ask, RemoteTarget

FIRST, EACH = 0.08, 0.02
#: What an event may come sooner behind another one because that one was late.
EARLY = 0.8


@pytest.fixture
def served():
    started = []

    def start(double):
        server = engine_double.serve(double)
        started.append(server)
        made = RemoteTarget(Client(server.url, timeout=5.0), "m", Engine(DIALECTS["vllm"], "", 512), name="openai:m")
        made.parts = frozenset({"chat", "temperature"})
        return made

    yield start
    for server in started:
        server.close()


def asks(target, count, tokens=6):
    prompt = target.chat([{"role": "user", "content": "?"}])
    return [Ask(prompt=prompt, tokens=tokens, law=Law(), seed=i, ignore_eos=True) for i in range(count)]


def test_times_are_those_that_the_server_takes(served):
    target = served(Double(first=FIRST, each=EACH))
    found = list(serving.closed(target, asks(target, 8), 2))
    assert sorted(a.number for a in found) == list(range(8))
    for answer in found:
        assert answer.tokens == 6
        assert FIRST * EARLY <= answer.first < FIRST + 0.2
        assert EACH * EARLY <= answer.per_token < EACH + 0.05
        assert len(answer.gaps) == 5
        assert answer.last == pytest.approx(answer.first + sum(answer.gaps))


def test_several_tokens_in_one_event_do_not_make_it_faster(served):
    target = served(Double(first=FIRST, each=EACH, bundle=3))
    (answer,) = serving.closed(target, asks(target, 1, tokens=9), 1)
    assert (answer.tokens, answer.events) == (9, 3)
    # the first event brought three tokens, so the time behind it is that of six
    assert EACH * EARLY <= answer.per_token < EACH + 0.05
    assert serving.metrics([answer], 1.0, ttft=1, tpot=1)["tokens_per_event"].value == 3


def test_clients_of_a_closed_load_ask_one_after_another(served):
    double = Double(first=0.1)
    target = served(double)
    begun = time.perf_counter()
    assert len(list(serving.closed(target, asks(target, 6, tokens=1), 2))) == 6
    assert 0.3 * EARLY <= time.perf_counter() - begun < 0.8


def test_who_waits_in_a_queue_is_timed_from_the_arrival(served):
    """A server that needs 0.1 s for each, one at a time, and eight requests at once: the k-th waits k times as long."""
    target = served(Double(first=0.1, serial=True))
    found = list(serving.opened(target, asks(target, 8, tokens=1), [0.0] * 8))
    firsts = sorted(a.first for a in found)
    for k, first in enumerate(firsts, 1):
        assert 0.1 * k * EARLY <= first < 0.1 * k + 0.25
    told = serving.metrics(found, 0.8, ttft=0.35, tpot=1.0)
    assert round(told["goodput"].value * 0.8) in (1, 2, 3)
    assert told["good_share"].value == pytest.approx(told["goodput"].value * 0.8 / 8)


def test_arrivals_are_a_poisson_process():
    due = serving.arrivals(5.0, 20_000, 3)
    gaps = np.diff([0.0, *due])
    assert gaps.mean() == pytest.approx(0.2, rel=4 / math.sqrt(20_000))
    assert gaps.std() == pytest.approx(0.2, rel=0.04)  # exponential: as wide as it is long
    assert (gaps > 0.2).mean() == pytest.approx(math.exp(-1), abs=0.015)
    per_second = Counter(int(t) for t in due)
    counts = np.array([per_second[s] for s in range(int(due[-1]))])
    assert counts.var() == pytest.approx(counts.mean(), rel=0.1)


def test_what_breaks_off_is_a_failure_and_in_no_percentile(served):
    target = served(Double(breaks_after=2))
    found = list(serving.closed(target, asks(target, 3), 1))
    assert all("broke off in the middle" in a.error for a in found)
    told = serving.metrics(found, 1.0, ttft=1, tpot=1)
    assert told["failed_requests"].value == 3
    assert told["goodput"].value == 0
    assert "ttft_s" not in told


def test_a_server_that_is_gone_ends_the_load(served):
    target = served(Double(dies_after=4))
    seen = []
    load = serving.closed(target, asks(target, 100), 2)
    with pytest.raises(EngineDownError, match="5 requests in a row failed"):
        seen.extend(answer for answer in load)
    assert sum(not a.error for a in seen) == 4
    assert len(seen) < 20


def test_refusals_are_counted(served):
    target = served(Double(faults=[429, 429]))
    found = list(serving.closed(target, asks(target, 6), 1))
    assert sum(bool(a.error) for a in found) == 2
    assert "429" in next(a.error for a in found if a.error)


def test_a_quantile_has_the_interval_of_order_statistics():
    assert statistics.quantile(range(19), 0.95) is None  # nothing is expected beyond it
    found = statistics.quantile(list(range(1, 101)), 0.5)
    assert found.value == 50.5
    assert (found.low, found.high) == (40, 61)  # as in any table: ranks 40 and 61 of 100
    assert statistics.quantile(list(range(25)), 0.95).low is None  # too few for an interval


@pytest.mark.parametrize("p", [0.5, 0.95])
def test_its_interval_covers_as_often_as_it_says(p):
    rng, inside, rounds = np.random.default_rng(1), 0, 2000
    truth = -math.log(1 - p)
    for _ in range(rounds):
        found = statistics.quantile(rng.exponential(size=150).tolist(), p)
        inside += found.low <= truth <= found.high
    assert inside / rounds >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / rounds)
    assert inside / rounds < 0.985


def answered(number, first, last, tokens, events):
    found = serving.Answered(number, 0.0)
    found.first, found.last, found.tokens, found.events = first, last, tokens, events
    return found


def test_good_is_who_keeps_both_limits():
    quick, slow_first, slow_rest = (
        answered(0, 0.1, 1.1, 11, 11),
        answered(1, 2.0, 3.0, 11, 11),
        answered(2, 0.1, 9.1, 10, 10),
    )
    told = serving.metrics([quick, slow_first, slow_rest], 10.0, ttft=1.0, tpot=0.5)
    assert told["goodput"].value == pytest.approx(0.1)
    assert told["good_share"].value == pytest.approx(1 / 3)


def test_what_nobody_counted_has_no_speed():
    told = serving.metrics([answered(0, 0.1, 1.0, 0, 9)], 1.0, ttft=1.0, tpot=0.5)
    assert {"goodput", "good_share", "tpot_s", "served_tokens_per_s", "answer_tokens"} & set(told) == set()
    assert told["ttft_s"].estimate().value == 0.1
    once = serving.metrics([answered(0, 1.0, 1.0, 20, 1)], 1.0, ttft=2.0, tpot=0.5)  # all in one event
    assert "tpot_s" not in once
    assert "goodput" not in once
    assert once["served_tokens_per_s"].value == 20
