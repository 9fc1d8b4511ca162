"""Rows become tokens with their ids; paired runs are mirrored, counted by one rule, and told apart from rounding."""

import json
import time

import pytest
import tiny_models
import torch

from decodathlon import Completion
from decodathlon.harness import decoder as decoders
from decodathlon.harness import models
from decodathlon.harness.datasets import Text
from decodathlon.harness.errors import MissingError
from decodathlon.harness.measure import memory, speed, texts
from decodathlon.harness.measure.speed import Pair
from decodathlon.harness.registry import load_builtins

load_builtins()
ROWS = tuple("" if i % 3 == 0 else f"row {i} says something of its own\n" for i in range(200))


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tiny_models.save_folder(tmp_path_factory.mktemp("tiny"))
    return models.load(models.resolve(str(folder)), device="cpu", dtype="float32", say=lambda text: None)


@pytest.fixture
def text():
    return Text("rows", "1", "test", "folder", ROWS, "\n\n")


def test_the_head_is_the_beginning_of_the_whole_text(target, text):
    whole = target.encode(text.joined)
    for n in (1, 10, 500, len(whole) - 3, len(whole)):
        found = texts.head(text, target, n)
        assert found.tokens == whole[:n]
        assert len("\n\n".join(ROWS[: found.rows])) >= n
    assert texts.head(text, target, None) == (whole, 200)
    assert texts.head(text, target, 10).rows == 16
    with pytest.raises(MissingError, match=f"has {len(whole)} tokens, {len(whole) + 1} are needed"):
        texts.head(text, target, len(whole) + 1)


def test_prompts_have_one_length_their_rows_and_no_repeats(target, text):
    found = texts.prompts(text, target, pairs=3, rows=2, length=20)
    assert [[len(p) for p in batch] for batch in found.batches] == [[20, 20]] * 3
    assert found.rows == [[1, 2], [4, 5], [7, 8]]
    assert found.batches[1][0] == target.encode(ROWS[4].strip())[:20]
    with pytest.raises(MissingError, match="has 0 rows of 400 tokens, 6 are needed"):
        texts.prompts(text, target, pairs=3, rows=2, length=400)


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<a>"
    "{% if enable_thinking is defined and not enable_thinking %}<no thinking>{% endif %}"
)


def test_problems_are_asked_as_drafters_are_measured_and_without_thinking(target, monkeypatch):
    rows = tuple(json.dumps({"problem": f"What is {i} + {i}?", "answer": "", "id": str(i)}) for i in range(3))
    found = texts.asked(Text("p", "1", "test", "folder", rows, "\n"), target, kind="aime25", pairs=2, tokens=5)
    assert found.rows == [[0], [1]]
    said = "What is 0 + 0?\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert target.decode(found.batches[0][0]) == f"Question: {said}\nAnswer:"
    monkeypatch.setattr(target.tokenizer, "chat_template", TEMPLATE)
    found = texts.asked(Text("p", "1", "test", "folder", rows, "\n"), target, kind="aime25", pairs=1, tokens=5)
    assert target.decode(found.batches[0][0]) == f"<user>{said}<a><no thinking>"


def test_of_spec_bench_one_kind_is_asked_and_may_think(target, monkeypatch):
    monkeypatch.setattr(target.tokenizer, "chat_template", TEMPLATE)
    rows = tuple(
        json.dumps({"turns": [f"{c} {i}", "more"], "category": c, "id": "x"})
        for i, c in enumerate(["rag", "writing", "qa", "math"])
    )
    text = Text("s", "1", "test", "folder", rows, "\n")
    found = texts.asked(text, target, kind="mt_bench", pairs=9, tokens=5)
    assert [target.decode(b[0]) for b in found.batches] == ["<user>writing 1<a>", "<user>math 3<a>"]
    with pytest.raises(MissingError, match="has no question of kind summarization"):
        texts.asked(text, target, kind="summarization", pairs=9, tokens=5)


