"""Beam search against transformers and against exhaustive search; contrastive search against a plain reading."""

import math

import pytest
import tiny_models
import torch

from decodathlon.harness import decoder as decoders
from decodathlon.harness.decoder import Limits
from decodathlon.harness.errors import UnsupportedError
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.targets.toy import Ising, enumerable_lm, law_of
from decodathlon.harness.targets.transformers import TransformersTarget

load_builtins()


@pytest.fixture(scope="module")
def target():
    made = TransformersTarget(tiny_models.build("llama").double(), name="tiny")
    made.stop_tokens = frozenset({7})
    return made


def prompts_of(count, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(8, tiny_models.VOCABULARY, (4 + i % 3,), generator=rng).tolist() for i in range(count)]


def answers(spec, target, prompts, limits):
    return decoders.build(spec).generate(target, prompts, limits, RowRandom(0, range(len(prompts))))


@pytest.mark.parametrize(("width", "penalty"), [(2, 1), (4, 1), (4, 0), (3, 2), (5, -1)])
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_beam_search_is_that_of_transformers(target, width, penalty, ignore_eos):
    from transformers import GenerationConfig

    prompts, T = prompts_of(8), 12
    found = answers(f"beam[width={width},length_penalty={penalty}]", target, prompts, Limits(T, ignore_eos))
    alone = answers(f"beam[width={width},length_penalty={penalty}]", target, prompts[1:2], Limits(T, ignore_eos))
    assert alone[0].tokens == found[1].tokens
    stopped = 0
    for prompt, ours in zip(prompts, found, strict=True):
        with target.native() as model, torch.no_grad():
            out = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                generation_config=GenerationConfig(
                    max_new_tokens=T, num_beams=width, length_penalty=float(penalty), do_sample=False, pad_token_id=0,
                    eos_token_id=None if ignore_eos else 7, early_stopping=False,
                ),
            )  # fmt: skip
        theirs = out[0, len(prompt) :].tolist()
        while theirs and theirs[-1] == 0 and len(theirs) > len(ours.tokens):
            theirs.pop()
        assert ours.tokens == theirs
        assert ours.log_prob == pytest.approx(float(target.log_prob([[*prompt, *ours.tokens]], given=len(prompt))))
        stopped += ours.stop_reason == "stop"
    assert ignore_eos == (stopped == 0)


def test_a_wide_beam_finds_the_likeliest_text():
    """As wide as there are beginnings, beam search is exhaustive: the mode of the enumerated law."""
    for seed in range(4):
        lm = enumerable_lm(4, seed)
        law = law_of(lm, [0], 3)
        (found,) = answers("beam[width=64,length_penalty=0]", lm, [[0]], Limits(3))
        best = max(law, key=law.__getitem__)
        assert tuple(found.tokens) == best
        assert found.log_prob == pytest.approx(math.log(law[best]))


def test_a_beam_of_one_is_greedy(target):
    prompts = prompts_of(6, seed=1)
    beam, greedy = (answers(s, target, prompts, Limits(9)) for s in ("beam[width=1]", "greedy"))
    assert [a.tokens for a in beam] == [a.tokens for a in greedy]


def plain_contrastive(model, prompt, k, alpha, T):
    """The whole text through the model for every candidate: Su et al. 2022, equation 5."""
    tokens = list(prompt)
    for _ in range(T):
        out = model(torch.tensor([tokens]), use_cache=False, output_hidden_states=True)
        p, candidates = out.logits[0, -1].softmax(-1).topk(k)
        scores = []
        for probability, v in zip(p, candidates, strict=True):
            h = model(torch.tensor([[*tokens, int(v)]]), use_cache=False, output_hidden_states=True).hidden_states[-1][
                0
            ]
            similarity = torch.cosine_similarity(h[-1:], h[:-1], dim=-1).max()
            scores.append((1 - alpha) * probability - alpha * similarity)
        tokens.append(int(candidates[int(torch.stack(scores).argmax())]))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(("k", "alpha"), [(4, 0.6), (6, 0.2), (3, 1.0)])
def test_contrastive_search_is_that_of_the_paper(target, k, alpha):
    model = tiny_models.build("llama").double()
    prompts = prompts_of(3, seed=2)
    found = answers(f"contrastive[k={k},alpha={alpha}]", target, prompts, Limits(8, ignore_eos=True))
    with torch.no_grad():
        assert [a.tokens for a in found] == [plain_contrastive(model, p, k, alpha, 8) for p in prompts]
    greedy = answers("greedy", target, prompts, Limits(8, ignore_eos=True))
    assert [a.tokens for a in found] != [a.tokens for a in greedy]


def test_without_a_penalty_contrastive_search_is_greedy(target):
    prompts = prompts_of(4, seed=3)
    ours, greedy = (answers(s, target, prompts, Limits(9)) for s in ("contrastive[alpha=0]", "greedy"))
    assert [(a.tokens, a.stop_reason) for a in ours] == [(a.tokens, a.stop_reason) for a in greedy]


def test_contrastive_search_names_what_it_needs():
    with pytest.raises(UnsupportedError, match="needs hidden"):
        answers("contrastive", Ising(4, 0.4), [[]], Limits(4))
