"""The scripts that make the findings, at sizes that take seconds."""

import csv
import importlib.util
import re
import types
from pathlib import Path

import made_results
import numpy as np
import pytest
import torch

from decodathlon.harness.measure.observations import Observations
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.results import store
from decodathlon.harness.results.measured import Measured, Number
from decodathlon.harness.targets import toy

load_builtins()
SCRIPTS = Path(__file__).parents[1] / "scripts"


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def factorial(monkeypatch, tmp_path):
    made = script("mcmc_factorial")
    small = {
        "WEIGHTS": ("iw",),
        "NORMS": (1,),
        "SIZES": (64.0,),
        "TEMPERATURES": (0.21,),
        "TRIES": (1, 4),
    }
    for name, value in small.items():
        monkeypatch.setattr(made, name, value)
    monkeypatch.setattr(made, "FIGURE", tmp_path / "figure.svg")
    return made


def test_the_factorial_measures_gaps(factorial):
    """One try at alpha 64 has a gap of 0.392."""
    one, four = factorial.measured()
    assert one["gap"] == pytest.approx(0.392, abs=0.0005)
    assert four["gap"] > one["gap"]
    assert four["gap_per_evaluation"] < one["gap_per_evaluation"]


def test_figures_are_drawn(factorial):
    pytest.importorskip("vl_convert")
    factorial.draw([{k: str(v) for k, v in row.items()} for row in factorial.measured()])
    assert factorial.FIGURE.read_text().startswith("<svg")


def test_the_published_factorial_is_whole():
    made = script("mcmc_factorial")
    with made.TABLE.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(made.TEMPERATURES) * len(made.NORMS) * len(made.SIZES) * len(made.WEIGHTS) * len(made.TRIES)
    (one,) = [
        r for r in rows if (r["beta"], r["p"], r["alpha"], r["weight"], r["tries"]) == ("0.21", "1", "64.0", "iw", "1")
    ]
    assert float(one["gap"]) == pytest.approx(0.392, abs=0.0005)


def test_under_a_length_reward_the_chain_comes_nearer_than_truncated_gibbs():
    made = script("length_reward")
    lm = toy.enumerable_lm()
    way = made.Toy(lm, [lm.start_token], room=4, answers=400, budget=4, goal=4, beta=0.5)
    exact = way.exact("qalign[reward=length:4,beta=0.5]")
    assert sum(exact.values()) == pytest.approx(1.0)
    far, chain = (made.distance(made.shares(x), exact) for x in (way.truncated("aligned"), way.chain("qalign", 24)))
    assert chain < 0.1 < far


@pytest.fixture(scope="module")
def verdict():
    return script("reservoir_verdict")


def beside(name, ratio, worse, noise=0.002):
    """A setting's two cells: so much faster than ancestral sampling, so many nats worse in its mixture."""
    rng = np.random.default_rng(len(name))
    pairs, windows = [f"pair-{i}" for i in range(10)], [f"window-{i}" for i in range(16)]
    common = {"suite_version": 1, "scale": "quick", "decoder": name, "model": "m", "dtype": "d", "device": "cpu",
              "dataset": "t", "seed": 0, "status": "ok", "reason": ""}  # fmt: skip

    def number(units):
        return Number(units.estimate(), "1", "higher", units)

    def speed(value):
        return number(Observations.each(pairs, list(np.log(value) + rng.normal(0, noise, 10)), scale="exp"))

    nats = np.random.default_rng(0).normal(3.2, 0.3, 16) + worse
    text = Observations(windows, list(100 * nats), [100] * 16, scale="exp")
    speeds = {"ratio_to_baseline": speed(ratio), "ratio_to_self": speed(1.0)}
    return [
        Measured(name + "s", "throughput", slice="batch-4", metrics=speeds, **common),
        Measured(name + "t", "wikitext2", slice="joined", metrics={"ppl_mixture": number(text)}, **common),
    ]


