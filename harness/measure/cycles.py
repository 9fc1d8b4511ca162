"""What became of the cycles of a decoder that drafts: how much of a draft stays, where the time goes, what that
predicts.

A cycle drafts some tokens, of which the first few stay, and makes one more. So an answer has one token from its
prompt, and of each cycle what stayed and one (fewer in the last, where the answer ends).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from decodathlon.harness.measure.observations import Observations

#: A text loops if its last so many tokens repeat with a period of at most so many.
LOOP_TOKENS, LOOP_PERIOD = 24, 8


class Traced(NamedTuple):
    """One answer with its cycles, as `Completion.trace` has them."""

    row: str
    tokens: Sequence[int]
    cycles: Sequence[Mapping[str, Any]]

    @property
    def batch(self) -> str:
        """What it ran in: the answers of a batch share their cycles, until they end."""
        return self.row.rpartition("-row-")[0] or self.row


def loops(tokens: Sequence[int]) -> bool:
    """Whether the last 24 tokens repeat with a period of at most 8: small models do, and it flatters who looks up."""
    last = list(tokens[-LOOP_TOKENS:])
    if len(last) < LOOP_TOKENS:
        return False
    return any(last[period:] == last[:-period] for period in range(1, LOOP_PERIOD + 1))


def metrics(answers: Sequence[Traced], stop: Collection[int] = ()) -> dict[str, Observations]:
    """By metric name, over answers; those that loop left out under a name of their own, and so what lies behind the
    first `stop` token, of which a reader has nothing."""
    found = _of(answers, "")
    if stop and (ended := [(a, _to_the_end(a, stop)) for a in answers if a.cycles]):
        cut = [n != (len(a.tokens), len(a.cycles)) or _overshot(a) for a, n in ended]
        if any(cut) and (left := [(a.row, made - 1, cycles) for a, (made, cycles) in ended if cycles]):
            found["tau(to the stop token)"] = Observations(
                [name for name, _, _ in left], [float(made) for _, made, _ in left], [float(n) for _, _, n in left]
            )
    found["looping_share"] = Observations.questions([a.row for a in answers], [float(loops(a.tokens)) for a in answers])
    straight = [a for a in answers if not loops(a.tokens)]
    if 0 < len(straight) < len(answers):
        found |= _of(straight, "(without loops)")
    return found


def _of(answers: Sequence[Traced], remark: str) -> dict[str, Observations]:
    some = [a for a in answers if a.cycles]
    if not some:
        return {}
    rows = [a.row for a in some]

    def share(of: str) -> Observations:
        """By batch: its answers share their seconds, so they are no units of their own."""
        whole = longest(some)
        return Observations.each(list(whole), [sum(c[of] for c in a.cycles) / seconds(a) for a in whole.values()])

    cycles = [float(len(a.cycles)) for a in some]
    whole = longest(some)
    names, batches = list(whole), list(whole.values())
    made = {name: [float(len(a.tokens) - 1) for a in some if a.batch == name] for name in names}
    behind = [seconds(a) - a.cycles[0]["draft_s"] for a in batches]
    found = {
        # of a batch the cycles are shared, and every row makes its own tokens in them
        f"tau_per_target_s{remark}": Observations.each(
            names, [sum(made[a.batch]) / len(made[a.batch]) / sum(c["verify_s"] for c in a.cycles) for a in batches]
        ),
        f"tpot_behind_draft_s{remark}": Observations.each(
            names, [s / max(1, max(made[a.batch])) for s, a in zip(behind, batches, strict=True)]
        ),
        f"tau{remark}": Observations(rows, [sum(c["accepted"] + 1.0 for c in a.cycles) for a in some], cycles),
        f"tau_by_text{remark}": Observations.each(
            rows, [sum(c["accepted"] + 1.0 for c in a.cycles) / len(a.cycles) for a in some]
        ),
        f"draft_share{remark}": share("draft_s"),
        f"keep_share{remark}": share("keep_s"),
    }
    seeding = [a for a in some if "seeded" in a.cycles[0]]
    if seeding:
        names, counts = [a.row for a in seeding], [float(len(a.cycles)) for a in seeding]
        tokens = [float(sum(c["seeded"] for c in a.cycles)) for a in seeding]
        begun = [float(sum(c["seeded"] > 0 for c in a.cycles)) for a in seeding]
        found[f"seeded_tokens{remark}"] = Observations(names, tokens, counts)
        found[f"seeded_share{remark}"] = Observations(names, begun, counts, share=True)
    drafting = [(a.row, sum(c["accepted"] for c in a.cycles), sum(c["drafted"] for c in a.cycles)) for a in some]
    if drafting := [x for x in drafting if x[2]]:
        units, stayed, drafted = zip(*drafting, strict=True)
        found[f"draft_acceptance{remark}"] = Observations(units, stayed, drafted, share=True)
    return found


def _to_the_end(answer: Traced, stop: Collection[int]) -> tuple[int, int]:
    """How many tokens it has up to the first stop token, that one included, and in how many cycles they were made."""
    made = next((i + 1 for i, token in enumerate(answer.tokens) if token in stop), len(answer.tokens))
    at = 1
    for number, cycle in enumerate(answer.cycles):
        if at >= made:
            return made, number
        at += int(cycle["accepted"]) + 1
    return made, len(answer.cycles)


def _overshot(answer: Traced) -> bool:
    """Whether its last cycle made tokens behind its end."""
    return 1 + sum(int(c["accepted"]) + 1 for c in answer.cycles) > len(answer.tokens)


def histogram(answers: Sequence[Traced]) -> list[float]:
    """How many cycles had 0, 1, 2, ... of their drafted tokens stay."""
    counts = Counter(int(c["accepted"]) for a in answers for c in a.cycles)
    return [float(counts[n]) for n in range(max(counts, default=-1) + 1)]


def by_position(answers: Sequence[Traced]) -> list[float]:
    """How often the token at each place of a draft stays, of those that were drafted there and could have: because all
    before them had."""
    reached: Counter[int] = Counter()
    stayed: Counter[int] = Counter()
    for cycle in (c for a in answers for c in a.cycles):
        for place in range(min(int(cycle["drafted"]), int(cycle["accepted"]) + 1)):
            reached[place] += 1
            stayed[place] += place < cycle["accepted"]
    return [stayed[place] / reached[place] for place in range(len(reached))]


def mean_seconds(answers: Sequence[Traced]) -> dict[str, float]:
    """Of a cycle, by its part: drafting, the target's pass and verdict, bookkeeping."""
    cycles = [c for a in answers for c in a.cycles]
    parts = {"draft": "draft_s", "verify": "verify_s", "keep": "keep_s"}
    return {name: sum(c[part] for c in cycles) / len(cycles) for name, part in parts.items()} if cycles else {}


def seconds(answer: Traced) -> float:
    """What its cycles took in all."""
    return float(sum(c["draft_s"] + c["verify_s"] + c["keep_s"] for c in answer.cycles))


def longest(answers: Sequence[Traced]) -> dict[str, Traced]:
    """By batch, the answer of most cycles: it has those of all others."""
    found: dict[str, Traced] = {}
    for answer in answers:
        if answer.batch not in found or len(answer.cycles) > len(found[answer.batch].cycles):
            found[answer.batch] = answer
    return found


def flaws(answers: Sequence[Traced]) -> list[str]:
    """What does not add up, by answer: it never should."""
    found = []
    for a in answers:
        made = 1 + sum(c["accepted"] + 1 for c in a.cycles)
        most = made - (a.cycles[-1]["accepted"] if a.cycles else 0)
        if not most <= len(a.tokens) <= made:
            found.append(f"{a.row}: cycles made {made} tokens, and the answer has {len(a.tokens)}")
        if any(not 0 <= c["accepted"] <= c["drafted"] for c in a.cycles):
            found.append(f"{a.row}: a cycle kept more tokens than it drafted")
    return found
