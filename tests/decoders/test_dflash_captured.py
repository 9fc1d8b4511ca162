"""A drafter's memory with shapes that stay, which CUDA graphs need, against the one whose shapes follow the texts."""

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

load_builtins()
ROWS, WIDTH, CAPACITY = 3, 5, 90
ON_GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)


def poisoned(memory):
    """Slots that nobody may look at are not zero."""
    for tensor in (*memory._keys, *memory._values):
        tensor.fill_(1e3)
    return memory


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("raw", [RELEASED, SLIDING], ids=["full", "sliding"])
@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_it_drafts_what_a_memory_of_growing_shapes_does(device, raw, seed):
    """Prompts, cycles with one pass or two, cycles without a block, rows that end, and copies, in any order."""
    network, rng = network_of(raw).to(device), random.Random(seed)
    torch.manual_seed(seed)
    # room for a second bucket of slots
    static = poisoned(StaticMemory(network, ROWS, 300, WIDTH, capture=device == "cuda"))
    for _ in range(2):  # the second request finds what the first one left
        static.begin()
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


def test_what_it_has_no_room_for_is_refused():
    memory = StaticMemory(network_of(), 1, 8, WIDTH, capture=False)
    memory.append(torch.randn(1, 6, 48).double(), [6])
    with pytest.raises(ValueError, match="memory of 8 tokens cannot take 4 behind"):
        memory.draft(torch.randn(1, 4, 24).double())
    with pytest.raises(ValueError, match="memory of 8 tokens cannot take 3 behind"):
        memory.append(torch.randn(1, 3, 48).double(), [3])
    with pytest.raises(ValueError, match="for blocks of 5 tokens cannot take one of 6"):
        StaticMemory(network_of(), 1, 80, WIDTH, capture=False).draft(torch.randn(1, 6, 24).double())


@pytest.mark.parametrize("spec", ["dflash", "dflash[schedule=ewma]", "dflash[draft_steps=2]", "ddtree",
                                  "dflash-multiround", "dflash-tree-lite[refine=true]"])  # fmt: skip
@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_texts_are_those_of_greedy_search(spec, device, monkeypatch):
    target, made = toy.enumerable_lm(8), []
    if device == "cuda":
        target = type(target)(target.model.cuda(), name=target.name)
    else:

        def memory_for(target, name, network, rows, capacity, width):
            made.append(StaticMemory(network, rows, capacity, width, capture=False))
            return made[-1]

        monkeypatch.setattr(captured, "memory_for", memory_for)
    prompts, limits = [[0, 2, 3, 2, 3], [0, 4, 5], [0, 2]], Limits(24)
    ours, greedy = (
        [a.tokens for a in decoders.build(name).generate(target, prompts, limits, RowRandom(0, range(3)))]
        for name in (spec, "greedy")
    )
    assert ours == greedy
    assert device == "cuda" or made
    assert not [note for note in target.notes if "without CUDA graphs" in note]


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
