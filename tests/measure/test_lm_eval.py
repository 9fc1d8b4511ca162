"""Decoders behind lm-eval: equal to its own Hugging Face model, ties told apart, replies kept."""

import json
import math

import pytest

pytest.importorskip("lm_eval", exc_type=ImportError)
import tiny_models
import torch

from decodathlon.harness import decoder as decoders
from decodathlon.harness.errors import MissingError, SpecError, UnsupportedError
from decodathlon.harness.measure import lm_eval_tasks, truthful
from decodathlon.harness.measure.lm_eval_model import DecoderLM
from decodathlon.harness.plan import Options, cells
from decodathlon.harness.registry import load_builtins, registry
from decodathlon.harness.results.lines import Lines
from decodathlon.harness.suite import Cell, LateError
from decodathlon.harness.targets.transformers import TransformersTarget

load_builtins()
QUESTIONS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.save_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def target(folder):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.config.max_position_embeddings = 4096
    return TransformersTarget(model, transformers.AutoTokenizer.from_pretrained(folder), name="bytes")


def a_cell(target, part="choice", spec="temperature", lines=None, timeout=None):
    suite = registry.get("suite", "truthfulqa")
    text = registry.get("dataset", suite.data_of(part)).stand_in("test")
    cell = Cell(
        suite=suite, decoder=decoders.build(spec), target=target, rivals={}, scale="smoke", slice=part, seed=0,
        texts={"test": text}, lines=lines, timeout=timeout,
    )  # fmt: skip
    cell.sizes = {"questions": QUESTIONS, "tokens": 4}
    return cell


def reported(cell):
    return {m["metric"]: m["value"] for m in cell.metrics}


def test_temperature_one_equals_lm_evals_own_model(target, folder):
    """mc1, mc2 and every likelihood, of lm-eval's `hf` model on the same questions."""
    hf = pytest.importorskip("lm_eval.models.huggingface")
    cell = a_cell(target)
    with truthful._tasks(cell, names := (truthful.MC1, truthful.MC2)) as tasks:
        ours = lm_eval_tasks.run(DecoderLM(cell), names, folder=tasks)
        model = hf.HFLM(pretrained=str(folder), device="cpu", batch_size=4, max_length=4096)
        theirs = lm_eval_tasks.run(model, names, folder=tasks)
    for name in names:
        assert len(ours[name].samples) == QUESTIONS
        for mine, other in zip(ours[name].samples, theirs[name].samples, strict=True):
            assert mine["doc"]["id"] == other["doc"]["id"]
            pairs = zip(mine["filtered_resps"], other["filtered_resps"], strict=True)
            assert all(a[0] == pytest.approx(b[0], abs=1e-3) and a[1] == b[1] for a, b in pairs)
        (a,), (b,) = (list(r[name].metrics.values()) for r in (ours, theirs))
        assert a.estimate().value == pytest.approx(b.estimate().value, abs=1e-6)
        # and without ties our own scores are lm-eval's
        scores = truthful._scores(ours[name], name)
        assert sum(scores) / QUESTIONS == pytest.approx(a.estimate().value, abs=1e-9)


def test_an_overlong_context_is_cut_as_lm_eval_cuts_it(target, folder, monkeypatch):
    """Each request loses as much of its beginning as it needs, however long the others are."""
    hf = pytest.importorskip("lm_eval.models.huggingface")
    reads = 64
    monkeypatch.setattr(target, "context_length", reads, raising=False)
    rng = torch.Generator().manual_seed(1)
    context = torch.randint(3, 250, (80,), generator=rng).tolist()
    short = torch.randint(3, 250, (40,), generator=rng).tolist()
    continuations = [torch.randint(3, 250, (n,), generator=rng).tolist() for n in (1, 5, 24, 25, 26, 30)]
    ours = DecoderLM(a_cell(target))
    theirs = hf.HFLM(pretrained=str(folder), device="cpu", batch_size=4, max_length=reads)
    for head in (context, short):
        pairs = [(("", ""), head, c) for c in continuations]
        mine, other = ours._loglikelihood_tokens(pairs), theirs._loglikelihood_tokens(pairs, disable_tqdm=True)
        assert [m[0] for m in mine] == pytest.approx([o[0] for o in other], abs=1e-3)


def test_what_is_reported_is_proved_in_every_cell(target):
    cell = a_cell(target)
    truthful.choices(cell)
    found = reported(cell)
    assert found["oracle"] == 1
    assert found["decided"] == 1
    assert 0 < found["mc1"] < 1
    assert 0 < found["mc2"] < 1


