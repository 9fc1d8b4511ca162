"""Training a drafter: the loss sees what decoding will see and falls; a training goes on where it was left."""

import math

import pytest
import torch

from decodathlon.decoders.dflash import checkpoint, drafter
from decodathlon.decoders.dflash.network import Memory, Network
from decodathlon.decoders.dflash.training import NOTHING, Recipe, Trainer, _before, _behind, begin_as, guesses, tau
from decodathlon.decoders.training import corpus, features
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
def states(target, tmp_path_factory):
    folder = tmp_path_factory.mktemp("states")
    prompts = [[0, *divmod(i, 8)] for i in range(48)]
    found = decoders.build("greedy").generate(
        target, prompts, Limits(20, ignore_eos=True), RowRandom(0, range(len(prompts)))
    )
    texts = [corpus.Written(p, a.tokens) for p, a in zip(prompts, found, strict=True)]
    features.make(target, drafter.seen_by(fresh(target)), [texts[:24], texts[24:]], folder, lambda text: None)
    return folder


def fresh(target, block=4, seed=0):
    torch.manual_seed(seed)
    return Network(checkpoint.shape_for(target, layers=1, fused=1, block=block))


def trainer(target, states, recipe, network=None, held_out=()):
    return Trainer(
        network or fresh(target), target.model.get_input_embeddings().weight.float(),
        target.model.get_output_embeddings().weight.float(), states, [0, 1], held_out, recipe,
    )  # fmt: skip


def test_the_loss_sees_what_decoding_will_see(target, states):
    """Outputs behind many anchors of several texts at once, against a memory that has read up to each anchor."""
    network, embedding = fresh(target).double(), target.model.get_input_embeddings().weight
    texts = features.load(states, 0)[:3]
    texts[1] = features.Seen(texts[1].tokens[:9], texts[1].states[:9], texts[1].last[:9], texts[1].begin)
    anchors = [torch.tensor([3, 7]), torch.tensor([4]), torch.tensor([11, 3, 20])]
    with torch.no_grad():
        together = guesses(network, embedding, texts, anchors, 4)
        place = 0
        for text, at in zip(texts, anchors, strict=True):
            for anchor in at.tolist():
                memory = Memory(network, 1, 64)
                memory.append(text.states[None, :anchor].double(), [anchor])
                block = torch.cat([text.tokens[anchor][None], torch.full((3,), network.config.mask_token_id)])
                alone = memory.draft(torch.nn.functional.embedding(block, embedding)[None])[0, 1:]
                assert torch.allclose(together[place], alone, atol=1e-9)
                place += 1


def test_states_are_those_that_the_target_has_behind_each_token(target, states):
    text = features.load(states, 1)[5]
    number = drafter.seen_by(fresh(target))[0]
    context = target.open([text.tokens[:4].tolist()], capacity=32)
    step = context.extend(text.tokens[None, 4:7], hidden=[number])
    assert torch.allclose(step.hidden[number][0].float(), text.states[4:7].float(), rtol=1e-2)
    assert text.begin == 3


def test_targets_are_the_tokens_behind_an_anchor():
    text = features.Seen(torch.tensor([5, 6, 7, 8]), torch.zeros(4, 1), torch.zeros(4, 1), 1)
    assert _behind(text, torch.tensor([0, 2, 3]), 4).tolist() == [[6, 7, 8], [8, NOTHING, NOTHING], [NOTHING] * 3]


def test_weights_fall_with_the_place():
    assert Recipe().weights(16).tolist() == pytest.approx([math.exp(-k / 7) for k in range(15)])
    assert Recipe().weights(8)[3].item() == pytest.approx(math.exp(-3 / 4))
    assert Recipe(gamma=2.0).weights(8)[2].item() == pytest.approx(math.exp(-1))


def test_the_target_s_law_is_that_of_the_tokens_that_are_guessed(target, states):
    """The states before the places behind an anchor, through the output matrix, have the greedy tokens on top."""
    head = target.model.get_output_embeddings().weight.float()
    right = total = 0
    for text in features.load(states, 0):
        anchors = torch.arange(text.begin, len(text.tokens) - 1)
        laws = torch.nn.functional.linear(_before(text.last, anchors, 4).float(), head)
        tokens = _behind(text, anchors, 4)
        right += int((laws.argmax(-1) == tokens)[tokens != NOTHING].sum())
        total += int((tokens != NOTHING).sum())
    assert right > 0.97 * total  # kept in bfloat16, near ties may turn


