"""The reservoir step: against the note read aloud in plain Python, and in the cases that the note leaves open."""

import math

import pytest
import torch

from decodathlon.kernels.reservoir import reference
from decodathlon.kernels.reservoir.reference import EMPTY


def aloud(p, slots, greatest, u, *, top_k, cross, fresh):
    """One step of one row as the note says it; a slot is (token, p0) or None. Returns slots, weights, greatest."""
    stored = [slot[0] for slot in slots if slot]
    kept, weights = [None] * len(slots), [0.0] * len(slots)
    for i, slot in enumerate(slots):
        if slot is None:
            continue
        token, p0 = slot
        w = p[token] / p0
        if u[i] < min(1.0, w / max(greatest, 1e-300)):
            greatest = max(greatest, w)
            kept[i], weights[i] = (token, p[token] if cross else p0), w
    best = sorted((v for v in range(len(p)) if p[v] > 0), key=lambda v: -p[v])[:top_k]
    new = [v for v in best if v not in stored]
    if not new and not any(kept):
        new = best
    for i in range(len(slots)):
        if kept[i] is None and new:
            token = new.pop(0)
            kept[i], weights[i] = (token, p[token]), 1.0 if fresh == "one" else p[token]
    return kept, weights, greatest


@pytest.mark.parametrize("fresh", ["one", "probability"])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize(("size", "top_k", "V"), [(4, 6, 12), (8, 8, 9), (5, 20, 12), (3, 2, 12), (1, 1, 3)])
def test_steps_are_those_of_the_note(size, top_k, V, cross, fresh):
    generator = torch.Generator().manual_seed(size * 100 + top_k)
    B, T = 6, 12
    state = reference.start(B, size, dtype=torch.float64)
    rows = [([None] * size, 1.0) for _ in range(B)]
    for _ in range(T):
        log_p = (2 * torch.randn(B, V, generator=generator, dtype=torch.float64)).log_softmax(1)
        log_p[0, : V // 2] = -math.inf  # a law that has cut tokens
        log_p = log_p.log_softmax(1)
        u = torch.rand(B, size, generator=generator, dtype=torch.float64)
        state = reference.step(log_p, state, u, top_k=top_k, every=1, cross=cross, fresh=fresh)
        for b in range(B):
            slots, greatest = rows[b]
            kept, weights, greatest = aloud(
                log_p[b].exp().tolist(), slots, greatest, u[b].tolist(), top_k=top_k, cross=cross, fresh=fresh
            )
            rows[b] = (kept, greatest)
            assert state.tokens[b].tolist() == [slot[0] if slot else EMPTY for slot in kept]
            assert state.log_weight[b].exp().tolist() == pytest.approx(weights, rel=1e-9)
            assert math.exp(state.log_greatest[b]) == pytest.approx(greatest, rel=1e-9)


def test_one_law_for_all_rows_is_the_same_as_a_row_each():
    generator = torch.Generator().manual_seed(0)
    one, each = reference.start(5, 4), reference.start(5, 4)
    for _ in range(6):
        log_p, u = torch.randn(1, 30, generator=generator).log_softmax(1), torch.rand(5, 4, generator=generator)
        one = reference.step(log_p, one, u, top_k=8, every=1, cross=False, fresh="one")
        each = reference.step(log_p.repeat(5, 1), each, u, top_k=8, every=1, cross=False, fresh="one")
        assert all(torch.equal(a, b) for a, b in zip(one, each, strict=True))


def test_every_second_step_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    log_p = torch.randn(4, 3, 20, generator=generator).log_softmax(-1)
    u = torch.rand(3, 4, generator=generator)
    state = reference.start(3, 4)
    seen = []
    for t in range(4):
        state = reference.step(log_p[t], state, u, top_k=8, every=2, cross=False, fresh="one")
        seen.append(state)
    assert torch.equal(seen[0].tokens, seen[1].tokens)
    assert torch.equal(seen[0].log_weight, seen[1].log_weight)
    assert not torch.equal(seen[1].log_weight, seen[2].log_weight)
    by_hand = reference.step(log_p[2], seen[0]._replace(age=seen[1].age), u, top_k=8, every=1, cross=False, fresh="one")
    assert torch.equal(by_hand.tokens, seen[2].tokens)


def test_what_was_rejected_does_not_come_straight_back():
    """Two stored tokens are rejected, and the likeliest two of the others take their places."""
    state = reference.start(1, 2, dtype=torch.float64)
    before = torch.tensor([[0.5, 0.4, 0.06, 0.04]], dtype=torch.float64).log()
    state = reference.step(before, state, torch.zeros(1, 2), top_k=4, every=1, cross=False, fresh="one")
    assert state.tokens.tolist() == [[0, 1]]
    now = torch.tensor([[0.3, 0.3, 0.1, 0.3]], dtype=torch.float64).log()
    state = reference.step(now, state, torch.full((1, 2), 0.9), top_k=4, every=1, cross=False, fresh="one")
    assert state.tokens.tolist() == [[3, 2]]
    # with no others to take they do, as on the first step
    state = reference.start(1, 2, dtype=torch.float64)
    state = reference.step(before, state, torch.zeros(1, 2), top_k=2, every=1, cross=False, fresh="one")
    now = torch.tensor([[0.3, 0.31, 0.2, 0.19]], dtype=torch.float64).log()
    state = reference.step(now, state, torch.full((1, 2), 0.9), top_k=2, every=1, cross=False, fresh="one")
    assert state.tokens.tolist() == [[1, 0]]


def test_the_law_of_what_is_kept_depends_on_the_order_of_the_slots():
    """The greatest weight is a running one: of weights 2 and 1.5 the second is kept surely, or with 3/4, by order."""
    log_p = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
    for tokens, p0, kept in (([0, 1], [0.2, 0.2], [1.0, 0.75]), ([1, 0], [0.2, 0.2], [1.0, 1.0])):
        state = reference.start(1, 2, dtype=torch.float64)._replace(
            tokens=torch.tensor([tokens]), log_before=torch.tensor([p0], dtype=torch.float64).log()
        )
        for share in torch.linspace(0.01, 0.99, 99):
            after = reference.step(
                log_p, state, torch.full((1, 2), float(share)), top_k=2, every=1, cross=False, fresh="one"
            )
            assert (after.log_weight[0].exp() > 1).tolist() == [float(share) < k for k in kept]


# --- The GPU form, interpreted where there is no GPU (conftest.py) -----------------------------------------------


@pytest.fixture(scope="module")
def fused():
    pytest.importorskip("triton")
    from decodathlon.kernels.reservoir.triton import step

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def stepped(logits, state, u, temperature, **options):
        there = reference.Reservoirs(*(part.to(device) for part in state))
        drawn, new = step(logits.to(device), there, u.to(device), temperature, **options)
        return drawn.cpu(), reference.Reservoirs(*(part.cpu() for part in new))

    return stepped


def walk(fused, logits, *, R, top_k, every=1, cross=False, fresh="one", temperature=1.0, part=1024, seed=0):
    """Steps through logits (T, B, V) with both forms side by side; everything must agree all the way."""
    T, B, V = logits.shape
    ours, theirs = reference.start(B, R), reference.start(B, R)
    generator = torch.Generator().manual_seed(seed)
    for t in range(T):
        u = torch.rand(B, 1 + R, generator=generator, dtype=torch.float64)
        wide = torch.full((B, V + 5), float("nan"))  # what lies between the rows must not be read
        wide[:, :V] = logits[t]
        drawn, ours = fused(
            wide[:, :V], ours, u, temperature, top_k=top_k, every=every, cross=cross, fresh=fresh, part=part
        )
        theirs = reference.step(
            logits[t] / temperature, theirs, u[:, 1:], top_k=top_k, every=every, cross=cross, fresh=fresh
        )
        assert torch.equal(ours.tokens, theirs.tokens)
        assert torch.equal(ours.age, theirs.age)
        for a, b in zip(ours[1:4], theirs[1:4], strict=True):
            assert torch.allclose(a, b, atol=1e-5)
        assert torch.equal(drawn, reference.pick(theirs, u[:, 0]))


@pytest.mark.parametrize("fresh", ["one", "probability"])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_the_fused_step_is_the_step(fused, every, cross, fresh):
    logits = 3 * torch.randn(5, 4, 501, generator=torch.Generator().manual_seed(1))
    # neighbouring steps resemble one another, so that tokens are kept
    walk(fused, logits[:1] + 0.3 * logits, R=8, top_k=32, every=every, cross=cross, fresh=fresh, temperature=0.8)


@pytest.mark.parametrize(
    ("B", "V", "R", "top_k"),
    [(1, 49152, 32, 64), (1, 50257, 8, 32), (1, 151936, 32, 128), (32, 77, 16, 32), (3, 1000, 5, 7), (2, 9, 16, 64)],
)
def test_odd_sizes(fused, B, V, R, top_k):
    logits = 3 * torch.randn(2, B, V, generator=torch.Generator().manual_seed(V))
    walk(fused, logits[:1] + 0.3 * logits, R=R, top_k=top_k, part=4096)


def test_cut_tokens_ties_and_a_single_one_in_the_fused_step(fused):
    logits = torch.full((4, 3, 300), -math.inf)
    logits[:, 0, 13] = 2.0  # a single finite logit
    logits[:, 1, ::7] = torch.tensor([0.0, -0.0])[torch.arange(43) % 2]  # all alike
    logits[:, 2] = torch.randn(4, 300, generator=torch.Generator().manual_seed(2)).bfloat16().float()
    walk(fused, logits, R=8, top_k=16, part=64)


def test_the_step_is_an_operation_that_torch_can_hold():
    from decodathlon.kernels.reservoir import dispatch

    state = reference.start(3, 4)
    u = torch.rand(3, 5, dtype=torch.float64)
    args = (torch.randn(3, 50), *state, u, 1.0, 8, 1, False, "one")
    torch.library.opcheck(dispatch._step, args)
    drawn, new = dispatch.step(args[0], state, u, temperature=1.0, top_k=8, every=1, cross=False, fresh="one")
    assert torch.equal(drawn, reference.pick(new, u[:, 0]))
