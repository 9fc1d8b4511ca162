"""Perplexity per word and byte against lm-eval itself: its detokeniser, its windows, its own Hugging Face model."""

import math
import re

import pytest
import tiny_models
import torch

from decodathlon.harness import datasets
from decodathlon.harness import decoder as decoders
from decodathlon.harness.datasets.base import Text
from decodathlon.harness.measure import pages
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.targets.transformers import TransformersTarget

load_builtins()

#: In the manner of the corpus: its spaces, its separators, its headings.
CORPUS = """ 
 = A Page About Decoders = 
 
 The first decoder 's score was 3 @.@ 5 ( about 1 @,@ 200 points ) , and the authors ' own model won " by a hair " .
 It was a well @-@ known result ; nobody asked : why ? It is 20 ° warm ! 
 
 = = Its History = = 
 
 In [ 1998 ] there were { many } of them . N words later it ended 'so to say ' .
 
 = Another Page = 
 
 Short , but real .
 = = = Deep = = = 
 The end . 
"""  # noqa: W291, W293


def corpus():
    lines = CORPUS.removesuffix("\n").split("\n")
    rows = tuple(line + "\n" if line.strip() else "" for line in lines)
    return Text("corpus", "r", "test", "folder", rows, "\n\n")


def test_pages_begin_at_titles_and_keep_their_sections():
    found = pages.pages(corpus())
    assert [p.raw.split("\n")[0] for p in found] == [" = A Page About Decoders = ", " = Another Page = "]
    assert "Its History" in found[0].raw
    assert pages.pages(corpus(), 1) == found[:1]


def test_wikitext_2_has_62_pages(data_folder):
    text = datasets.find("wikitext-2-raw-v1", "test", str(data_folder))
    assert len(pages.pages(text)) == 62


def test_detokenising_is_that_of_lm_eval():
    theirs = pytest.importorskip("lm_eval.tasks.wikitext.preprocess_wikitext").wikitext_detokenizer
    for page in pages.pages(corpus()):
        assert page.text == theirs({"page": page.raw})
    assert "3.5 (about 1,200 points), and the authors' own" in pages.pages(corpus())[0].text


def test_detokenising_the_whole_corpus_is_that_of_lm_eval(data_folder):
    theirs = pytest.importorskip("lm_eval.tasks.wikitext.preprocess_wikitext").wikitext_detokenizer
    for split in ("test", "validation"):
        for page in pages.pages(datasets.find("wikitext-2-raw-v1", split, str(data_folder))):
            assert page.text == theirs({"page": page.raw})


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 17, 40])
def test_windows_are_those_of_lm_eval(length):
    utils = pytest.importorskip("lm_eval.utils")
    tokens = list(range(100, 100 + length))
    theirs = [
        utils.make_disjoint_window(w)
        for w in utils.get_rolling_token_windows(tokens, prefix_token=1, max_seq_len=8, context_len=1)
    ]
    everything = [1, *tokens]
    ours = [(everything[b:c], everything[c:e]) for b, e, c in pages.windows(length, 8)]
    assert ours == [(list(c), list(t)) for c, t in theirs]


class Characters:
    """A tokenizer of few words, as lm-eval and we both call it."""

    bos_token_id, eos_token_id, chat_template, vocab_size = 1, 2, None, tiny_models.VOCABULARY
    is_fast, padding_side, pad_token_id, unk_token_id = False, "right", 0, 0

    def __call__(self, text, add_special_tokens=True, **options):
        ids = [3 + ord(c) % (tiny_models.VOCABULARY - 3) for c in text]
        return {"input_ids": ([1] if add_special_tokens else []) + ids}

    def encode(self, text, add_special_tokens=True, **options):
        return self(text, add_special_tokens)["input_ids"]

    def decode(self, tokens, **options):
        return ""


def lm_eval_of(model, tokenizer, max_length, found):
    """lm-eval's own numbers for the pages, by its own model class and its own task's arithmetic."""
    lm_eval = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    theirs = lm_eval.HFLM.__new__(lm_eval.HFLM)
    lm_eval.TemplateLM.__init__(theirs)
    theirs._model, theirs.tokenizer, theirs._device = model, tokenizer, torch.device("cpu")
    theirs._max_length, theirs.backend, theirs.add_bos_token = max_length, "causal", False
    theirs._rank, theirs._world_size, theirs.batch_size_per_gpu = 0, 1, 1
    theirs.custom_prefix_token_id, theirs.logits_cache, theirs.batch_schedule = None, False, 1
    theirs.softmax_dtype, theirs.mixed_precision_dtype, theirs.revision = None, None, "main"
    theirs.tok_encode = lambda text, **options: tokenizer(text, add_special_tokens=False)["input_ids"]
    requests = [Instance("loglikelihood_rolling", {}, (p.text,), i) for i, p in enumerate(found)]
    with torch.no_grad():
        scores = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    words = sum(len(re.split(r"\s+", p.raw)) for p in found)
    size = sum(len(p.raw.encode()) for p in found)
    return math.exp(-sum(scores) / words), math.exp(-sum(scores) / size)


def test_both_numbers_are_those_of_lm_evals_own_model():
    """Four pages, most of them longer than the model reads: to six digits."""
    model, tokenizer = tiny_models.build("llama").double(), Characters()
    width = 32
    found = [*pages.pages(corpus()), *pages.pages(corpus())]
    assert len(found) == 4
    theirs = lm_eval_of(model, tokenizer, width, found)
    target = TransformersTarget(tiny_models.build("llama").double(), tokenizer, name="tiny")
    target.context_length = width
    ours = pages.metrics(decoders.build("temperature"), target, found)
    assert ours["ppl_word"].estimate().value == pytest.approx(theirs[0], rel=1e-6)
    assert ours["ppl_byte"].estimate().value == pytest.approx(theirs[1], rel=1e-6)
    assert pages.metrics(decoders.build("greedy"), target, found)["ppl_word"].estimate().value == math.inf


def test_a_real_model_on_real_pages_agrees_with_lm_eval_to_four_digits(data_folder, stories):
    text = datasets.find("wikitext-2-raw-v1", "test", str(data_folder))
    found = sorted(pages.pages(text), key=lambda p: p.size)[:4]
    target = stories()
    ours = pages.metrics(decoders.build("temperature"), target, found)
    with target.native() as model:
        theirs = lm_eval_of(model, _Encoder(target), target.context_length, found)
    assert ours["ppl_word"].estimate().value == pytest.approx(theirs[0], rel=1e-4)
    assert ours["ppl_byte"].estimate().value == pytest.approx(theirs[1], rel=1e-4)


class _Encoder(Characters):
    """A target's tokenizer in the shape that lm-eval wants."""

    def __init__(self, target):
        self._target, self.bos_token_id = target, target.start_token

    def __call__(self, text, add_special_tokens=True, **options):
        return {"input_ids": self._target.encode(text, special=False)}


def test_stand_in_text_has_pages_too():
    assert pages.pages(datasets.find("wikitext-2-raw-v1", "test", None), 2)[1].words > 100
