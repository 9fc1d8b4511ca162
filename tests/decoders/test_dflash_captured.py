"""A drafter's memory with shapes that stay, which CUDA graphs need, against the one whose shapes follow the texts."""

import math
import random

import pytest
import torch
from tiny_drafters import RELEASED, SLIDING, network_of

from decodathlon.decoders.dflash import captured
from decodathlon.decoders.dflash.captured import StaticMemory
from decodathlon.decoders.dflash.network import Memory
from decodathlon.harness import decoder as decoders
from decodathlon.harness.decoder import Limits
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.targets import toy
from decodathlon.harness.targets.transformers import TransformersTarget

load_builtins()
ROWS, WIDTH, CAPACITY = 3, 5, 90
ON_GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)


def poisoned(memory, value):
    """What nobody may look at is not zero."""
    for tensor in (*memory._keys, *memory._values, memory._states, memory._x):
        tensor.fill_(value)


class Recorded:
    """Stands for a graph where there is no GPU: it does again what it was recorded with."""

    def __init__(self, work):
        self.replay = work


def record(work, moving):
    return Recorded(work)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("raw", [RELEASED, SLIDING], ids=["full", "sliding"])
@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_it_drafts_what_a_memory_of_growing_shapes_does(device, raw, seed):
    """Prompts, cycles with one pass or two, cycles without a block, rows that end, and copies, in any order."""
    network, rng = network_of(raw).to(device), random.Random(seed)
    torch.manual_seed(seed)
    # room for a second bucket of slots
    static = StaticMemory(network, ROWS, 300, WIDTH, capture=device == "cuda")
    for _ in range(4):
        poisoned(static, math.nan)  # as a text that came to nothing may leave it
        static.begin()
        for tensor in (*static._keys, *static._values):
            tensor.fill_(1e3)
        plain, rows = Memory(network, ROWS, 300), ROWS
        counts = [rng.choice([7, 240]), rng.randint(1, 12), rng.randint(1, 12)]
        states = torch.randn(rows, max(counts), 48, dtype=torch.double, device=device)
        for memory in (static, plain):
            memory.append(states, counts)
        for _ in range(8):
            for _ in range(rng.choice([0, 1, 1, 2])):
                x = torch.randn(rows, rng.choice([WIDTH, WIDTH, 2]), 24, dtype=torch.double, device=device)
                assert torch.allclose(static.draft(x), plain.draft(x), atol=1e-9)
            if rng.random() < 0.3:
                which = [rng.randrange(rows) for _ in range(4)]
                x = torch.randn(4, 3, 24, dtype=torch.double, device=device)
                copies = [memory.copied(which, 4).draft(x) for memory in (static, plain)]
                assert torch.allclose(*copies, atol=1e-9)
            counts = [rng.randint(0, WIDTH) for _ in range(rows)]
            states = torch.randn(rows, WIDTH, 48, dtype=torch.double, device=device)
            for memory in (static, plain):
                memory.append(states, counts)
            assert static.lengths == plain.lengths
            if rows > 1 and rng.random() < 0.2:
                left = sorted(rng.sample(range(rows), rows - 1), key=lambda _: rng.random())
                for memory in (static, plain):
                    memory.select(left)
                rows -= 1
    assert device == "cpu" or (static.capture and static._graphs), static.trouble


def test_what_it_has_no_room_for_is_refused():
    memory = StaticMemory(network_of(), 1, 8, WIDTH, capture=False)
    memory.append(torch.randn(1, 6, 48).double(), [6])
    with pytest.raises(ValueError, match="memory of 8 tokens cannot take 4 behind"):
        memory.draft(torch.randn(1, 4, 24).double())
    with pytest.raises(ValueError, match="memory of 8 tokens cannot take 3 behind"):
        memory.append(torch.randn(1, 3, 48).double(), [3])
    with pytest.raises(ValueError, match="for blocks of 5 tokens cannot take one of 6"):
        StaticMemory(network_of(), 1, 80, WIDTH, capture=False).draft(torch.randn(1, 6, 24).double())


@pytest.mark.parametrize("spec", ["dflash", "dflash[schedule=ewma]", "dflash[draft_steps=2]", "ddtree[budget=6]",
                                  "dflash-multiround", "dflash-tree-lite[refine=true]"])  # fmt: skip
