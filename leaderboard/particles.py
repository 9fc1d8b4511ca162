"""The course of a particle method, as an answer keeps it, as rows that a chart can draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: How an entry says how far it is, the first that it has.
_PLACES = {"step": "step", "length": "tokens", "level": "stage"}


def axis(course: Sequence[Mapping[str, Any]]) -> str:
    """What the entries count."""
    return next((word for key, word in _PLACES.items() if key in course[0]), "entry")


def _place(entry: Mapping[str, Any], number: int) -> int:
    return int(entry.get("step") or entry.get("length") or number + 1)


def _copied(entry: Mapping[str, Any]) -> bool:
    """Whether particles were drawn anew there."""
    return bool(entry.get("resampled", entry.get("parents")))


def levels(course: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per entry and quantity: the share of effective particles, and the level where there is one."""
    names = {"ess": "effective particles, over N", "level": "level"}
    return [
        {"at": _place(entry, i), "line": words, "value": float(entry[key]), "copied": _copied(entry)}
        for i, entry in enumerate(course)
        for key, words in names.items()
        if key in entry
    ]


def genealogy(course: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per particle and entry at which it was copied or went on: from where (x, y) to where (x2, y2).

    `kept` says whether it is an ancestor of a particle of the last generation. Where particles are drawn from a pool of
    all stages, a parent's number is stage * N + place.
    """
    steps = [entry for entry in course if "weights" not in entry]
    N = max((len(entry["parents"]) for entry in steps if entry.get("parents")), default=0)
    if not N:
        return []
    pooled = any(max(entry["parents"]) >= N for entry in steps if entry.get("parents"))
    pooled = pooled or all("pool" in entry for entry in steps)
    edges: list[tuple[int, int, int, int]] = []
    for t, entry in enumerate(steps):
        parents = entry.get("parents") or range(N)
        edges += [(k // N if pooled else t, k % N, t + 1, i) for i, k in enumerate(parents)]
    alive = {(len(steps), i) for i in range(N)}
    for x, y, x2, y2 in reversed(edges):
        if (x2, y2) in alive:
            alive.add((x, y))
    return [
        {"x": x, "y": y + 1, "x2": x2, "y2": y2 + 1, "kept": "yes" if (x2, y2) in alive else "no"}
        for x, y, x2, y2 in edges
    ]


def weights(course: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per answer of the final pool: its weight and score; which one was given."""
    last = course[-1]
    scores = last.get("scores") or [None] * len(last.get("weights", ()))
    return [
        {"answer": i + 1, "weight": float(w), "score": s, "given": "yes" if i == last.get("chosen") else "no"}
        for i, (w, s) in enumerate(zip(last.get("weights", ()), scores, strict=True))
    ]


def in_words(course: Sequence[Mapping[str, Any]]) -> str:
    """What the charts show."""
    first, last = course[0], course[-1]
    copied = sum(map(_copied, course))
    said = [f"{len(course)} entries, particles copied at {copied} of them"]
    if "level" in first:
        said.append(f"level from {float(first['level']):.3g} to {float(last.get('level', first['level'])):.3g}")
    said.append(f"effective particles over N: {float(first['ess']):.3g} at first, {float(last['ess']):.3g} at the end")
    if isinstance(last.get("log_z"), float):
        said.append(f"log of the estimated constant {last['log_z']:.4g}")
    lines = genealogy(course)
    if lines:
        begun = {row["y"] for row in lines if row["x"] == 0 and row["kept"] == "yes"}
        said.append(f"{len(begun)} of the first particles have descendants at the end")
    if last.get("weights"):
        said.append(f"greatest weight {max(last['weights']):.2g} of {len(last['weights'])} answers")
    return "; ".join(said) + "."