@pytest.mark.parametrize(
    ("ratio", "worse", "noise", "expected"),
    [
        (1.0, -0.02, 0.002, ("holds", "fails")),  # some 0.5 less perplexity at the same speed
        (1.4, 0.0, 0.002, ("fails", "holds")),  # faster at the very same perplexity
        (0.95, 0.0, 0.002, ("fails", "fails")),  # slower, and nothing gained
        (1.0, -0.02, 0.1, ("not decided", "fails")),  # too noisy to call the speed the same
        (1.0, 1.0, 0.002, ("fails", "fails")),
    ],
)
def test_a_criterion_of_the_note_holds_only_where_intervals_say_so(verdict, ratio, worse, noise, expected):
    cells = [*beside("temperature", 1.0, 0.0), *beside("reservoir", ratio, worse, noise)]
    found = verdict.judged(cells, ["reservoir", "reservoir[size=8]"])
    assert (found["reservoir"]["quality"], found["reservoir"]["speed"]) == expected
    assert set(found["reservoir[size=8]"].values()) == {"not measured"}
    (row, _) = verdict.rows(cells, ["reservoir", "temperature"])
    assert row["ratio_to_temperature"] == pytest.approx(ratio, rel=0.1)
    assert (row["ppl_mixture_less"] == 0) == (worse == 0)


def test_the_note_has_36_settings(verdict):
    assert len(verdict.settings()) == 36


def test_a_reservoir_keeps_all_of_a_law_that_stays_and_loses_the_likeliest_token_where_laws_jump():
    held = script("reservoir_kept").held
    law = torch.linspace(0, 5, 200)[None]
    assert held([law] * 20, 8, cross=False) == (1.0, 1.0, 1.0)
    # what was likely is unlikely at the next step and back again behind it: nothing of it may come straight back
    jumps = [law if step % 2 else law.flip(1) for step in range(20)]
    found = held(jumps, 8, cross=True)
    assert found.kept < 0.1
    assert found.greatest > 100


def test_the_regret_of_bandits_is_that_against_the_best_rule(monkeypatch, tmp_path, capsys):
    made = script("bandit_regret")
    monkeypatch.setattr(made, "TABLE", tmp_path / "table.csv")
    monkeypatch.setattr(made, "FIGURE", tmp_path / "figure.svg")
    made.main(["--cycles", "100", "--runs", "1"])
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(made.WAYS) * 2  # two rewards, after 50 and 100 cycles
    assert "best" in capsys.readouterr().out
    assert (tmp_path / "figure.svg").stat().st_size > 1000
    # who always pulls the best rule loses nothing, but for the noise of its own rewards
    arms = made.arms("blend", 4000)
    best = max(arms, key=arms.get)
    rule = made.bandits.arms(made.LONGEST, laws=True)[list(arms).index(best)]
    own = made.cycles(rule, "blend", 4000, 5)
    assert abs(np.mean(own) - arms[best]) < 4 * np.std(own) / np.sqrt(4000)


def test_greedy_identity_tells_texts_that_part(monkeypatch, capsys):
    made = script("greedy_identity")
    target = toy.enumerable_lm(8)
    monkeypatch.setattr(made.models, "load", lambda *args, **more: target)
    monkeypatch.setattr(made, "prompts", lambda *args: [[[0, 2, 3], [0, 4]], [[0, 5]]])
    assert made.main(["--tokens", "8", "--decoder", "quantised-self", "--decoder", "early-exit"]) == 0
    assert "0 of 3 texts differ" in capsys.readouterr().out
    monkeypatch.setattr(made, "answers", lambda target, spec, batch, tokens: [[spec == "greedy"] * tokens] * len(batch))
    assert made.main(["--tokens", "8", "--decoder", "quantised-self"]) == 1
    assert "3 of 3 texts differ, gaps" in capsys.readouterr().out
    for wrong, error in ((["--decoder", "top-p"], "top-p claims shaped"), (["--prompts", "0"], "at least 1")):
        with pytest.raises(SystemExit):
            made.main(wrong)
        assert error in capsys.readouterr().err
    names = made.specs()
    assert {"prompt-lookup", "layer-skip", "structured-self", "multi-level"} <= set(names)
    assert not {"hf-assisted", "draft-model", "temperature"} & set(names)