@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_texts_are_those_of_greedy_search(spec, device, monkeypatch):
    """And what stays of each draft is what stays without any of it: texts alone would be right with any drafter."""
    plain, target, made = toy.enumerable_lm(8), toy.enumerable_lm(8), []
    if device == "cuda":
        target = TransformersTarget(
            type(target.model)._from_config(target.config, attn_implementation="sdpa").cuda(), name=target.name
        )
        target.model.load_state_dict(plain.model.state_dict())
    else:

        def memory_for(target, name, network, rows, capacity, width):
            made.append(StaticMemory(network, rows, capacity, width, capture=False))
            return made[-1]

        monkeypatch.setattr(captured, "memory_for", memory_for)
    prompts, limits = [[0, 2, 3, 2, 3], [0, 4, 5], [0, 2]], Limits(24, trace=True)

    def answers(name, of):
        found = decoders.build(name).generate(of, prompts, limits, RowRandom(0, range(3)))
        return [(a.tokens, [c["accepted"] for c in a.trace]) for a in found]

    ours = [answers(spec, target) for _ in range(2)]
    monkeypatch.undo()
    assert [tokens for tokens, _ in ours[0]] == [tokens for tokens, _ in answers("greedy", plain)]
    assert device == "cuda" or made
    assert not target.incidents
    if "ewma" not in spec:  # whose blocks go by the clock
        assert ours == [answers(spec, plain)] * 2


def test_the_first_drafts_of_a_size_are_none_to_judge_by(monkeypatch):
    """They run as they come, and the third is recorded; what it took says nothing of those that follow."""
    monkeypatch.setattr(captured.graphs, "captured", record)
    memory = StaticMemory(network_of(), 1, 80, WIDTH, capture=True)
    memory.append(torch.randn(1, 3, 48).double(), [3])
    x, found, outputs = torch.randn(1, WIDTH, 24).double(), [], []
    for _ in range(5):
        outputs.append(memory.draft(x))
        found.append(memory.usual)
    assert found == [False, False, False, True, True]
    assert all(torch.equal(o, outputs[0]) for o in outputs)
    memory.draft(x[:, :2])
    assert not memory.usual, "another size"

    def fails(work, moving):
        try:
            raise RuntimeError("asked the host")
        except RuntimeError:
            raise RuntimeError("previous error")  # noqa: B904 - as PyTorch has it

    monkeypatch.setattr(captured.graphs, "captured", fails)
    for expected in (False, False, True):  # the second of this size, the third, which fails, and all that follow
        memory.draft(x[:, :2])
        assert memory.usual is expected
    assert memory.trouble == "the drafter ran without CUDA graphs: asked the host"


def test_schedules_do_not_hear_of_unusual_seconds_and_rows_of_trouble(monkeypatch):
    from decodathlon.decoders.dflash.schedules import Scheduler

    heard, settle = [], Scheduler.settle
    monkeypatch.setattr(Scheduler, "settle", lambda self, *given: (heard.append(1), settle(self, *given))[1])

    class Unusual(Memory):
        usual, trouble = False, "the drafter stumbled"

    monkeypatch.setattr(
        captured, "memory_for", lambda target, name, network, rows, room, width: Unusual(network, rows, room)
    )
    target = toy.enumerable_lm(8)
    decoders.build("dflash[schedule=ewma]").generate(target, [[0, 2]], Limits(24), RowRandom(0, [0]))
    assert not heard
    assert target.incidents == ["dflash[block=16,schedule=ewma]: the drafter stumbled"]


def test_a_target_keeps_the_memories_of_its_last_requests(monkeypatch):
    """As on a CUDA device, where a memory has graphs that are worth keeping."""

    class OnGPU:
        device, kept, notes = torch.device("cuda"), {}, ()

    network = network_of()
    first = captured.memory_for(OnGPU, "a", network, 2, 90, WIDTH)
    first.append(torch.randn(2, 3, 48).double(), [3, 2])
    assert captured.memory_for(OnGPU, "a", network, 2, 80, WIDTH) is first
    assert first.lengths == [0, 0]
    others = [captured.memory_for(OnGPU, "a", network, rows, 90, WIDTH) for rows in (1, 3, 4, 5)]
    assert captured.memory_for(OnGPU, "a", network, 1, 90, WIDTH) is others[0]
    assert captured.memory_for(OnGPU, "a", network, 2, 80, WIDTH) is not first, "only the last few"
    assert captured.memory_for(OnGPU, "b", network, 1, 90, WIDTH) is not others[0]
    larger = captured.memory_for(OnGPU, "a", network, 1, 300, WIDTH)
    assert others[0] not in OnGPU.kept["memories", "a"], "too small for what is asked now"
    assert captured.memory_for(OnGPU, "a", network_of(seed=1), 1, 300, WIDTH) is not larger, "another drafter"
