"""Against a law worked out by hand, and: the temperature moves the probabilities, not the cut."""

import torch
from decodathlon_top_n_sigma import TopNSigma

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0]], dtype=torch.float64)  # standard deviation sqrt(2)


def test_it_keeps_what_lies_within_n_standard_deviations():
    p = TopNSigma(n=1.0).shape(LOGITS).exp()
    e = torch.tensor(1.0, dtype=torch.float64).exp()
    assert torch.allclose(p, torch.tensor([[e / (1 + e), 1 / (1 + e), 0, 0, 0]], dtype=torch.float64))


def test_the_temperature_does_not_move_the_cut():
    for temperature in (0.1, 1.0, 10.0):
        law = TopNSigma(n=1.5, temperature=temperature).shape(LOGITS)
        assert law.isfinite().tolist() == [[True, True, True, False, False]]
        assert torch.allclose(law.exp().sum(-1), torch.ones(1, dtype=torch.float64))


def test_rows_do_not_mix():
    both = TopNSigma().shape(torch.cat([LOGITS, 5 * LOGITS.flip(-1)]))
    assert torch.equal(both[:1], TopNSigma().shape(LOGITS))
