"""DFlash decoders: the text is the target's own whatever a block guesses; each variant drafts what it says."""

import json
import math

import pytest
import torch

from decodathlon.decoders.dflash import block, checkpoint, drafter, hints
from decodathlon.decoders.speculative.controllers import Seconds
from decodathlon.harness import decoder as decoders
from decodathlon.harness.decoder import Limits
from decodathlon.harness.errors import MissingError, SpecError, UnsupportedError
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.targets import toy
from tests.text_laws import assert_same, chi_square, with_parameter

load_builtins()
PROMPTS = [[0, 2, 3, 2, 3], [0, 4, 5], [0, 2]]
VARIANTS = [
    "dflash", "dflash[block=1]", "dflash[block=2]", "dflash[block=4]", "dflash[schedule=ewma]",
    "dflash[schedule=break-even]", "dflash[suffix_seed=sparse,seed_max_tokens=2]", "dflash[suffix_seed=dense]",
    "dflash[suffix_seed=dense,seed_aligned=true]", "dflash[suffix_seed=confident]", "dflash[draft_steps=2]",
    "dflash[draft_steps=3,refine=low-confidence]", "dflash[controller=confidence]", "dflash[controller=tapout]",
    "dflash[head=int8]", "ddtree", "ddtree[budget=6]", "ddtree[budget=1]", "dflash-tree[candidates=2]", "dflash-tree",
    "dflash-candidates", "dflash-candidates[branch_margin_threshold=0.02]", "dflash-candidates[mode=prefix-rank]",
    "dflash-candidates[mode=sparse-rank,branch_top_k=3]", "dflash-tree-lite", "dflash-tree-lite[refine=true,depth=6]",
    "dflash-tree-lite[choices=3,refine=true]", "dflash-multiround", "dflash-multiround[rounds=3]",
]  # fmt: skip


@pytest.fixture(scope="module")
def target():
    return toy.enumerable_lm(8)


@pytest.fixture(scope="module")
def good(target, tmp_path_factory):
    """A drafter that has learnt the target by heart, in a folder: half of what it guesses is right."""
    return trained(target, tmp_path_factory.mktemp("good"))


