"""Verification rules draw the target's law: by enumeration of every draft and every interval of the uniforms."""

import itertools

import pytest
import torch

from decodathlon.decoders.speculative import verify

EXACT = {"atol": 1e-12, "rtol": 0.0}
#: A threshold in the wrong place misjudges an interval of this width, which the tolerance above sees.
NARROW = 1e-9


def laws(*shape, seed=0, zeros=False):
    p = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 2
    if zeros:  # another token is impossible in each law
        p[..., seed % shape[-1]] = 0
    return p / p.sum(-1, keepdim=True)


def intervals(*breaks):
    """Midpoints and widths of the intervals between the breaks, with a narrow one on either side of each."""
    places = {0.0, 1.0, 0.37}
    for b in breaks:
        places |= {min(max(x, 0.0), 1.0) for x in (b - NARROW, b, b + NARROW)}
    places = sorted(places)
    return [((a + b) / 2, b - a) for a, b in itertools.pairwise(places)]


def integrated(axes):
    """(cases, len(axes)) uniforms and (cases,) probabilities of the product of `intervals`."""
    found = list(itertools.product(*axes))
    u = torch.tensor([[x for x, _ in case] for case in found], dtype=torch.float64)
    weights = torch.tensor([[w for _, w in case] for case in found], dtype=torch.float64)
    return u, weights.prod(-1)


def cumulative(weights):
    total = sum(weights)
    return [sum(weights[: i + 1]) / total for i in range(len(weights) - 1)] if total > 0 else []


def left_of(p, q):
    left = [max(a - b, 0.0) for a, b in zip(p, q, strict=True)]
    return left if sum(left) > 0 else list(p)


def normal(weights):
    return [w / sum(weights) for w in weights]


LAWS = [
    (laws(4, seed=1), laws(4, seed=2)),
    (laws(4, seed=3, zeros=True), laws(4, seed=4)),
    (laws(4, seed=1), laws(4, seed=2, zeros=True)),
    (laws(4, seed=1), laws(4, seed=1)),
    (torch.tensor([0.5, 0.5, 0, 0], dtype=torch.float64), torch.tensor([0, 0, 0.25, 0.75], dtype=torch.float64)),
]


@pytest.mark.parametrize(("p", "q"), LAWS)
def test_one_position_of_the_chain_rule_has_the_targets_law(p, q):
    law, accepted = torch.zeros(4, dtype=torch.float64), 0.0
    for x in range(4):
        if q[x] == 0:
            continue
        u, weight = integrated([intervals(float(p[x] / q[x])), intervals(*cumulative(left_of(p.tolist(), q.tolist())))])
        B = len(u)
        log_p = torch.stack([p, p]).log().expand(B, 2, 4)
        verdict = verify.chain(
            log_p, torch.full((B, 1), x), q.log().expand(B, 1, 4), torch.ones(B, dtype=torch.long), u
        )
        first = torch.where(verdict.accepted == 1, x, verdict.token)
        law.index_add_(0, first, weight * q[x])
        accepted += float((weight * (verdict.accepted == 1)).sum() * q[x])
    torch.testing.assert_close(law, p, **EXACT)
    assert accepted == pytest.approx(float(torch.minimum(p, q).sum()), abs=1e-12)


def test_two_positions_of_the_chain_rule_have_the_targets_joint_law():
    p0, p1 = laws(3, seed=5), laws(3, 3, seed=6)  # p1[a] behind a
    q0, q1 = laws(3, seed=7), laws(3, 3, seed=8)
    joint = torch.zeros(3, 3, dtype=torch.float64)
    for a, b in itertools.product(range(3), repeat=2):
        residuals = [
            *cumulative(left_of(p0.tolist(), q0.tolist())),
            *cumulative(left_of(p1[a].tolist(), q1[a].tolist())),
        ]
        bonus = laws(3, seed=9)
        u, weight = integrated(
            [
                intervals(float(p0[a] / q0[a])),
                intervals(float(p1[a, b] / q1[a, b])),
                intervals(*residuals, *cumulative(bonus.tolist())),
            ]
        )
        B = len(u)
        verdict = verify.chain(
            torch.stack([p0, p1[a], bonus]).log().expand(B, 3, 3),
            torch.tensor([[a, b]]).expand(B, 2),
            torch.stack([q0, q1[a]]).log().expand(B, 2, 3),
            torch.full((B,), 2),
            u,
        )
        weight = weight * q0[a] * q1[a, b]
        for n, token, w in zip(verdict.accepted.tolist(), verdict.token.tolist(), weight.tolist(), strict=True):
            if n == 0:  # the next cycle draws the second token
                joint[token] += w * p1[token]
            else:
                joint[a, b if n == 2 else token] += w
    torch.testing.assert_close(joint, p0[:, None] * p1, **EXACT)


