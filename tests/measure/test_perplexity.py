"""Perplexities against closed forms, on a model small enough to compute them by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import tiny_models
import torch

from decodathlon import Sampler
from decodathlon.harness import decoder as decoders
from decodathlon.harness.errors import UnsupportedError
from decodathlon.harness.law import one_hot
from decodathlon.harness.measure import perplexity, speed
from decodathlon.harness.measure.perplexity import Scores
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.targets.transformers import TransformersTarget

load_builtins()


def estimates(test, validation):
    found = perplexity.metrics(test, validation)
    return {name: f if isinstance(f, tuple) else f.estimate() for name, f in found.items()}


@pytest.fixture(scope="module")
def target():
    return TransformersTarget(tiny_models.build("llama"), name="tiny")


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, tiny_models.VOCABULARY, (61,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.mark.parametrize(("length", "context"), [(61, 16), (61, 200), (5, 4), (2, 16), (33, 32), (34, 32)])
def test_every_token_but_the_first_counts_once_with_at_least_half_a_window_before_it(length, context):
    counted = []
    for begin, end, first in perplexity.windows(length, context):
        assert end - begin <= context
        assert begin == 0 or first - begin >= context // 2
        counted += range(first, end)
    assert counted == list(range(1, length))


def test_scores_equal_the_plain_forward_window_by_window(target, tokens):
    scores = perplexity.score(decoders.build("temperature"), target, tokens, context=16)
    reference = tiny_models.build("llama")
    expected = []
    for begin, end, first in perplexity.windows(len(tokens), 16):
        with torch.no_grad():
            law = reference(torch.tensor([tokens[begin:end]]), use_cache=False).logits[0].log_softmax(-1)
        expected += [float(law[i - begin - 1, tokens[i]]) for i in range(first, end)]
    assert np.allclose(scores.decoder, expected, atol=1e-5)
    assert np.allclose(scores.model, expected, atol=1e-5)
    assert len(scores.cluster) == len(tokens) - 1


def scores_of(target, tokens, spec, context=16):
    return perplexity.score(decoders.build(spec), target, tokens, context)


def test_a_truncating_sampler_has_infinite_perplexity_and_finite_mixtures(target, tokens):
    test = scores_of(target, tokens, "top-k[k=5]")
    found = estimates(test, test)
    assert found["ppl"].value == math.inf
    assert found["ppl"].low is None
    kept = np.isfinite(test.decoder)
    assert found["coverage"].value == pytest.approx(kept.mean())
    assert 0 < kept.mean() < 1
    assert found["ppl_conditional"].value == pytest.approx(math.exp(-test.decoder[kept].mean()))
    assert found["ppl_conditional"].n == kept.sum()
    assert math.isfinite(found["ppl_epsilon"].value)
    # tuned on the very text, the mixture can only be as good as the model or better
    assert found["ppl_mixture"].value <= found["ppl_model"].value * (1 + 1e-12)


def test_a_law_that_covers_nothing_has_no_conditional_perplexity():
    nothing = Scores(np.full(40, -np.inf), np.full(40, -2.0), np.ones(40), np.arange(40) // 5, 50)
    found = estimates(nothing, nothing)
    assert "ppl_conditional" not in found
    assert (found["coverage"].value, found["ppl_mixture"].value) == (0, pytest.approx(math.exp(2)))


def test_a_sampler_equal_to_the_model_mixes_to_the_model(target, tokens):
    test = scores_of(target, tokens, "temperature")
    for weight in (0.0, 0.3, 1.0):
        assert np.allclose(perplexity.mixture_nats(test, weight, uniform=False), -test.model, atol=1e-5)
    found = estimates(test, test)
    assert found["ppl"].value == pytest.approx(found["ppl_model"].value)
    assert found["coverage"].value == 1


def test_the_uniform_end_of_the_mixture_is_the_vocabulary_size(target, tokens):
    nats = perplexity.mixture_nats(scores_of(target, tokens, "greedy"), 1.0, uniform=True)
    assert math.exp(nats.mean()) == pytest.approx(tiny_models.VOCABULARY)


def test_epsilon_perplexity_is_that_of_martins_et_al(target, tokens):
    """Their form: exp(-mean log((p + eps) / (1 + eps V))), with eps = weight / (V (1 - weight))."""
    test, weight, V = scores_of(target, tokens, "top-k[k=5]"), 0.2, tiny_models.VOCABULARY
    eps = weight / (V * (1 - weight))
    theirs = -np.log((np.exp(test.decoder) + eps) / (1 + eps * V))
    assert np.allclose(perplexity.mixture_nats(test, weight, uniform=True), theirs)


def test_sparsemax_score_is_one_minus_half_the_brier_score(target, tokens):
    test = scores_of(target, tokens, "top-p[p=0.7]")
    found = estimates(test, test)["sparsemax_score"]
    brier = test.concentration - 2 * np.exp(test.decoder) + 1
    assert found.value == pytest.approx((1 - brier / 2).mean())


def test_a_better_truncation_earns_weight():
    """A law that halves the mass on wrong tokens and never cuts the real one: the least model weight wins."""
    n = 200
    scores = Scores(np.full(n, math.log(0.8)), np.full(n, math.log(0.4)), np.full(n, 0.7), np.arange(n) // 20, 50)
    found = estimates(scores, scores)
    assert found["mixture_weight"].value == 1e-3
    assert found["ppl_mixture"].value == pytest.approx(1 / (0.999 * 0.8 + 0.001 * 0.4))


def test_mixtures_stay_finite_when_only_the_test_text_loses_a_token():
    calm = Scores(np.full(60, -1.0), np.full(60, -1.5), np.full(60, 0.5), np.arange(60) // 6, 50)
    hit = Scores(np.where(np.arange(60) == 7, -np.inf, -1.0), calm.model, calm.concentration, calm.cluster, 50)
    found = estimates(hit, calm)
    assert found["ppl"].value == math.inf
    assert math.isfinite(found["ppl_mixture"].value)
    assert math.isfinite(found["ppl_epsilon"].value)


def test_only_decoders_with_a_stated_law_are_scored(target, tokens):
    with pytest.raises(UnsupportedError, match="hf-generate draws no token from a law"):
        perplexity.score(decoders.build("hf-generate"), target, tokens, 16)


class Bare(Sampler):
    """A sampler outside the registry."""

    claim = "shaped"
    spec = "bare"


@pytest.mark.parametrize(
    ("law", "message"),
    [
        (lambda logits: logits * float("nan"), "bare: its law has NaN"),
        (lambda logits: logits, "bare: its law sums to .*, not 1; end with log_softmax"),
        (lambda logits: logits.log_softmax(-1) + 0.18, "bare: its law sums to 1.197, not 1"),
        (lambda logits: logits.log_softmax(-1)[:, :-1], r"bare: shape got logits \(.*61\) and returned \(.*60\)"),
        (lambda logits: torch.full_like(logits, -math.inf), "bare: its law sums to 0, not 1"),
    ],
)
def test_what_is_no_law_is_an_error_not_a_number(target, tokens, law, message):
    bare = type("Bare", (Bare,), {"shape": lambda self, logits: law(logits)})()
    with pytest.raises(ValueError, match=message):
        perplexity.score(bare, target, tokens, 16)
    with pytest.raises(ValueError, match=message):
        list(speed.measure(bare, {}, target, [[tokens[:5]]], tokens=2, seed=0))


def test_nan_logits_are_an_error_that_names_the_model(tokens):
    model = tiny_models.build("llama")
    broken = TransformersTarget(model, name="broken")
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    for name in ("greedy", "top-p", "hf-generate", "beam"):
        with pytest.raises(ValueError, match="the model's own logits have NaN; its weights are broken"):
            list(speed.measure(decoders.build(name), {}, broken, [[tokens[:5]]], tokens=2, seed=0))
    for name in ("greedy", "temperature", "mirostat"):
        with pytest.raises(ValueError, match="the model's own logits have NaN"):
            perplexity.score(decoders.build(name), broken, tokens, 16)


def test_a_law_that_is_not_the_one_drawn_from_is_not_scored(target, tokens):
    def shape(self, logits):
        return logits.log_softmax(-1)

    for changed in ({"start": lambda self, rows: []}, {"choose": lambda self, x, s, u: (x, s)}):
        sampler = type("Bare", (Bare,), {"shape": shape, **changed})()
        with pytest.raises(UnsupportedError, match="bare chooses tokens by other means than its law"):
            perplexity.score(sampler, target, tokens, 16)


class EverySecondIsGreedy(Bare):
    """Its law depends on how many tokens came before."""

    def start(self, rows):
        return torch.zeros(rows)

    def next_law(self, logits, state, u):
        return (one_hot(logits) if int(state[0]) % 2 else logits.log_softmax(-1)), state

    def advance(self, state, tokens):
        return state + 1


class Coins(Bare):
    """At temperature 2 or 1/2, by a coin per token, or by one coin for a whole text."""

    uniforms = 1
    for_all = False

    def start(self, rows):
        return torch.full((rows, 1), -1.0)

    def next_law(self, logits, state, u):
        state = torch.where(state < 0, u.to(state), state) if self.for_all else u.to(state)
        law = torch.where(state < 0.5, (logits * 2).log_softmax(-1), (logits / 2).log_softmax(-1))
        return law.log_softmax(-1), state


class OneCoin(Coins):
    for_all = True


def test_a_state_follows_the_real_text_over_windows(target, tokens):
    found = perplexity.score(EverySecondIsGreedy(), target, tokens, 16)
    model, greedy = (scores_of(target, tokens, name) for name in ("temperature", "greedy"))
    even = np.arange(len(tokens) - 1) % 2 == 0
    assert np.allclose(found.decoder[even], model.decoder[even], atol=1e-6)
    assert np.array_equal(found.decoder[~even], greedy.decoder[~even])
    assert np.allclose(found.concentration[even], model.concentration[even], atol=1e-6)


def test_a_random_law_is_the_mean_over_what_it_may_be(target, tokens):
    """A coin per token: the mean of two laws, token by token, with the error of 64 copies."""
    found = perplexity.score(Coins(), target, tokens, 16)
    laws = [np.exp(scores_of(target, tokens, f"temperature[temperature={t}]").decoder) for t in (0.5, 2.0)]
    mean = (laws[0] + laws[1]) / 2
    assert np.abs(np.exp(found.decoder) - mean).max() < 5 * np.abs(laws[0] - laws[1]).max() / 2 / math.sqrt(64)
    assert np.abs(np.exp(found.decoder) - mean).mean() > 0, "it is an estimate"
    # each of the two filters is one of half the copies, and together they are the whole
    assert np.allclose(np.exp(found.filters).mean(0), np.exp(found.decoder))


def test_what_a_state_has_shown_of_itself_counts(target, tokens):
    """One coin for the whole text: its law is the mean of two laws of whole texts, not of tokens."""
    tokens = tokens[:24]
    found = perplexity.score(OneCoin(), target, tokens, 64)
    laws = [scores_of(target, tokens, f"temperature[temperature={t}]", 64).decoder for t in (0.5, 2.0)]
    whole = np.logaddexp(np.cumsum(laws[0]), np.cumsum(laws[1])) - math.log(2)
    predicted = np.diff(whole, prepend=0.0)
    # the text soon shows which coin it was, and then the prediction is that law's; before, 64 copies of a coin
    assert np.abs(found.decoder - predicted)[:3].max() < 1.0
    sure = np.abs(np.cumsum(laws[0]) - np.cumsum(laws[1])) > 12
    assert sure.any()
    assert np.allclose(found.decoder[sure][1:], predicted[sure][1:], atol=1e-3)


def test_more_copies_come_nearer_to_the_mean_law(target, tokens):
    """The error falls as one over the root of their number: from 8 to 128 copies by 4, and by 2 to 8 with noise."""
    from decodathlon.harness.measure.copies import CopiesJudge

    logits = target.logits(torch.tensor([tokens[:-1]]), torch.arange(len(tokens) - 1))[0]
    real = torch.tensor(tokens[1:])
    law = (((logits * 2).log_softmax(-1).exp() + (logits / 2).log_softmax(-1).exp()) / 2).gather(1, real[:, None])[:, 0]
    errors = []
    for copies in (4, 64):
        found = [np.exp(CopiesJudge(Coins(), seed, copies)(logits, real)[0]) - law.numpy() for seed in range(5)]
        errors.append(math.sqrt(np.square(found).mean()))
    assert 2 < errors[0] / errors[1] < 8


def _scored(target, tokens, copies):
    from decodathlon.harness.measure.copies import CopiesJudge

    logits = target.logits(torch.tensor([tokens[:-1]]), torch.arange(len(tokens) - 1))[0]
    real = torch.tensor(tokens[1:])
    both, each, concentration = CopiesJudge(Coins(), 0, copies)(logits, real)
    model = logits.log_softmax(-1).gather(-1, real[:, None])[:, 0].double().numpy()
    return Scores(both, model, concentration, np.arange(len(real)) // 8, logits.shape[-1], each)


def test_of_a_random_law_nothing_is_said_that_copies_cannot_show(target, tokens):
    scores = perplexity.score(Coins(), target, tokens, 16)
    found = perplexity.metrics(scores, scores)
    assert not {"ppl", "coverage", "ppl_conditional"} & set(found)
    assert 0 < found["copies_error"].value < 0.1
    half = [perplexity.mixture_nats(replace(scores, decoder=f), 0.3, uniform=True).mean() for f in scores.filters]
    assert half[0] != half[1]
    # one filter's logs are too low on average, and by about twice as much as those of both
    few, many = (perplexity.metrics(s, s)["copies_bias"].value for s in (
        _scored(target, tokens, 2), _scored(target, tokens, 64)))  # fmt: skip
    assert few > 4 * abs(many)
    with pytest.raises(UnsupportedError, match="the law of bare is itself random"):
        perplexity.judge_of(Coins())


def test_a_law_that_looks_at_its_neighbours_is_an_error(target, tokens):
    """Row i + 1 was computed after the real token i was read: a law that looks there knows the answer."""
    for peek in (
        lambda logits: logits.roll(-1, 0).log_softmax(-1),
        lambda logits: (logits - logits.max()).softmax(0).log(),
    ):
        bare = type("Bare", (Bare,), {"shape": lambda self, logits, peek=peek: peek(logits).log_softmax(-1)})()
        with pytest.raises(ValueError, match="the law of a row depends on the other rows"):
            perplexity.score(bare, target, tokens, 16)


def test_a_law_written_into_its_argument_leaves_the_models_score_alone(target, tokens):
    def in_place(self, logits):
        logits[logits < logits.topk(5).values[:, -1:]] = -math.inf
        return logits.log_softmax(-1)

    bare = type("Bare", (Bare,), {"shape": in_place})()
    mine, plain = perplexity.score(bare, target, tokens, 16), scores_of(target, tokens, "top-k[k=5]")
    assert np.array_equal(mine.model, plain.model)
    assert np.allclose(mine.decoder, plain.decoder, atol=1e-6)
    top_k = decoders.build("top-k[k=5]")
    in_place_too = type("InPlace", (type(top_k),), {"shape": in_place})(k=5)
    answers = [speed.generate(d, target, [tokens[:5]], 4, 0)[0] for d in (in_place_too, top_k)]
    assert answers[0].tokens == answers[1].tokens
    assert answers[0].log_prob == pytest.approx(answers[1].log_prob)


def test_a_decoder_that_adds_nothing_has_mixture_weight_one(target, tokens):
    test = scores_of(target, tokens, "temperature")
    assert np.array_equal(test.decoder, test.model)
    assert estimates(test, test)["mixture_weight"].value == 1.0


SAMPLERS = ["reservoir", "reservoir[reuse=cross,every=2]", "reservoir[reuse=none]", "reservoir-ris", "reservoir-mis",
            "reservoir-imh", "reservoir-imh[moves=1]", "reservoir-imh[begin=target]", "reservoir-ris[source=uniform]",
            "reservoir-mis[source=uniform]", "reservoir-imh[source=uniform]"]  # fmt: skip


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_of_candidates_is_scored(target, tokens, name):
    """Whatever state it keeps; what draws from the law itself, by many candidates, is near the model."""
    found = scores_of(target, tokens[:24], name)
    assert np.all(np.exp(found.decoder) <= 1 + 1e-9)
    if "begin=target" in name:
        model = scores_of(target, tokens[:24], "temperature")
        # 64 copies of laws on a few of 60 tokens, each for itself an honest one
        assert abs(found.decoder[np.isfinite(found.decoder)].mean() - model.decoder.mean()) < 1.0
