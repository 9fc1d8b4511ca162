"""Controllers: rules stop where they say, clocks find the length that pays, bandits find the arm that is best."""

import math
import random

import pytest
import torch

from decodathlon.decoders.speculative import bandits, clocks, controllers
from decodathlon.decoders.speculative.controllers import Seconds
from decodathlon.decoders.speculative.outlook import Outlook
from decodathlon.harness import decoder as decoders
from decodathlon.harness.decoder import Limits
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.targets import toy

NO_TIME = Seconds(0.0, 0.0, 0.0)


def outlook(*probabilities, position=0):
    return Outlook(torch.tensor([probabilities], dtype=torch.float64).log(), position)


def test_an_outlook_summarises_a_law_and_has_no_token():
    seen = outlook(0.5, 0.3, 0.2, 0.0)
    assert seen.top == pytest.approx([0.5])
    assert seen.margin == pytest.approx([0.2])
    assert seen.entropy == pytest.approx([-sum(p * math.log(p) for p in (0.5, 0.3, 0.2))])
    assert not any("token" in name for name in dir(seen))


def test_rules_stop_where_they_say():
    sure, unsure, close = outlook(0.9, 0.05, 0.05), outlook(0.35, 0.05, *[0.06] * 10), outlook(0.45, 0.44, 0.11)
    assert not controllers.Confidence(8).stops(sure, 0)
    assert controllers.Confidence(8).stops(unsure, 0)
    assert controllers.Confidence(8, 0.8).stops(outlook(0.79, 0.21), 0)
    assert controllers.Margin(8).stops(close, 0)
    assert not controllers.Margin(8).stops(unsure, 0)
    # sqrt(0.15 H) > 0.3 where H > 0.6 nats
    assert not controllers.SVIP(8).stops(outlook(0.8, 0.2), 0)
    assert controllers.SVIP(8).stops(outlook(0.6, 0.4), 0)
    # 1 - sqrt(0.2 H) < 0.4 where H > 1.8 nats
    assert not controllers.AdaEDL(8).stops(outlook(*[1 / 6] * 6), 0)
    assert controllers.AdaEDL(8).stops(outlook(*[1 / 6.1] * 6, 1 - 6 / 6.1), 0)
    assert not controllers.Static(8).stops(unsure, 0)


def test_the_threshold_of_adaedl_follows_the_acceptance():
    low, high = controllers.AdaEDL(8), controllers.AdaEDL(8)
    for _ in range(300):
        low.settle(4, 0, NO_TIME)
        high.settle(4, 4, NO_TIME)
    assert low.threshold == pytest.approx(0.4 + 300 * 0.001, abs=1e-9)
    assert high.threshold < 0.4 - 250 * 0.001
    cut = controllers.AdaEDL(8)
    cut.settle(8, 0, NO_TIME)
    assert cut.threshold == 0.4


def test_the_heuristic_grows_by_two_and_shrinks_by_one():
    rule = controllers.Heuristic(8)
    widths = [rule.width()]
    for drafted, accepted in ((5, 5), (7, 7), (8, 3), (7, 6), (0, 0), (6, 6)):
        rule.settle(drafted, accepted, NO_TIME)
        widths.append(rule.width())
    assert widths == [5, 7, 8, 7, 6, 6, 8]
    for _ in range(20):
        rule.settle(3, 0, NO_TIME)
    assert rule.width() == 1


# -- clocks: a simulated machine ------------------------------------------------------------------------------


def speed(controller, stays, cost, cycles, seed=0, skip=0):
    """Tokens per second of a controller on a machine: tokens stay with this probability, and cycles cost so much."""
    source, tokens, seconds = random.Random(seed), 0, 0.0
    for cycle in range(cycles):
        drafted = controller.width()
        accepted = 0
        while accepted < drafted and source.random() < stays(cycle):
            accepted += 1
        took = Seconds(drafted * cost[0], cost[1] + cost[2] * drafted, 0.0)
        controller.settle(drafted, accepted, took)
        if cycle >= skip:
            tokens, seconds = tokens + accepted + 1, seconds + sum(took)
    return tokens / seconds


