"""Where time and memory go while a decoder generates: stacks of named phases and of torch's operations.

The phases are prefill and forward (the target), sampler (law and draw, of decoders that draw token by token) and,
around them, the host's own work. torch's profiler sees the operations inside. It slows everything down, so shares are
taken from its own clock, and the speed under it stands beside the plain one.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch

from decodathlon.harness.decoder import Decoder
from decodathlon.harness.measure import speed
from decodathlon.harness.targets.base import Target

ROOT = "generate"
PREFILL, FORWARD, SAMPLER = "prefill", "forward", "sampler"
#: Operations that are kept one by one, with their times, for a trace: the first steps of a small model, and of the
#: prefill the whole alone.
MOST_EVENTS = 1500
#: Stacks that are less than this share of the whole are added to what they are part of.
LEAST_SHARE = 5e-4


@dataclass
class Profile:
    """What one call of a decoder did."""

    #: Of the call without and with the profiler.
    seconds: float
    profiled_seconds: float
    #: Seconds that each stack took by itself, and bytes that it allocated; a stack is names joined by semicolons.
    time: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    #: Stack, begin and duration in microseconds, in order.
    events: list[tuple[str, float, float]] = field(default_factory=list)

    def as_sample(self) -> dict[str, Any]:
        """As it is stored: stacks of events by their number."""
        stacks = list(dict.fromkeys(stack for stack, _, _ in self.events))
        place = {stack: i for i, stack in enumerate(stacks)}
        begin = self.events[0][1] if self.events else 0.0
        return {
            "seconds": self.seconds,
            "profiled_seconds": self.profiled_seconds,
            "time": self.time,
            "memory": self.memory,
            "stacks": stacks,
            "events": [[place[s], round(t - begin, 1), round(d, 1)] for s, t, d in self.events],
        }

    def share(self, phase: str) -> float:
        """What a phase took of the whole, prefill apart."""
        inside = {s: t for s, t in self.time.items() if f"{ROOT};{PREFILL}" not in s}
        whole = sum(inside.values())
        return sum(t for s, t in inside.items() if phase in s.split(";")[1:2]) / whole if whole else 0.0


def profile(decoder: Decoder, target: Target, prompts: Sequence[Sequence[int]], tokens: int, seed: int) -> Profile:
    """Profile one call that makes `tokens` tokens per prompt, after one that is not profiled."""
    speed.generate(decoder, target, prompts, tokens, seed)
    plain, _ = speed.timed(target, lambda: speed.generate(decoder, target, prompts, tokens, seed))
    activities = [torch.profiler.ProfilerActivity.CPU]
    if target.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with _phases(decoder, target), torch.profiler.profile(activities=activities, profile_memory=True) as watched:
        begin = time.perf_counter()
        with torch.profiler.record_function(ROOT):
            speed.generate(decoder, target, prompts, tokens, seed)
        profiled = time.perf_counter() - begin
    found = Profile(plain, profiled)
    times: dict[str, float] = defaultdict(float)
    memory: dict[str, float] = defaultdict(float)
    for event in watched.events() or []:
        stack = _stack(event)
        if stack is None:
            continue
        times[stack] += event.self_cpu_time_total / 1e6
        memory[stack] += max(0, event.self_cpu_memory_usage)
        if f"{PREFILL};" not in stack:  # what is inside the prefill would leave no room for the steps
            found.events.append((stack, event.time_range.start, event.time_range.elapsed_us()))
    found.time, found.memory = folded(times), folded(memory)
    found.events = sorted(found.events, key=lambda e: e[1])[:MOST_EVENTS]
    return found


def folded(values: dict[str, float]) -> dict[str, float]:
    """Stacks with their values; what is too little to be seen is added to what it is part of."""
    total, kept = sum(values.values()), dict(values)
    whole: dict[str, float] = defaultdict(float)
    for stack, value in values.items():
        names = stack.split(";")
        for n in range(1, len(names) + 1):
            whole[";".join(names[:n])] += value
    for stack in sorted(whole, key=lambda s: -s.count(";")):
        parent = stack.rpartition(";")[0]
        if parent and stack in kept and whole[stack] < LEAST_SHARE * total:
            kept[parent] = kept.get(parent, 0.0) + kept.pop(stack)
    return {stack: float(f"{value:.6g}") for stack, value in sorted(kept.items()) if value > 0}


def _stack(event: Any) -> str | None:
    """The names from the root to an event; None outside of the call, and where a device did it."""
    names = []
    while event is not None:
        names.append(str(event.name).removeprefix("aten::").replace(";", ","))
        event = event.cpu_parent
    return ";".join(reversed(names)) if names[-1] == ROOT else None


@contextlib.contextmanager
def _phases(decoder: Decoder, target: Target) -> Iterator[None]:
    """Inside, what the target and the sampler do carries the name of its phase."""
    opened = target.open

    @wraps(opened)
    def watched_open(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(PREFILL):
            context = opened(*args, **kwargs)
        vars(context)["extend"] = _named(FORWARD, context.extend)
        return context

    vars(target)["open"] = watched_open
    drawn = getattr(decoder, "choose", None)
    if drawn is not None:
        object.__setattr__(decoder, "choose", _named(SAMPLER, drawn))
    try:
        yield
    finally:
        del vars(target)["open"]
        if drawn is not None:
            object.__delattr__(decoder, "choose")


def _named(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def named(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(phase):
            return function(*args, **kwargs)

    return named
