"""The processed law agrees with transformers' own processors, sums to one, and is drawn from exactly."""

import math

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from decodathlon import draw, process
from decodathlon.harness import law


def logits(rows=7, vocabulary=1000, seed=0):
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"top_k": 20}, [TopKLogitsWarper(20)]),
        ({"top_p": 0.9}, [TopPLogitsWarper(0.9)]),
        ({"top_p": 0.9999}, [TopPLogitsWarper(0.9999)]),
        ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        (
            {"temperature": 1.3, "top_k": 50, "top_p": 0.8},
            [TemperatureLogitsWarper(1.3), TopKLogitsWarper(50), TopPLogitsWarper(0.8)],
        ),
        (
            {"temperature": 0.8, "top_p": 0.9, "min_p": 0.05},
            [TemperatureLogitsWarper(0.8), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)],
        ),
    ],
)
def test_process_equals_the_processors_of_transformers(ours, theirs):
    x = logits()
    expected = LogitsProcessorList(theirs)(None, x.clone()).log_softmax(-1)
    assert torch.allclose(process(x, **ours).exp(), expected.exp(), atol=1e-12)


def test_every_law_sums_to_one_also_for_one_token_and_for_ties():
    for x in (logits(), logits(vocabulary=1), torch.zeros(3, 10)):
        for options in ({}, {"top_k": 3}, {"top_p": 0.5}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-3}):
            assert torch.allclose(process(x, **options).exp().sum(-1), torch.ones(len(x), dtype=x.dtype))


def test_the_guessed_nucleus_equals_the_sorted_one(monkeypatch):
    x = logits(vocabulary=5000)
    quick = process(x, top_p=0.6)
    monkeypatch.setattr(law, "_NUCLEUS_GUESS", 5000)
    assert torch.equal(quick, process(x, top_p=0.6))


def test_one_hot_takes_the_first_of_the_greatest():
    assert law.one_hot(torch.tensor([[1.0, 5.0, 5.0]])).exp().tolist() == [[0.0, 1.0, 0.0]]


def test_draw_inverts_the_cumulative_law_exactly():
    p = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]], dtype=torch.float64)
    below_one = math.nextafter(1.0, 0.0)
    for u, token in [(0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (below_one, 4)]:
        assert draw(p.log(), torch.tensor([u], dtype=torch.float64)).item() == token


def test_draw_never_returns_a_cut_token():
    x = process(logits(rows=1, vocabulary=50_000).float(), top_k=3)
    u = torch.tensor([0.0, math.nextafter(1.0, 0.0), 0.5], dtype=torch.float64)
    tokens = draw(x.expand(3, -1), u)
    assert bool((x[0, tokens] > float("-inf")).all())
