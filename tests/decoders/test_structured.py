"""Smaller copies of the target: removal equals masking with a bias, shares are kept, texts stay the target's."""

import pytest
import torch

from decodathlon.decoders.speculative import structured
from decodathlon.decoders.speculative.layers import size, written
from decodathlon.harness import decoder as decoders
from decodathlon.harness.decoder import Limits
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.targets import toy

load_builtins()


@pytest.fixture(scope="module")
def target():
    return toy.enumerable_lm(8)


@pytest.fixture(scope="module")
def seen(target):
    return structured.observed(target, written(target)[0])


def logits_of(target, forward, tokens):
    return target.open([tokens[:1]], capacity=len(tokens), forward=forward).extend(torch.tensor([tokens[1:]])).logits


def test_without_anything_left_out_it_is_the_target(target):
    same = structured.smaller(target, "flap", 0.0)
    tokens = [0, 2, 3, 4, 5]
    expected = target.open([tokens[:1]], capacity=5).extend(torch.tensor([tokens[1:]])).logits
    torch.testing.assert_close(logits_of(target, same, tokens), expected)


def test_removal_is_masking_with_the_mean_in_the_place(target, seen):
    """The outputs of the smaller matrices are those of the whole ones whose inputs stand at their mean."""
    layer, (heads, channels) = target.lean.layers[0], seen[0]
    made = structured._without(target.lean, layer, heads, channels, {1}, {0, 5, 7})
    x = torch.randn(3, channels.mean.shape[0], dtype=torch.float64)
    masked = x.clone()
    masked[:, [0, 5, 7]] = channels.mean[[0, 5, 7]].double()
    stay = [j for j in range(x.shape[1]) if j not in (0, 5, 7)]
    torch.testing.assert_close(made.mlp.down(x[:, stay]), layer.mlp.down(masked), atol=1e-6, rtol=1e-5)
    width = target.lean.heads // target.lean.key_heads * target.lean.width
    y = torch.randn(3, heads.mean.shape[0], dtype=torch.float64)
    masked = y.clone()
    masked[:, width:] = heads.mean[width:].double()
    torch.testing.assert_close(made.attention.out(y[:, :width]), layer.attention.out(masked), atol=1e-6, rtol=1e-5)
    assert (made.attention.heads, made.attention.key_heads) == (2, 1)


def test_slopes_are_those_of_finite_differences(target, seen):
    texts, _ = written(target)

    def log_prob(layer, channel, gate):
        lean = target.lean
        down = lean.layers[layer].mlp.down
        weight = down.weight.clone()
        weight[:, channel] *= gate
        from dataclasses import replace

        changed = list(lean.layers)
        changed[layer] = replace(changed[layer], mlp=replace(changed[layer].mlp, down=type(down)(weight)))
        context = target.open([row[:1].tolist() for row in texts], capacity=texts.shape[1])
        logits = context.lent(lean.replaced(changed)).extend(texts[:, 1:]).logits[:, :-1]
        return float(logits.log_softmax(-1).gather(2, texts[:, 2:, None]).sum())

    for layer, channel in ((0, 3), (1, 0), (1, 9)):
        slope = (log_prob(layer, channel, 1.02) - log_prob(layer, channel, 0.98)) / 0.04
        assert float(seen[layer][1].slope[channel]) == pytest.approx(
            abs(slope), rel=5e-3, abs=1e-3
        )  # norms are in 32 bits


@pytest.mark.parametrize("method", ["flap", "gradient"])
def test_about_the_share_is_gone_and_every_layer_keeps_something(target, method):
    head = target.lean.head.weight.numel()
    whole = size(target.lean) - head
    for share in (0.2, 0.5, 0.9):
        less = structured.smaller(target, method, share)
        gone = 1 - (size(less) - head) / whole
        assert share - 0.15 < gone <= share + 1e-9
        assert all(la.attention.key_heads >= 1 and la.mlp.down.weight.shape[1] >= 1 for la in less.layers)


@pytest.mark.parametrize("spec", ["structured-self", "structured-self[method=gradient,share=0.6,k=4,controller=svip]"])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_the_text_stays_that_of_the_target(target, spec, temperature):
    prompts, limits = [[0, 2, 3], [0, 4, 5, 6, 7], [0]], Limits(20)
    more = f"temperature={temperature},proposal=guess"
    ours = decoders.build(f"{spec[:-1]},{more}]" if spec.endswith("]") else f"{spec}[{more}]")
    theirs = decoders.build("greedy" if temperature == 0 else "temperature[temperature=0.8]")
    a, b = (d.generate(target, prompts, limits, RowRandom(0, range(3))) for d in (ours, theirs))
    assert [x.tokens for x in a] == [x.tokens for x in b]
