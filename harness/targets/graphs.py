"""The decoding loop of a CUDA device: one graph replay per token, sampling inside, nothing waits for the host.

All shapes are fixed. Lengths, the step counter, the tokens and their log-probabilities live in tensors that the step
itself updates. The attention looks at a bucket of slots; when the longest row outgrows it, a graph for the next bucket
takes over. Stop tokens are looked at a step late, while the next one runs, so a text may overrun; that is cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from decodathlon.harness.targets.attention import Layout, RowCache

if TYPE_CHECKING:
    from torch import Tensor

    from decodathlon.harness.decoder import Limits, Sampler

#: Slots that a step may look at.
BUCKETS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
#: Eager steps before a capture, so that libraries have chosen their kernels.
WARM_UP_STEPS = 3
#: Loops that a target holds: the decoders that one cell compares.
LOOPS_KEPT = 4


class StaticLoop:
    """Buffers and graphs for B rows of up to `capacity` tokens and a sampler without a state, or with a static one.

    Args:
        capture: record CUDA graphs; without it the same fixed-shape step runs eagerly, which is how it is tested.
    """

    def __init__(self, sampler: Sampler, target: Any, rows: int, capacity: int, *, capture: bool) -> None:
        self.sampler, self.target, self.rows, self.capture = sampler, target, rows, capture
        self.capacity = min(bucket_of(capacity), target.context_length)
        device = target.device
        self.cache = RowCache(target.layers, rows, self.capacity)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.count = torch.zeros(1, dtype=torch.long, device=device)
        self.logits = torch.zeros(rows, target.vocab_size, device=device)
        self.noise = torch.zeros(rows, self.capacity, 1 + sampler.uniforms, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(rows, self.capacity, dtype=torch.long, device=device)
        self.log_probs = torch.zeros(rows, self.capacity, device=device)
        state: Any = sampler.start(rows) if sampler.static_state else ()
        #: The sampler's state: tensors that a step overwrites.
        self.state = tuple(part.to(device) for part in state)
        self._kind: Any = type(state)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        #: Why no graphs are recorded any more.
        self.trouble = ""

    def step(self, end: int) -> None:
        """Draw from the current logits, read the token, leave the next logits. Captured as it is."""
        u = self.noise.index_select(1, self.count)[:, 0]
        if self.state:
            state = self._kind(*self.state) if hasattr(self._kind, "_fields") else self.state
            token, after = self.sampler.choose(self.logits.clone(), state, u)
            for part, value in zip(self.state, after, strict=True):
                part.copy_(value)
        else:
            token, _ = self.sampler.choose(self.logits.clone(), None, u)
        score = self.logits.gather(-1, token[:, None]) - self.logits.logsumexp(-1, keepdim=True)
        self.tokens.index_copy_(1, self.count, token[:, None])
        self.log_probs.index_copy_(1, self.count, score)
        layout = Layout(self.lengths, 1, end, start=None)
        logits, _ = self.target.forward(token[:, None], layout, self.cache)
        self.logits.copy_(logits[:, 0])
        self.lengths += 1
        self.count += 1

    @torch.no_grad()
    def run(self, prompts: Sequence[Sequence[int]], noise: Tensor, limits: Limits) -> tuple[Tensor, Tensor]:
        """Tokens and log-probabilities (B, up to T) after the prompts; `noise` is (B, T, 1 + uniforms)."""
        T = noise.shape[1]
        self.cache.clear()
        context = self.target.open(prompts, capacity=self.capacity, cache=self.cache)
        self.logits.copy_(context.next_logits)
        self.lengths.copy_(context.lengths)
        self.count.zero_()
        for part, value in zip(self.state, self.sampler.start(self.rows) if self.state else (), strict=True):
            part.copy_(value)
        self.noise[:, :T].copy_(noise)
        longest = max(map(len, prompts))
        ending = None if limits.ignore_eos or not self.target.stop_tokens else Ending(self.target, self.rows)
        for t in range(T):
            self._advance(min(bucket_of(longest + t + 1), self.capacity))
            if ending is not None and ending.seen(self.tokens[:, t]):
                return self.tokens[:, : t + 1].clone(), self.log_probs[:, : t + 1].clone()
        return self.tokens[:, :T].clone(), self.log_probs[:, :T].clone()

    def _advance(self, end: int) -> None:
        if not self.capture:
            self.step(end)
            return
        if end not in self._graphs:
            try:
                moving = (self.lengths, self.count, self.logits, *self.state)
                self._graphs[end] = captured(lambda: self.step(end), moving)
            except RuntimeError as error:  # a plugin's law, or an architecture, that asks the host something
                self.capture, self.trouble = False, f"{self.sampler.spec} ran without CUDA graphs: {reason(error)}"
                self.step(end)
                return
        self._graphs[end].replay()


class Ending:
    """Whether all rows have had a stop token. The host asks about the step before, while the device is at the next one,
    so that neither waits for the other."""

    def __init__(self, target: Any, rows: int) -> None:
        on_gpu = target.device.type == "cuda"
        self.stop = torch.tensor(sorted(target.stop_tokens), device=target.device)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=target.device)
        # two of each: one is written while the other is read
        self._flags = [torch.zeros((), dtype=torch.bool, pin_memory=on_gpu) for _ in range(2)]
        self._events = [torch.cuda.Event() for _ in range(2)] if on_gpu else []
        self._step = 0

    def seen(self, tokens: Tensor) -> bool:
        """Take up the newest tokens (B,); true if all rows had ended the step before."""
        self.ended |= torch.isin(tokens, self.stop)
        now, before = self._step % 2, (self._step + 1) % 2
        self._flags[now].copy_(self.ended.all(), non_blocking=True)
        if self._events:
            self._events[now].record()
            if self._step:
                self._events[before].synchronize()
        self._step += 1
        return bool(self._flags[before])


def captured(work: Callable[[], None], moving: Sequence[Tensor]) -> torch.cuda.CUDAGraph:
    """Record `work`; the warm-up runs it for real, so the tensors that it moves on are put back.

    Raises:
        RuntimeError: it asks the host something.
    """
    before = [t.clone() for t in moving]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_STEPS):
            work()
            for tensor, value in zip(moving, before, strict=True):
                tensor.copy_(value)
    stream = torch.cuda.current_stream()
    stream.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    finally:
        torch.cuda.set_stream(stream)  # which a capture that fails leaves on its own
        for tensor, value in zip(moving, before, strict=True):
            tensor.copy_(value)
    return graph


def reason(error: RuntimeError) -> str:
    """In a line; what ends a capture that has failed says so in general, and hides what failed."""
    return str(error.__context__ or error).splitlines()[0]


def bucket_of(length: int) -> int:
    """The smallest bucket that holds so many tokens."""
    return next((b for b in BUCKETS if b >= length), length)


def run(
    sampler: Sampler, target: Any, prompts: Sequence[Sequence[int]], noise: Tensor, limits: Limits
) -> tuple[Tensor, Tensor]:
    """Generate through a loop that the target keeps for this sampler and batch; the newest few are kept."""
    capacity = max(map(len, prompts)) + noise.shape[1]
    target.check_room(prompts, capacity)
    loops: list[StaticLoop] = target.static_loops
    fitting = [x for x in loops if x.sampler == sampler and x.rows == len(prompts) and x.capacity >= capacity]
    if not fitting:
        del loops[: max(0, len(loops) + 1 - LOOPS_KEPT)]
        fitting = [StaticLoop(sampler, target, len(prompts), capacity, capture=True)]
        loops += fitting
    found = fitting[0].run(prompts, noise.to(target.device), limits)
    if fitting[0].trouble:
        target.happened(fitting[0].trouble)
    return found