@pytest.mark.parametrize("kind", [clocks.EWMA, clocks.BreakEven])
@pytest.mark.parametrize(
    ("stays", "cost"),
    [(0.8, (0.4, 1.0, 0.02)), (0.95, (0.05, 1.0, 0.02)), (0.3, (0.4, 1.0, 0.02)), (0.5, (0.0, 1.0, 0.02))],
    ids=["half-price", "cheap-and-good", "worthless", "free"],
)
def test_clocks_come_near_the_best_length(kind, stays, cost):
    fixed = {n: speed(controllers.Static(n), lambda _: stays, cost, 4000) for n in clocks.lengths(8)}
    assert speed(kind(8), lambda _: stays, cost, 4000, skip=200) > 0.95 * max(fixed.values())


@pytest.mark.parametrize("kind", [clocks.EWMA, clocks.BreakEven])
def test_clocks_never_fall_far_below_not_drafting(kind):
    assert speed(kind(8), lambda _: 0.0, (0.4, 1.0, 0.02), 4000, skip=200) > 0.97


@pytest.mark.parametrize("kind", [clocks.EWMA, clocks.BreakEven])
def test_clocks_notice_that_the_text_has_changed(kind):
    def stays(cycle):
        return 0.05 if cycle < 1000 else 0.9

    best = max(speed(controllers.Static(n), lambda _: 0.9, (0.1, 1.0, 0.02), 4000) for n in clocks.lengths(8))
    assert speed(kind(8), stays, (0.1, 1.0, 0.02), 4000, skip=2000) > 0.93 * best


# -- bandits ---------------------------------------------------------------------------------------------------


def regret(bandit, means, pulls, seed=0):
    source, lost = random.Random(seed), 0.0
    for _ in range(pulls):
        arm = bandit.choose()
        bandit.learn(arm, float(source.random() < means[arm]))
        lost += max(means) - means[arm]
    return lost


@pytest.mark.parametrize("policy", ["ucb1", "ucb1-tuned", "thompson"])
def test_regret_per_pull_vanishes_and_the_best_arm_is_pulled_most(policy):
    means = [0.2, 0.5, 0.8, 0.4]
    early = regret(bandits.Bandit(4, policy, 1), means, 500) / 500
    bandit = bandits.Bandit(4, policy, 1)
    late = regret(bandit, means, 20_000) / 20_000
    assert late < 0.25 * early
    assert late < 0.02
    assert max(range(4), key=lambda arm: bandit.pulls[arm]) == 2


def test_ucb1_pulls_no_bad_arm_more_often_than_its_theorem_says():
    """Auer, Cesa-Bianchi, Fischer 2002, theorem 1: at most 8 ln n / gap^2 + 1 + pi^2 / 3 in the mean."""
    means, n, runs = [0.9, 0.6, 0.3], 3000, 20
    pulls = torch.zeros(3)
    for seed in range(runs):
        bandit = bandits.Bandit(3, "ucb1", 0)
        regret(bandit, means, n, seed)
        pulls += torch.tensor(bandit.pulls) / runs
    for arm in (1, 2):
        assert pulls[arm] <= 8 * math.log(n) / (0.9 - means[arm]) ** 2 + 1 + math.pi**2 / 3


def test_rewards_lie_between_0_and_1():
    for kind in ("blend", "tokens-per-second"):
        rewarding = bandits.Rewarding(kind, 8)
        for drafted in range(9):
            for accepted in range(drafted + 1):
                assert 0 <= rewarding.of(drafted, accepted, Seconds(0.1 * drafted, 1.0, 0.1)) <= 1
    assert bandits.Rewarding("blend", 8).of(8, 8, NO_TIME) == 1
    assert bandits.Rewarding("blend", 8).of(4, 2, NO_TIME) == pytest.approx(0.5 * 2 / 8 + 0.5 * 2 / 4)
    with pytest.raises(ValueError, match=r"between 0 and 1, not 1\.5"):
        bandits.Bandit(2, "ucb1", 0).learn(0, 1.5)


