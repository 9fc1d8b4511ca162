"""The law of whole texts of a toy target, and how far what a decoder draws is from it."""

from __future__ import annotations

import math

import pytest

from decodathlon.harness.decoder import Limits
from decodathlon.harness.randomness import RowRandom


def chi_square(target, decoder, prompt, tokens, rows, runs):
    """Of all texts of so many tokens, `rows` drawn side by side in each of `runs`; and over how many cells it is
    summed. Fails if hardly anything is drafted and stays."""
    law = {(): 0.0}
    for _ in range(tokens):
        law = {
            (*text, t): p + q
            for text, p in law.items()
            for t, q in enumerate(
                decoder.shape(target.open([[*prompt, *text]], capacity=len(prompt) + len(text)).next_logits)[0].tolist()
            )
            if q > -50
        }
    counts, accepted = dict.fromkeys(law, 0), 0
    for seed in range(runs):
        limits = Limits(tokens, ignore_eos=True, trace=True)
        for answer in decoder.generate(target, [prompt] * rows, limits, RowRandom(seed, range(rows))):
            counts[tuple(answer.tokens)] += 1
            accepted += sum(c["accepted"] for c in answer.trace)
    expected = {text: rows * runs * math.exp(p) for text, p in law.items()}
    cells = [(counts[t], e) for t, e in expected.items() if e >= 5]
    cells.append((rows * runs - sum(n for n, _ in cells), rows * runs - sum(e for _, e in cells)))
    assert accepted > rows * runs / 4  # that something is drafted and stays
    return sum((n - e) ** 2 / e for n, e in cells if e > 0.5), len(cells)


def assert_same(ours, theirs):
    """Two lists of answers that should be one."""
    assert [a.tokens for a in ours] == [a.tokens for a in theirs]
    assert [a.stop_reason for a in ours] == [a.stop_reason for a in theirs]
    assert [a.log_prob for a in ours] == pytest.approx([a.log_prob for a in theirs], abs=1e-9)


def with_parameter(spec, parameter):
    return f"{spec[:-1]},{parameter}]" if spec.endswith("]") else f"{spec}[{parameter}]"
