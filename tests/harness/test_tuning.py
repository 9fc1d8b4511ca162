"""Tuning: the same budget for all, a study that goes on, and the question-by-question gain over the default."""

import numpy as np
import pytest

from decodathlon.harness import decoder as decoders
from decodathlon.harness import tuning
from decodathlon.harness.bench import Bench
from decodathlon.harness.cells import CellSpec, Outcome
from decodathlon.harness.commands.command import main
from decodathlon.harness.errors import SpecError
from decodathlon.harness.measure.observations import Observations
from decodathlon.harness.registry import load_builtins

load_builtins()
QUESTIONS = [f"q{i}" for i in range(50)]


def first(decoder="top-p"):
    return CellSpec("math500", 1, "all", decoder, "m", "smoke", 0, split="validation", limit=50)


class Bed:
    """Scores top-p by how near p is to 0.8; counts what it measured."""

    def __init__(self, fails=()):
        self.measured, self.fails = [], fails

    def __call__(self, spec):
        self.measured.append(spec.decoder)
        outcome = Outcome(spec, "tuning")
        p = decoders.build(spec.decoder).p
        if any(lo <= p <= hi for lo, hi in self.fails):
            outcome.status, outcome.reason = "failed", "it broke"
            return outcome
        rng = np.random.default_rng(0)
        sums = [float(x) for x in np.clip(rng.normal(0.9 - 3 * abs(p - 0.8), 0.1, len(QUESTIONS)), 0, 1)]
        units = Observations(QUESTIONS, sums, [1.0] * len(sums), share=True)
        found = units.estimate()
        outcome.metrics = [
            {"metric": "pass_at_1", "value": found.value, "ci_low": found.low, "ci_high": found.high, "n": found.n,
             "units": units.as_json()}
        ]  # fmt: skip
        return outcome


def tuned(path, bed, trials=12, method="tpe", decoder="top-p", said=None):
    say = (lambda text: None) if said is None else said.append
    return tuning.tune(
        first(decoder), metric="pass_at_1", method=method, trials=trials, study_file=path, measure=bed, say=say
    )


@pytest.mark.parametrize("method", tuning.METHODS)
def test_the_best_setting_is_found_and_held_against_the_default(tmp_path, method):
    bed = Bed()
    found = tuned(tmp_path / "study", bed, trials=15, method=method)
    assert bed.measured[0] == "top-p", "the default is one of the trials"
    best = decoders.build(found.best.decoder).p
    grid = decoders.build("top-p").info.sweep["p"]
    assert abs(best - 0.8) <= (0.1 if method != "grid" else min(abs(p - 0.8) for p in grid) + 1e-9)
    assert found.best.score.value > found.default.score.value
    assert found.gain.low > 0, "the noise that the settings share cancels"
    assert found.trials <= 15
    assert found.failed == 0


def test_a_grid_measures_every_value_once(tmp_path):
    bed = Bed()
    tuned(tmp_path / "study", bed, trials=100, method="grid")
    assert len(bed.measured) == len(set(bed.measured))
    grid = decoders.build("top-p").info.sweep["p"]
    assert {decoders.build(d).p for d in bed.measured} >= set(grid)


def test_a_study_goes_on_where_it_was_stopped(tmp_path):
    bed, said = Bed(), []
    tuned(tmp_path / "study", bed, trials=5)
    before = list(bed.measured)
    found = tuned(tmp_path / "study", bed, trials=9, said=said)
    assert said[0].startswith("top-p: going on behind 5 trials")
    assert len(set(bed.measured)) == len(bed.measured), "nothing is measured twice"
    assert 5 <= len(before) + 0 <= len(bed.measured) <= 9
    again = tuned(tmp_path / "study", bed, trials=9)
    assert (again.best.decoder, again.gain) == (found.best.decoder, found.gain)


def test_settings_that_fail_are_counted_and_do_not_win(tmp_path):
    found = tuned(tmp_path / "study", Bed(fails=[(0.5, 0.85)]), trials=12)
    assert found.failed > 0
    assert decoders.build(found.best.decoder).p > 0.85
    with pytest.raises(SpecError, match="no setting of top-p has a score: failed: it broke"):
        tuned(tmp_path / "other", Bed(fails=[(0, 1)]), trials=3)


def test_a_setting_that_the_decoder_refuses_is_one_without_a_score(tmp_path, monkeypatch):
    replace = tuning.dataclasses.replace

    def picky(base, **values):
        if values.get("p", 0) > 0.95:
            raise SpecError("p is too much")
        return replace(base, **values)

    monkeypatch.setattr(tuning.dataclasses, "replace", picky)
    bed = Bed()
    found = tuned(tmp_path / "study", bed, trials=100, method="grid")
    over = [p for p in decoders.build("top-p").info.sweep["p"] if p > 0.95]
    assert found.failed == len(over) > 0
    assert all(decoders.build(d).p <= 0.95 for d in bed.measured)