def trained(target, folder, vocabulary=8):
    """A drafter whose guesses the target often agrees with: trained on its greedy texts for a few steps."""
    from decodathlon.decoders.dflash.network import Network
    from decodathlon.decoders.dflash.training import Recipe, Trainer
    from decodathlon.decoders.training import features
    from decodathlon.decoders.training.corpus import Written

    torch.manual_seed(0)
    network = Network(checkpoint.shape_for(target, layers=1, fused=1, block=4))
    prompts = [[0, i // vocabulary % vocabulary, i % vocabulary] for i in range(64)]
    answers = decoders.build("temperature[temperature=0.3]").generate(
        target, prompts, Limits(16, ignore_eos=True), RowRandom(0, range(64))
    )
    texts = [Written(p, a.tokens) for p, a in zip(prompts, answers, strict=True)]
    features.make(target, drafter.seen_by(network), [texts], folder / "states", lambda text: None)
    recipe = Recipe(steps=120, rate=3e-3)
    trainer = Trainer(
        network, target.model.get_input_embeddings().weight.float(),
        target.model.get_output_embeddings().weight.float(), folder / "states", [0], [], recipe,
    )  # fmt: skip
    trainer.run(folder / "state.pt", lambda text: None)
    checkpoint.save(network, folder)
    return folder


def answers(spec, target, limits, prompts=PROMPTS, seed=0):
    return decoders.build(spec).generate(target, prompts, limits, RowRandom(seed, range(len(prompts))))


@pytest.mark.parametrize("limits", [Limits(20), Limits(20, ignore_eos=True), Limits(2), Limits(1)], ids=str)
@pytest.mark.parametrize("spec", VARIANTS)
def test_greedy_text_is_that_of_greedy_search_with_a_drafter_at_random(target, spec, limits):
    for _ in range(2):  # what schedules and budgets have learnt is remembered
        assert_same(answers(spec, target, limits), answers("greedy", target, limits))


@pytest.mark.parametrize("spec", VARIANTS)
def test_greedy_text_is_that_of_greedy_search_with_a_drafter_that_is_often_right(target, good, spec):
    spec, limits = with_parameter(spec, f"checkpoint={good}"), Limits(24, ignore_eos=True, trace=True)
    ours = answers(spec, target, limits)
    assert_same(ours, answers("greedy", target, limits))
    kept = [cycle["accepted"] for one in ours for cycle in one.trace]
    assert sum(kept) > 0 or "block=1," in spec, "or it shows nothing"
    for one in ours:
        made = 1 + sum(cycle["accepted"] + 1 for cycle in one.trace)
        assert made - one.trace[-1]["accepted"] <= len(one.tokens) <= made
        assert one.cost.target_calls == 1 + len(one.trace)


@pytest.mark.parametrize("spec", ["dflash", "ddtree[budget=6]", "dflash-tree-lite", "dflash-multiround"])
def test_a_text_ends_at_a_stop_token_inside_a_block(target, good, spec, monkeypatch):
    """Of what was drafted behind it, and stayed, nothing is in the text."""
    spec, overshot, at_once = with_parameter(spec, f"checkpoint={good}"), 0, 0
    for stop in range(1, 8):
        monkeypatch.setattr(target, "stop_tokens", frozenset({stop}))
        limits = Limits(24, trace=True)
        ours = answers(spec, target, limits)
        assert_same(ours, answers("greedy", target, limits))
        for one in ours:
            made = 1 + sum(cycle["accepted"] + 1 for cycle in one.trace)
            overshot += one.stop_reason == "stop" and made > len(one.tokens)
            at_once += one.stop_reason == "stop" and not one.trace
    assert overshot > 0, "or it shows nothing"
    assert at_once > 0, "or no answer has a stop token as its first"


def test_in_bfloat16_texts_part_only_where_two_tokens_are_as_likely(target, good):
    import transformers

    from decodathlon.harness.measure import speed
    from decodathlon.harness.targets.transformers import TransformersTarget

    config = transformers.LlamaConfig.from_dict(target.model.config.to_dict(), attn_implementation="sdpa")
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(target.model.state_dict())
    half = TransformersTarget(model.bfloat16(), toy.Letters(), name="half")
    prompts = [[0, *divmod(i, 8)] for i in range(48)]
    made = {
        name: [a.tokens for a in answers(spec, half, Limits(24, ignore_eos=True), prompts)]
        for name, spec in (("candidate", f"dflash[checkpoint={good}]"), ("greedy", "greedy"))
    }
    parted = speed.divergences(half, [speed.Pair(answers=made, prompts=prompts)], "greedy")
    assert len(parted) < len(prompts) / 4
    for one in parted:
        read = [*prompts[one.row], *made["greedy"][one.row][: one.position]]
        top = half.open([read], capacity=len(read)).next_logits[0].max()
        assert one.top2_gap <= 2**-6 * abs(float(top))


def test_the_passes_of_the_drafter_are_counted(target, good):
    """A block of 4 has 4 positions, and what the target has read is read once: the prompt, and what stayed."""
    (one,) = answers(f"dflash[checkpoint={good}]", target, Limits(24, ignore_eos=True, trace=True), prompts=[[0, 2, 3]])
    drafting = [cycle for cycle in one.trace if cycle["drafted"]]
    assert one.cost.draft_calls == len(drafting)
    read = 3 + sum(cycle["accepted"] + 1 for cycle in one.trace[: len(drafting) - 1])
    assert one.cost.draft_positions in (
        4 * len(drafting) + read,
        4 * len(drafting) + read + one.trace[-2]["accepted"] + 1,
    )
    (two,) = answers(
        f"dflash[draft_steps=2,checkpoint={good}]", target, Limits(24, trace=True, ignore_eos=True), [[0, 2, 3]]
    )
    assert two.cost.draft_calls == 2 * sum(cycle["drafted"] > 0 for cycle in two.trace)


@pytest.mark.parametrize("spec", ["dflash[proposal=guess]", "ddtree[budget=6]", "dflash-tree", "dflash-candidates",
                                  "dflash-tree-lite[refine=true]", "dflash-multiround[proposal=guess]"])  # fmt: skip
def test_guesses_leave_the_very_text_that_the_target_draws_alone(target, good, spec):
    for extra in ("", f"checkpoint={good},"):
        ours = answers(with_parameter(spec, f"{extra}temperature=1"), target, Limits(20))
        assert_same(ours, answers("temperature[temperature=1]", target, Limits(20)))


@pytest.mark.parametrize(
    "spec",
    ["dflash", "dflash[suffix_seed=dense]", "dflash[draft_steps=2]", "dflash[controller=confidence]",
     "dflash[block=3,schedule=ewma]", "dflash[block=3,schedule=break-even]", "dflash-multiround",
     "dflash-multiround[rounds=3,diverse=true]", "dflash-multiround[top_p=0.7,rounds=3]",
     "dflash[top_p=0.8,suffix_seed=dense]", "dflash[top_k=3]"],
)  # fmt: skip
def test_texts_that_are_drawn_have_the_law_of_the_target(spec):
    """All texts of four tokens (of seven, where a schedule has to learn in them); the bound is five deviations of
    chi-square."""
    vocabulary, tokens = (3, 7) if "schedule" in spec else (4, 4)
    target = toy.enumerable_lm(vocabulary)
    found, cells = chi_square(target, decoders.build(with_parameter(spec, "temperature=1")), [0, 1], tokens, 250, 8)
    assert abs(found - (cells - 1)) < 5 * math.sqrt(2 * (cells - 1))


@pytest.mark.parametrize("more", ["", "top_p=0.8,"])
def test_seeds_are_put_into_so_short_texts(more):
    """What the law above is held to: else `suffix_seed` would pass there without being asked."""
    made, target = decoders.build(f"dflash[{more}suffix_seed=dense,temperature=1]"), toy.enumerable_lm(4)
    found = made.generate(target, [[0, 1]] * 40, Limits(4, ignore_eos=True, trace=True), RowRandom(0, range(40)))
    assert sum(cycle["seeded"] for one in found for cycle in one.trace) > 20


def test_seeds_that_the_drafter_was_sure_of_leave_the_law(tmp_path, monkeypatch):
    """With a drafter whose laws differ from place to place, and a bar that some of its guesses pass."""
    from decodathlon.decoders.dflash import hints

    monkeypatch.setattr(hints, "SURE", 0.3)
    target = toy.enumerable_lm(4)
    for more in ("", ",seed_aligned=true"):
        made = decoders.build(
            f"dflash[temperature=1,suffix_seed=confident{more},checkpoint={trained(target, tmp_path, 4)}]"
        )
        found, cells = chi_square(target, made, [0, 1], 4, 250, 8)
        assert abs(found - (cells - 1)) < 5 * math.sqrt(2 * (cells - 1))
        some = made.generate(target, [[0, 1]] * 50, Limits(4, ignore_eos=True, trace=True), RowRandom(0, range(50)))
        seeded = [cycle["seeded"] for one in some for cycle in one.trace]
        assert 0 < sum(n > 0 for n in seeded) < len(seeded)


@pytest.mark.parametrize("schedule", ["ewma", "break-even"])
def test_schedules_learn_in_so_short_texts_and_change_sizes(schedule, monkeypatch):
    """What the law above is held to: else a schedule that looks at tokens would pass there."""
    from decodathlon.decoders.dflash import schedules

    kind, seen = {"ewma": schedules.Scheduler, "break-even": schedules.BreakEvenSize}[schedule], []
    settle, width = kind.settle, kind.width
    monkeypatch.setattr(kind, "settle", lambda self, *given: (seen.append("learnt"), settle(self, *given))[1])
    monkeypatch.setattr(kind, "width", lambda self: seen.append(found := width(self)) or found)
    made, target = decoders.build(f"dflash[block=3,schedule={schedule},temperature=1]"), toy.enumerable_lm(3)
    for seed in range(8):  # as many calls as above; what is learnt is kept between them
        made.generate(target, [[0, 1]] * 40, Limits(7, ignore_eos=True), RowRandom(seed, range(40)))
    assert seen.count("learnt") > 20
    assert {1, 2} <= set(seen)


def test_a_setting_without_effect_is_refused():
    for more in ("", ",temperature=1,proposal=guess"):
        with pytest.raises(SpecError, match="diverse=true says how tokens are drawn"):
            decoders.build(f"dflash-multiround[diverse=true{more}]")


@pytest.mark.parametrize("controller", ["margin", "confidence"])
def test_rules_that_stop_leave_the_law(controller, tmp_path):
    """With a drafter whose laws differ from place to place, so that a rule stops here and not there."""
    target = toy.enumerable_lm(4)
    made = decoders.build(f"dflash[temperature=1,controller={controller},checkpoint={trained(target, tmp_path, 4)}]")
    found, cells = chi_square(target, made, [0, 1], 4, 250, 8)
    assert abs(found - (cells - 1)) < 5 * math.sqrt(2 * (cells - 1))
    some = made.generate(target, [[0, 1]] * 50, Limits(4, ignore_eos=True, trace=True), RowRandom(0, range(50)))
    cycles = [cycle for one in some for cycle in one.trace if cycle["asked"] > 1]
    assert 0 < sum(cycle["drafted"] < cycle["asked"] for cycle in cycles) < len(cycles)


def test_a_row_does_not_depend_on_its_neighbours(target, good):
    for spec in (
        "dflash[temperature=1]",
        "dflash[temperature=1,suffix_seed=dense]",
        "dflash-multiround[temperature=1]",
    ):
        spec = with_parameter(spec, f"checkpoint={good}")
        together = answers(spec, target, Limits(12))
        alone = [
            decoders.build(spec).generate(target, [p], Limits(12), RowRandom(0, [b]))[0] for b, p in enumerate(PROMPTS)
        ]
        assert [a.tokens for a in together] == [a.tokens for a in alone]


def test_one_candidate_is_a_chain(target, good):
    """The trees' masks, paths and memory against those of a chain, cycle by cycle."""
    limits, with_drafter = Limits(24, ignore_eos=True, trace=True), f"checkpoint={good}"

    def accepted(spec):
        found = answers(with_parameter(spec, with_drafter), target, limits)
        return [[cycle["accepted"] for cycle in one.trace] for one in found]

    chain = accepted("dflash")
    assert accepted("dflash-tree[candidates=1]") == chain
    assert accepted("dflash-candidates[max_candidates=1]") == chain
    assert accepted("dflash-multiround[rounds=1]") == chain
    more = accepted("ddtree[budget=40]")
    assert sum(map(len, more)) <= sum(map(len, chain)), "a tree that holds the chain never takes more cycles"


def test_what_the_drafter_sees_is_what_it_would_see_of_the_whole_text_at_once(target, good):
    """The memory that grows by what each cycle kept, against one pass over all hidden states: also along a tree."""
    for spec in (f"dflash[checkpoint={good}]", f"ddtree[budget=12,checkpoint={good}]"):
        made = decoders.build(spec)
        seen = []

        class Watched(type(made)):
            def drafting(self, kind, *given, found=seen, **more):
                found.append(super().drafting(kind, *given, **more))
                return found[-1]

        watched = object.__new__(Watched)
        watched.__dict__.update(made.__dict__)
        prompt = PROMPTS[0]
        text = [*prompt, *watched.generate(target, [prompt], Limits(20, ignore_eos=True), RowRandom(0, [0]))[0].tokens]
        memory = seen[0].memory
        length = memory.lengths[0]
        assert length > len(prompt) + 4
        numbers = drafter.seen_by(memory.network)
        hidden = target.open([text[:length]], capacity=length, hidden=numbers).prompt_hidden
        states = torch.cat([hidden[n] for n in numbers], -1)
        for number, (keys, values) in enumerate(
            memory.network.read(memory.network.context(states), torch.arange(length)[None])
        ):
            assert torch.allclose(memory._keys[number][:, :, :length], keys, atol=1e-9)
            assert torch.allclose(memory._values[number][:, :, :length], values, atol=1e-9)


def test_seeds_are_what_the_last_cycle_refused():
    made = hints.HintedDrafter.__new__(hints.HintedDrafter)
    refused = [(11, 0.95), (12, 0.5), (13, 0.99), (14, 0.2)]

    def seeds(mode, most=-1, aligned=False, width=7):
        made.seeding, made.most, made.aligned = mode, most, aligned
        return made._seeds(refused, width)

    assert seeds("dense") == [(1, 11), (2, 12), (3, 13), (4, 14)]
    assert seeds("sparse") == [(2, 11), (4, 12), (6, 13)]
    assert seeds("sparse", most=2) == [(2, 11), (4, 12)]
    assert seeds("dense", width=2) == [(1, 11), (2, 12)]
    assert seeds("dense", aligned=True) == [(1, 12), (2, 13), (3, 14)], (
        "the first was a guess for the text's last token"
    )
    assert seeds("sparse", aligned=True) == [(2, 13)]
    assert seeds("confident", aligned=True) == [(2, 13)]
    assert seeds("dense", most=0) == []


def test_seeding_is_counted_and_changes_what_is_drafted(target, good):
    limits = Limits(26, ignore_eos=True, trace=True)
    plain = answers(f"dflash[block=4,checkpoint={good}]", target, limits)
    seeded = answers(f"dflash[block=4,suffix_seed=dense,checkpoint={good}]", target, limits)
    assert all("seeded" not in cycle for one in plain for cycle in one.trace)
    for one in seeded:
        before = None
        for cycle in one.trace:
            refused = 0 if before is None else before["drafted"] - before["accepted"]
            if cycle["drafted"]:
                assert cycle["seeded"] == min(refused, 3)
            before = cycle
    assert sum(cycle["seeded"] for one in seeded for cycle in one.trace) > 0
    stayed = [[[cycle["accepted"] for cycle in one.trace] for one in found] for found in (plain, seeded)]
    assert stayed[0] != stayed[1]


def test_a_block_that_is_larger_than_trained_is_told(target, good):
    which = f"drafter: folder {good.name}"
    assert decoders.build(f"dflash[block=8,checkpoint={good}]").remarks(target) == [
        which, "a block of 8 tokens; the drafter was trained with 4",
    ]  # fmt: skip
    assert decoders.build(f"dflash[checkpoint={good}]").remarks(target) == [which]


def test_what_a_drafter_consists_of_is_part_of_the_decoder(good):
    """Or a drafter that was trained on would pass for the one before."""
    for name in ("dflash", "ddtree", "hf-dflash"):
        assert good / "model.safetensors" in decoders.build(f"{name}[checkpoint={good}]").sources()


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("ddtree[proposal=guess]", "proposal"),
        ("dflash[block=65]", "block"),
        ("dflash[k=3]", "k"),
        ("dflash[checkpoint=nowhere]", "neither a folder nor a hub id"),
        ("dflash[schedule=ewma,controller=svip]", "both say how far to draft"),
        ("ddtree[controller=confidence]", "stops chains"),
        ("dflash[draft_steps=0]", "draft_steps"),
        ("dflash[controller=break-even]", "schedule=break-even"),
        ("dflash[refine=low-confidence]", "second pass"),
        ("dflash[seed_aligned=true]", "nothing to seed with"),
        ("dflash[block=1,schedule=ewma]", "drafts nothing"),
        ("ddtree[block=1]", "drafts nothing"),
        ("dflash-candidates[prefix=3]", "mode=beam has no prefix"),
    ],
)
def test_specs_that_mean_nothing_are_refused_before_a_model_is_loaded(spec, said):
    with pytest.raises(SpecError, match=said):
        decoders.build(spec)