@pytest.mark.parametrize(("soft", "short"), [(0.0, 0), (0.25, 0), (1.0, 0), (0.5, 1)])
def test_the_loss_by_hand(target, states, soft, short):
    one = trainer(target, states, Recipe(anchors=3, soft=soft, short=short))
    block = 2 if short else 4
    texts = features.load(states, 0)[:2]
    with torch.no_grad():
        found = one.loss(texts, torch.Generator().manual_seed(5))
        generator, parts, weights = torch.Generator().manual_seed(5), [], []
        if short:
            torch.rand(1, generator=generator)
        at = [t.begin + torch.randint(len(t.tokens) - 1 - t.begin, (3,), generator=generator) for t in texts]
        outputs = guesses(one.network, one.embedding, texts, at, block)
        for text, anchor, output in zip(
            [t for t in texts for _ in range(3)], [a for some in at for a in some.tolist()], outputs, strict=True
        ):
            for place in range(1, block):
                if anchor + place < len(text.tokens):
                    mine = (output[place - 1] @ one.head.T).log_softmax(-1)
                    law = (text.last[anchor + place - 1].float() @ one.head.T).softmax(-1)
                    hard, mixed = -mine[text.tokens[anchor + place]], -(law * mine).sum()
                    weights.append(math.exp(-(place - 1) / (4 * 7 / 16)))
                    parts.append(weights[-1] * float((1 - soft) * hard + soft * mixed))
    assert float(found) == pytest.approx(sum(parts) / sum(weights), rel=1e-4)


def test_training_teaches_what_the_texts_say(target, states, tmp_path):
    held_out = features.load(states, 1)[:8]
    told = []
    one = trainer(target, states, Recipe(steps=150, rate=3e-3), held_out=held_out)
    before = tau(one.network, one.embedding, one.head, held_out)
    assert one.run(tmp_path / "state.pt", told.append)
    after = tau(one.network, one.embedding, one.head, held_out)
    assert after > before + 0.3, (before, after)
    assert one.history[-1]["tau"] == pytest.approx(after)
    assert "tokens per cycle" in told[-1]


def test_tau_is_what_decoding_measures(target, states, tmp_path):
    """Of texts that are greedy themselves; cycles at the end of a text, where a block has no room, are not counted."""
    one = trainer(target, states, Recipe(steps=80, rate=3e-3))
    one.run(tmp_path / "state.pt", lambda text: None)
    checkpoint.save(one.network, tmp_path / "saved")
    texts = features.load(states, 1)[:6]
    network = checkpoint.read(tmp_path / "saved", one.network.config).double()
    prompts = [t.tokens[: t.begin].tolist() for t in texts]
    spec = f"dflash[checkpoint={tmp_path / 'saved'}]"
    found = decoders.build(spec).generate(
        target, prompts, Limits(20, ignore_eos=True, trace=True), RowRandom(0, range(6))
    )
    made = cycles = 0
    for text, answer in zip(texts, found, strict=True):
        assert answer.tokens == text.tokens[text.begin :].tolist()
        at = text.begin
        for cycle in answer.trace:
            if at > len(text.tokens) - 4:
                break
            made, cycles, at = made + cycle["accepted"] + 1, cycles + 1, at + cycle["accepted"] + 1
    ours = tau(network, target.model.get_input_embeddings().weight, target.model.get_output_embeddings().weight, texts)
    assert ours == pytest.approx(made / cycles, rel=0.1)  # in training hidden states are kept in bfloat16


def test_a_training_that_was_left_goes_on_as_it_would_have(target, states, tmp_path):
    recipe = Recipe(steps=24, rate=1e-3, classes=4)
    whole = trainer(target, states, recipe)
    whole.run(tmp_path / "whole.pt", lambda text: None)
    first = trainer(target, states, recipe)
    first.run(tmp_path / "parts.pt", lambda text: None, until=0)
    assert first.step == 0
    for _ in range(18):  # beyond the first choice of shards
        first._one()
    first.save(tmp_path / "parts.pt")
    second = trainer(target, states, recipe, network=fresh(target, seed=9))
    assert second.run(tmp_path / "parts.pt", lambda text: None)
    for name, tensor in whole.network.state_dict().items():
        assert torch.allclose(second.network.state_dict()[name], tensor, atol=1e-6), name


def test_a_training_of_another_recipe_is_not_taken_up(target, states, tmp_path):
    one = trainer(target, states, Recipe(steps=2))
    one.run(tmp_path / "state.pt", lambda text: None)
    with pytest.raises(ValueError, match=r"with rate=0\.0006, not 0\.1"):
        trainer(target, states, Recipe(steps=2, rate=0.1)).load(tmp_path / "state.pt")
    with pytest.raises(ValueError, match="with block_size=4, not 6"):
        trainer(target, states, Recipe(steps=2), network=fresh(target, block=6)).load(tmp_path / "state.pt")