def test_what_cannot_be_tuned_is_named():
    with pytest.raises(SpecError, match="has nothing that is kept for tuning; math500 and truthfulqa have"):
        tuning.check("aime25", None)
    with pytest.raises(SpecError, match="has no better and worse"):
        tuning.check("math500", "answer_tokens")
    with pytest.raises(SpecError, match="greedy has no parameters with a sweep"):
        tuning.space(decoders.build("greedy"))
    assert tuning.check("math500", None) == "pass_at_1"
    assert tuning.check("truthfulqa", "mc2") == "mc2"
    assert tuning.check("wikitext2", None) == "ppl_epsilon"


def test_what_a_suite_cannot_score_is_refused_after_one_look(tmp_path):
    def unsupported(spec):
        outcome = Outcome(spec, "tuning")
        outcome.status, outcome.reason = "unsupported", "it has no law"
        return outcome

    with pytest.raises(SpecError, match="top-p cannot be tuned on math500: unsupported: it has no law"):
        tuned(tmp_path / "study", unsupported)


def test_the_validation_questions_are_no_reported_ones(monkeypatch, tmp_path):
    import tiny_models

    folder = tiny_models.save_folder(tmp_path / "m")
    seen = {}

    def prepared(split, limit):
        spec = CellSpec(
            "math500",
            1,
            "all",
            "greedy",
            "m",
            "smoke",
            0,
            model_spec=str(folder),
            device="cpu",
            split=split,
            limit=limit,
        )
        outcome = Outcome(spec, "x")
        from decodathlon.harness.results.journal import Journal
        from decodathlon.harness.results.lines import Lines

        cell = Bench(say=lambda text: None)._prepare(spec, outcome, None, Journal(None), Lines(None))
        seen[split] = set(cell.text().rows)
        return cell

    assert prepared("validation", 7).sizes["questions"] == 7
    assert prepared("test", 0).sizes["questions"] == 2
    assert not seen["validation"] & seen["test"]
    ids = {
        CellSpec("s", 1, "all", "d", "m", "smoke", 0, split=s, limit=n).cell_id for s, n in (("test", 0), ("test", 5))
    }
    assert len(ids) == 2


def test_bad_options_are_refused_before_anything_is_loaded(capsys):
    base = ["tune", "--suite", "math500", "--decoder", "top-p"]
    for words, message in (
        (["--trials", "0"], "--trials 0: at least 1"),
        (["--validation", "-1"], "--validation -1: at least 1"),
        (["--suite", "wikitext2", "--validation", "1"], "--validation 1: of a text at least 64 tokens"),
        (["--slice", "nope"], "--slice nope: math500 has all"),
        (["--decoder", "greedy"], "there is nothing to tune"),
    ):
        assert main([*base, *words]) == 2
        assert message in capsys.readouterr().err


def test_a_metric_that_is_not_reported_ends_it_at_once(tmp_path):
    class Other(Bed):
        def __call__(self, spec):
            outcome = super().__call__(spec)
            outcome.metrics[0] |= {"metric": "bleu_acc"}
            return outcome

    bed = Other()
    with pytest.raises(SpecError, match=r"does not report .* for top-p; --metric bleu_acc"):
        tuned(tmp_path / "study", bed, trials=10)
    assert len(bed.measured) == 1


def test_ctrl_c_keeps_the_trials_and_says_so(monkeypatch, tmp_path, capsys):
    def pressed(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "tune", pressed)
    study = str(tmp_path / "a.journal")
    assert main(["tune", "--suite", "math500", "--decoder", "top-p", "--scale", "smoke", "--study", study]) == 130
    said = capsys.readouterr()
    assert f"The trials so far are in {study}; the same command goes on with them." in said.out
    assert "interrupted" in said.err
    assert "Traceback" not in said.out + said.err


def test_who_says_something_of_fewer_questions_has_not_won(tmp_path):
    """A law that decides one question of fifty, and that one rightly, is no better than the default."""

    class Skips(Bed):
        def __call__(self, spec):
            outcome = super().__call__(spec)
            if decoders.build(spec.decoder).p < 0.85:
                units = Observations.questions(QUESTIONS[:1], [1.0])
                outcome.metrics[0] |= {"value": 1.0, "ci_low": None, "ci_high": None, "n": 1, "units": units.as_json()}
            return outcome

    found = tuned(tmp_path / "study", Skips(), method="grid", trials=10)
    assert decoders.build(found.best.decoder).p >= 0.85
    assert found.failed > 0


def test_a_study_of_other_questions_is_another_one(tmp_path):
    for basis in ("own", "real"):
        bed = Bed()
        tuning.tune(first(), metric="pass_at_1", method="random", trials=3, study_file=tmp_path / "study",
                    measure=bed, say=lambda text: None, basis=basis)  # fmt: skip
        assert bed.measured[0] == "top-p", "the default is measured on these questions, too"