def test_padding_behind_the_count_is_never_taken():
    p = laws(2, 3, 4, seed=3)
    drafted = torch.tensor([[0, 1], [2, 3]])
    q = laws(2, 2, 4, seed=4)
    u = torch.zeros(2, 3, dtype=torch.float64)  # everything that is asked stays
    verdict = verify.chain(p.log(), drafted, q.log(), torch.tensor([1, 0]), u)
    assert verdict.accepted.tolist() == [1, 0]
    u[:, -1] = torch.tensor([0.999999, 0.999999])
    token = verify.chain(p.log(), drafted, q.log(), torch.tensor([1, 0]), u).token
    assert token.tolist() == [3, 3]  # from p itself: nothing was refused there
    matched = verify.match(torch.tensor([[0, 1, 2], [2, 3, 1]]), drafted, torch.tensor([1, 0]))
    assert (matched.accepted.tolist(), matched.token.tolist()) == ([1, 0], [1, 2])


def test_a_guess_stays_as_often_as_the_target_draws_it_and_its_law_is_the_targets():
    p0, p1 = laws(4, seed=10), laws(4, 4, seed=11)
    guess = 2
    joint, stayed = torch.zeros(4, 4, dtype=torch.float64), 0.0
    for a, b in itertools.product(range(4), repeat=2):  # what the target draws behind the text, and behind the guess
        weight = float(p0[a] * p1[guess, b])
        verdict = verify.match(torch.tensor([[a, b]]), torch.tensor([[guess]]), torch.tensor([1]))
        if int(verdict.accepted) == 0:
            joint[int(verdict.token)] += weight * p1[int(verdict.token)]
        else:
            joint[guess, int(verdict.token)] += weight
            stayed += weight
    torch.testing.assert_close(joint, p0[:, None] * p1, **EXACT)
    assert stayed == pytest.approx(float(p0[guess]), abs=1e-12)


@pytest.mark.parametrize("replaced", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("p", "q"), LAWS)
def test_several_candidates_at_one_position_leave_the_targets_law(p, q, count, replaced):
    if not replaced and count > int((q > 0).sum()):
        pytest.skip("there are not so many to draw")
    law = torch.zeros(4, dtype=torch.float64)
    for drawn in itertools.product(range(4), repeat=count):
        probability, now, rest = 1.0, q.tolist(), p.tolist()
        axes = []
        for x in drawn:
            probability *= now[x]
            if probability == 0:
                break
            axes.append(intervals(rest[x] / now[x]))
            rest = normal(left_of(rest, now))
            if not replaced:
                now = [0.0 if v == x else w for v, w in enumerate(now)]
                now = normal(now) if sum(now) > 0 else now
        if probability == 0:
            continue
        u, weight = integrated([*axes, intervals(*cumulative(rest), *cumulative(p.tolist()))])
        B = len(u)
        which, token = verify.rounds(
            p.log().expand(B, 4), torch.tensor([drawn]).expand(B, count), q.log().expand(B, 4), u, replaced=replaced
        )
        taken = which >= 0
        assert torch.equal(token[taken], torch.tensor(drawn)[which[taken]])
        law.index_add_(0, token, weight * probability)
    torch.testing.assert_close(law, p, **EXACT)


#: Two children of the text, two of the first child, one of the second.
TOKENS, PARENTS = [0, 2, 1, 2, 0], [-1, -1, 0, 0, 1]