def test_a_law_that_cuts_all_choices_does_not_win(target):
    """lm-eval takes the first of equals, which is the right one: 100 % for greedy search."""
    cell = a_cell(target, spec="greedy")
    with truthful._tasks(cell, (truthful.MC1,)) as tasks:
        shipped = lm_eval_tasks.run(DecoderLM(cell), (truthful.MC1,), folder=tasks)[truthful.MC1]
    assert shipped.metrics["acc,none"].estimate().value == 1.0, "the trap"
    truthful.choices(cell)
    found = reported(cell)
    assert found["decided"] == 0
    assert "mc1" not in found
    assert any("there is no mc1" in note for note in cell.notes)


@pytest.mark.parametrize("spec", ["greedy", "top-k[k=3]"])
def test_any_task_of_lm_eval_is_over_the_documents_of_which_the_law_says_something(target, spec, monkeypatch):
    """The same trap outside TruthfulQA: whoever cuts all choices has the first one, which may be right."""
    cell = a_cell(target, spec=spec)
    whole = lm_eval_tasks.run
    with truthful._tasks(cell, (truthful.MC1,)) as tasks:
        monkeypatch.setattr(lm_eval_tasks, "run", lambda m, t, limit=None: whole(m, t, limit=limit, folder=tasks))
        lm_eval_tasks.measure(cell, truthful.MC1, limit=None)
    acc = next((m for m in cell.metrics if m["metric"] == "lm_eval(acc)"), None)
    assert acc is None or acc["n"] < QUESTIONS
    assert any("documents of which the law says anything" in note for note in cell.notes)


def test_a_law_that_cuts_some_choices_is_said_to_guess(target):
    cell = a_cell(target, spec="top-k[k=200]")
    truthful.choices(cell)
    found = {m["metric"]: m for m in cell.metrics}
    decided = found["decided"]["value"]
    assert 0 < decided < 1
    assert found["mc1"]["n"] == round(decided * QUESTIONS), "over the questions of which it says anything"
    said = [s["data"]["score"] for s in cell.samples if s["row"].endswith("/mc1")]
    assert said.count(None) == QUESTIONS - found["mc1"]["n"]


@pytest.mark.parametrize(
    ("log_probs", "labels", "mc1", "mc2"),
    [
        ([-1.0, -2.0], [1, 0], 1.0, 1 / (1 + math.exp(-1))),
        ([-2.0, -2.0, -2.0], [1, 0, 0], 1 / 3, 1 / 3),
        ([-math.inf, -3.0], [1, 0], 0.0, 0.0),
        ([-3000.0, -3001.0], [0, 1], 0.0, 1 / (1 + math.e)),
    ],
)
def test_scores_by_hand(log_probs, labels, mc1, mc2):
    assert truthful.mc1(log_probs, labels) == pytest.approx(mc1)
    assert truthful.mc2(log_probs, labels) == pytest.approx(mc2)


def test_free_answers_are_scored_and_proved(target):
    cell = a_cell(target, "generation", "top-p")
    cell.sizes = {"questions": 2, "tokens": 4}
    truthful.generation(cell)
    assert reported(cell)["oracle"] == 1
    assert {"bleu_acc", "rouge1_acc", "rouge_l_acc", "bleu_diff"} <= set(reported(cell))
    assert len(cell.samples) == 2


def test_a_decoder_without_a_law_is_unsupported_before_anything_is_read(target):
    cell = a_cell(target, spec="beam")
    with pytest.raises(UnsupportedError, match="a next-token law"), truthful._tasks(cell, (truthful.MC1,)) as tasks:
        lm_eval_tasks.run(DecoderLM(cell), (truthful.MC1,), folder=tasks)


def test_replies_are_kept_and_not_asked_for_again(target, tmp_path, monkeypatch):
    path = tmp_path / "lines.jsonl"
    values = []
    for attempt in range(2):
        lines = Lines(path)
        if attempt:
            monkeypatch.setattr(DecoderLM, "_scored", lambda self, context, some: [] if not some else 1 / 0)
        cell = a_cell(target, lines=lines)
        truthful.choices(cell)
        lines.close()
        values.append(reported(cell))
    assert values[0] == values[1]


