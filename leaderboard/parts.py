"""What several pages of the board share: the snapshot and its cache, the setting that the sidebar chooses, pieces."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import streamlit as st

from decodathlon.harness.errors import MissingError, StoreError
from decodathlon.harness.results import environment, measured
from decodathlon.harness.results.metrics import Metric
from decodathlon.leaderboard import findings, queries
from decodathlon.leaderboard.comparison import compare
from decodathlon.leaderboard.queries import Cell, Setting
from decodathlon.leaderboard.source import Snapshot, Source
from decodathlon.leaderboard.tables import Field, link

#: How often an open page looks whether something was written.
PULSE = "5s"
#: Lines of a table that a page shows at once.
MOST_LINES = 100
T = TypeVar("T")


# --- Data --------------------------------------------------------------------------------------------------------


@st.cache_resource(show_spinner=False)
def _source(results: str) -> Source:
    return Source(Path(results))


def source() -> Source:
    """The results that this board shows."""
    return _source(str(environment.results_file().resolve()))


def snapshot() -> Snapshot:
    """The newest results, or a page that says why there are none and looks again."""
    try:
        found = source().current()
    except (StoreError, MissingError) as error:
        st.title("Nothing to show yet")
        st.warning(str(error))
        st.caption("This page looks again every few seconds.")
        st.stop()
    for remark in found.remarks:
        st.warning(remark)
    return found


def ask(found: Snapshot, query: Callable[..., T], *values: Any, **more: Any) -> T:
    """The answer to a query of queries.py or audit_queries.py, computed once per snapshot."""
    answer: T = _answer(found, found.version, (query.__module__, query.__name__), values, more)
    return answer


@st.cache_data(show_spinner=False, max_entries=300)
def _answer(
    _found: Snapshot, version: str, query: tuple[str, str], values: tuple[Any, ...], more: dict[str, Any]
) -> Any:
    module, name = query
    cursor = _found.cursor()
    try:
        return getattr(sys.modules[module], name)(cursor, *values, **more)
    finally:
        cursor.close()


# --- The frame ---------------------------------------------------------------------------------------------------


def watch() -> None:
    """In the sidebar: how fresh the page is, and what is being measured; draws the page anew when results arrive."""
    with st.sidebar:
        st.subheader("Decodathlon", anchor=False)
        _pulse()


@st.fragment(run_every=PULSE)
def _pulse() -> None:
    shown = st.session_state.get("_version")
    if shown is not None and source().changed(shown):
        st.session_state["_version"] = None
        st.rerun()
    for run in source().progress()[:3]:
        share = run.done / run.planned
        if run.live:
            st.progress(share, text=f"being measured: {run.run_id}, {run.done} of {run.planned} cells")
        else:
            st.caption(
                f"stopped: {run.run_id}, {run.done} of {run.planned} cells; go on with "
                f"`pytest suites/ --benchmark --resume {run.run_id}`"
            )


def begin() -> Snapshot:
    """The snapshot of this drawing of the page, remembered for `watch`."""
    st.session_state["_version"] = ""
    found = snapshot()
    st.session_state["_version"] = found.version
    with st.sidebar:
        st.caption(f"results as of {found.taken:%Y-%m-%d %H:%M:%S} UTC")
    return found


def setting(found: Snapshot) -> Setting:
    """The setting that the sidebar chooses; by default the one measured last."""
    known = [s for s, _ in ask(found, queries.settings)]
    if not known:
        st.title("Nothing was measured yet")
        st.info(
            "The results file has no measured cell. Run `pytest suites/ --benchmark`; this page fills while it runs."
        )
        st.stop()
    values: dict[str, Any] = {}
    with st.sidebar:
        for key, label in (("model", "Model"), ("dtype", "Type"), ("hardware", "Hardware"), ("scale", "Scale"),
                           ("seed", "Seed")):  # fmt: skip
            left = [s for s in known if all(getattr(s, k) == v for k, v in values.items())]
            options = list(dict.fromkeys(getattr(s, key) for s in left))
            if len(options) == 1 and key in ("dtype", "seed"):
                values[key] = options[0]
            else:
                values[key] = choose(label, options, key)
            st.query_params[key] = str(values[key])
    return Setting(**values)


def address(chosen: Setting) -> dict[str, str]:
    """What a link to another page says of the setting, so that it leads to the same numbers."""
    return {key: str(value) for key, value in vars(chosen).items()}


def choose(label: str, options: Sequence[T], key: str, *, first: int = 0) -> T:
    """One of some options. It is always in the address of the page, and kept from page to page.

    An address that names what is not there gets a word about it: nobody shall take other numbers for those he was sent.
    """
    texts = {str(option): option for option in options}
    kept: dict[str, str] = st.session_state.setdefault("_kept", {})
    wanted = st.query_params.get(key)
    if wanted is not None and wanted != kept.get(key):  # a link was followed
        st.session_state.pop(key, None)
        if wanted not in texts:
            st.warning(f"There is no {label.lower()} {plain(wanted[:80])} here; this is another one.")
    if st.session_state.get(key) not in texts:
        usual = kept.get(key)
        at = next((text for text in (wanted, usual) if text in texts), list(texts)[first])
        st.session_state[key] = at
    text = st.selectbox(label, list(texts), key=key)
    kept[key] = st.query_params[key] = text
    return texts[text]


def cells(found: Snapshot, chosen: Setting, *filters: Any) -> list[Cell]:
    """The newest cells of a setting, filtered as `queries.cells` says."""
    return ask(found, queries.cells, chosen, *filters)


def leads(found: Snapshot, chosen: Setting) -> list[findings.Axis]:
    """The most telling metric of each column of a setting."""
    return findings.leads(ask(found, queries.columns, chosen), ask(found, queries.suites), ask(found, queries.metrics))


# --- Pieces ------------------------------------------------------------------------------------------------------


def entry_field(entry: findings.Entry) -> Field:
    """A field of a table of decoders: the number with its marks, or why there is none."""
    look: list[str] = [entry.mark] if entry.mark in ("best", "tied") else []
    small = ", ".join(entry.doubts)
    if entry.mark == "unlike":
        small = "other weights, data or units: not ranked"
    if entry.number is None:
        look.append("none")
    elif entry.doubts:
        look.append("grey")
    if entry.cell is not None and entry.cell.remarks and entry.number is not None:
        small = "; ".join(filter(None, [small, "! " + entry.cell.remarks[0].partition(":")[0]]))
    return Field(entry.text, small=small, look=" ".join(look), number=entry.number is not None)


def decoder_row(line: findings.Line, chosen: Setting, *between: Field | str) -> list[Field | str]:
    """A line of a table: the decoder, leading to its page, what stands between, its numbers. What holds for all of
    them is said once."""
    fields = [entry_field(e) for e in line.entries]
    said = {f.small for f, e in zip(fields, line.entries, strict=True) if e.number is not None}
    common = said.pop() if len(said) == 1 else ""
    if common:
        fields = [replace(f, small="") for f in fields]
    if line.beside:
        common = ", ".join(filter(None, ["measured since", common]))
    look = " ".join(filter(None, ["front" if line.pareto else "", "grey" if line.grey else ""]))
    name = Field(line.decoder, small=common, look=look, href=link("decoder", decoder=line.name, **address(chosen)))
    return [name, *between, *fields]


def claim_field(line: findings.Line) -> Field:
    """What a decoder claims, and what the audit says of that."""
    said = {
        "pass": "audited",
        "weak": "audited with few draws",
        "self": "audited by its own law",
        "fail": "audit failed",
    }
    return Field(line.claim or "–", small=said.get(line.audit or "", ""))


def axis_name(axis: findings.Axis, among: Sequence[findings.Axis]) -> str:
    """What an axis is called in a choice."""
    return f"{column_name(axis.column, among)}: {axis.metric}"


def column_name(column: queries.Column, among: Sequence[findings.Axis]) -> str:
    """What a column is called; with its data set where the same part of a suite was measured on several."""
    several = len({a.column.dataset for a in among if a.column.part == column.part}) > 1
    return f"{column} on {column.dataset or 'no data'}" if several else str(column)


def choose_axis(label: str, axes: Sequence[findings.Axis], key: str) -> findings.Axis:
    """One of some axes; its name is in the address of the page."""
    names = {axis_name(a, axes): a for a in axes}
    return names[choose(label, list(names), key)]


def axis_head(axis: findings.Axis, metrics: Mapping[str, Metric], among: Sequence[findings.Axis] = ()) -> Field:
    """The head of a column that is an axis."""
    return Field(column_name(axis.column, among), small=axis.metric + _arrow(metrics[axis.metric]))


def metric_head(metric: str, metrics: Mapping[str, Metric]) -> Field:
    """The head of a column that is a metric."""
    return Field(metric + _arrow(metrics[metric]))


def _arrow(metric: Metric) -> str:
    return {"higher": " ↑", "lower": " ↓"}.get(metric.better, "")


def missing(lines: Sequence[findings.Line], axes: Sequence[findings.Axis]) -> list[str]:
    """What was not measured and why, one sentence per reason."""
    by_reason: dict[tuple[str, str, bool], tuple[dict[str, None], dict[str, None]]] = {}
    for line in lines:
        for axis, entry in zip(axes, line.entries, strict=True):
            if entry.number is None and entry.cell is not None and entry.cell.measured.status not in findings.MEASURED:
                key = (entry.cell.measured.status, entry.reason, entry.cell.beside)
                who, where = by_reason.setdefault(key, ({}, {}))
                who[line.decoder] = where[column_name(axis.column, axes)] = None
    return [
        f"{findings.listed(list(who))} on {findings.listed(list(where))}: {status}"
        + (f" ({reason})" if reason else "")
        + ("; what was measured before it is shown" if before else "")
        for (status, reason, before), (who, where) in by_reason.items()
    ]


def comparison(
    pairs: Sequence[tuple[measured.Measured, measured.Measured]], names: tuple[str, str], caption: str
) -> None:
    """Two lists of cells beside one another, what speaks of a change first."""
    found = compare(pairs, names, caption)
    if found.speaking:
        st.html(found.speaking)
    if any(a.basis != b.basis for a, b in pairs):
        st.caption("Some of these were measured with other weights, data or sizes under the same names.")
    if found.judged:
        chance = found.judged * 0.05
        st.caption(f"{found.judged} intervals: about {chance:.1f} of them would speak of a change by chance alone.")
    if found.rest:
        with st.expander("What cannot be ranked, or is the same"):
            st.html(found.rest)


def plain(text: str, *, code: bool = False) -> str:
    """Text of others as Markdown that shows it letter by letter, without links, pictures, formulas or tags.

    Args:
        code: what stands between backticks is still set as code.
    """
    parts = re.split(r"(`[^`\n]*`)", text) if code else [text]
    return "".join(
        part if i % 2 else re.sub(r"([\\`*_{}\[\]()#+!<>|~$:-])", r"\\\1", part) for i, part in enumerate(parts)
    )


def download(rows: Sequence[Mapping[str, Any]], name: str, label: str = "CSV") -> None:
    """A button that saves rows as CSV."""
    if rows:
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        st.download_button(label, text.getvalue(), file_name=f"{name}.csv", mime="text/csv", icon=":material/download:")


def moment(value: datetime | None) -> str:
    """A time as a person writes it, in UTC."""
    return "–" if value is None else f"{value.astimezone(UTC):%Y-%m-%d %H:%M}"