def test_a_model_without_layers_is_a_model_of_its_own(tmp_path, capsys):
    from decodathlon.harness import models
    from tests.tiny_models import save_folder

    made = script("drop_layers")
    source, out = str(save_folder(tmp_path / "whole")), tmp_path / "less"
    assert made.main([source, str(out), "--drop", "1-2"]) == 0
    assert "2 of 4 layers" in capsys.readouterr().out
    less, whole = (
        models.load(models.resolve(str(p)), device="cpu", dtype="bfloat16", say=lambda text: None)
        for p in (out, source)
    )
    kept = [whole.model.model.layers[i].mlp.down_proj.weight for i in (0, 3)]
    assert all(torch.equal(a, b.mlp.down_proj.weight) for a, b in zip(kept, less.model.model.layers, strict=True))
    assert torch.equal(less.model.model.embed_tokens.weight, whole.model.model.embed_tokens.weight)
    wrong = {
        "9": "layers 0 to 3, not 9",
        "0-3": "no layer left",
        "x": "not 'x'",
        "1": "not an empty",
        "3-1": "backwards",
    }
    for drop, error in wrong.items():
        assert made.main([source, str(out if drop == "1" else tmp_path / "other"), "--drop", drop]) == 2
        assert error in capsys.readouterr().err


def test_the_table_of_speculative_decoders_is_that_of_the_results(tmp_path, capsys):
    made = script("speculative_verdict")
    row = {f"{made.RATIO} low": 0.9, f"{made.RATIO} high": 2.5, made.WHOLE: 1.5}
    rows = [
        row | {"decoder": "a", "slice": kind, made.RATIO: 2.0 if i % 2 else 0.5} for i, kind in enumerate(made.KINDS)
    ]
    rows += [row | {"decoder": "b", "slice": "qa", made.RATIO: 3.0}]
    table = made.across(rows)
    assert [line[:2] for line in table[1:]] == [["a", "1.00"], ["b", made.DASH]]
    assert table[2][1 + 1 + made.KINDS.index("qa")] == "3.00 [0.90, 2.50]"
    few = [{"decoder": "c", "slice": "qa", made.RATIO: 1.0, f"{made.RATIO} low": None, f"{made.RATIO} high": None}]
    assert "1.00" in made.across(few)[1]
    old = [few[0] | {made.RATIO: None, made.WHOLE: 1.5, f"{made.WHOLE} low": 1.0, f"{made.WHOLE} high": 2.0}]
    assert f"1.50 [1.00, 2.00]{made.MARK}" in made.across(old)[1]
    empty = tmp_path / "empty.duckdb"
    store.ingest(empty, [])
    with pytest.raises(SystemExit, match="no rows of drafting decoders"):
        made.main(["--results", str(empty), "--out", str(tmp_path)])


def drafting_row(decoder, slice_, ratio, baseline="dflash"):
    return {"decoder": decoder, "slice": slice_, "baseline": baseline, "numbers": {"ratio_to_baseline": ratio}}


