"""What votes say: win rates and Bradley-Terry ratings with intervals over prompts, and how far annotators agree.

Bradley and Terry 1952; Hunter 2004 for the iteration. A tie, or that both are bad, is half a win for each. Two votes on
one prompt are no independent evidence, so prompts are drawn anew, not votes. Agreement is Fleiss' kappa (1971) for any
number of annotators per pair.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from decodathlon.harness.arena.pairs import Arena, Vote
from decodathlon.harness.measure.statistics import FEWEST_FOR_INTERVAL, Estimate, clustered_share

#: Prompts are drawn anew so many times for an interval.
RESAMPLES = 1000
#: Half wins that every pair of decoders is given, so that who won all has a finite rating.
PRIOR = 0.5
_POINTS = {"first": 1.0, "second": 0.0, "tie": 0.5, "bad": 0.5}


class Game(NamedTuple):
    """One vote as points of `a` against `b`."""

    prompt: str
    a: str
    b: str
    points: float


def games(arenas: Sequence[Arena]) -> list[Game]:
    """All votes of some sets."""
    found = []
    for arena in arenas:
        prompts = {p.id: p.prompt for p in arena.pairs}
        a, b = arena.decoders
        found += [Game(prompts[v.pair], a, b, _POINTS[v.choice]) for v in arena.votes()]
    return found


def win_rate(played: Sequence[Game]) -> Estimate:
    """Mean points of `a`, with an interval over prompts; without one below six of them."""
    if not played:
        return Estimate(math.nan, n=0)
    by_prompt = _by_prompt(played)
    points = np.array([sum(g.points for g in some) for some in by_prompt])
    counts = np.array([len(some) for some in by_prompt])
    if len(by_prompt) < FEWEST_FOR_INTERVAL:
        return Estimate(float(points.sum() / counts.sum()), n=len(played))
    return clustered_share(list(points), list(counts))._replace(n=len(played))


def ratings(played: Sequence[Game]) -> dict[str, Estimate]:
    """Bradley-Terry strength of every decoder in units of Elo (400 for ten to one), their mean 0."""
    names = sorted({name for g in played for name in (g.a, g.b)})
    if len(names) < 2:
        return {}
    by_prompt = _by_prompt(played)
    place = {name: i for i, name in enumerate(names)}
    tables = np.zeros((len(by_prompt), len(names), len(names)))
    for row, some in enumerate(by_prompt):
        for g in some:
            tables[row, place[g.a], place[g.b]] += g.points
            tables[row, place[g.b], place[g.a]] += 1 - g.points
    met = tables.sum(0) + tables.sum(0).T > 0
    value = _strengths(tables.sum(0), met)
    rng = np.random.default_rng(0)
    drawn = np.array(
        [_strengths(tables[rng.integers(len(tables), size=len(tables))].sum(0), met) for _ in range(RESAMPLES // 4)]
    )
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    # where every prompt says the same, so does every resample, and few prompts spread too little
    known = len(by_prompt) >= FEWEST_FOR_INTERVAL and float(np.ptp(drawn, axis=0).max()) > 0
    games_of = Counter(name for g in played for name in (g.a, g.b))
    return {
        name: Estimate(float(value[i]), min(float(low[i]), float(value[i])), max(float(high[i]), float(value[i])),
                       games_of[name]) if known else Estimate(float(value[i]), n=games_of[name])
        for name, i in place.items()
    }  # fmt: skip


def _strengths(wins: np.ndarray, met: np.ndarray) -> np.ndarray:
    """Of a table of wins (K, K), by Hunter's iteration; those that met have `PRIOR` wins each way besides."""
    wins = wins + PRIOR * met
    total, strength = wins + wins.T, np.ones(len(wins))
    for _ in range(10_000):
        shares = total / (strength[:, None] + strength)
        np.fill_diagonal(shares, 0.0)
        new = wins.sum(1) / np.maximum(shares.sum(1), 1e-12)
        new /= np.exp(np.log(np.maximum(new, 1e-12)).mean())
        done = float(np.abs(new - strength).max()) < 1e-9
        strength = new
        if done:
            break
    elo: np.ndarray = 400 * np.log10(strength)
    return elo


def kappa(votes: Sequence[Vote]) -> Estimate | None:
    """Fleiss' kappa over the pairs that several annotators judged; None where there are none, or all always agree by
    saying the same everywhere."""
    by_pair: dict[str, list[str]] = {}
    for vote in votes:
        by_pair.setdefault(vote.pair, []).append(vote.choice)
    shared = [choices for choices in by_pair.values() if len(choices) > 1]
    if not shared:
        return None
    agreed = [_agreement(Counter(choices)) for choices in shared]
    everything = Counter(choice for choices in shared for choice in choices)
    total = sum(everything.values())
    by_chance = sum((n / total) ** 2 for n in everything.values())
    if by_chance == 1:
        return None
    value = (sum(agreed) / len(agreed) - by_chance) / (1 - by_chance)
    return Estimate(value, n=len(shared))


def _agreement(counts: Mapping[str, int]) -> float:
    """Share of the pairs of annotators that said the same."""
    n = sum(counts.values())
    return sum(c * (c - 1) for c in counts.values()) / (n * (n - 1))


def _by_prompt(played: Sequence[Game]) -> list[list[Game]]:
    found: dict[str, list[Game]] = {}
    for game in played:
        found.setdefault(game.prompt, []).append(game)
    return list(found.values())