def test_runs_are_mirrored_and_equal_decoders_answer_alike(target, text, monkeypatch):
    order = []
    honest = speed.generate

    def spy(decoder, *rest, **more):
        order.append((decoder.spec, rest[2]))
        return honest(decoder, *rest, **more)

    monkeypatch.setattr(speed, "generate", spy)
    batches = texts.prompts(text, target, pairs=2, rows=2, length=20).batches
    rivals = {"ratio_to_self": decoders.build("top-k"), "ratio_to_greedy": decoders.build("greedy")}
    pairs = list(speed.measure(decoders.build("top-k"), rivals, target, batches, tokens=6, seed=3))
    k, g, first = ("top-k", 6), ("greedy", 6), ("top-k", 1)
    assert order[3:] == [k, k, g, g, k, k, first, k, g, k, k, g, k, first]  # after three warm-ups; the order turns
    for pair in pairs:
        assert {k: len(v) for k, v in pair.seconds.items()} == {
            "candidate": 2,
            "ratio_to_self": 2,
            "ratio_to_greedy": 2,
        }
        assert pair.answers["candidate"] == pair.answers["ratio_to_self"] != pair.answers["ratio_to_greedy"]
    found = speed.metrics(pairs, tokens=6)
    assert found["generated_tokens"].value == 2 * 2 * 2 * 6
    assert found["tokens_per_s"].estimate().value == pytest.approx(2 / found["tpot_s"].estimate().value, rel=0.5)


def test_a_ratio_is_the_rivals_time_over_the_candidates():
    pairs = [Pair(seconds={"candidate": [1.0, 4.0], "slow": [3.0, 12.0]}) for _ in range(6)]
    found = speed.ratio(pairs, "slow").estimate()
    assert found.value == pytest.approx(3.0)
    assert (found.low, found.high) == pytest.approx((3.0, 3.0))


def test_speeds_from_known_times():
    pairs = [Pair({"candidate": [1.0, 1.2]}, first=0.1, prefill=0.05, prompts=[[1] * 10] * 4) for _ in range(6)]
    found = {name: f if isinstance(f, tuple) else f.estimate() for name, f in speed.metrics(pairs, tokens=11).items()}
    assert found["tpot_s"].value == pytest.approx(0.1)
    assert found["tokens_per_s"].value == pytest.approx(40.0)
    assert found["ttft_s"].value == 0.1
    assert found["prefill_tokens_per_s"].value == pytest.approx(800.0)


def test_who_needs_as_long_for_one_token_has_no_time_per_further_one():
    pairs = [Pair({"candidate": [0.03, 0.03]}, first=0.04, prefill=0.01, prompts=[[1] * 4]) for _ in range(6)]
    assert set(speed.metrics(pairs, tokens=12)) == {"ttft_s", "prefill_tokens_per_s", "generated_tokens"}
    assert "one token took as long as all of them" in speed.remarks(pairs)[0]


def test_a_decoder_that_remembers_its_answers_is_remarked_on():
    fair = [Pair({"candidate": [1.1, 1.0]}, first=0.1) for _ in range(6)]
    cheat = [Pair({"candidate": [1.0, 0.01]}, first=0.1, repeatable=False) for _ in range(6)]
    assert speed.remarks(fair) == []
    disturbed = [Pair({"candidate": [9.0, 1.0]}, first=0.1), Pair({"candidate": [1.0, 1.0]}, first=0.1)]
    assert speed.remarks(disturbed) == [], "a neighbour on the machine, once"
    assert [r.split(":")[0] for r in speed.remarks(cheat)] == [
        "the same seed gave other tokens the second time",
        "the second run over the same prompts was 100.0 times as fast",
    ]


def test_divergences_name_the_place_and_the_gap(target, text):
    (batch,) = texts.prompts(text, target, pairs=1, rows=2, length=20).batches
    greedy = [c.tokens for c in speed.generate(decoders.build("greedy"), target, batch, 5, 0)]
    logits = target.open([[*batch[1], *greedy[1][:3]]]).next_logits[0]
    top = logits.topk(2)
    other = [*greedy[1][:3], int(top.indices[1]), 0]
    pair = Pair(answers={"candidate": [greedy[0], other], "ratio_to_greedy": greedy}, prompts=batch)
    ((_, row, place, gap),) = speed.divergences(target, [pair], "ratio_to_greedy")
    assert (row, place) == (1, 3)
    assert gap == pytest.approx(float(top.values[0] - top.values[1]), abs=1e-4)


