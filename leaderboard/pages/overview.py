"""Overview: every decoder by every suite, what leads, what cannot be told apart, what was not measured and why."""

import streamlit as st

from decodathlon.leaderboard import findings, parts, queries
from decodathlon.leaderboard.tables import Field, link, table

found = parts.begin()
setting = parts.setting(found)
metrics = parts.ask(found, queries.metrics)
suites = parts.ask(found, queries.suites)
baselines = parts.ask(found, queries.baselines, setting)
axes = parts.leads(found, setting)
cells = parts.cells(found, setting, tuple(sorted({a.metric for a in axes} | {"ratio_to_self"})))

st.title("Which decoder is better, and how sure is that?")
st.caption(f"{setting} · {len({c.decoder for c in cells})} decoders")

with st.container(horizontal=True):
    families = st.multiselect("Family", sorted({c.family for c in cells}), key="family", bind="query-params")
    claims = st.multiselect("Claim", sorted({c.claim for c in cells if c.claim}), key="claim", bind="query-params")
    data = st.multiselect("Data", sorted({a.column.dataset for a in axes}), key="data", bind="query-params")
    orders = ["decoder", *(parts.axis_name(a, axes) for a in axes)]
    order = st.selectbox("Sort by", orders, index=min(1, len(orders) - 1), key="sort", bind="query-params")

axes = [a for a in axes if not data or a.column.dataset in data]
cells = [c for c in cells if not families or c.family in families]
cells = [c for c in cells if not claims or c.claim in claims]
cells = [c for c in cells if not data or c.column.dataset in ("", *data)]
plane = findings.default_axes(axes, metrics)
lines = findings.with_front(findings.lines(cells, axes, baselines), axes, plane)
place = next((i for i, a in enumerate(axes) if parts.axis_name(a, axes) == order), None)
lines = sorted(lines, key=lambda line: line.decoder) if place is None else findings.ordered(lines, place)

st.markdown("\n".join(f"- {sentence}" for sentence in findings.summary(lines, axes, baselines)))

head: list[str | Field] = ["decoder", "claims", *(parts.axis_head(a, metrics, axes) for a in axes)]
rows = [
    [parts.decoder_field(line), line.claim or "–", *(parts.entry_field(e) for e in line.entries)]
    for line in lines[: parts.MOST_LINES]
]
st.html(table(head, rows, "Decoders by suite"))
if len(lines) > parts.MOST_LINES:
    st.caption(f"{parts.MOST_LINES} of {len(lines)} decoders; filter by family or claim to see the others.")
front = f"◆ on the [Pareto front]({link('trade-off')}) of {plane[1]} and {plane[0]} · " if plane else ""
st.caption(
    f"★ best of its column, or not told apart from the best · {front}↑ higher, ↓ lower is better · "
    f"[intervals]({link('about')}) are 95 % · pale: stand-in data, changed code or a failed audit, as it says"
)
parts.download(parts.ask(found, queries.numbers_as_rows, setting), "decodathlon", "All numbers of this setting as CSV")

reasons = parts.missing(lines, axes)
if reasons:
    st.subheader("Not measured")
    st.markdown("\n".join(f"- {reason}" for reason in reasons[: parts.MOST_LINES]))
remarks = sorted({(c.decoder, remark) for c in cells for remark in c.remarks})
if remarks:
    st.subheader("What a reader of these numbers must know")
    st.markdown("\n".join(f"- `{decoder}`: {remark}" for decoder, remark in remarks[: parts.MOST_LINES]))

columns = {parts.column_name(a.column, axes): a.column for a in axes}
if columns:
    st.subheader("One suite with all its metrics")
    chosen = columns[st.selectbox("Suite", list(columns), key="suite", bind="query-params")]
    st.markdown(suites.get(chosen.suite, {}).get("asks", ""))
    shown = {line.decoder for line in lines}
    whole = [c for c in parts.cells(found, setting, None, "", chosen) if c.decoder in shown]
    names = findings.columns_of(whole).get(chosen, set())
    detail = [findings.Axis(chosen, m) for m in findings.table_of(chosen, names, suites, metrics)]
    body = [
        [parts.decoder_field(line), *(parts.entry_field(e) for e in line.entries)]
        for line in sorted(findings.lines(whole, detail, baselines), key=lambda x: x.decoder)[: parts.MOST_LINES]
    ]
    st.html(
        table(["decoder", *(parts.metric_head(a.metric, metrics) for a in detail)], body, f"All metrics of {chosen}")
    )

others = parts.ask(found, queries.elsewhere, setting)
if others:
    st.subheader("Measured only in other settings")
    rows = []
    for other in others[: parts.MOST_LINES]:
        address = link("", **{k: str(v) for k, v in other["at"].items()})
        rows.append([Field(other["name"], href=address), str(queries.Setting(**other["at"]))])
    st.html(table(["decoder", "last measured in"], rows, "Decoders measured only in other settings"))