def test_some_classes_give_the_loss_of_all_where_they_are_all(target, states):
    texts = features.load(states, 0)[:8]

    def loss(classes):
        one = trainer(target, states, Recipe(classes=classes, anchors=64))
        if classes:
            one.frequent = one._most_frequent()
        return float(one.loss(texts, torch.Generator().manual_seed(0)).detach())

    assert loss(8) == pytest.approx(loss(0), rel=1e-5)
    assert loss(1) <= loss(0) + 1e-6, "fewer classes to confuse"


def test_states_of_other_texts_are_made_anew(target, tmp_path):
    ids = drafter.seen_by(fresh(target))
    one, other = corpus.Written([0, 1], [2, 3, 4]), corpus.Written([0, 2], [3, 3])
    features.make(target, ids, [[one], [other]], tmp_path, lambda text: None)
    before = features.path(tmp_path, 1).stat().st_mtime_ns
    features.make(target, ids, [[other], [other]], tmp_path, lambda text: None)
    assert features.load(tmp_path, 0)[0].tokens.tolist() == [0, 2, 3, 3]
    assert features.path(tmp_path, 1).stat().st_mtime_ns == before
    features.make(target, ids, [[], [other]], tmp_path, lambda text: None)
    assert features.load(tmp_path, 0) == []
    assert not features.make(target, ids, [[one], [other]], tmp_path, lambda text: None, until=0)


def test_a_drafter_begins_as_the_last_blocks_of_its_target(target):
    network = fresh(target)
    begin_as(network, target)
    last = target.model.model.layers[-1]
    assert torch.equal(network.layers[0].mlp.up_proj.weight, last.mlp.up_proj.weight.float())
    assert torch.equal(network.layers[0].self_attn.v_proj.weight, last.self_attn.v_proj.weight.float())
    assert torch.equal(network.norm.weight, target.model.model.norm.weight.float())


def test_every_text_comes_once_before_any_comes_twice(target, states):
    one = trainer(target, states, Recipe(texts=8))
    seen = []
    for one.step in range(12):  # 48 texts, six steps
        seen += [tuple(t.tokens.tolist()) for t in one._some()]
    assert len(set(seen[:48])) == len(set(seen[48:])) == 48
    assert seen[:48] != seen[48:]


def test_a_training_on_other_texts_is_not_taken_up(target, states, tmp_path):
    def on(texts):
        return Trainer(
            fresh(target), target.model.get_input_embeddings().weight.float(),
            target.model.get_output_embeddings().weight.float(), states, [0, 1], [], Recipe(steps=2), texts,
        )  # fmt: skip

    on("a").run(tmp_path / "state.pt", lambda text: None)
    on("a").load(tmp_path / "state.pt")
    with pytest.raises(ValueError, match="on other texts"):
        on("b").load(tmp_path / "state.pt")


def spoil(one, monkeypatch):
    """Have the third step leave parameters that are no numbers."""
    step = one.optimizer.step

    def spoilt(closure=None):
        step()
        if one.step == 2:
            with torch.no_grad():
                one.network.norm.weight.fill_(float("nan"))

    monkeypatch.setattr(one.optimizer, "step", spoilt)


def test_what_is_no_number_is_not_kept(target, states, tmp_path, monkeypatch):
    """Nor are parameters that a step of this run has spoilt."""
    one = trainer(target, states, Recipe(steps=9))
    spoil(one, monkeypatch)
    with pytest.raises(ValueError, match="the loss of step 3 is nan"):
        one.run(tmp_path / "state.pt", lambda text: None)
    assert not (tmp_path / "state.pt").exists()


@pytest.mark.parametrize("steps", [3, 9])
def test_a_state_is_not_replaced_by_parameters_that_are_no_numbers(target, states, tmp_path, monkeypatch, steps):
    """Of the last step, whose loss nobody looks at any more, or of one behind which it is kept."""
    from decodathlon.decoders.training import trainer as module

    monkeypatch.setattr(module, "CHECK_EVERY", 0.0)
    one = trainer(target, states, Recipe(steps=steps))
    spoil(one, monkeypatch)
    with pytest.raises(ValueError, match=r"no numbers any more after step 3"):
        one.run(tmp_path / "state.pt", lambda text: None)
    assert torch.load(tmp_path / "state.pt")["step"] == 2


def test_an_interrupt_within_a_step_keeps_what_was_there(target, states, tmp_path, monkeypatch):
    one = trainer(target, states, Recipe(steps=9))

    def interrupted(closure=None):
        if one.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(one.optimizer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        one.run(tmp_path / "state.pt", lambda text: None)
    assert not (tmp_path / "state.pt").exists()