def test_linucb_is_ridge_regression_on_its_log_and_stays_positive_definite():
    model, source = bandits.LinUCB(2, 3, alpha=0.0), torch.Generator().manual_seed(0)
    X = torch.rand(40, 3, generator=source, dtype=torch.float64)
    y = X @ torch.tensor([0.1, 0.5, -0.2], dtype=torch.float64) + 0.2
    for x, r in zip(X, y, strict=True):
        model.learn(1, x.tolist(), float(r))
    ridge = torch.linalg.solve(X.T @ X + torch.eye(3), X.T @ y)
    torch.testing.assert_close(torch.linalg.solve(model.A[1], model.b[1]), ridge.double())
    assert bool((torch.linalg.eigvalsh(model.A) > 0).all())
    assert torch.equal(model.A[0], torch.eye(3, dtype=torch.float64))
    assert model.choose([1.0, 1.0, 0.0]) == 1  # it has seen that this pays


def test_a_contextual_bandit_learns_what_a_plain_one_cannot():
    """Which arm is right depends on the context alone."""
    source, model, right = random.Random(0), bandits.LinUCB(2, 3), 0
    for pull in range(600):
        sign = source.choice([-1.0, 1.0])
        x = [1.0, sign, 0.0]
        arm = model.choose(x)
        model.learn(arm, x, float((arm == 1) == (sign > 0)))
        right += pull >= 300 and (arm == 1) == (sign > 0)
    assert right > 285


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_one_arm_is_that_rule_without_a_bandit(level, monkeypatch):
    monkeypatch.setattr(bandits, "arms", lambda longest, laws: [controllers.Confidence(longest)])
    tapout = bandits.TapOut(6, policy="ucb1", level=level, reward="blend", seed=0)
    rule = controllers.Confidence(6)
    source = random.Random(0)
    for _ in range(50):
        assert tapout.width() == rule.width()
        for position in range(5):
            top = source.random()
            seen = outlook(top, 1 - top, position=position)
            assert tapout.stops(seen, 0) == rule.stops(seen, 0)
        tapout.settle(5, source.randrange(6), NO_TIME)


def test_tapout_comes_near_the_best_of_its_arms():
    """A machine on which long drafts pay, arms being lengths: 3 % of the best length are lost at most."""
    stays, cost = 0.8, (0.1, 1.0, 0.02)
    best = max(speed(controllers.Static(n), lambda _: stays, cost, 20_000) for n in (1, 2, 4, 8))
    for policy in ("ucb1-tuned", "thompson"):
        tapout = bandits.TapOut(8, policy=policy, level="sequence", reward="tokens-per-second", seed=0, laws=False)
        assert speed(tapout, lambda _: stays, cost, 20_000, skip=2000) > 0.97 * best


def test_the_contextual_rule_sees_how_large_activations_are():
    state = torch.tensor([[3.0, -4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    log_q = torch.full((2, 2), 0.5).log()
    assert Outlook(log_q, 0, state).norm == pytest.approx([2.5, 0.0])
    assert Outlook(log_q, 0).norm == [0.0, 0.0]
    load_builtins()
    target = toy.enumerable_lm(8)
    prompts = [[0, 2, 3, 4], [0, 5]]
    decoder = decoders.build("quantised-self[controller=contextual]")
    decoder.generate(target, prompts, Limits(4, ignore_eos=True), RowRandom(0, range(2)))
    found = [c._seen[3] for c in target.kept[decoder]]
    # it is asked in the first cycle alone, and what it saw there is the stream behind the prompt and the first token
    for b, prompt in enumerate(prompts):
        first = int(target.open([prompt], capacity=9).next_logits.argmax())
        own = target.open([prompt], capacity=9).lent(decoder.made(target))
        states = own.extend(torch.tensor([[first]]), hidden=[target.layers]).hidden[target.layers]
        assert found[b] == pytest.approx(math.log1p(float(states.square().mean().sqrt())) / 4, rel=1e-5)
