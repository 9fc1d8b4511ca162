"""A decoder's parameters from a file: what it takes, what it leaves aside, and what it says of a bad one."""

import re
from pathlib import Path

import pytest
import yaml

from decodathlon.harness import decoder as decoders
from decodathlon.harness import decoder_config
from decodathlon.harness.commands.command import main
from decodathlon.harness.errors import SpecError
from decodathlon.harness.registry import load_builtins, registry

load_builtins()
EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "persistent-smc-steps.yaml"
NAME = "persistent-smc-steps"


def written(tmp_path, content):
    file = tmp_path / "some.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return file


def test_the_example_is_the_default():
    """So that the file shows what the decoder does anyway."""
    assert decoder_config.applied(EXAMPLE, [NAME]) == ([NAME], [])


def test_values_become_parameters_and_the_spec_string_has_the_last_word(tmp_path):
    file = written(tmp_path, {"generation": {"n_particles": 4}, "ps": {"snapshot_pool": {"enabled": False}}})
    (spec, other), aside = decoder_config.applied(file, [f"{NAME}[generation.n_particles=16,tau=2]", "top-p"])
    assert (other, aside) == ("top-p", [])
    one = decoders.build(spec)
    assert (one.n_particles, one.tau, one.pool) == (16, 2.0, False)
    (spec,), _ = decoder_config.applied(file, [NAME])
    assert spec == f"{NAME}[n_particles=4,pool=false]"


def test_the_notes_own_sections_are_known_and_left_aside(tmp_path):
    content = {"system": {"seed": 42}, "logging": {"log_ess": True}, "models": {"generator": {"model_path": "x"}},
               "generation": {"stop_tokens": [], "max_steps": 3}, "tuning": {"enabled": False}}  # fmt: skip
    (spec,), aside = decoder_config.applied(written(tmp_path, content), [NAME])
    assert spec == f"{NAME}[max_steps=3]"
    assert sorted(aside) == ["generation.stop_tokens", "logging", "models.generator", "system"]


def test_numbers_as_yaml_reads_them(tmp_path):
    """1e-4 without a point is a word to YAML, and the note writes it so."""
    file = written(tmp_path, "ps:\n  temperature_schedule:\n    bisection_tol: 1e-6\nscoring:\n  params:\n    tau: 2\n")
    one = decoders.build(decoder_config.applied(file, [NAME])[0][0])
    assert (one.bisection_tol, one.tau) == (1e-6, 2.0)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_section_that_is_not_enabled_counts_as_not_there(tmp_path, enabled):
    content = {"models": {"prm": {"enabled": enabled, "model_path": str(tmp_path)}}}
    (spec,), _ = decoder_config.applied(written(tmp_path, content), [NAME])
    assert spec == (f"{NAME}[prm={tmp_path}]" if enabled else NAME)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"ps": {"resample": {"alpha_start": 1.5}}}, r"ps.resample.alpha_start = 1.5: .*less than or equal to 1"),
        ({"generation": {"n_particles": "many"}}, "generation.n_particles = 'many': .*integer"),
        ({"generation": {"n_particels": 4}}, "there is no 'generation.n_particels'.*generation.n_particles"),
        ({"genration": {}}, "there is no 'genration'"),
        ({"ps": {"resample": {"method": "best"}}}, "ps.resample.method = 'best': .*'systematic'"),
        ({"generation": 3}, "generation = 3"),
        ({"scoring": {"type": "prm_reward"}}, "some.yaml: .*score=prm_reward needs a process reward model"),
        ({"models": {"prm": {"model_path": "x,n_particles=3"}}}, "may not be empty or hold any of"),
        ({"models": {"prm": {"model_path": ""}}}, "may not be empty or hold any of"),
        ({"models": {"prm": {"enabled": "maybe"}}}, "models.prm.enabled = 'maybe'"),
        ({"generation": {"n_particles": True}}, "generation.n_particles = True: .*a number is wanted"),
        ({"ps": {"snapshot_pool": {"enabled": 0}}}, "ps.snapshot_pool.enabled = 0: .*valid boolean"),
        ({"ps.resample.method": "topN"}, "there is no 'ps.resample.method'; write it as sections"),
        ("a: 2020-13-45", "is not YAML"),
        ("[" * 3000, "is not YAML"),
        ("a: [", "is not YAML"),
        ("- a\n", "it must be a mapping with sections, not list"),
        ("", "it must be a mapping with sections, not NoneType"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, content, message):
    with pytest.raises(SpecError, match=message):
        decoder_config.applied(written(tmp_path, content), [NAME])


