"""The toy of QUEST's appendix: under a reward for length, who has the exact law of the reward?

    python scripts/length_reward.py                                # a tiny transformer whose law is enumerated
    python scripts/length_reward.py --model smollm2-135m-instruct  # a real model, where nobody knows the exact law

Four ways to answer with the law p(y) exp(r(y) / beta): ancestral draws (no reward), truncated Gibbs (N ancestral draws,
one of them taken by its weight), QAlign after 2 N steps, several tries after as many suffixes. And on the tiny
transformer the same for the law exp(r(y) / beta) of QUEST. Writes docs/findings/length-reward-MODEL.csv and .svg.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from decodathlon import Answer, Limits, RowRandom
from decodathlon.harness import decoder as decoders
from decodathlon.harness import models, rewards
from decodathlon.harness.measure import draws
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.targets import toy

PLACE = Path(__file__).parents[1] / "docs" / "findings"
PROMPT = "The weather report for tomorrow, in one sentence:"
Lengths = list[int]


class Toy:
    """How answers are drawn, of which lengths, and how many."""

    def __init__(self, target: Any, prompt: list[int], room: int, answers: int, budget: int, goal: int, beta: float):
        self.target, self.prompt, self.room, self.answers, self.budget = target, prompt, room, answers, budget
        self.reward, self.beta = rewards.build(f"length:{goal}"), beta

    def ancestral(self) -> Lengths:
        return self._lengths("temperature", self.answers)

    def _lengths(self, spec: str, count: int, key: str = "") -> Lengths:
        return [len(a.tokens) for a in self._drawn(spec, count, key)]

    def _drawn(self, spec: str, count: int, key: str) -> list[Any]:
        rng = RowRandom(0, [f"{spec}-{key}-{i}" for i in range(count)])
        return decoders.build(spec).generate(self.target, [self.prompt] * count, Limits(self.room), rng)

    def truncated(self, law: str) -> Lengths:
        """One of `budget` ancestral draws, by exp(r / beta), or for QUEST's law by that over p."""
        found = []
        drawn = self._drawn("temperature", self.answers * self.budget, "pool")
        for i in range(self.answers):
            pool = drawn[i * self.budget : (i + 1) * self.budget]
            weights = self.reward([Answer(self.prompt, a.tokens, a.log_prob, self.target) for a in pool]) / self.beta
            if law == "reward":
                weights = weights - torch.tensor([a.log_prob for a in pool], dtype=torch.float64)
            u = RowRandom(1, [i]).uniforms(1)[0]
            chosen = int(torch.searchsorted(weights.softmax(0).cumsum(0), u).clamp(max=len(pool) - 1))
            found.append(len(pool[chosen].tokens))
        return found

    def chain(self, name: str, steps: int, **params: Any) -> Lengths:
        more = "".join(f",{key}={value}" for key, value in params.items())
        return self._lengths(f"{name}[reward={self.reward.spec},beta={self.beta},steps={steps}{more}]", self.answers)

    def exact(self, spec: str) -> dict[int, float]:
        """The law of the lengths of a sharpened decoder, enumerated."""
        law = draws.claimed_law(decoders.build(spec), self.target, self.room)
        found: Counter[int] = Counter()
        for text, p in law.items():
            found[len(text)] += p
        return dict(found)


def shares(lengths: Lengths) -> dict[int, float]:
    return {n: c / len(lengths) for n, c in Counter(lengths).items()}


def distance(a: dict[int, float], b: dict[int, float]) -> float:
    return 0.5 * sum(abs(a.get(n, 0.0) - b.get(n, 0.0)) for n in a.keys() | b.keys())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="toy", help="toy, or any model that decodathlon loads")
    name = parser.parse_args().model
    load_builtins()
    if name == "toy":
        target = toy.enumerable_lm()
        toy_of = Toy(target, [target.start_token], room=6, answers=4000, budget=16, goal=5, beta=0.5)
    else:
        target = models.load(models.resolve(name), device="cpu", dtype="float32", say=sys.stderr.write)
        toy_of = Toy(target, target.encode(PROMPT), room=32, answers=40, budget=8, goal=10, beta=2.0)
    chain_spec = f"reward={toy_of.reward.spec},beta={toy_of.beta}"
    laws: dict[str, dict[str, Callable[[], Lengths]]] = {
        "p exp(r/beta)": {
            "truncated Gibbs": lambda: toy_of.truncated("aligned"),
            "QAlign": lambda: toy_of.chain("qalign", 2 * toy_of.budget),
            "QAlign, 4 spread tries": lambda: toy_of.chain("mt-quest", toy_of.budget // 2, tries=4),
        },
    }
    if name == "toy":
        laws["exp(r/beta)"] = {
            "truncated Gibbs": lambda: toy_of.truncated("reward"),
            "QUEST": lambda: toy_of.chain("quest", 2 * toy_of.budget),
            "QUEST, 4 spread tries": lambda: toy_of.chain("mt-quest", toy_of.budget // 2, tries=4, law="reward"),
        }
    rows: list[dict[str, Any]] = []
    for law, ways in laws.items():
        exact = toy_of.exact(f"{'qalign' if law.startswith('p') else 'quest'}[{chain_spec}]") if name == "toy" else None
        found = {"exact": exact} if exact else {}
        for way, work in {"ancestral": toy_of.ancestral, **ways}.items():
            began = time.monotonic()
            found[way] = shares(work())
            away = f"TVD of its lengths from the exact law {distance(found[way], exact):.3f}, " if exact else ""
            mean = sum(n * share for n, share in found[way].items())
            sys.stdout.write(f"{law}: {way}: mean length {mean:.2f}, {away}{time.monotonic() - began:.0f} s\n")
        rows += [
            {"law": law, "way": way, "length": n, "share": round(histogram.get(n, 0.0), 5)}
            for way, histogram in found.items()
            for n in range(1, toy_of.room + 1)
        ]
    table = PLACE / f"length-reward-{name}.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, table.with_suffix(".svg"))


def draw(rows: list[dict[str, Any]], figure: Path) -> None:
    """A histogram per way, a row per law."""
    import altair as alt

    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_bar(color="#0072b2")
        .encode(
            x=alt.X("length:O", title="tokens", axis=alt.Axis(values=[1, *range(4, 60, 4)], labelAngle=0)),
            y=alt.Y("share:Q"),
            column=alt.Column("way:N", sort=None, title=None),
            row=alt.Row("law:N", sort=None, title=None),
        )
        .properties(width=150, height=110)
    )
    chart.save(str(figure))


if __name__ == "__main__":
    main()