def test_the_walk_down_a_tree_of_guesses_has_the_targets_joint_law():
    p = {(): laws(3, seed=20)} | {(a,): laws(3, seed=21 + a) for a in range(3)}
    p |= {(a, b): laws(3, seed=30 + 3 * a + b) for a in range(3) for b in range(3)}
    texts = [(), (0,), (2,), (0, 1), (0, 2), (2, 0)]  # what each node continues
    joint = torch.zeros(3, 3, 3, dtype=torch.float64)
    for drawn in itertools.product(range(3), repeat=6):
        weight = 1.0
        for text, x in zip(texts, drawn, strict=True):
            weight *= float(p[text][x])
        path = verify.walk(torch.tensor([drawn]), torch.tensor([TOKENS]), torch.tensor([PARENTS]), 2)
        n = int(path.accepted)
        out = (*(TOKENS[i] for i in path.nodes[0, :n].tolist()), int(path.token))
        rest = torch.tensor(weight, dtype=torch.float64)
        if len(out) == 1:
            rest = rest * p[out][:, None] * torch.stack([p[(*out, b)] for b in range(3)])
        elif len(out) == 2:
            rest = rest * p[out]
        joint[out] += rest
    expected = torch.stack([torch.stack([p[()][a] * p[(a,)][b] * p[(a, b)] for b in range(3)]) for a in range(3)])
    torch.testing.assert_close(joint, expected, **EXACT)


@pytest.mark.parametrize("replaced", [True, False])
def test_a_drawn_tree_has_the_targets_joint_law(replaced):
    p0, p1, q = laws(3, seed=40), laws(3, 3, seed=41), laws(3, seed=42)
    joint = torch.zeros(3, 3, dtype=torch.float64)
    for a, b in itertools.product(range(3), repeat=2):
        if a == b and not replaced:
            continue
        second = q.tolist() if replaced else [0.0 if v == a else w for v, w in enumerate(q.tolist())]
        probability = float(q[a]) * normal(second)[b]
        rest = normal(left_of(p0.tolist(), q.tolist()))
        after = normal(left_of(rest, normal(second)))
        axes = [intervals(float(p0[a] / q[a])), intervals(rest[b] / normal(second)[b]), intervals(*cumulative(after))]
        bonus = intervals(*cumulative(p1[a].tolist()), *cumulative(p1[b].tolist()))
        u, weight = integrated([*axes, bonus])
        B = len(u)
        numbers = torch.zeros(B, 2, 3, dtype=torch.float64)
        numbers[:, 0], numbers[:, 1, 2] = u[:, :3], u[:, 3]
        path = verify.walk_drawn(
            torch.stack([p0, p1[a], p1[b]]).log().expand(B, 3, 3),
            torch.tensor([[a, b]]).expand(B, 2),
            torch.full((B, 2), -1),
            torch.stack([q, q, q]).log().expand(B, 3, 3),
            numbers,
            1,
            replaced=replaced,
        )
        for n, node, token, w in zip(
            path.accepted.tolist(), path.nodes[:, 0].tolist(), path.token.tolist(), weight.tolist(), strict=True
        ):
            if n == 0:
                joint[token] += w * probability * p1[token]
            else:
                joint[(a, b)[node], token] += w * probability
    torch.testing.assert_close(joint, p0[:, None] * p1, **EXACT)


def test_a_deeper_drawn_tree_follows_one_path():
    """Everything is accepted where q = p and the uniforms are small, nothing where q is elsewhere."""
    p = torch.full((1, 4, 3), 1 / 3, dtype=torch.float64)
    tokens, parents = torch.tensor([[0, 1, 2]]), torch.tensor([[-1, 0, 1]])
    u = torch.zeros(1, 4, 2, dtype=torch.float64)
    path = verify.walk_drawn(p.log(), tokens, parents, p.log(), u, 3, replaced=False)
    assert (path.accepted.tolist(), path.nodes.tolist(), path.token.tolist()) == ([3], [[0, 1, 2]], [0])
    elsewhere = torch.zeros(1, 4, 3, dtype=torch.float64)
    elsewhere[..., 0] = 1.0
    target = torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64).expand(1, 4, 3)
    u[..., -1] = 0.7
    path = verify.walk_drawn(target.log(), tokens, parents, elsewhere.log(), u, 3, replaced=False)
    assert (path.accepted.tolist(), path.token.tolist()) == ([0], [2])
