"""The documentation is true: its generated page is the table's, its example runs, its options exist."""

import argparse
import importlib.util
import io
import re
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch

from decodathlon.harness import decoder as decoders
from decodathlon.harness.registry import Registry, registry

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_metrics_page_is_the_table():
    made = script("make_metrics_page")
    assert made.PAGE.read_text() == made.page(), "run python scripts/make_metrics_page.py"


def test_the_readmes_plugin_is_a_decoder(tmp_path):
    code = re.search(r"```python\n# my_decoder.py\n(.*?)```", README, re.DOTALL)[1]
    (tmp_path / "my_decoder.py").write_text(code)
    Registry.load_file(registry, tmp_path / "my_decoder.py")
    top_a = decoders.build("top-a[a=0.5]")
    p = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64)
    assert torch.allclose(top_a.shape(p.log()).exp(), torch.tensor([[2 / 3, 1 / 3, 0.0]], dtype=torch.float64))
    assert len(code.strip().splitlines()) <= 18


def test_the_readmes_options_exist(request):
    from decodathlon.harness.commands import board
    from decodathlon.harness.registry import load_builtins, registry

    load_builtins()
    help_text = request.config._parser.optparser.format_help()
    for arguments in (board._arguments, *(registry.get("command", n).arguments for n in registry.names("command"))):
        parser = argparse.ArgumentParser()
        arguments(parser)
        help_text += parser.format_help()
    for option in sorted(set(re.findall(r"`(--[a-z-]+)", README)) - {"--no-deps"}):
        assert option in help_text, option


def test_the_ten_questions_have_answers(tmp_path):
    """Every query of docs/results.md runs on the published rows; those that must find something do."""
    from decodathlon.harness.results import store

    path = tmp_path / "r.duckdb"
    store.ingest(path, [ROOT / "leaderboard" / "published"])
    queries = re.findall(r"```sql\n(.*?)```", (ROOT / "docs" / "results.md").read_text(), re.DOTALL)
    assert len(queries) == 10
    with store.connect(path) as connection:
        found = [len(connection.execute(query).fetchall()) for query in queries]
        assert sum(n > 0 for n in found) >= 7
        columns = {row[0] for row in connection.execute("DESCRIBE results").fetchall()}
    described = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "results.md").read_text(), re.MULTILINE)
    assert {name for cell in described for name in re.findall(r"`(\w+)`", cell)} == columns


def test_the_example_gates_are_well_formed(tmp_path):
    from decodathlon.harness.results import gates

    (example,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "gating.md").read_text(), re.DOTALL)
    (tmp_path / "gates.toml").write_text(example)
    assert len(gates.load(tmp_path / "gates.toml")) == 2


def test_the_commands_that_the_pages_name_exist():
    from decodathlon.harness.commands.command import main  # noqa: F401 - loads nothing yet

    registry.load_package("decodathlon.harness.commands")
    pages = [README, *(p.read_text() for p in (ROOT / "docs").glob("*.md"))]
    named = {word for page in pages for word in re.findall(r"`decodathlon (\w+)", page)}
    assert named <= set(registry.names("command"))
    assert len(named) >= 5


def _rows_of(path):
    from decodathlon.harness.results import store

    with store.connect(path) as connection:
        tables = ("run", "cell", "metric", "sample", "gate")
        return {t: set(map(str, connection.execute(f"SELECT * FROM {t}").fetchall())) for t in tables}


def test_the_published_database_is_the_published_text(tmp_path):
    """As committed, row for row; a working copy may have more, of runs that nobody has published."""
    rebuild = script("rebuild_results")
    assert rebuild.rebuild(rebuild.PUBLISHED, tmp_path / "r.duckdb") > 0
    ours, theirs = _rows_of(tmp_path / "r.duckdb"), _rows_of(ROOT / "results.duckdb")
    for table, rows in ours.items():
        assert rows <= theirs[table], f"results.duckdb lacks published rows of {table}"
    git = ["git", "-C", str(ROOT), "archive", "HEAD", "leaderboard/published", "results.duckdb"]
    packed = subprocess.run(git, capture_output=True, check=False)
    if packed.returncode != 0:
        pytest.skip("not a git checkout: only that nothing published is missing was checked")
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extractall(tmp_path / "head", filter="data")
    rebuild.rebuild(tmp_path / "head" / "leaderboard" / "published", tmp_path / "again.duckdb")
    assert _rows_of(tmp_path / "again.duckdb") == _rows_of(tmp_path / "head" / "results.duckdb")


def test_the_readmes_query_runs_on_the_tracked_file():
    command = re.search(r"```bash\n(python -c .*?)```", README, re.DOTALL)[1]
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ratio_to_greedy" in done.stdout
