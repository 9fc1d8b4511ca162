"""Which of several weighted answers is given: one by lot, the best one, or one that says what most of them say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from decodathlon.harness.errors import UnsupportedError
from decodathlon.harness.measure.grading import last_box

if TYPE_CHECKING:
    from decodathlon.harness.targets.base import Target

#: draw: one, in proportion to its weight; best: one of the greatest score; vote: of the final answers (the last box of
#: each) that with the greatest weight in all, and among those who give it one of the greatest score.
Way = Literal["draw", "best", "vote"]


def check(way: Way, target: Target) -> None:
    """
    Raises:
        UnsupportedError: votes are counted by texts, and the target has none.
    """
    if way == "vote" and "text" not in target.capabilities:
        raise UnsupportedError("text", f"answer=vote reads final answers, and {target.name} writes no text")


def chosen(
    way: Way,
    weights: Sequence[float],
    scores: Sequence[float],
    answers: Sequence[Sequence[int]],
    target: Target,
    u: float,
) -> int:
    """The number of the answer that is given.

    Args:
        weights: not negative, and not all zero.
        scores: by which `best` and ties are decided.
        answers: the tokens of each.
        u: uniform in [0, 1), for `draw`.
    """
    if way == "draw":
        reached, point = 0.0, u * sum(weights)
        for i, weight in enumerate(weights):
            reached += weight
            if reached > point:
                return i
        return max(range(len(weights)), key=lambda i: (weights[i] > 0, i))  # what rounding left over
    among = voted(weights, [target.decode(a) for a in answers]) if way == "vote" else range(len(weights))
    return max(among, key=lambda i: (weights[i] > 0, scores[i], -i))


def voted(weights: Sequence[float], texts: Sequence[str]) -> list[int]:
    """Those whose last box has the greatest weight in all; everyone where nobody has a box.

    Boxes are the same where they are letter by letter, spaces aside: a decoder has no grader.
    """
    boxes = [last_box(text)[0] for text in texts]
    said = [None if box is None else "".join(box.split()) for box in boxes]
    votes: dict[str, float] = {}
    for box, weight in zip(said, weights, strict=True):
        if box is not None:
            votes[box] = votes.get(box, 0.0) + weight
    if not votes:
        return list(range(len(texts)))
    most = max(votes.values())
    leading = {box for box, weight in votes.items() if weight >= most * (1 - 1e-12)}
    return [i for i, box in enumerate(said) if box in leading]
