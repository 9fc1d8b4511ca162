"""AIME 2025 (30 problems, integers from 0 to 999) and MATH-500 (Hendrycks et al. 2021; Lightman et al. 2023)."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from math import comb, gcd, lcm

from decodathlon.harness.datasets import questions
from decodathlon.harness.datasets.base import Split
from decodathlon.harness.datasets.questions import Question

#: Of the rows joined by line feeds; see questions.py for their form.
AIME_SHA256: Mapping[Split, str] = {"test": "ca97ddc7c13a5c566329c42b00075e4fdba50ab7c6e0c9d80e6c784343f8ee5f"}
MATH_SHA256: Mapping[Split, str] = {
    "test": "5e40f71052f3b28b234abf2bfd74a9a2226591a33d8d5e8639dc5cbd793ef4d4",
    "validation": "28f7e193c3cc0d0b60f54fd03841e92771d15012f7282a9e922fab80475fdf4e",
}


def _linear(rng: random.Random) -> tuple[str, str]:
    a, x, b = rng.randint(2, 12), rng.randint(0, 60), rng.randint(1, 99)
    return f"Find $x$ such that ${a}x + {b} = {a * x + b}$.", str(x)


def _divisors(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(12, 400), rng.randint(12, 400)
    return f"What is the greatest common divisor of ${a}$ and ${b}$?", str(gcd(a, b))


def _multiple(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(4, 30), rng.randint(4, 30)
    return f"What is the least common multiple of ${a}$ and ${b}$?", str(lcm(a, b))


def _choice(rng: random.Random) -> tuple[str, str]:
    n, k = rng.randint(4, 12), rng.randint(2, 3)
    return f"In how many ways can ${k}$ of ${n}$ books be chosen, if their order does not matter?", str(comb(n, k))


def _remainder(rng: random.Random) -> tuple[str, str]:
    a, n, m = rng.randint(2, 9), rng.randint(3, 40), rng.randint(5, 40)
    return f"What is the remainder when ${a}^{{{n}}}$ is divided by ${m}$?", str(pow(a, n, m))


def _series(rng: random.Random) -> tuple[str, str]:
    first, step, n = rng.randint(1, 9), rng.randint(1, 5), rng.randint(4, 12)
    total = n * (2 * first + (n - 1) * step) // 2
    begin = f"${first}, {first + step}, {first + 2 * step}, \\ldots$"
    return f"What is the sum of the first ${n}$ terms of {begin}?", str(total)


def _fraction(rng: random.Random) -> tuple[str, str]:
    a, b, c, d = rng.randint(1, 9), rng.randint(2, 9), rng.randint(1, 9), rng.randint(2, 9)
    total = Fraction(a, b) + Fraction(c, d)
    answer = str(total.numerator) if total.denominator == 1 else f"\\frac{{{total.numerator}}}{{{total.denominator}}}"
    return f"Compute $\\frac{{{a}}}{{{b}}} + \\frac{{{c}}}{{{d}}}$ in lowest terms.", answer


def _factors(rng: random.Random) -> tuple[str, str]:
    p, q = rng.randint(1, 9), rng.randint(1, 9)
    return f"Factor $x^2 + {p + q}x + {p * q}$.", f"(x+{p})(x+{q})"


_INTEGERS = (_linear, _divisors, _multiple, _choice, _remainder, _series)


def generated(kinds: Sequence[Callable[[random.Random], tuple[str, str]]], count: int, seed: int) -> list[Question]:
    """So many different problems of our own, each kind in turn, with exact answers."""
    rng, found = random.Random(seed), dict[str, Question]()
    while len(found) < count:
        kind = kinds[len(found) % len(kinds)]
        problem, answer = kind(rng)
        subject = kind.__name__.strip("_")
        found.setdefault(problem, {"problem": problem, "answer": answer, "subject": subject, "level": 1})
    return [{"id": f"own-{i}", **question} for i, question in enumerate(found.values())]


questions.register(
    "aime25",
    file="aime_2025.jsonl",
    fields={"problem": str, "answer": str},
    hub_table=("math-ai/aime25", None, "test"),
    of_hub=lambda row: {"problem": row["problem"], "answer": str(row["answer"])},
    stand_in=partial(generated, _INTEGERS, 30, 25),
    held_out=0,
    sha256=AIME_SHA256,
    source=__file__,
)
questions.register(
    "math-500",
    file="math-500.test.jsonl",
    fields={"problem": str, "answer": str, "subject": str, "level": int},
    hub_table=("HuggingFaceH4/MATH-500", None, "test"),
    of_hub=lambda row: {key: row[key] for key in ("problem", "answer", "subject", "level")},
    stand_in=partial(generated, (*_INTEGERS, _fraction, _factors), 80, 500),
    held_out=50,
    sha256=MATH_SHA256,
    source=__file__,
)
