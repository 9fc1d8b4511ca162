"""The contributor's path works as written: tutorial, suite guide, templates, and a third-party package."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models

from decodathlon.harness.commands.command import main
from decodathlon.harness.results import store

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
EXAMPLE = DOCS / "examples" / "decodathlon-top-n-sigma"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_models.save_folder(tmp_path_factory.mktemp("tiny-llama"))


def shell(command, cwd, **environment):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("DECODATHLON_", "PYTEST_"))}
    scripts = str(Path(sys.executable).parent)
    found = inherited | {"PATH": f"{scripts}{os.pathsep}{inherited['PATH']}", "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(["bash", "-c", command], cwd=cwd, env=found, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def written(page, folder):
    """Writes the page's code blocks that begin with a file's name."""
    for code in blocks(page, "python"):
        (folder / re.match(r"# (\S+\.py)\n", code)[1]).write_text(code)


def measured(results, metric):
    with store.connect(results) as connection:
        return dict(connection.execute("SELECT decoder, value FROM latest WHERE metric = ?", [metric]).fetchall())


def with_tiny_model(command, model, results):
    suites = str(ROOT / "suites")
    return f"{command.strip().replace('suites/', suites)} --model {model} --results {results} --gates none"


def test_the_tutorial_leads_from_an_empty_folder_to_a_row_on_the_board(model, tmp_path, monkeypatch):
    page, results = DOCS / "add-a-decoder.md", tmp_path / "r.duckdb"
    new, smoke, quick, board, test, audit = blocks(page, "bash")
    assert "--suite audit --suite ising" in audit
    assert "wrote epsilon.py" in shell(new, tmp_path)
    written(page, tmp_path)
    out = shell(with_tiny_model(smoke, model, results), tmp_path)
    assert "epsilon" in out
    assert set(measured(results, "coverage")) == {"epsilon", "top-p"}
    assert set(measured(results, "ratio_to_greedy")) == {"epsilon", "top-p"}
    collected = shell(with_tiny_model(quick, model, results) + " --collect-only -q", tmp_path)
    assert "epsilon[floor=0.01]-joined" in collected
    assert "2 passed" in shell(test, tmp_path)

    assert board == "decodathlon board\n"
    pytest.importorskip("streamlit")
    from streamlit.testing.v1 import AppTest

    from decodathlon.harness.results import environment

    monkeypatch.setenv(environment.RESULTS_VARIABLE, str(results))
    at = AppTest.from_file(str(ROOT / "leaderboard" / "app.py"), default_timeout=60).run()
    assert not at.exception
    assert ">epsilon<" in at.get("html")[0].proto.body + at.get("html")[1].proto.body
    at.switch_page("views/decoder.py")
    at.query_params["decoder"] = "epsilon"
    at.run()
    assert not at.exception
    said = "\n".join(str(x.value) for kind in ("markdown", "caption") for x in at.get(kind))
    assert "the most probable one always stays" in said
    assert "Hewitt, Manning, Liang 2022" in said


def test_the_suite_guide_measures_and_the_board_understands_it(model, tmp_path):
    page, results = DOCS / "add-a-suite.md", tmp_path / "r.duckdb"
    written(page, tmp_path)
    (command,) = blocks(page, "bash")
    for executor in ("local", "inline"):
        out = shell(f"{command.strip()} --model {model} --results {results} --executor {executor}", tmp_path)
        assert "repetition" in out
    found = measured(results, "repeated_4")
    assert set(found) == {"greedy", "top-p"}
    assert all(0 <= share <= 1 for share in found.values())
    with store.connect(results) as connection:
        about, units = connection.execute(
            "SELECT about->>'$.metrics.repeated_4.meaning', units->'rows' FROM run JOIN metric USING (run_id) "
            "WHERE metric = 'repeated_4' LIMIT 1"
        ).fetchone()
    assert about.startswith("Share of the 4-grams")
    assert "prompt-3" in units


def test_the_example_package_installs_registers_and_passes_its_tests(model, tmp_path):
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is missing: pip install setuptools")
    source, site, results = tmp_path / "source", tmp_path / "site", tmp_path / "r.duckdb"
    shell(f"cp -r {EXAMPLE} {source}", tmp_path)  # a build writes beside its source
    shell(f"{sys.executable} -m pip install -q --no-deps --no-build-isolation --target {site} {source}", tmp_path)
    assert "3 passed" in shell("python -m pytest tests", source, PYTHONPATH=str(site))
    assert "top-n-sigma" in shell("decodathlon list decoders", tmp_path, PYTHONPATH=str(site))
    command = "pytest suites/ --benchmark --decoder top-n-sigma --decoder top-p --scale smoke"
    assert command in (EXAMPLE / "README.md").read_text()
    shell(with_tiny_model(command, model, results), tmp_path, PYTHONPATH=str(site))
    assert set(measured(results, "coverage")) == {"top-n-sigma", "top-p"}


@pytest.mark.parametrize("form", ["sampler", "general"])
def test_a_template_works_as_it_is_on_every_suite(model, tmp_path, form):
    results = tmp_path / "r.duckdb"
    out = shell(f"decodathlon new decoder my-own --form {form} --out mine.py", tmp_path)
    (command,) = re.findall(r"^  (pytest .*)$", out, re.MULTILINE)
    shell(with_tiny_model(command, model, results) + " --seed 3", tmp_path)
    with store.connect(results) as connection:
        rows = connection.execute(
            "SELECT DISTINCT suite, slice, status FROM latest WHERE decoder = 'my-own'"
        ).fetchall()
    choosing = {status for suite, part, status in rows if (suite, part) == ("truthfulqa", "choice")}
    found = {suite: status for suite, part, status in rows if (suite, part) != ("truthfulqa", "choice")}
    by_law = "ok" if form == "sampler" else "unsupported"
    expected = {
        "throughput": "ok",
        "wikitext2": by_law,
        "audit": by_law,
        "ising": by_law,
        "mixing": "unsupported",
        "sets": "ok",
    }
    expected |= dict.fromkeys(("aime25", "math500", "mt_bench", "truthfulqa"), "ok")
    assert found == expected
    assert choosing == {by_law}, "to choose takes a law"
    assert "TODO" not in (tmp_path / "mine.py").read_text()


def test_the_chain_template_draws_what_it_claims(tmp_path):
    out = shell("decodathlon new decoder my-chain --form chain", tmp_path)
    (command,) = re.findall(r"^  (pytest .*)$", out, re.MULTILINE)
    assert command.endswith("--decoder my-chain --suite audit")
    results = tmp_path / "r.duckdb"
    said = shell(f"{command} --suite ising --scale smoke --results {results}", tmp_path)
    with store.connect(results) as connection:
        found = dict(connection.execute("SELECT metric, value FROM latest WHERE suite = 'audit'").fetchall())
    assert found["goodness_p"] > 1e-3
    assert "definition_gap" not in found, "it states no matrix"
    assert "! weak: so few draws would not have shown a distance of 0.05: my-chain" in said


def test_the_general_template_keeps_the_more_probable_of_its_tries(tmp_path, monkeypatch):
    """Against its own draws: by one row's stream, the answer is the best of so many."""
    import torch

    from decodathlon.harness import decoder as decoders
    from decodathlon.harness.decoder import Limits
    from decodathlon.harness.randomness import RowRandom
    from decodathlon.harness.registry import load_builtins, registry
    from decodathlon.harness.targets.toy import enumerable_lm

    load_builtins()
    registry.load_package("decodathlon.harness.commands")
    monkeypatch.setattr(registry, "entries", dict(registry.entries))  # what is added below goes again
    assert main(["new", "decoder", "probe-best", "--form", "general", "--out", str(tmp_path / "probe.py")]) == 0
    registry.load_file(tmp_path / "probe.py")
    lm = enumerable_lm(4)
    one, many = (decoders.build(f"probe-best[tries={n}]") for n in (1, 16))
    means = []
    for decoder in (one, many):
        answers = decoder.generate(lm, [[0]] * 40, Limits(4), RowRandom(0, range(40)))
        for answer in answers:
            exact = float(lm.log_prob([[0, *answer.tokens]])[0])
            assert answer.log_prob == pytest.approx(exact, abs=1e-9)
        means.append(sum(a.log_prob for a in answers) / 40)
    assert means[1] > means[0] + 0.5, "sixteen tries find a far more probable text than one"
    torch.manual_seed(0)
    again = many.generate(lm, [[0]] * 2, Limits(4), RowRandom(0, range(2)))
    assert [a.tokens for a in again] == [
        a.tokens for a in many.generate(lm, [[0]] * 2, Limits(4), RowRandom(0, range(2)))
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["MyDecoder"], "is not kebab-case"),
        (["top-p"], "there is a decoder 'top-p' already"),
        (["fresh", "--out", "nowhere/fresh.py"], "a folder that exists"),
        (["fresh", "--out", "fresh.txt"], "name a .py file"),
    ],
)
def test_bad_names_and_places_are_refused(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["new", "decoder", *words]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_left_as_it_is(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fresh.py").write_text("mine")
    assert main(["new", "decoder", "fresh"]) == 2
    assert "left as it is" in capsys.readouterr().err
    assert (tmp_path / "fresh.py").read_text() == "mine"


def test_links_in_the_pages_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
