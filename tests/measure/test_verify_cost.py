"""The cost of reading several tokens at once: order, ratios, and that nothing is kept."""

import pytest

from decodathlon.harness import plan
from decodathlon.harness.measure import speed, verify_cost
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.targets import toy

load_builtins()


def test_widths_are_read_forth_and_back_and_nothing_is_kept(monkeypatch):
    target = toy.Coins(length=200)
    read, clock = [], iter(range(10_000))

    def timed(target, work):
        before = target.spent.positions
        work()
        read.append(target.spent.positions - before)
        return float(next(clock)), None

    monkeypatch.setattr(speed, "timed", timed)
    found = list(verify_cost.rounds(target, 10, 3, 0))
    n = len(verify_cost.WIDTHS)
    for i in range(3):
        one = read[2 * n * i : 2 * n * (i + 1)]
        assert sorted(one[:n]) == list(verify_cost.WIDTHS)
        assert one[n:] == one[:n][::-1]
        assert one[0] == verify_cost.WIDTHS[i]
    # forth and back weigh the same: with a clock that runs evenly all widths take equally long
    assert {round(s, 9) for s in found[1].values()} == {found[1][1]}


def test_a_ratio_is_over_one_token():
    found = [{w: 0.1 * (1 + w / 10) for w in verify_cost.WIDTHS} for _ in range(7)]
    ratios = verify_cost.ratios(found)
    assert 1 not in ratios
    assert ratios[64].estimate().value == pytest.approx(7.4 / 1.1)


def test_the_model_is_measured_once_whatever_decoders_are_named():
    cells = plan.cells(plan.Options(suite=["verify_cost"], decoder=["top-p", "min-p"]))
    assert [c.decoder for c in cells] == ["greedy"]
