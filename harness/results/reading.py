"""From shards to rows: each shard is checked, and its rows are written as lines of JSON that DuckDB reads in one go.

Nothing of a run stays in memory behind its last line: very many runs need no more than one of them does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from decodathlon.harness.cells import HARNESS, SHARD_SCHEMA, Outcome
from decodathlon.harness.errors import StoreError
from decodathlon.harness.results import shards
from decodathlon.harness.results.environment import hardware_name
from decodathlon.harness.results.rows import ROWS, lines_of

#: Rows of a line; DuckDB holds lines whole.
TOGETHER = 500


def sources(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Run folders and results files among `paths`; a folder may also hold run folders.

    Raises:
        StoreError: a path is neither.
    """
    folders, files = [], []
    for path in paths:
        if (path / shards.RUN_FILE).is_file():
            folders.append(path)
        elif path.is_dir():
            inside = sorted(p.parent for p in path.glob(f"*/{shards.RUN_FILE}"))
            if not inside:
                raise StoreError(f"{path} holds no run: neither it nor a folder in it has a {shards.RUN_FILE}")
            folders += inside
        elif path.is_file():
            files.append(path)
        else:
            raise StoreError(f"{path}: there is no such file or folder")
    return folders, files


def rows_of(folders: Sequence[Path], into: Path) -> Path:
    """The rows of every shard, in a file of JSON lines for each table.

    Args:
        into: a folder for the files, made here.

    Returns:
        That folder.

    Raises:
        StoreError: a shard is damaged or was written by newer code.
    """
    into.mkdir(parents=True)
    with _Lines(into) as lines:
        for folder in folders:
            try:
                _add_run(lines, folder)
            except RecursionError:
                raise StoreError(f"{folder} is damaged or foreign: it holds JSON that is nested too deep") from None
    return into


class _Lines:
    """Files of rows, one for each table; a line holds what shares its key."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, IO[str]] = {}
        self._open = contextlib.ExitStack()

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def add(self, table: str, key: Mapping[str, str], found: Sequence[Mapping[str, Any]]) -> None:
        """
        Args:
            key: what the rows have in common.
            found: rows without it; what a table has no column for is left out.
        """
        if found and table not in self._files:
            # half a character must not cost the row
            file = lines_of(self._folder, table).open("w", encoding="utf-8", errors="replace")
            self._files[table] = self._open.enter_context(file)
        for begin in range(0, len(found), TOGETHER):
            line = {**key, ROWS: found[begin : begin + TOGETHER]}
            self._files[table].write(_as_json(line, ascii_only=False) + "\n")


def _as_json(value: Mapping[str, Any], *, ascii_only: bool = True, ordered: bool = False) -> str:
    """As JSON, infinities as words. Hardly any row has one, and to look for them takes longer than to write it."""
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=ascii_only, sort_keys=ordered)
    except ValueError:
        return json.dumps(shards.plain(value), allow_nan=False, ensure_ascii=ascii_only, sort_keys=ordered)


def _add_run(lines: _Lines, folder: Path) -> None:
    from decodathlon.harness.results import records  # needs pydantic, which a machine that only measures may lack

    def read(path: Path, kind: type[records.Record]) -> dict[str, Any]:
        content = shards.read(path)
        schema = content.get("schema", 0)
        if not isinstance(schema, int) or schema <= SHARD_SCHEMA:  # of a newer one only that can be said
            records.check(content, kind, path)
        return content

    run = read(folder / shards.RUN_FILE, records.RunRecord)
    outcomes = [Outcome.from_shard(read(path, records.CellRecord)) for path in shards.cells(folder)]
    stranger = next((o for o in outcomes if o.run_id != run["run_id"]), None)
    if stranger is not None:
        raise StoreError(f"{folder} is of run {run['run_id']}, its {stranger.spec.cell_id} of {stranger.run_id}")
    ids = [o.spec.cell_id for o in outcomes]
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise StoreError(f"{folder} is damaged: more than one of its shards is of cell {twice}; keep the right one")
    # The hardware of a run is where its decoders ran; operations of the harness run on the CPU beside a GPU.
    models = [o.model for o in outcomes if o.model and o.spec.model != HARNESS]
    model: dict[str, Any] = next((m for m in models if "processor" in m), models[0] if models else {})
    key = {"run_id": run["run_id"]}
    lines.add("run", key, [{**run, "hardware": hardware_name(run["environment"], model)}])
    for outcome in outcomes:
        _add_cell(lines, outcome)
    if (folder / shards.GATES_FILE).is_file():
        verdicts = read(folder / shards.GATES_FILE, records.GatesRecord)["verdicts"]
        lines.add("gate", key, verdicts)


def _add_cell(lines: _Lines, outcome: Outcome) -> None:
    spec, decoder, model = outcome.spec, outcome.decoder, outcome.model
    shard = outcome.as_shard()
    key = {"run_id": outcome.run_id, "cell_id": shard["cell_id"]}
    parts = (
        "started",
        "status",
        "reason",
        "error",
        "log",
        "seconds",
        "notes",
        "data",
        "sizes",
        "attempts",
        "conditions",
        "protocol",
    )
    whole = _as_json(shard, ordered=True)
    row = {
        **{k: getattr(spec, k) for k in ("suite", "suite_version", "slice", "seed")},
        "scale": spec.sized,
        **{k: getattr(outcome, k) for k in parts},
        "decoder": decoder.get("spec", spec.decoder),
        "family": decoder.get("family"),
        "params": decoder.get("params", {}),
        "claim": decoder.get("claim"),
        "decoder_sha256": decoder.get("source_sha256"),
        "model": model.get("name", spec.model),
        "dtype": model.get("dtype", spec.dtype),
        "device": model.get("device", spec.device),
        "weights": model,
        "dataset": outcome.data.get("dataset"),
        "hardware": outcome.place.get("hardware"),
        "place": outcome.place or None,
        "shard_sha256": hashlib.sha256(whole.encode()).hexdigest(),
    }
    lines.add("cell", key, [row])
    lines.add("metric", key, outcome.metrics)
    lines.add("sample", key, [{**sample, "place": i} for i, sample in enumerate(outcome.samples)])


def batches(folders: Sequence[Path]) -> list[list[Path]]:
    """Folders in groups in which no run appears twice, so that two copies of a run are merged one after the other."""
    found: list[dict[str, Path]] = []
    for folder in folders:
        run = str(shards.read(folder / shards.RUN_FILE).get("run_id"))
        free = next((batch for batch in found if run not in batch), None)
        if free is None:
            found.append({run: folder})
        else:
            free[run] = folder
    return [list(batch.values()) for batch in found]