def test_a_model_without_a_drafter_is_told_what_to_do(target):
    other = toy.enumerable_lm(8)
    other.name, other.revision = "somebody/unknown", "abc"
    with pytest.raises(UnsupportedError, match=r"none ships for somebody/unknown.*checkpoint=FOLDER.*draft train"):
        decoders.build("dflash").check(other)


def changed(folder, good, change):
    folder.mkdir(exist_ok=True)
    raw = json.loads((good / "config.json").read_text())
    change(raw)
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "model.safetensors").write_bytes((good / "model.safetensors").read_bytes())
    return decoders.build(f"dflash[checkpoint={folder}]")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: raw.update(vocab_size=99), r"is for another model: .*vocabulary 99 and .* vocabulary 8"),
        (lambda raw: raw.update(num_target_layers=36), "for another model: the drafter is for layers 36"),
        (lambda raw: raw["dflash_config"].update(mask_token_id=8), "mask token 8, and .* has embeddings for 8 tokens"),
        (lambda raw: raw["dflash_config"].update(target_layer_ids=[2]), r"looks at layer 2 .*layers 0 to 1"),
        (lambda raw: raw.update(num_hidden_layers=2), r"lacks \d+ tensors, the first of them layers.1"),
        (lambda raw: raw.update(intermediate_size=7), "its config asks for"),
        (lambda raw: raw.update(rope_scaling={"type": "su"}), "which transformers cannot"),
    ],
)  # fmt: skip
def test_a_drafter_for_another_target_is_refused(target, good, tmp_path, change, said):
    target.kept.clear()
    with pytest.raises(SpecError, match=said):
        changed(tmp_path / "other", good, change).check(target)