def test_files_and_decoders_that_are_not_there(tmp_path):
    with pytest.raises(SpecError, match=f"{tmp_path}/none.yaml: No such file"):
        decoder_config.applied(tmp_path / "none.yaml", [NAME])
    with pytest.raises(SpecError, match=f"name a decoder that reads such a file: --decoder .*{NAME}"):
        decoder_config.applied(EXAMPLE, ["top-p"])
    with pytest.raises(SpecError, match="name a decoder that reads such a file"):
        decoder_config.applied(EXAMPLE, [])


def test_the_search_space_is_the_notes():
    found = decoder_config.tuning(EXAMPLE, registry.get("decoder", NAME))
    assert (found.method, found.trials, found.validation) == ("random", 100, 50)
    assert found.space == {"alpha_start": [0.3, 0.5, 0.7], "alpha_end": [0.6, 0.8, 0.9], "tau": [0.5, 1.0, 2.0]}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"search_space": {"ps.resample.alpha": [1]}}, "no 'ps.resample.alpha'.*ps.resample.alpha_end"),
        ({"search_space": {"scoring.params.tau": 1}}, "search_space.scoring.params.tau = 1: .*valid list"),
        ({"search_space": {"scoring.params.tau": []}}, "search_space.scoring.params.tau = .*at least 1 item"),
        ({"search_space": {"scoring.params.tau": [0]}}, "scoring.params.tau = 0: .*greater than 0"),
        ({"search_space": {"scoring.params.tau": ["a"]}}, "scoring.params.tau = 'a': .*valid number"),
        ({"search_space": {"ps.resample.method": ["best"]}}, "ps.resample.method = 'best': .*'systematic'"),
        ({"search_space": [1]}, "search_space = .*valid dictionary"),
        ({"method": "magic"}, "method = 'magic': .*'grid', 'random', 'bayesian'"),
        ({"n_trials": 0}, "n_trials = 0: .*greater than or equal to 1"),
        ({"n_trials": True}, "n_trials = True: .*valid integer"),
        ({"trials": 3}, "there is no 'trials'"),
        (3, "tuning.* = 3"),
    ],
)
def test_a_bad_search_space_is_named(tmp_path, section, message):
    with pytest.raises(SpecError, match=message):
        decoder_config.tuning(written(tmp_path, {"tuning": section}), registry.get("decoder", NAME))


def test_a_section_on_tuning_may_be_switched_off(tmp_path):
    file = written(tmp_path, {"tuning": {"enabled": False, "n_trials": 5}})
    assert decoder_config.tuning(file, registry.get("decoder", NAME)) == ({}, None, None, None)


def test_tune_takes_space_trials_and_questions_from_the_file(monkeypatch, tmp_path, capsys):
    from decodathlon.harness import tuning

    asked = {}

    def stop(first, **options):
        asked.update(options, decoder=first.decoder, limit=first.limit)
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "tune", stop)
    words = ["tune", "--suite", "math500", "--decoder", NAME, "--decoder-config", str(EXAMPLE), "--scale", "smoke"]
    assert main([*words, "--trials", "7", "--study", str(tmp_path / "a.journal")]) == 130
    assert (asked["trials"], asked["method"], asked["limit"]) == (7, "random", 50)
    assert asked["ranges"]["tau"] == [0.5, 1.0, 2.0]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("ps:\n  answer: best\nps:\n  answer: vote\n", "'ps' is there twice, line 3"),
        ("generation:\n  max_steps: 3\n  max_steps: 4\n", "'max_steps' is there twice, line 3"),
        ("system: &a [x]\nlogging: *a\n", "anchors and aliases are not taken, line 1"),
        ("generation: {max_steps: 0x" + "f" * 6000 + "}", "a number of more than 64 bits"),
        ("tuning: {search_space: {models.prm.model_path: ['a,b=[']}}", "may not be empty or hold any of"),
    ],
    ids=["section", "key", "anchor", "huge", "search-space"],
)
def test_files_that_would_lose_something_or_stand_for_too_much_are_refused(tmp_path, text, error):
    path = written(tmp_path, text)

    def both():
        decoder_config.applied(path, [NAME])
        decoder_config.tuning(path, registry.get("decoder", NAME))

    with pytest.raises(SpecError, match=re.escape(error)):
        both()
