"""Cycles of drafting decoders: sums by hand, loops, and what must add up."""

import math

import pytest

from decodathlon.harness import decoder as decoders
from decodathlon.harness.decoder import Limits
from decodathlon.harness.measure import cycles, speed
from decodathlon.harness.measure.cycles import Traced
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.targets import toy

load_builtins()


def cycle(drafted, accepted, draft=0.2, verify=0.7, keep=0.1):
    return {"drafted": drafted, "accepted": accepted, "draft_s": draft, "verify_s": verify, "keep_s": keep}


A = Traced("a", list(range(8)), [cycle(4, 4), cycle(4, 0), cycle(2, 0)])
B = Traced("b", [5] * 30, [cycle(9, 9)] * 3)
NONE = Traced("c", [1], [])


def test_sums_by_hand():
    found = {name: o.estimate().value for name, o in cycles.metrics([A, B, NONE]).items()}
    assert found["tau"] == pytest.approx((5 + 1 + 1 + 30) / 6)
    assert found["draft_acceptance"] == pytest.approx((4 + 27) / (10 + 27))
    assert found["draft_share"] == pytest.approx(0.2)
    assert found["keep_share"] == pytest.approx(0.1)
    assert found["looping_share"] == pytest.approx(1 / 3)
    assert found["tau(without loops)"] == pytest.approx(7 / 3)
    assert found["draft_acceptance(without loops)"] == pytest.approx(0.4)
    assert cycles.histogram([A, B]) == [2, 0, 0, 0, 1, 0, 0, 0, 0, 3]
    assert cycles.by_position([A]) == pytest.approx([1 / 3, 1, 1, 1])
    assert cycles.seconds(A) == pytest.approx(3)
    assert cycles.longest([A, NONE, B]) == {"a": A, "b": B, "c": NONE}
    assert cycles.mean_seconds([A]) == pytest.approx({"draft": 0.2, "verify": 0.7, "keep": 0.1})
    assert cycles.mean_seconds([NONE]) == {}


def test_seconds_by_hand():
    found = {name: o.estimate().value for name, o in cycles.metrics([A]).items()}
    verify, draft = sum(c["verify_s"] for c in A.cycles), A.cycles[0]["draft_s"]
    assert found["tau_per_target_s"] == pytest.approx(7 / verify)
    assert found["tpot_behind_draft_s"] == pytest.approx((cycles.seconds(A) - draft) / 7)


def test_seeded_cycles_and_tokens_are_counted():
    made = [cycle(4, 0) | {"seeded": n} for n in (0, 3, 2, 0)]
    found = {k: o.estimate().value for k, o in cycles.metrics([Traced("a", list(range(5)), made)]).items()}
    assert (found["seeded_tokens"], found["seeded_share"]) == (5 / 4, 2 / 4)


def test_a_batch_shares_its_seconds():
    """Two rows in the same three cycles of 0.7 s each: a text has 7 or 4 tokens of them, so 5.5 on average."""
    rows = [
        Traced("pair-0-row-0", list(range(8)), [cycle(4, 4), cycle(4, 0), cycle(2, 0)]),
        Traced("pair-0-row-1", list(range(5)), [cycle(4, 1), cycle(4, 0), cycle(2, 0)]),
    ]
    found = cycles.metrics(rows)["tau_per_target_s"].estimate().value
    assert found == pytest.approx(5.5 / sum(c["verify_s"] for c in rows[0].cycles))


@pytest.mark.parametrize(
    ("tokens", "accepted", "tau"),
    [
        ([7, 1, 2, 3, 4, 5], [3, 0], None),  # no stop token, and the cycles made just these
        ([7, 1, 2, 9], [3, 2], 3.0),  # the first cycle made 1 2 9, and another behind the stop token
        ([7, 1, 9, 3, 4, 5, 6], [1, 3], 2.0),  # the second cycle lies behind it altogether
        ([9, 1, 2], [1], None),  # nothing but the stop token: no cycle made it
    ],
)
def test_tau_to_the_stop_token(tokens, accepted, tau):
    found = cycles.metrics([Traced("a", tokens, [cycle(4, n) for n in accepted])], stop={9})
    name = "tau(to the stop token)"
    assert (found[name].estimate().value if name in found else None) == tau