def test_the_backlog_of_dflash_says_who_is_faster(tmp_path):
    made = script("dflash_backlog")
    slow, fast, open_ = (0.8, 0.7, 0.9), (1.2, 1.1, 1.3), (1.0, 0.9, 1.1)

    def verdict(*ratios, **noise):
        return made.verdict([{"ratio_to_baseline": ratio, **noise} for ratio in ratios])

    assert verdict(slow, slow) == "slower"
    assert verdict(fast) == "faster"
    assert verdict(open_, open_) == "no difference seen"
    assert verdict(slow, fast, open_) == "faster on 1 of 3, slower on 1 of 3"
    assert verdict() == "not measured"
    assert verdict((1.0, None, None)) == "too few prompts"
    assert verdict(fast, ratio_to_self=(1.02, 0.97, 1.06)) == "faster"
    assert verdict(fast, ratio_to_self=(0.9, 0.85, 0.94)) == "no difference seen", "it is slower than itself"
    assert verdict((1.02, 1.01, 1.03), ratio_to_self=(0.97, 0.9, 1.1)) == "no difference seen", "less than the noise"
    rows = [
        drafting_row("ddtree", "math500", fast), drafting_row("ddtree", "mt_bench", slow, baseline="dflash[block=1]"),
        drafting_row("dflash[draft_steps=2]", "mt_bench", slow),
    ]  # fmt: skip
    ideas = [
        {"name": "tree", "note": "4 %", "decoders": ["ddtree", "dflash-tree"], "why": "wide"},
        {"name": "steps", "note": "1.2", "decoders": ["dflash[draft_steps=2]"], "why": "unseen"},
    ]
    assert made.backlog(ideas, rows) == [
        ["idea", "the note", "decoder", "math500", "mt_bench", "verdict", "why"],
        ["tree", "4 %", "`ddtree`", "1.20 [1.10, 1.30]", made.DASH, "faster", "wide"],
        ["", "", "`dflash-tree`", made.DASH, made.DASH, "not measured", ""],
        ["steps", "1.2", "`dflash[draft_steps=2]`", made.DASH, "0.80 [0.70, 0.90]", "slower", "unseen"],
    ]
    warm = [{"name": "rounds", "note": "", "decoders": ["ddtree"], "why": "", "beside": "dflash[block=1]"}]
    assert made.backlog(warm, rows)[1][3:5] == ["0.80 [0.70, 0.90]", "slower"]
    told = made.commands([*ideas, *warm])
    assert len(told) == 2 * 3 + 1
    assert "--workload problems -k 'math500' --baseline 'dflash' --decoder 'ddtree' --decoder 'dflash-tree'" in told[1]
    assert made.speeds(rows)[1][0] == "`ddtree`"
    assert made.speeds(rows)[1][-2:] == ["1.20 [1.10, 1.30] to `dflash`", made.DASH]
    by_token = {"ratio_to_baseline(per token)": open_, "ratio_to_greedy(per token)": slow, "greedy_match": (0.3,)}
    rows[0]["numbers"] |= by_token  # its texts were shorter, and that is no speed
    assert made.backlog(ideas, rows)[1][3:6] == ["1.00 [0.90, 1.10]", made.DASH, "no difference seen"]
    assert made.speeds(rows)[1][5::2] == ["0.80 [0.70, 0.90]", "1.00 [0.90, 1.10] to `dflash`"]
    assert made.speeds(rows)[1][-1] == "30%"
    found = made.curve([("context-64", f"verify_cost({n})", v) for n, v in ((8, 1.27), (16, 1.5))])
    assert found == [["text before", "8", "16"], ["context-64", "1.27", "1.50"]]
    here = {"model": "m", "dtype": "bfloat16", "hardware": "one", "scale": "quick", "seed": 0}
    several = [here | {"run_id": "2"}, here | {"run_id": "3", "hardware": "two"}, here | {"run_id": "1"}]
    assert [r["run_id"] for r in made.of_one_setting(several, "m", "quick", None)] == ["3"]
    assert [r["run_id"] for r in made.of_one_setting(several, "m", "quick", "one")] == ["2", "1"]
    assert made.of_one_setting(several, "m", "full", None) == []
    from decodathlon.harness.results import table

    page = "a\n<!-- backlog -->\nold\n<!-- end of backlog -->\nb"
    assert table.rewritten(page, "backlog", [["x", "y"], ["1", "2"]]).splitlines() == [
        "a", "<!-- backlog -->", "| x | y |", "|---|---|", "| 1 | 2 |", "<!-- end of backlog -->", "b",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="has no <!-- curve -->"):
        table.rewritten(page, "curve", [])
    numbers = {"tau": (1.9, 1.8, 2.0), "tau(without loops)": (1.7, 1.6, 1.8), "looping_share": (0.25, None, None)}
    straight = {"tau": (2.0, None, None), "looping_share": (0.0, None, None), "ratio_to_greedy": (1.2, 1.1, 1.3)}
    dash = made.DASH
    assert made.card(
        [
            {"decoder": "dflash", "slice": "mt_bench", "run_id": "1", "numbers": straight},
            {"decoder": "dflash", "slice": "math500", "run_id": "1", "numbers": numbers},
            {"decoder": "ddtree", "slice": "math500", "run_id": "1", "numbers": straight},
        ]
    )[1:] == [
        ["math500", "1.90 [1.80, 2.00]", "1.70 [1.60, 1.80]", "1.90 [1.80, 2.00]", dash, "0.25", dash],
        ["mt_bench", "2.00", "2.00", "2.00", dash, "0.00", "1.20 [1.10, 1.30]"],
    ]