def test_tensors_too_many_are_refused(target, good, tmp_path):
    from safetensors.torch import load_file, save_file

    made = changed(tmp_path / "more", good, lambda raw: None)
    tensors = load_file(str(tmp_path / "more" / "model.safetensors"))
    save_file({**tensors, "surplus.weight": torch.zeros(2)}, str(tmp_path / "more" / "model.safetensors"))
    with pytest.raises(SpecError, match=r"has, and should not, 1 tensors, the first of them surplus\.weight"):
        made.check(target)


def test_a_torn_file_is_told(target, good, tmp_path):
    made = changed(tmp_path / "torn", good, lambda raw: None)
    file = tmp_path / "torn" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(MissingError, match="cannot be read"):
        made.check(target)
    file.unlink()
    with pytest.raises(MissingError, match=r"no \.safetensors file"):
        made.check(target)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: raw.pop("dflash_config"), "no dflash_config"),
        (lambda raw: raw["dflash_config"].update(selector_rank=256), "DFlash 2"),
        (lambda raw: raw.update(hidden_act="gelu"), "gelu"),
        (lambda raw: raw.update(hidden_size="wide"), "hidden_size has to be a whole number"),
        (lambda raw: raw["dflash_config"].update(target_layer_ids="all"), "target_layer_ids has to be a list"),
        (lambda raw: raw.update(num_key_value_heads=3), "cannot share"),
        (lambda raw: raw.update(layer_types=["full_attention", "linear"]), "2 layer_types for 1 layers"),
        (lambda raw: raw.update(block_size=1), "block_size is 1"),
        (lambda raw: raw.update(block_size=1000), "block_size is 1000"),
        (lambda raw: raw.update(hidden_size=math.inf), "hidden_size has to be a whole number"),
        (lambda raw: raw.update(sliding_window="far"), "sliding_window has to be a whole number"),
        (lambda raw: raw.update(rope_scaling="yarn"), "not by 'yarn'"),
        (lambda raw: raw["dflash_config"].update(use_swa=True), "use_swa"),
        (lambda raw: raw["dflash_config"].update(fc_layernorm=True), "fc_layernorm"),
    ],
)
def test_configs_of_something_else_are_refused_before_a_model_is_loaded(good, tmp_path, change, said):
    with pytest.raises(SpecError, match=said):
        changed(tmp_path / "config", good, change)