def test_the_mean_of_the_histogram_is_tau_less_one():
    counts = cycles.histogram([A, B])
    mean = sum(n * count for n, count in enumerate(counts)) / sum(counts)
    assert mean + 1 == pytest.approx(cycles.metrics([A, B])["tau"].estimate().value)


@pytest.mark.parametrize(
    ("tokens", "looping"),
    [
        ([1] * 24, True), ([1] * 23, False), ([9, 8, *[1, 2, 3] * 8], True), ([*range(8), *range(8), *range(8)], True),
        ([*range(9)] * 4, False), ([*[1, 2] * 11, 1, 3], False), ([], False),
    ],
)  # fmt: skip
def test_a_loop_is_a_short_period_at_the_end(tokens, looping):
    assert cycles.loops(tokens) == looping


def test_what_does_not_add_up_is_said():
    assert cycles.flaws([A, NONE]) == []
    assert cycles.flaws([B]) == []  # its last cycle made one more than there was room for
    assert "kept more" in cycles.flaws([Traced("d", [1, 2, 3, 4], [cycle(1, 2)])])[0]
    assert "made 4 tokens, and the answer has 5" in cycles.flaws([Traced("e", [1] * 5, [cycle(2, 2)])])[0]


@pytest.mark.parametrize("spec", ["prompt-lookup", "quantised-self[k=3]", "draft-model[k=5]"])
def test_cycles_of_decoders_add_up(spec):
    target = toy.enumerable_lm(8)
    for ignore in (True, False):
        limits = Limits(20, ignore_eos=ignore, trace=True)
        found = decoders.build(spec).generate(target, [[0, 2, 3], [0]], limits, RowRandom(0, range(2)))
        answers = [Traced(str(i), a.tokens, a.trace) for i, a in enumerate(found)]
        assert cycles.flaws(answers) == []


def test_the_predicted_ratio_is_that_of_each_pair():
    """Greedy takes 2 s and 1 s behind the prompt; one cycle takes 1 s, four take 2 s each. The rows of a batch share
    their cycles, so the longest one has all of them."""
    slow = speed.Pair(seconds={"ratio_to_greedy": [2.0, 3.0]}, prefill=0.5, prompts=[[1]])
    fast = speed.Pair(seconds={"ratio_to_greedy": [1.25, 1.25]}, prefill=0.25, prompts=[[3], [4]])
    part = {"drafted": 3, "draft_s": 0.25, "verify_s": 0.5, "keep_s": 0.25}
    answers = [
        cycles.Traced("pair-0-row-0", list(range(5)), [part | {"accepted": 3}]),
        cycles.Traced("pair-1-row-0", list(range(5)), [part | {"accepted": 3, "verify_s": 1.5}]),
        cycles.Traced("pair-1-row-1", list(range(5)), [part | {"accepted": 0, "verify_s": 1.5}] * 4),
    ]
    found = speed.predicted([slow, fast], answers)
    assert found.estimate().value == pytest.approx(math.sqrt((2.0 / 1.0) * (1.0 / 8.0)))
    assert speed.predicted([slow], [cycles.Traced("a", [1], [])]) is None
    shares = cycles.metrics(answers)["draft_share"]
    assert shares.estimate().n == 2


def test_the_decode_ratio_leaves_the_prompt_out():
    pair = speed.Pair(seconds={"ratio_to_greedy": [3.0, 3.0], "candidate": [2.0, 2.0]}, prefill=1.0, prompts=[[1]])
    assert speed.decode_ratio([pair], "ratio_to_greedy").estimate().value == pytest.approx(2.0)
    assert speed.ratio([pair], "ratio_to_greedy").estimate().value == pytest.approx(1.5)
    late = speed.Pair(seconds={"ratio_to_greedy": [1.0], "candidate": [1.0]}, prefill=1.0, prompts=[[1]])
    assert speed.decode_ratio([late], "ratio_to_greedy") is None
