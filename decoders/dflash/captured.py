"""A drafter's memory for a CUDA device: a pass of the drafter over a block is one graph, with shapes that stay.

Such a pass is hundreds of small operations, which take longer to ask for than to do. Here the hidden states of the last
cycle are taken up, and the block goes through all layers, by the replay of one graph; embeddings, the output matrix and
the law are outside. Lengths live in tensors that the step itself moves on. The attention looks at a bucket of slots;
each bucket and size of block has a graph of its own, recorded when it comes for the third time, for some sizes come
once, at the end of a text. Rows that have ended keep their place, and what is computed for them is not looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from decodathlon.decoders.dflash.network import Memory, Network, seen
from decodathlon.harness.targets import graphs

#: Memories that a target holds: those of the decoders that one cell compares.
KEPT = 4
#: How often a size is drafted without a graph.
EAGER = 2


class StaticMemory(Memory):
    """As `Memory`, which it gives the same outputs as.

    States of a cycle are only noted by `append`, and read with the next block; more of them than a cycle has, which a
    prompt has, are read at once.

    Args:
        width: the most tokens of a block, and states of a cycle.
        capture: record CUDA graphs; without it the same step runs eagerly, which is how it is tested.
    """

    def __init__(self, network: Network, rows: int, capacity: int, width: int, *, capture: bool) -> None:
        # a step writes as many states as a cycle may have, though fewer are meant
        super().__init__(network, rows, capacity + width)
        self.capacity, self.width, self.capture = capacity, width, capture
        #: Why no graphs are recorded any more.
        self.trouble = ""
        like, config = self._keys[0], network.config
        #: The rows that have not ended; the callers' numbers are places in here.
        self._live = list(range(rows))
        #: What the step reads and moves on, of all rows.
        self._at = torch.zeros(rows, dtype=torch.long, device=like.device)
        self._counts = torch.zeros_like(self._at)
        self._states = like.new_zeros(rows, width, len(config.target_layer_ids) * config.hidden_size)
        self._x = like.new_zeros(rows, width, config.hidden_size)
        self._out = torch.zeros_like(self._x)
        self._noted = False
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._seen = Counter[tuple[int, int]]()

    @property
    def rows(self) -> int:
        return len(self._at)

    def begin(self) -> None:
        """Forget everything; a NaN of an earlier text would reach a masked sum."""
        self._live, self.lengths, self._noted = list(range(self.rows)), [0] * self.rows, False
        for tensor in (*self._keys, *self._values, self._states, self._at, self._counts):
            tensor.zero_()

    def append(self, states: Tensor, counts: Sequence[int]) -> None:
        T = max(counts, default=0)
        if not T:
            return
        self._check(T)
        self._read_noted()
        self._counts[self._here] = torch.tensor(list(counts), device=self._at.device)
        if self.width >= T:
            self._states[self._here, :T] = states[:, :T].to(self._states.dtype)
            self._noted = True
        else:
            every = self._states.new_zeros(self.rows, T, states.shape[2])
            every[self._here] = states[:, :T].to(every.dtype)
            self._read(every)
        self.lengths = [n + c for n, c in zip(self.lengths, counts, strict=True)]

    def draft(self, x: Tensor) -> Tensor:
        b = x.shape[1]
        self._check(b)
        if b > self.width:
            raise ValueError(f"a drafter's memory for blocks of {self.width} tokens cannot take one of {b}")
        self._x[self._here, :b] = x.to(self._x.dtype)
        self._advance(b, min(graphs.bucket_of(max(self.lengths) + b), self.capacity))
        self._noted = False
        return self._out[self._here, :b].clone()

    def select(self, rows: Sequence[int]) -> None:
        live = [self._live[row] for row in rows]
        for row in set(self._live) - set(live):  # else it might lie behind the bucket, where a window sees nothing
            self._at[row] = self._counts[row] = 0
        self._live = live
        self.lengths = [self.lengths[row] for row in rows]

    def copied(self, rows: Sequence[int], room: int) -> Memory:
        self._read_noted()
        other = Memory(self.network, len(rows), max(self.lengths) + room)
        other.lengths = [self.lengths[row] for row in rows]
        index = torch.tensor([self._live[row] for row in rows], device=self._at.device)
        known = max(other.lengths)
        for own, theirs in ((self._keys, other._keys), (self._values, other._values)):
            for tensor, copy in zip(own, theirs, strict=True):
                copy[:, :, :known] = tensor[index, :, :known]
        return other

    def step(self, b: int, end: int) -> None:
        """Read what was noted, draft a block of the first b of `_x`; captured as it is."""
        self._read(self._states)
        rows = torch.arange(self.rows, device=self._at.device)[:, None]
        places = self._at[:, None] + torch.arange(b, device=self._at.device)
        slots = torch.arange(end, device=self._at.device)
        there = slots < places[:, :1, None] + b

        def attended(number: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            self._keys[number][rows, :, places] = keys.transpose(1, 2)
            self._values[number][rows, :, places] = values.transpose(1, 2)
            attention = self.network.layers[number].self_attn
            mask = seen(places[:, :, None], slots, there, attention.window, attention.causal)
            return self._keys[number][:, :, :end], self._values[number][:, :, :end], mask

        self._out[:, :b].copy_(self.network.block(self._x[:, :b], places, attended))

    def _read_noted(self) -> None:
        """Read what was noted, where no block follows."""
        if self._noted:
            self._read(self._states)
            self._noted = False

    def _read(self, states: Tensor) -> None:
        """Keys and values of states (B, T, F * E), behind what there is; of row b the first `_counts[b]` are meant. The
        others are written over by the next ones, or by a block, and seen by nobody before."""
        slots = self._at[:, None] + torch.arange(states.shape[1], device=self._at.device)
        rows = torch.arange(self.rows, device=self._at.device)[:, None]
        for number, (keys, values) in enumerate(self.network.read(self.network.context(states), slots)):
            self._keys[number][rows, :, slots] = keys.transpose(1, 2)
            self._values[number][rows, :, slots] = values.transpose(1, 2)
        self._at += self._counts
        self._counts.zero_()

    @property
    def _here(self) -> Any:
        """Index of the rows that have not ended."""
        return slice(None) if self._live == list(range(self.rows)) else torch.tensor(self._live, device=self._at.device)

    def _check(self, more: int) -> None:
        if max(self.lengths) + more > self.capacity:
            raise ValueError(f"a drafter's memory of {self.capacity} tokens cannot take {more} behind {self.lengths}")

    def _advance(self, b: int, end: int) -> None:
        if not self.capture:
            self.usual = True
            self.step(b, end)
            return
        self._seen[b, end] += 1
        self.usual = (b, end) in self._graphs
        if self._seen[b, end] <= EAGER:
            self.step(b, end)
            return
        if not self.usual:
            try:
                self._graphs[b, end] = graphs.captured(lambda: self.step(b, end), (self._at, self._counts))
            except RuntimeError as error:
                self.capture, self.trouble = False, f"the drafter ran without CUDA graphs: {graphs.reason(error)}"
                self.step(b, end)
                return
        self._graphs[b, end].replay()


def memory_for(target: Any, name: Any, network: Network, rows: int, capacity: int, width: int) -> Memory:
    """An empty memory for the drafter of that name: on a CUDA device one that the target keeps, with its graphs."""
    if target.device.type != "cuda":
        return Memory(network, rows, capacity)

    found: list[StaticMemory] = target.kept.setdefault(("memories", name), [])
    # what is too small, or of weights that were replaced, goes
    found[:] = [m for m in found if (m.rows, m.width) != (rows, width) or m.capacity >= capacity]
    found[:] = [m for m in found if m.network is network]
    fitting = [m for m in found if (m.rows, m.width) == (rows, width)]
    if not fitting:
        del found[: max(0, len(found) + 1 - KEPT)]
        fitting = [StaticMemory(network, rows, graphs.bucket_of(capacity), width, capture=True)]
        found += fitting
    fitting[0].begin()
    return fitting[0]
