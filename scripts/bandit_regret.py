"""What it costs to learn which stopping rule is best: regret of bandits on a simulated drafter.

    python scripts/bandit_regret.py [--cycles 2000] [--runs 8]

A text is a run of places; at each the drafter's likeliest token has a probability that is drawn anew (Beta), and stays
as often as that probability says. A token costs 0.45 of a pass of the target to draft, a pass over 1 + n tokens
1 + 0.02 n. On it each rule of `bandits.arms` alone has a mean reward, so the best is known. Regret is what a bandit has
gained less than that rule, added up over cycles. Writes docs/findings/bandit-regret.csv and .svg.
"""

from __future__ import annotations

import argparse
import csv
import random
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from decodathlon.decoders.speculative import bandits
from decodathlon.decoders.speculative.controllers import Controller, Seconds
from decodathlon.decoders.speculative.outlook import Outlook
from decodathlon.harness.commands.command import say
from decodathlon.harness.progress import told
from decodathlon.harness.results.table import aligned

PLACE = Path(__file__).parents[1] / "docs" / "findings"
TABLE, FIGURE = PLACE / "bandit-regret.csv", PLACE / "bandit-regret.svg"
LONGEST = 8
#: Shape of the law of probabilities: many tokens are nearly certain, some are open.
BETA = (1.6, 0.5)
#: Tokens among which the rest is shared evenly.
OTHERS = 20
DRAFT, VERIFY, PER_TOKEN = 0.45, 1.0, 0.02
#: How a bandit may be told to learn.
WAYS: dict[str, tuple[bandits.Policy, bandits.Level]] = {
    "ucb1": ("ucb1", "sequence"),
    "ucb1-tuned": ("ucb1-tuned", "sequence"),
    "thompson": ("thompson", "sequence"),
    "ucb1 by token": ("ucb1", "token"),
}


def cycles(controller: Controller, reward: bandits.Reward, count: int, seed: int) -> list[float]:
    """The reward of each of so many cycles."""
    source, rewarding = random.Random(seed), bandits.Rewarding(reward, LONGEST)
    rewarding.of(LONGEST, LONGEST, Seconds(LONGEST * DRAFT, VERIFY + LONGEST * PER_TOKEN, 0.0))  # the most there is
    found = []
    for _ in range(count):
        width, drafted, accepted, going = controller.width(), 0, 0, True
        while drafted < width:
            top = source.betavariate(*BETA)
            drafted += 1
            going = going and source.random() < top
            accepted += going
            rest = (1 - top) / OTHERS
            law = torch.tensor([[top, *[rest] * OTHERS]], dtype=torch.float64).clamp(min=1e-9).log()
            if controller.stops(Outlook(law, drafted - 1), 0):
                break
        took = Seconds(drafted * DRAFT, VERIFY + drafted * PER_TOKEN, 0.0)
        controller.settle(drafted, accepted, took)
        found.append(rewarding.of(drafted, accepted, took))
    return found


def arms(reward: bandits.Reward, count: int) -> dict[str, float]:
    """The mean reward of each rule alone, once it has settled."""
    names = [type(arm).__name__.lower() for arm in bandits.arms(LONGEST, laws=True)]
    names = [name if names.index(name) == i else f"{name} (2)" for i, name in enumerate(names)]
    rules = bandits.arms(LONGEST, laws=True)
    return {n: statistics.fmean(cycles(r, reward, count, 0)[count // 10 :]) for n, r in zip(names, rules, strict=True)}


def regret(way: str, reward: bandits.Reward, best: float, count: int, runs: int, marks: Sequence[int]) -> list[float]:
    """Mean regret over the runs after so many cycles each."""
    policy, level = WAYS[way]
    lost = [0.0] * len(marks)
    for seed in range(runs):
        bandit = bandits.TapOut(LONGEST, policy=policy, level=level, reward=reward, seed=seed)
        total, found = 0.0, cycles(bandit, reward, count, seed + 1)
        for i, gained in enumerate(found):
            total += best - gained
            if i + 1 in marks:
                lost[marks.index(i + 1)] += total / runs
    return lost


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cycles", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=8)
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    marks = [m for m in (50, 100, 200, 500, 1000, 2000, 4000, 8000) if m <= options.cycles]
    rows = []
    rewards: tuple[bandits.Reward, ...] = ("blend", "tokens-per-second")
    todo = [(reward, way) for reward in rewards for way in WAYS]
    means: dict[str, dict[str, float]] = {}
    for reward, way in told(todo, "bandits", say):
        if reward not in means:
            means[reward] = arms(reward, 20 * options.cycles)
            say(f"{reward}: " + ", ".join(f"{name} {mean:.4f}" for name, mean in means[reward].items()))
        best = max(means[reward].values())
        middle = best - statistics.fmean(means[reward].values())
        for mark, lost in zip(marks, regret(way, reward, best, options.cycles, options.runs, marks), strict=True):
            rows.append(
                {"reward": reward, "way": way, "cycles": mark, "regret": round(lost, 3),
                 "per cycle, share of best": round(lost / mark / best, 5), "without learning": round(middle * mark, 3)}
            )  # fmt: skip
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    say("\n".join(aligned([list(rows[0]), *([str(v) for v in row.values()] for row in rows)])))
    draw(rows)


def draw(rows: list[dict[str, object]]) -> None:
    import altair as alt

    colours = ["#0072b2", "#e69f00", "#009e73", "#cc79a7"]
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_line(point=True)
        .encode(
            x=alt.X("cycles:Q", scale=alt.Scale(type="log", base=10)),
            y=alt.Y("regret:Q", title="reward gained less than by the best rule"),
            color=alt.Color("way:N", sort=None, title=None, scale=alt.Scale(range=colours)),
            column=alt.Column("reward:N", sort=None),
        )
        .properties(width=260, height=180)
    )
    chart.save(str(FIGURE))


if __name__ == "__main__":
    main()
