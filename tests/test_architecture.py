"""Who may import whom, what may be printed, and how the folders are reached."""

import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: What each folder may import of the project. Suites reach for the machinery inside their functions.
ALLOWED = {
    "harness": {"decodathlon.harness"},
    "decoders": {"decodathlon", "decodathlon.harness", "decodathlon.kernels", "decodathlon.decoders"},
    "kernels": set(),
    "suites": {"decodathlon", "decodathlon.harness"},
    "leaderboard": {
        "decodathlon.harness.arena",
        "decodathlon.harness.errors",
        "decodathlon.harness.locks",
        "decodathlon.harness.results",
        "decodathlon.leaderboard",
    },
}
#: Modules that the controller imports: they must be light, so torch is imported inside functions or lazily.
TORCH_AT_TOP = {"harness/targets", "harness/measure"}
#: Files of decoders that are imported when a model or a drafter is loaded, or trained: a network is a class of torch's.
NETWORKS = {
    *(f"decoders/dflash/{name}.py" for name in ("network", "captured", "training")),
    *(f"decoders/training/{name}.py" for name in ("features", "trainer", "repair")),
    *(f"decoders/jit_delta/{name}.py" for name in ("assembly", "modules", "persona", "target")),
}
#: What Streamlit runs, besides the pages of the board; nothing else may know it.
STREAMLIT = {"leaderboard/app.py", "leaderboard/parts.py"}


def imports(path, *, top_level_only=False):
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def files(folder):
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", ALLOWED)
def test_parts_import_only_what_they_may(folder):
    for path in files(folder):
        for name in imports(path):
            if name.split(".")[0] in ("harness", "decoders", "suites", "leaderboard"):
                pytest.fail(f"{path}: import {name} through decodathlon.{name}")
            if path.name == "test_overheads.py" and name == "decodathlon.leaderboard":
                continue  # it times the board's queries
            if path.name == "test_kernels.py" and name.startswith("decodathlon.kernels"):
                continue  # it times them
            if name.split(".")[0] == "decodathlon":
                ok = any(name == a or (a != "decodathlon" and name.startswith(a + ".")) for a in ALLOWED[folder])
                assert ok, f"{path} imports {name}"