def test_answers_may_end_where_they_end(target):
    class Ending(decoders.Decoder):
        spec = "ending"

        def generate(self, target, prompts, limits, rng):
            assert not limits.ignore_eos
            return [Completion([1] * (1 + p[0]), "stop") for p in prompts]

    batch = [[3], [1]]
    assert [len(a.tokens) for a in speed.generate(Ending(), target, batch, 9, 0, ending=True)] == [4, 2]
    with pytest.raises(ValueError, match="returned 8 tokens where exactly 5 were due"):
        speed.generate(Ending(), target, [[7]], 5, 0, ending=True)
    answers = {"candidate": [[1] * 4, [1] * 2], "ratio_to_greedy": [[1] * 6, [1] * 6]}
    pairs = [Pair({"candidate": [1.0, 1.0]}, first=0.1, prefill=0.05, prompts=batch, answers=answers)] * 6
    found = {k: f if isinstance(f, tuple) else f.estimate() for k, f in speed.metrics(pairs, tokens=9).items()}
    assert found["tpot_s"].value == pytest.approx(0.9 / 3), "that of the longer text"
    assert found["tokens_per_s"].value == pytest.approx(4 / 0.9)
    assert found["generated_tokens"].value == 2 * 6 * 6
    assert speed.lengths_ratio(pairs, "ratio_to_greedy").estimate().value == pytest.approx(0.5)
    slower = [Pair({"candidate": [1.0, 1.0], "ratio_to_greedy": [3.0, 3.0]}, answers=answers)] * 6
    assert speed.ratio(slower, "ratio_to_greedy").estimate().value == pytest.approx(3)
    assert speed.token_ratio(slower, "ratio_to_greedy").estimate().value == pytest.approx(1.5), "half the tokens"


def test_an_answer_that_does_not_end_with_a_stop_token_is_refused(target):
    class Cut(decoders.Decoder):
        spec = "cut"

        def generate(self, target, prompts, limits, rng):
            return [Completion([5, 6], "stop") for _ in prompts]

    with pytest.raises(ValueError, match="cut returned 2 tokens where exactly 5 were due"):
        speed.generate(Cut(), target, [[3]], 5, 0, ending=True)


def test_a_text_that_ends_elsewhere_has_parted(target):
    pair = Pair(answers={"candidate": [[5, 6]], "greedy": [[5, 6, 7]]}, prompts=[[3, 4]])
    ((_, row, place, _),) = speed.divergences(target, [pair], "greedy")
    assert (row, place) == (0, 2)


def test_few_answers_without_a_time_per_token_are_left_out():
    """An answer of few tokens, all made in one cycle, may take no longer than its first."""
    fine = Pair({"candidate": [1.0, 1.0]}, first=0.5, prefill=0.4, prompts=[[1]], answers={"candidate": [[1] * 6]})
    odd = Pair({"candidate": [0.4, 0.4]}, first=0.5, prefill=0.4, prompts=[[1]], answers={"candidate": [[1] * 2]})
    assert speed.metrics([fine] * 9 + [odd], tokens=9)["tpot_s"].estimate().value == pytest.approx(0.1)
    assert "tpot_s" not in speed.metrics([fine] * 5 + [odd] * 5, tokens=9)
    assert "in 1 of 10 batches" in speed.remarks([fine] * 9 + [odd])[0]


def test_miscounted_answers_are_refused(target):
    class Short(decoders.Decoder):
        spec = "short"

        def generate(self, target, prompts, limits, rng):
            return [Completion([1, 2], "length")]

    with pytest.raises(ValueError, match="short returned 2 tokens where exactly 3 were due"):
        speed.generate(Short(), target, [[3]], 3, 0)
    with pytest.raises(ValueError, match="short returned 1 completions for 2 prompts"):
        speed.generate(Short(), target, [[3], [4]], 2, 0)


def test_peak_memory_sees_what_was_allocated_and_freed():
    if not memory.SMAPS.exists():
        pytest.skip("no smaps_rollup on this system")
    before = memory.peak_bytes(lambda: None, "cpu")  # what earlier tests freed has gone back by now

    def work():
        block = torch.ones(64 << 20, dtype=torch.uint8)
        for _ in range(30):
            block += 1

    peak = memory.peak_bytes(work, "cpu")
    assert peak - before > 60 << 20


def test_the_share_of_the_sampler_is_that_of_its_draws(target):
    """A draw that waits 20 ms takes most of a step of a tiny model, one that does nothing takes little."""
    pairs = [Pair(prompts=[[3, 4], [5, 6]]) for _ in range(2)]

    class Waits(type(decoders.build("greedy"))):
        def choose(self, logits, state, u):
            time.sleep(0.02)
            return super().choose(logits, state, u)

    slow = speed.sampler_shares(Waits(), target, pairs, 5, 0).values()
    quick = speed.sampler_shares(decoders.build("greedy"), target, pairs, 5, 0).values()
    assert 0.5 < min(slow) <= max(slow) < 1
    assert max(quick) < min(slow)
    assert "choose" not in vars(decoders.build("greedy"))


def test_who_has_a_loop_of_its_own_has_no_share(target):
    assert speed.sampler_shares(decoders.build("reservoir-spatial"), target, [Pair(prompts=[[3], [3]])], 4, 0) is None