def test_rouge_without_a_bootstrap_of_one_value_is_the_same_rouge(target):
    cell = a_cell(target, part="generation")
    with truthful._tasks(cell, names := (truthful.GENERATION,)) as tasks:

        def scores():
            told = truthful.Told(truth=True)
            found = lm_eval_tasks.run(told, names, folder=tasks, limit=4)[truthful.GENERATION]
            return [[s[m] for m in sorted(s["metrics"])] for s in found.samples]

        whole = scores()
        with truthful._rouge_once():
            assert scores() == whole


def test_out_of_time_keeps_what_was_done(target, tmp_path):
    lines = Lines(tmp_path / "lines.jsonl")
    cell = a_cell(target, lines=lines, timeout=0.01)
    cell.begin()
    with pytest.raises(LateError), truthful._tasks(cell, (truthful.MC1,)) as tasks:
        lm_eval_tasks.run(DecoderLM(cell), (truthful.MC1,), folder=tasks)


def own_task(folder, **settings):
    rows = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(4)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    task = {
        "task": "sums", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}", **settings,
    }  # fmt: skip
    (folder / "sums.yaml").write_text(json.dumps(task))


def test_a_generating_task_with_repeats_draws_each_anew(target, tmp_path):
    own_task(
        tmp_path, output_type="generate_until", repeats=3, generation_kwargs={"max_gen_toks": 5, "until": ["\n"]},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )  # fmt: skip
    cell = a_cell(target)
    found = lm_eval_tasks.run(DecoderLM(cell), ["sums"], folder=tmp_path)["sums"]
    assert len(found.samples) == 4
    replies = found.samples[0]["resps"][0]
    assert len(replies) == 3
    assert len(set(replies)) > 1, "a stream for each"
    assert all("\n" not in reply for reply in replies)
    assert found.metrics["exact_match,none"].estimate().n == 4


def test_a_stop_string_cuts_within_a_block_of_drafted_tokens(target, tmp_path):
    """An answer ends before it, wherever in a cycle of guesses it came up, as it does token by token."""

    def replies(spec, until):
        own_task(
            tmp_path, output_type="generate_until", generation_kwargs={"max_gen_toks": 40, "until": until},
            metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        )  # fmt: skip
        found = lm_eval_tasks.run(DecoderLM(a_cell(target, spec=spec)), ["sums"], folder=tmp_path)["sums"]
        return [sample["resps"][0][0] for sample in found.samples]

    whole = replies("greedy", [])
    stop = whole[0][13:16]
    cut = [text.partition(stop)[0] for text in whole]
    assert cut != whole
    assert replies("greedy", [stop]) == cut
    assert replies("early-exit[layers=1,k=8]", [stop]) == cut
    assert replies("prompt-lookup", [stop]) == cut


def test_a_rolling_task_gives_the_perplexity_of_the_law(target, tmp_path):
    own_task(
        tmp_path, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{question}}",
        metric_list=[{"metric": "byte_perplexity"}],
    )  # fmt: skip
    found = lm_eval_tasks.run(DecoderLM(a_cell(target)), ["sums"], folder=tmp_path)["sums"]
    total = size = 0.0
    for i in range(4):
        text = f"What is {i} + {i}?"
        tokens = [target.start_token, *target.encode(text, special=False)]
        total += float(target.log_prob([tokens])[0])
        size += len(text.encode())
    assert found.metrics["byte_perplexity,none"].value == pytest.approx(math.exp(-total / size), rel=1e-4)


def test_a_task_without_its_data_is_named(target, tmp_path):
    own_task(tmp_path, dataset_kwargs={"data_files": {"test": str(tmp_path / "gone.jsonl")}})
    with pytest.raises(MissingError, match="lm-eval cannot make sums"):
        lm_eval_tasks.run(DecoderLM(a_cell(target)), ["sums"], folder=tmp_path)


def test_tasks_are_checked_before_anything_is_loaded():
    with pytest.raises(SpecError, match="no such task; did you mean 'arc_easy'"):
        cells(Options(lm_eval_task=["arc_eas"]))
    with pytest.raises(SpecError, match="name one, such as arc_easy"):
        cells(Options(suite=["lm_eval"]))
    found = cells(Options(lm_eval_task=["arc_easy", "sciq"], decoder=["greedy", "top-p"]))
    assert [(c.suite, c.slice, c.decoder) for c in found] == [
        ("lm_eval", "arc_easy", "greedy"), ("lm_eval", "arc_easy", "top-p"),
        ("lm_eval", "sciq", "greedy"), ("lm_eval", "sciq", "top-p"),
    ]  # fmt: skip