def test_harness_names_no_decoder():
    from decodathlon.harness.registry import load_builtins, registry

    load_builtins()
    # the default of --baseline; a parameter of the law; one of llama.cpp
    generic = {"greedy", "temperature", "mirostat"}
    names = set(registry.names("decoder")) - generic
    for path in files("harness"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in names, f"{path} names the decoder {node.value}"


def test_heavy_modules_are_not_imported_at_the_top():
    heavy = {"torch", "transformers", "duckdb", "datasets", "streamlit"}
    for folder in ("harness", "decoders", "suites", "leaderboard"):
        for path in files(folder):
            place = str(path.relative_to(ROOT).parent)
            found = heavy & {name.split(".")[0] for name in imports(path, top_level_only=True)}
            name = str(path.relative_to(ROOT))
            allowed = {"torch", "transformers"} if place in TORCH_AT_TOP or name in NETWORKS else set()
            if name in STREAMLIT or place == "leaderboard/views":
                allowed = {"streamlit"}
            assert found <= allowed, f"{path} imports {found} at its top"


def test_on_the_board_streamlit_sql_and_drawing_are_kept_apart():
    """Pages show; `queries`, `audit_queries` and `source` know DuckDB; `charts` know neither it nor Streamlit."""
    for path in files("leaderboard"):
        name, known = str(path.relative_to(ROOT)), {n.split(".")[0] for n in imports(path)}
        shows = name in STREAMLIT or name.startswith("leaderboard/views/")
        assert ("streamlit" in known) <= shows, f"{name} knows Streamlit"
        asks = name.endswith("queries.py") or name == "leaderboard/source.py"
        assert ("duckdb" in known) <= asks, f"{name} knows DuckDB"
        assert not (asks and "streamlit" in known)
        assert "altair" not in known or name.endswith("charts.py"), f"{name} draws"


def test_kernels_is_no_package_of_its_own():
    """With an __init__.py it would shadow Hugging Face's `kernels`, and `import transformers` would fail."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_links_lead_to_the_flat_folders():
    for folder in ALLOWED:
        link = ROOT / "src" / "decodathlon" / folder
        assert link.is_symlink()
        assert link.resolve() == ROOT / folder


def test_transformers_imports_beside_an_installed_hf_kernels(tmp_path):
    """A stand-in for HF's package in a version that transformers accepts; the repository root is on the path too."""
    package = tmp_path / "kernels"
    package.mkdir()
    # Whatever transformers takes from it is a decorator factory, so that its modules import to their end.
    fake = "ours = False\n\ndef __getattr__(name):\n    return lambda *a, **k: lambda x: x\n"
    (package / "__init__.py").write_text(fake)
    info = tmp_path / "kernels-0.18.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    code = textwrap.dedent(
        f"""
        import sys
        sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]
        import kernels
        assert kernels.ours is False and "dist" not in str(kernels.__file__), kernels.__file__
        import transformers
        import decodathlon.harness.targets.transformers
        import decodathlon.kernels
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_python_m_pytest_from_the_root_collects_the_suites(tmp_path):
    command = [sys.executable, "-m", "pytest", "suites", "--benchmark", "--collect-only", "-q", "--results"]
    done = subprocess.run(
        [*command, str(tmp_path / "none.duckdb")], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "suites/test_throughput.py::test_throughput[greedy-batch-1]" in done.stdout


def test_a_new_decoder_file_is_seen_without_reinstalling(tmp_path):
    """The links make the folder itself the package, so a new module in it is importable at once."""
    import decodathlon.decoders

    assert Path(decodathlon.decoders.__file__).resolve().parent == ROOT / "decoders"


def test_nothing_generic_is_installed():
    from importlib.metadata import files as installed

    tops = {str(f).split("/")[0] for f in installed("decodathlon") or []}
    assert not tops & {"harness", "decoders", "kernels", "suites", "leaderboard", "tests"}


def test_the_gpu_tests_are_collected_without_the_optional_packages(tmp_path):
    """A GPU image has torch, transformers, numpy and pytest: `pytest tests -m gpu` must not stumble over the rest."""
    for name in ("duckdb", "lm_eval", "math_verify", "streamlit", "pydantic", "pytest_benchmark"):
        (tmp_path / f"{name}.py").write_text("raise ModuleNotFoundError(__name__)\n")
    words = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "--collect-only", "-q", "-p", "no:benchmark"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run([*words, "-p", "decodathlon.harness.plugin"], cwd=ROOT, capture_output=True, text=True,
                          check=False, env=environment)  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "test_every_decoder_runs_on_the_gpu" in done.stdout


def test_the_measuring_core_runs_without_the_optional_packages():
    """torch, transformers, numpy and pytest are enough to plan, load a model and measure."""
    code = textwrap.dedent(
        """
        import sys
        for name in ("duckdb", "datasets", "lm_eval", "math_verify", "streamlit", "gguf", "pydantic",
                     "pytest_benchmark"):
            sys.modules[name] = None  # importing it raises, looking for it finds nothing
        import importlib, pkgutil, decodathlon.harness as h
        for m in pkgutil.walk_packages(h.__path__, "decodathlon.harness."):
            # for whoever reads shards into DuckDB, or measures tasks of lm-eval
            if m.name.rpartition(".")[2] not in ("records", "lm_eval_model", "lm_eval_tasks", "truthful"):
                importlib.import_module(m.name)
        from decodathlon.harness.bench import Bench
        from decodathlon.harness.plan import Options, cells
        from decodathlon.harness.targets import toy
        assert cells(Options())
        toy.law_of(toy.enumerable_lm(), [0], 2)
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
