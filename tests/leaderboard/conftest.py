"""Results files that the board is tried on."""

import pytest
from made_results import demo, million

from decodathlon.harness.results import store
from decodathlon.leaderboard import queries


@pytest.fixture(scope="session")
def demo_file(tmp_path_factory):
    return demo(tmp_path_factory.mktemp("demo") / "results.duckdb")


@pytest.fixture(scope="session")
def million_file(tmp_path_factory):
    return million(tmp_path_factory.mktemp("million") / "results.duckdb")


@pytest.fixture(scope="session")
def asked(demo_file, tmp_path_factory):
    """A connection to a snapshot of the demo, as the board asks it."""
    duckdb = pytest.importorskip("duckdb")
    copy = tmp_path_factory.mktemp("asked") / "copy.duckdb"
    assert store.snapshot(demo_file, copy, queries.prepare) == []
    with duckdb.connect(str(copy)) as connection:
        yield connection
