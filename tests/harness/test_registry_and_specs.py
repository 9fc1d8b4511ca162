"""Names and spec strings: they round-trip, and every mistake is a usage error that names the nearest valid thing."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest

from decodathlon import Sampler, decoder
from decodathlon.harness import cells, models, plan, spec
from decodathlon.harness import decoder as decoders
from decodathlon.harness.errors import MissingError, SpecError
from decodathlon.harness.registry import Registry, load_builtins, registry

load_builtins()


@pytest.mark.parametrize(
    "text",
    ["greedy", "top-p", "top-p[p=0.8]", "top-p[p=1,temperature=0.7]", "top-k[k=7]", "hf-generate[sample=true]"],
)
def test_specs_round_trip(text):
    built = decoders.build(text)
    assert built.spec == text
    assert decoders.build(built.spec) == built


def test_defaults_and_order_and_spaces_do_not_matter():
    assert decoders.build("top-p[ temperature = 0.7 , p=0.95 ]").spec == "top-p[temperature=0.7]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("top-q", "no decoder 'top-q'; did you mean 'top-[kp]'"),
        ("top-p[q=1]", "has no parameter 'q'"),
        ("top-p[temprature=1]", "did you mean 'temperature'"),
        ("top-p[p=2]", r"p=2 is outside \(0, 1\]"),
        ("top-p[p=nan]", r"p=nan is outside \(0, 1\]"),
        ("top-p[p=0]", r"p=0 is outside \(0, 1\]"),
        ("temperature[temperature=0]", r"is outside \[0.01, 100\]"),
        ("top-k[k=1.5]", "k=1.5 is not a whole number"),
        ("hf-generate[sample=maybe]", "is not true or false"),
        ("top-p[p]", "'p' is not of the form key=value"),
        ("top-p[p=0.5,p=0.6]", "'p' is given twice"),
        ("top-p[p=0.5", "not of the form name"),
        ("", "not of the form name"),
    ],
)
def test_mistakes_are_named(text, message):
    with pytest.raises(SpecError, match=message):
        decoders.build(text)


def test_claims_may_depend_on_parameters():
    assert decoders.build("temperature").claim == "exact"
    assert decoders.build("temperature[temperature=0.5]").claim == "shaped"
    assert decoders.build("hf-generate").claim == "greedy-exact"


def test_sweeps_move_one_parameter_at_a_time():
    assert [d.spec for d in decoders.swept(decoders.build("top-p"))] == [
        "top-p", "top-p[p=0.8]", "top-p[p=0.9]", "top-p[p=0.98]",
    ]  # fmt: skip


def test_a_name_belongs_to_one_source():
    own = Registry()
    own.add("decoder", "x", 1, "a.py")
    own.add("decoder", "x", 2, "a.py")  # the same file again, as pytest imports suites twice
    with pytest.raises(SpecError, match=r"defined twice: in a.py and in b.py"):
        own.add("decoder", "x", 3, "b.py")
    own.add("reward", "x", 3, "b.py")  # another kind is another name space
    with pytest.raises(SpecError, match="not kebab-case"):
        own.add("decoder", "Top_P", 1, "a.py")
    with pytest.raises(SpecError, match="not snake_case"):
        own.add("metric", "top-p", 1, "a.py")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"claim": "perfect"}, "claim 'perfect' is not one of exact"),
        ({"claim": "exact", "sweep": {"q": [1]}}, "'q' in sweep or bounds is not a parameter"),
        ({"claim": "exact", "bounds": {"p": "(0, 1]"}, "sweep": {"p": [0.0]}}, r"sweep p=0.0 is outside \(0, 1\]"),
    ],
)
def test_a_plugin_author_learns_what_is_wrong(options, message):
    with pytest.raises(SpecError, match=message):

        @decoder("broken", **options)
        class Broken(Sampler):
            p: float = 0.5

    assert "broken" not in registry.names("decoder")


def test_intervals_are_read_as_mathematics_writes_them():
    assert 1 in spec.interval("(0, 1]")
    assert 0 not in spec.interval("(0, 1]")
    assert 1 not in spec.interval("[0, 1)")
    assert 1e300 in spec.interval("(0, inf)")
    with pytest.raises(ValueError, match="not an interval"):
        spec.interval("0..1")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("smollm2-135m-instrct", SpecError, "did you mean 'smollm2-135m-instruct'"),
        ("qwen3-5b", SpecError, "did you mean 'qwen3-"),
        ("smollm2-135m-instruct[load=fp3]", SpecError, "load=fp3 is not one of full, nf4, int8"),
        ("stories-260k", SpecError, "write stories-260k\\[path=FOLDER\\]"),
    ],
)
def test_models_that_do_not_exist_are_named(text, error, message, monkeypatch):
    monkeypatch.delenv("DECODATHLON_MODELS", raising=False)
    with pytest.raises(error, match=message):
        models.resolve(text)


def test_model_folders_are_looked_into(tmp_path):
    with pytest.raises(MissingError, match=r"has no config\.json"):
        models.resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MissingError, match=r"no \.safetensors file"):
        models.resolve(str(tmp_path))
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(MissingError, match="pickles can run code"):
        models.resolve(str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    assert models.resolve(str(tmp_path)).kind == "folder"
    other = tmp_path / "weights.pt"
    other.touch()
    with pytest.raises(SpecError, match=r"only \.gguf files and folders"):
        models.resolve(str(other))


def test_aliases_of_the_ladder_are_hub_models():
    assert models.resolve("qwen3-4b").location == "Qwen/Qwen3-4B"
    assert models.resolve("mistral-7b-instruct[load=nf4]").name == "mistral-7b-instruct[load=nf4]"
    assert models.resolve("org/model[revision=abc]").options.revision == "abc"


def test_an_unreachable_hub_says_so_in_one_line_within_ten_seconds(monkeypatch):
    import time

    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: refuses
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    begin = time.monotonic()
    with pytest.raises(MissingError, match="hub cannot be reached") as caught:
        models.check_hub("model org/none")
    assert time.monotonic() - begin < 10
    assert len(str(caught.value).splitlines()) == 1


def test_listing_and_collecting_do_not_import_torch():
    code = (
        "import sys; from decodathlon.harness import registry, plan, plugin; registry.load_builtins();"
        "plan.cells(plan.Options()); assert len(registry.registry.names('decoder')) >= 6;"
        "heavy = {'torch', 'transformers', 'duckdb', 'datasets'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_naming_a_suite_twice_measures_it_once():
    from decodathlon.harness import plan

    once = plan.cells(plan.Options(suite=["wikitext2"]))
    assert plan.cells(plan.Options(suite=["wikitext2", "wikitext2"])) == once
    assert len({c.cell_id for c in once}) == len(once)


def test_the_audit_alone_is_of_all_decoders():
    from decodathlon.harness import plan
    from decodathlon.harness.registry import load_builtins, registry

    load_builtins()
    asked = {c.decoder for c in plan.cells(plan.Options(suite=["audit", "ising"], scale="smoke"))}
    assert set(registry.names("decoder")) <= {d.partition("[")[0] for d in asked}
    some = {c.decoder for c in plan.cells(plan.Options(suite=["audit", "wikitext2"], scale="smoke"))}
    assert some == {decoders.build(s).spec for s in plan.headline()}


def test_sizes_of_the_users_own_take_the_place_of_those_of_the_scale():
    chosen = ["math500", "wikitext2"]
    plain = plan.cells(plan.Options(suite=chosen, decoder=["greedy"]))
    sized = plan.cells(plan.Options(suite=chosen, decoder=["greedy"], size=["math500.tokens=32", "questions=all"]))
    assert [c.sized for c in sized] == ["quick[questions=all,tokens=32]", *(c.sized for c in plain[1:])]
    assert sized[0].cell_id != plain[0].cell_id
    assert sized[1:] == plain[1:]
    for one in (plain[0], sized[0]):  # as a worker gets it
        again = cells.CellSpec.from_json(json.loads(json.dumps(dataclasses.asdict(one))))
        assert (again, again.cell_id) == (one, one.cell_id)
    for order in (["math500.tokens=5", "tokens=9"], ["tokens=9", "math500.tokens=5"]):  # the named one counts
        both = {c.suite: dict(c.sizes) for c in plan.cells(plan.Options(suite=chosen, decoder=["greedy"], size=order))}
        assert both["math500"]["tokens"] == 5
        assert both["wikitext2"]["tokens"] == 9
    everywhere = plan.cells(plan.Options(suite=chosen, decoder=["greedy"], size=["tokens=32"]))
    assert {(c.suite, dict(c.sizes)["tokens"]) for c in everywhere if c.sizes} == {("math500", 32), ("wikitext2", 32)}


@pytest.mark.parametrize(
    ("size", "error"),
    [
        ("token=3", "--size token=3: no such size; did you mean 'tokens'?"),
        ("math501.tokens=3", "math501 is not measured; did you mean 'math500'?"),
        ("slices=3", "no such size"),
        ("tokens=0", "a positive whole number is wanted, as in tokens=32"),
        ("tokens=all", "a positive whole number"),
        ("tokens", "a positive whole number"),
        ("tokens=-3", "a positive whole number"),
        ("tokens=" + "9" * 5000, "a positive whole number"),
    ],
)
def test_a_size_that_makes_no_sense_is_named(size, error):
    with pytest.raises(SpecError, match=re.escape(error)):
        plan.cells(plan.Options(suite=["math500"], decoder=["greedy"], size=[size]))
