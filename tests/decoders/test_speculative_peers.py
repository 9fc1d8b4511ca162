"""Transformers' assisted generation, and drafters that are models of their own: on a tiny model in a folder."""

import pytest
import tiny_models

from decodathlon.harness import decoder as decoders
from decodathlon.harness import models
from decodathlon.harness.decoder import Limits
from decodathlon.harness.errors import DecodathlonError, SpecError
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.targets import toy

load_builtins()
PROMPTS = [[3, 4, 5, 3, 4], [7, 8], [9, 1, 2, 3, 4, 5, 6]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.save_folder(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="module")
def target(folder):
    return models.load(models.resolve(str(folder)), device="cpu", dtype="float32", say=lambda text: None)


@pytest.mark.parametrize("ignore_eos", [True, False])
@pytest.mark.parametrize(
    "spec", ["hf-prompt-lookup", "hf-assisted", "hf-assisted[model=FOLDER]", "draft-model[model=FOLDER]"]
)
def test_their_text_is_that_of_greedy_search(target, folder, spec, ignore_eos):
    limits = Limits(24, ignore_eos=ignore_eos)
    ours = decoders.build(spec.replace("FOLDER", str(folder))).generate(target, PROMPTS, limits, RowRandom(0, range(3)))
    greedy = decoders.build("greedy").generate(target, PROMPTS, limits, RowRandom(0, range(3)))
    assert [a.tokens for a in ours] == [a.tokens for a in greedy]
    assert [a.stop_reason for a in ours] == [a.stop_reason for a in greedy]
    if "FOLDER" in spec and ignore_eos:  # everything that such a drafter drafts stays
        assert all(a.cost.target_calls < len(a.tokens) for a in ours)
        assert all(a.cost.draft_calls >= a.cost.target_calls for a in ours)
    if spec == "hf-prompt-lookup":
        assert all(a.cost.target_calls <= len(a.tokens) and a.cost.draft_calls == 0 for a in ours)


def test_a_drafter_of_other_tokens_is_refused_by_both_names(folder):
    other = toy.enumerable_lm(8)
    with pytest.raises(
        SpecError, match=r"has [0-9]+ tokens and enumerable-lm-8 has 8; a drafter needs the same tokenizer"
    ):
        decoders.build(f"draft-model[model={folder}]").check(other)
    with pytest.raises(SpecError, match="a drafter needs the same tokenizer"):
        decoders.build(f"hf-assisted[model={folder}]").check(other)


def test_a_drafter_that_is_not_there_is_named(target):
    with pytest.raises(DecodathlonError, match="/no/such/model"):
        decoders.build("draft-model[model=/no/such/model]").check(target)


def test_a_drafter_with_more_layers_than_the_target_has_is_refused(target):
    with pytest.raises(SpecError, match="layers, and a drafter has fewer"):
        decoders.build("early-exit[layers=64]").check(target)


def test_what_the_assistant_is_told_is_in_force(target, folder):
    """The assistant has the target's weights, so everything stays, and calls fall with the tokens it may draft."""

    def cost(spec):
        (answer,) = decoders.build(spec).generate(target, [[1, 5, 9]], Limits(24, ignore_eos=True), RowRandom(0, [0]))
        return answer.cost.target_calls

    calls = [cost(f"hf-assisted[model={folder},tokens={n},threshold=0]") for n in (1, 3, 8)]
    assert calls[0] > calls[1] > calls[2]
    assert cost(f"hf-assisted[model={folder},tokens=8,threshold=1]") > calls[2]
