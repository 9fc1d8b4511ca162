"""Results files that the board is tried on."""

from pathlib import Path

import pytest
from made_results import demo, million

from decodathlon.harness.results import environment, store
from decodathlon.leaderboard import queries

ROOT = Path(__file__).parents[2]


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


@pytest.fixture
def opened(monkeypatch):
    """Opens a page of the board on a results file, as a browser would with a deep link."""
    st = pytest.importorskip("streamlit")
    from streamlit.testing.v1 import AppTest

    def open_page(results, page="overview", **parameters):
        monkeypatch.setenv(environment.RESULTS_VARIABLE, str(results))
        at = AppTest.from_file(str(ROOT / "leaderboard" / "app.py"), default_timeout=60)
        if page == "trade_off":  # its address is not its file's name, so the frame must have told of it
            at.run()
        if page != "overview":
            at.switch_page(f"views/{page}.py")
        at.query_params.clear()
        for name, value in parameters.items():
            at.query_params[name] = value
        return at.run()

    st.cache_data.clear()
    st.cache_resource.clear()
    return open_page