# -- how large a block is ------------------------------------------------------------------------------------------


def run(schedule, cycles, tokens, seconds):
    """Sizes that were taken, where a block of size b makes tokens(b) in seconds(b)."""
    taken = []
    schedule.begin()
    for _ in range(cycles):
        size = schedule.width() + 1
        taken.append(size)
        schedule.settle(size - 1, tokens(size) - 1, Seconds(0.0, seconds(size), 0.0))
    return taken


@pytest.mark.parametrize("kind", ["ewma", "break-even"])
def test_a_schedule_finds_the_best_size(kind):
    flat = run(block.SCHEDULES[kind](15), 400, lambda b: min(b, 12), lambda b: 1.0)
    assert flat[-60:].count(12) + flat[-60:].count(16) > 50, "where width is free, all that stays is worth it"
    dear = run(block.SCHEDULES[kind](15), 400, lambda b: min(b, 9), lambda b: b)
    assert dear[-60:].count(8) > 50, "where it is not, the smallest"


def test_a_schedule_probes_and_keeps_what_it_learnt():
    schedule = block.SCHEDULES["ewma"](15)
    run(schedule, 100, lambda b: b, lambda b: 1.0)
    again = run(schedule, 60, lambda b: b, lambda b: 1.0)
    assert again.count(16) > 50
    assert len(set(again)) > 1, "it looks at others from time to time"
    little = run(schedule, 120, lambda b: 1, lambda b: 1.0)
    assert little.count(8) > little.count(16), "little of a block stays: a smaller one"


def test_transformers_own_loop_with_the_same_drafter_writes_the_same_text(target, good):
    import transformers

    if not hasattr(transformers, "MuseGlimmerAssistantModel"):
        pytest.skip("transformers has DFlash from 5.23 on")
    limits = Limits(12, ignore_eos=True)
    theirs = answers(f"hf-dflash[checkpoint={good}]", target, limits)
    ours = answers(f"dflash[checkpoint={good}]", target, limits)
    assert [a.tokens for a in theirs] == [a.tokens for a in ours]
    assert all(a.cost.draft_calls > 0 for a in theirs)
    assert all(a.cost.target_calls < 12 for a in theirs), "something stayed"
