"""A server under load: when the first token comes, how fast the rest, what the slow ones see, and how much it bears.

Two kinds of load. Closed: so many clients, each of which asks again as soon as it was answered. Open: requests arrive
at random (a Poisson process of a given rate) whether the server keeps up or not, and each is timed from its arrival,
for who waits does not care in which queue.

A server may put several tokens into one event, so what lies between events is told as that, and the time per token
comes from the server's own count of tokens.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from decodathlon.harness import served
from decodathlon.harness.engines.client import Chunk, EngineDownError, EngineError
from decodathlon.harness.errors import UnsupportedError
from decodathlon.harness.measure import asking, statistics
from decodathlon.harness.measure.observations import Observations
from decodathlon.harness.measure.statistics import Estimate
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.served import Served
from decodathlon.harness.targets import remote
from decodathlon.harness.targets.remote import Ask, RemoteTarget

if TYPE_CHECKING:
    from decodathlon.harness.suite import Cell

#: Failures in a row after which a server counts as gone.
PATIENCE = 5
#: The percentiles that are told, where there are enough requests for them.
PERCENTILES = (50, 95, 99)
#: Seconds by which a client may be late before it is told.
LATE = 0.05


@dataclass
class Answered:
    """One request and what became of it. Seconds count from its arrival."""

    number: int
    #: When it arrived, after the load began.
    arrived: float
    #: How much later than that it could be sent.
    waited: float = 0.0
    first: float | None = None
    last: float = 0.0
    #: Seconds between events that brought text.
    gaps: list[float] = field(default_factory=list)
    events: int = 0
    #: Tokens as the server counts them; 0 where it does not.
    tokens: int = 0
    error: str = ""

    @property
    def per_token(self) -> float | None:
        """Seconds per token behind the first event, which counts for as many as the others; None where nobody knows."""
        if self.first is None or self.events < 2 or not self.tokens:
            return None
        return (self.last - self.first) / (self.tokens * (1 - 1 / self.events))


def arrivals(rate: float, count: int, seed: int) -> list[float]:
    """When each of `count` requests arrives: gaps are exponential, so their number in any second is Poisson's."""
    u = RowRandom(seed, ["arrivals"]).uniforms(count)[0]
    return (-(1 - u).log() / rate).cumsum(0).tolist()


def stream(target: RemoteTarget, ask: Ask, number: int, arrived: float, begun: float) -> Answered:
    """Ask once, and listen to the end.

    Args:
        arrived: when it is due, after `begun` on the clock of perf_counter.
    """
    found = Answered(number, arrived)
    found.waited = max(0.0, time.perf_counter() - begun - arrived)
    path, body = target.request(ask, streamed=True)
    try:
        for chunk in target.client.stream(path, body):
            _hear(found, chunk)
    except EngineError as error:
        found.error = str(error)
    if found.first is None and not found.error:
        found.error = "it answered nothing"
    return found


def _hear(found: Answered, chunk: Chunk) -> None:
    usage = chunk.content.get("usage") or {}
    found.tokens = int(usage.get("completion_tokens") or found.tokens)
    if not any(_text(choice) for choice in chunk.content.get("choices") or ()):
        return  # who speaks, or how it ended
    now = found.waited + chunk.seconds
    if found.first is None:
        found.first = now
    else:
        found.gaps.append(now - found.last)
    found.last, found.events = now, found.events + 1


def _text(choice: dict[str, Any]) -> str:
    """What a user sees grow: also what a model thinks, where the server tells it apart."""
    delta = choice.get("delta") or {}
    parts = (choice.get("text"), delta.get("content"), delta.get("reasoning_content"), delta.get("reasoning"))
    return str(next((part for part in parts if part), ""))


def closed(target: RemoteTarget, asks: Sequence[Ask], clients: int) -> Iterator[Answered]:
    """All of them, as they end, by clients that ask again as soon as they were answered."""
    begun = time.perf_counter()

    def one(number: int) -> Answered:
        return stream(target, asks[number], number, time.perf_counter() - begun, begun)

    yield from _ended(one, len(asks), clients)


def opened(target: RemoteTarget, asks: Sequence[Ask], due: Sequence[float]) -> Iterator[Answered]:
    """All of them, as they end; each is sent when it is due, whatever became of the others."""
    begun = time.perf_counter()
    stopped = threading.Event()

    def one(number: int) -> Answered:
        stopped.wait(max(0.0, due[number] - (time.perf_counter() - begun)))
        if stopped.is_set():
            return Answered(number, due[number], error="the server was gone by then")
        return stream(target, asks[number], number, due[number], begun)

    try:
        yield from _ended(one, len(asks), len(asks))
    finally:
        stopped.set()


def _ended(one: Any, count: int, clients: int) -> Iterator[Answered]:
    """The requests as they end.

    Raises:
        EngineDownError: so many in a row failed that the server is gone.
    """
    failed = 0
    with ThreadPoolExecutor(min(clients, count)) as pool:
        pending: set[Future[Answered]] = {pool.submit(one, number) for number in range(count)}
        try:
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in sorted(done, key=lambda f: f.result().last):
                    answered = future.result()
                    failed = failed + 1 if answered.error else 0
                    yield answered
                    if failed >= PATIENCE:
                        raise EngineDownError(f"{failed} requests in a row failed; the last: {answered.error}")
        finally:
            for future in pending:
                future.cancel()


