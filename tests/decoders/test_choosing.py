"""Which answer is given: tables of weights, scores and final answers, and self-consistency among answers with boxes."""

import pytest

from decodathlon.decoders import choosing
from decodathlon.harness import decoder as decoders
from decodathlon.harness.decoder import Limits
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.targets import toy

load_builtins()


class Speaker:
    """A target whose answers are known texts."""

    capabilities = frozenset({"text"})
    name = "speaker"

    def decode(self, tokens):
        return "".join(tokens)


BOXES = [["\\boxed{1}"], ["so \\boxed{ 2 }"], ["\\boxed{2}"], ["nothing"], ["\\boxed{3}"]]


@pytest.mark.parametrize(
    ("way", "weights", "scores", "taken"),
    [
        ("vote", [1, 1, 1, 1, 1], [9, 1, 2, 9, 9], 2),  # two say 2, the better scored of them
        ("vote", [5, 1, 1, 9, 1], [0, 0, 0, 9, 0], 0),  # by weight; who has no box has no vote
        ("vote", [1, 0.5, 0.5, 1, 1], [1, 2, 3, 9, 4], 4),  # three equal parties: the best scored
        ("vote", [0, 1, 0, 0, 0], [0, 1, 9, 0, 0], 1),  # a weight of zero is not given, however good
        ("best", [1, 1, 1, 1, 1], [1, 5, 3, 4, 5], 1),  # the first of the best
        ("best", [1, 0, 1, 1, 0], [1, 5, 3, 4, 5], 3),
    ],
)
def test_who_is_chosen(way, weights, scores, taken):
    assert choosing.chosen(way, weights, scores, BOXES, Speaker(), 0.5) == taken


def test_without_boxes_everyone_may_win():
    assert choosing.voted([1, 1], ["a", "b"]) == [0, 1]
    assert choosing.chosen("vote", [1, 1], [1, 2], [["a"], ["b"]], Speaker(), 0.0) == 1


@pytest.mark.parametrize(("u", "taken"), [(0.0, 1), (0.24, 1), (0.26, 3), (1 - 2**-53, 3)])
def test_a_draw_goes_by_weight_and_never_by_zero(u, taken):
    assert choosing.chosen("draw", [0, 1, 0, 3, 0], [0] * 5, BOXES, Speaker(), u) == taken


class Boxer:
    """A toy whose last tokens are final answers; the likeliest text need not have the commonest."""

    def __init__(self, lm):
        self._lm = lm
        self.capabilities = frozenset({"logits", "text"})

    def __getattr__(self, name):
        return getattr(self._lm, name)

    def decode(self, tokens):
        return f"\\boxed{{{tokens[-1]}}}"


def test_self_consistency_gives_what_most_answers_say():
    from decodathlon.decoders.best_of import drawn

    target, limits = Boxer(toy.enumerable_lm(4)), Limits(3, ignore_eos=True)
    one = decoders.build("self-consistency[n=7,temperature=1,top_p=1]")
    given = one.generate(target, [[0]] * 40, limits, RowRandom(5, range(40)))
    found = drawn(one.shape, target, [[0]] * 40, 7, limits, RowRandom(5, range(40)))
    differs = 0
    for p, answer in enumerate(given):
        mine = found.of(p)
        votes = [sum(other.tokens[-1] == one.tokens[-1] for other in mine) for one in mine]
        assert sum(one.tokens[-1] == answer.tokens[-1] for one in mine) == max(votes)
        likeliest = max(mine, key=lambda one: one.model_log_prob)
        differs += votes[mine.index(likeliest)] < max(votes)
    assert differs > 3, "that the likeliest answer is outvoted does happen here"
