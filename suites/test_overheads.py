"""Overheads: what does the harness itself cost? Timed by pytest-benchmark in the controller, stored like all rows."""

import itertools

import pytest

from decodathlon.harness.suite import timed

overheads = timed("overheads", version=2, asks="What does the harness itself cost?", table=["overhead_s"])


@overheads
def test_collection(benchmark):
    """A whole `pytest suites/ --benchmark --collect-only`, interpreter included."""
    from decodathlon.harness.measure import overheads

    benchmark.pedantic(overheads.collect, rounds=6)


@overheads
def test_plan(benchmark):
    """From options to cells, with everything registered."""
    from decodathlon.harness.plan import Options, cells

    benchmark(cells, Options(decoder=["top-p[p=0.9]"]))


@overheads
def test_sampler_step(benchmark):
    """Law and draw of one token by top-p over a vocabulary of 49,152, batch 1."""
    from decodathlon.harness.measure import overheads

    benchmark(overheads.sampler_step("top-p", vocabulary=49_152))


@overheads
def test_record_pair(benchmark, tmp_path):
    """What a timed pair costs beside its work: the clock, and its line in the journal."""
    from decodathlon.harness.measure import overheads

    benchmark(overheads.record_pair(tmp_path))


@overheads
def test_shard_write(benchmark, tmp_path):
    """One finished cell to disk, flushed."""
    from decodathlon.harness.measure import overheads

    benchmark.pedantic(overheads.shard_write(tmp_path), rounds=30)


@overheads
def test_ingest(benchmark, tmp_path):
    """A run of 20 cells into a results file of 1,000."""
    from decodathlon.harness.measure import overheads

    pytest.importorskip("duckdb")
    benchmark.pedantic(overheads.ingest(tmp_path, cells=1000, new=20), rounds=6)


@overheads
def test_board_snapshot(benchmark, tmp_path):
    """What the board does when results have changed: a private copy of 1,000 cells, the newest of each worked out."""
    from decodathlon.harness.measure import overheads
    from decodathlon.harness.results import store
    from decodathlon.leaderboard import queries

    pytest.importorskip("duckdb")
    results, copies = overheads.filled(tmp_path, cells=1000), itertools.count()
    benchmark.pedantic(
        lambda: store.snapshot(results, tmp_path / f"copy-{next(copies)}.duckdb", queries.prepare), rounds=12
    )


@overheads
def test_board_query(benchmark, tmp_path):
    """What a page asks of it: one metric of 1,000 decoders, with intervals and units."""
    from decodathlon.harness.measure import overheads
    from decodathlon.harness.results import store
    from decodathlon.leaderboard import queries

    duckdb = pytest.importorskip("duckdb")
    store.snapshot(overheads.filled(tmp_path, cells=1000), tmp_path / "copy.duckdb", queries.prepare)
    with duckdb.connect(str(tmp_path / "copy.duckdb"), read_only=True) as connection:
        ((setting, _),) = queries.settings(connection)
        benchmark.pedantic(lambda: queries.cells(connection, setting, ("ratio_to_greedy",)), rounds=12)