def metrics(
    answers: Sequence[Answered], seconds: float, *, ttft: float, tpot: float
) -> dict[str, Estimate | Observations]:
    """What a load of so many seconds showed; percentiles are of what was answered, failures stand beside them.

    Args:
        ttft, tpot: seconds to the first token, and per further token, up to which an answer counts as good.
    """
    whole = [a for a in answers if not a.error and a.first is not None]
    rows = [f"request-{a.number}" for a in whole]
    firsts = [a.first for a in whole if a.first is not None]
    timed = [(row, a.per_token) for row, a in zip(rows, whole, strict=True) if a.per_token is not None]
    found: dict[str, Estimate | Observations] = {
        "requests_per_s": Estimate(len(whole) / seconds, n=len(answers)),
        "failed_requests": Estimate(float(len(answers) - len(whole)), n=len(answers)),
    }
    if all(a.per_token is not None or a.tokens == 1 for a in whole):  # else nobody knows how good they were
        good = [a for a in whole if a.first is not None and a.first <= ttft and (a.per_token or 0.0) <= tpot]
        found["goodput"] = Estimate(len(good) / seconds, n=len(answers))
        found["good_share"] = statistics.wilson(len(good), len(answers))
    if not whole:
        return found
    found["ttft_s"] = Observations.each(rows, firsts)
    found["latency_s"] = Observations.each(rows, [a.last for a in whole])
    if timed:
        found["tpot_s"] = Observations.each([row for row, _ in timed], [s for _, s in timed if s is not None])
    if all(a.tokens for a in whole):
        events = sum(a.events for a in whole)
        found["served_tokens_per_s"] = Estimate(sum(a.tokens for a in whole) / seconds, n=len(whole))
        found["answer_tokens"] = Observations.grouped(rows, [float(a.tokens) for a in whole])
        found["tokens_per_event"] = Estimate(sum(a.tokens for a in whole) / max(1, events), n=events)
    found["in_flight"] = Estimate(sum(a.last for a in whole) / seconds, n=len(whole))
    gaps = [gap for a in whole for gap in a.gaps]
    for name, values in (("ttft_s", firsts), ("latency_s", [a.last for a in whole]), ("inter_event_s", gaps)):
        for p in PERCENTILES:
            if p == 50 and name in found:
                continue
            if (estimate := statistics.quantile(values, p / 100)) is not None:
                # gaps of one answer depend on one another: no interval
                alone = name == "inter_event_s"
                found[f"{name}(p{p})"] = Estimate(estimate.value, n=len(values)) if alone else estimate
    return found


def measure(cell: Cell, questions: Sequence[Any]) -> None:
    """Report what the slice's load shows of the cell's server.

    Raises:
        UnsupportedError: the decoder asks for more than one answer, or for what a stream does not tell.
        EngineDownError: the server was gone; what had been answered is kept.
    """
    decoder, target, sizes = cell.decoder, cast("RemoteTarget", cell.target), cell.sizes
    if not isinstance(decoder, Served) or not decoder.streams:
        raise UnsupportedError("one request per answer", f"{decoder.spec} asks for several, or for parts of one")
    kind, _, number = cell.slice.partition("-")
    count, level = sizes["requests"], int(number)
    prompts = [asking.prompt(target, [("user", q["turns"][0])]) for q in questions]
    fixed = target.engine.dialect.ignore_eos is not None
    if not fixed:
        cell.note(f"answers end where they end: {target.engine.label} cannot be told to go on")
    warm = max(1, min(level if kind == "closed" else 1, len(prompts) // 2))
    if count > len(prompts) - warm:
        cell.note(f"{len(prompts) - warm} questions are asked {count} times: a server that keeps prefixes gains by it")

    def ask(prompt: Sequence[int], key: str) -> Ask:
        rng = RowRandom(cell.seed, [key])
        return remote.Ask(
            prompt=prompt, tokens=sizes["tokens"], law=decoder.law, seed=served.seed(rng, 0), ignore_eos=fixed
        )

    for answered in closed(target, [ask(prompts[-1 - i], f"warm-{i}") for i in range(warm)], warm):
        if answered.error:
            raise EngineError(f"the warm-up failed: {answered.error}")
    asks = [ask(prompts[i % (len(prompts) - warm)], f"request-{i}") for i in range(count)]
    begun, answers = time.perf_counter(), []
    load = closed(target, asks, level) if kind == "closed" else opened(target, asks, arrivals(level, count, cell.seed))
    for answered in cell.each(load, count):
        answers.append(answered)
        cell.sample(f"request-{answered.number}", **_facts(answered))
    seconds = time.perf_counter() - begun
    found = metrics(answers, seconds, ttft=sizes["ttft_ms"] / 1000, tpot=sizes["tpot_ms"] / 1000)
    for metric, estimate in found.items():
        cell.report(metric, estimate)
    if not all(a.tokens for a in answers if not a.error):
        cell.note("the server does not count its tokens: there are no speeds per token, and no goodput")
    if failed := [a for a in answers if a.error]:
        cell.note(f"{len(failed)} of {len(answers)} requests failed; one of them: {failed[0].error[:200]}")
    late = max((a.waited for a in answers if not a.error), default=0.0)
    if late > LATE:
        cell.note(f"this client was up to {late:.3g} s late with a request; the server may be faster than it seems")


def _facts(answered: Answered) -> dict[str, Any]:
    facts = {k: v for k, v in vars(answered).items() if k not in ("number", "gaps") and v not in ("", None)}
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in facts.items()} | {
        "gaps": [float(f"{g:.4g}") for g in answered.gaps]
    }
