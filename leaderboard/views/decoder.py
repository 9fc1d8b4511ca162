"""Decoder: what one decoder is, its settings, how it did over time and over its parameters, and where it failed."""

import streamlit as st

from decodathlon.leaderboard import charts, findings, parts, queries
from decodathlon.leaderboard.tables import Field, link, table

found = parts.begin()
setting = parts.setting(found)
known = parts.ask(found, queries.decoders)
metrics = parts.ask(found, queries.metrics)
suites = parts.ask(found, queries.suites)
baselines = parts.ask(found, queries.baselines, setting)

name = parts.choose("Decoder", sorted(known), "decoder")
about = known[name]
cells = parts.cells(found, setting, None, name)
st.title(parts.plain(name))
if about:
    st.markdown(parts.plain(about["text"], code=True))
    if about["paper"]:
        st.caption(parts.plain(f"Paper: {about['paper']}"))
else:
    st.caption("No run has described this decoder; runs measured from now on do.")
claims = sorted({c.claim for c in cells if c.claim})
files = "".join(f" --decoder-file {file}" for file in parts.ask(found, queries.decoder_files, name))
st.markdown(
    f"Family **{parts.plain(about.get('family') or next((c.family for c in cells), name))}**"
    + (f" · claims **{parts.plain(', '.join(claims))}**" if claims else "")
    + f" · [what claims mean]({link('about')}) · `pytest suites/ --benchmark{files} --decoder {name}`"
)
if about.get("parameters"):
    st.subheader("Parameters")
    rows = [
        [p["name"], p["type"], str(p["default"]), p["bounds"] or "any", ", ".join(map(str, p["sweep"])) or "–"]
        for p in about["parameters"]
    ]
    st.html(table(["parameter", "type", "default", "range", "values of --sweep"], rows, f"Parameters of {name}"))

st.subheader("Results")
st.caption(parts.plain(str(setting)))
if cells:
    for column in dict.fromkeys(c.column for c in cells):
        own = [c for c in cells if c.column == column]
        present = {m for c in own for m in c.measured.metrics}
        axes = [findings.Axis(column, m) for m in findings.table_of(column, present, suites, metrics)]
        lines = sorted(findings.lines(own, axes, baselines, rank=False), key=lambda line: line.decoder)
        st.markdown(f"**{column}**" + (f" · {column.dataset}" if column.dataset else ""))
        if axes:
            head = [parts.metric_head(a.metric, metrics) for a in axes]
            body = [parts.decoder_row(line, setting) for line in lines[: parts.MOST_LINES]]
            st.html(table(["setting", *head], body, f"{name} on {column}"))
        for cell in own:
            if cell.measured.status not in findings.MEASURED:
                why = f"{cell.decoder}: {cell.measured.status}: {cell.measured.reason}"
                st.markdown(f"- {parts.plain(why)}")
else:
    st.info("Not measured in this setting; choose another in the sidebar.")

settings = sorted({c.decoder for c in cells})
rivals = sorted({c.decoder for c in parts.cells(found, setting, ("ratio_to_self",))} - {name})
if cells and rivals:
    st.subheader("Against another decoder")
    left, right = st.columns(2)
    with left:
        mine = parts.choose("This one", settings, "setting") if len(settings) > 1 else settings[0]
    with right:
        rival = st.selectbox("Compare with", rivals, index=None, key="against", bind="query-params")
    if rival:
        theirs = parts.cells(found, setting, None, rival.partition("[")[0])
        by_column = {
            c.column: c.measured for c in theirs if c.decoder == rival and c.measured.status == "ok" and not c.beside
        }
        pairs = [
            (by_column[c.column], c.measured)
            for c in cells
            if c.decoder == mine and c.column in by_column and c.measured.status == "ok" and not c.beside
        ]
        parts.comparison(pairs, (rival, mine), f"{mine} against {rival}")
        doubts = sorted({d for c in (*cells, *theirs) if c.decoder in (mine, rival) for d in c.doubts})
        if doubts:
            st.caption(f"Not to be relied on: {', '.join(doubts)}.")
        if not pairs:
            st.info("No suite was measured with both on the same data.")

measurable = sorted({m for c in cells for m in c.measured.metrics})
if measurable:
    st.subheader("Over its parameters, and over time")
    leading = [a.metric for a in findings.leads(findings.columns_of(cells), suites, metrics)] or measurable
    first = next((m for m in leading if findings.sweeps(cells, m)), leading[0])
    metric = st.selectbox("Metric", measurable, index=measurable.index(first), key="metric", bind="query-params")
    st.caption(metrics[metric].meaning)
    swept = findings.sweeps(cells, metric)
    for (column, parameter), values in swept.items():
        st.markdown(f"**{column}** · {metric} over `{parameter}`")
        words = charts.series_in_words(values, metric, parameter)
        st.altair_chart(charts.sweep(values, parameter, metric), width="stretch", alt=words)
    if not swept:
        st.caption("No parameter was measured at two values in this setting: `--sweep` measures them.")
    past = parts.ask(found, queries.history, setting, name, metric)
    for part in dict.fromkeys((r["suite"], r["suite_version"], r["slice"], r["dataset"]) for r in past):
        own_past = [r for r in past if (r["suite"], r["suite_version"], r["slice"], r["dataset"]) == part]
        if len({r["run_id"] for r in own_past}) > 1:
            st.markdown(f"**{queries.Column(*part)}** (version {part[1]}) · {metric} from run to run")
            words = charts.series_in_words([r | {"at": r["run_id"]} for r in own_past], metric, "runs")
            st.altair_chart(charts.over_time(own_past, metric), width="stretch", alt=words)
    parts.download(past, f"{name}-{metric}")

failed = parts.ask(found, queries.failures, name)
if failed:
    st.subheader("Not measured, in any setting")
    failures = []
    for f in failed:
        reason, run = Field(f["reason"] or "–", look="prose"), Field(f["run_id"], href=link("run", run=f["run_id"]))
        where = f"{f['model']}, {f['hardware']}, {f['scale']}"
        failures.append([f["decoder"], queries.part_name(f["suite"], f["slice"]), f["status"], reason, where, run])
    st.html(table(["decoder", "suite", "status", "why", "where", "run"], failures, f"Failures of {name}"))
    for f in failed[:5]:
        if f["error"] or f["log"]:
            with st.expander(f"{f['decoder']}, {f['suite']} {f['slice']}: {f['status']} in {f['run_id']}"):
                st.code((f["error"] or "") + (f["log"] or ""), language=None)