def test_what_drafting_costs_stands_beside_its_share_of_bytes(capsys):
    small = ["--layers", "4", "--width", "128", "--vocabulary", "1000", "--drafter-layers", "1", "--block", "4"]
    made = script("dflash_draft_cost")
    made.main([*small, "--text", "16", "--turns", "6", "--device", "cpu"])
    told = capsys.readouterr().out
    # a layer, what brings one hidden state to the width, and the head, of four layers and the head; with all norms
    layer, fc, head = 13 * 128 * 128 + 4 * 128, 128 * 128, 128 * 1000
    share = (layer + fc + head + 2 * 128) / (4 * layer + head + 128)
    assert re.search(r"^cpu: drafting [\d.]+ ms, verifying [\d.]+ ms, ratio [\d.]+ \[", told), told
    assert f"bytes {share:.2f}" in told
    with pytest.raises(SystemExit):
        made.main(["--turns", "5"])


def test_every_idea_of_the_backlog_names_decoders_that_there_are():
    import tomllib

    from decodathlon.harness import decoder as decoders

    ideas = tomllib.loads((SCRIPTS.parent / "docs" / "findings" / "dflash.toml").read_text())["idea"]
    for idea in ideas:
        assert set(idea) - {"beside"} == {"name", "note", "decoders", "why"}
        for spec in (*idea["decoders"], idea.get("beside", "dflash")):
            assert decoders.build(spec).spec == spec


def test_what_parts_predict_of_a_packed_model(monkeypatch):
    """Ten tokens behind the first: a tenth of the plain time for that, 0.09 s for each of the others."""
    monkeypatch.syspath_prepend(SCRIPTS)
    made = script("packed_speed")
    beside = made.Beside.__new__(made.Beside)
    beside.tokens, beside.first, beside.wide = 11, 0.1, 1.5
    turn = made.Turn(plain=1.0, other=0.0, all_bits=0.2, first_bits=0.05)
    greedy, drafted = (types.SimpleNamespace(target_calls=n, draft_calls=d) for n, d in ((11, 0), (5, 8)))
    assert beside.predicted(turn, greedy) == pytest.approx(1 / (1 + 11 * 0.2))
    first, wide, draft = 0.1 + 0.2, 0.09 * 1.5 + 0.2, 0.09 + 0.05
    assert beside.predicted(turn, drafted) == pytest.approx(1 / (first + 4 * wide + 8 * draft))


def test_first_bits_stand_beside_the_plain_model(tmp_path):
    results = made_results.demo(tmp_path / "r.duckdb")
    made = script("first_bits_verdict")
    head, line = made.lines(results, "tiny")
    assert line[0] == "tiny"
    assert line[head.index("tokens/s")] == "50.0 [50.0, 50.0]"
    assert line[head.index("perplexity")] == "–", "greedy search is no law to have one by"
    assert made.lines(results, "tin") == [head], "another model, which is called so"


def test_experts_are_read_or_dropped(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    made = script("experts_on_disk")
    small = {"SHARES": (0.0, 1.0), "DECODERS": ("greedy", "self-delta[k=1]"), "PRUNED": (0.5,), "TOKENS": 8}
    for name, value in small.items():
        monkeypatch.setattr(made, name, value)
    text = " ".join(f"word{i % 97} and {i % 13}" for i in range(4000))
    tokenizer = made.tokenizer_of(text)
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    made.trained(tokens, 30).save_pretrained(tmp_path / "mixture")
    tokenizer.save_pretrained(tmp_path / "mixture")
    made.pack.pack(tmp_path / "mixture", tmp_path / "packed", "nested", [].append)
    little, all_of_it = made.reading(tmp_path / "packed", [tokens[:16].tolist(), tokens[100:116].tolist()])
    fetched = [[int(cell.split(" kB")[0]) for cell in line[1:]] for line in (little, all_of_it)]
    assert fetched[0][0] > fetched[1][0]
    whole, half = made.dropping(tmp_path / "mixture", tmp_path, tokens[:512], tokens[:1024])
    assert half[0] == "8 of 16"
    assert float(half[3]) > float(whole[1])
    assert float(half[3]) > float(half[1])
