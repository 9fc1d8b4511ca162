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
others = [(s, n) for s, n in parts.ask(found, queries.settings) if s != setting]
st.caption(
    f"{parts.plain(str(setting))} · {len({c.decoder for c in cells})} decoders"
    + "".join(
        f" · [{parts.plain(str(s))}: {n} decoders]({link('', **parts.address(s))})"
        for s, n in sorted(others, key=lambda other: -other[1])[:2]
    )
)

with st.container(horizontal=True):
    families = st.multiselect("Family", sorted({c.family for c in cells}), key="family", bind="query-params")
    claims = st.multiselect("Claim", sorted({c.claim for c in cells if c.claim}), key="claim", bind="query-params")
    data = st.multiselect("Data", sorted({a.column.dataset for a in axes}), key="data", bind="query-params")
    orders = ["decoder", *(parts.axis_name(a, axes) for a in axes)]
    order = parts.choose("Sort by", orders, "sort", first=min(1, len(orders) - 1))
    usual = st.toggle("Default parameters only", key="defaults", bind="query-params")

axes = [a for a in axes if not data or a.column.dataset in data]
plane = findings.default_axes(axes, metrics)
everyone = findings.with_front(findings.lines(cells, axes, baselines), axes, plane)
place = next((i for i, a in enumerate(axes) if parts.axis_name(a, axes) == order), None)
everyone = sorted(everyone, key=lambda x: x.decoder) if place is None else findings.ordered(everyone, place)
# Filters hide lines; who is best is decided among all.
lines = [
    x
    for x in everyone
    if (not families or x.family in families)
    and (not claims or x.claim in claims)
    and (not usual or x.decoder == x.name)
]

for column, sentence in findings.summary(everyone, axes, baselines):
    st.markdown(f"- **{parts.plain(column)}**: {parts.plain(sentence)}")

head = ["decoder", "claims", *(parts.axis_head(a, metrics, axes) for a in axes)]
rows = [parts.decoder_row(line, setting, parts.claim_field(line)) for line in lines[: parts.MOST_LINES]]
st.html(table(head, rows, "Decoders by suite"))
if len(lines) > parts.MOST_LINES:
    st.caption(f"{parts.MOST_LINES} of {len(lines)} decoders; filter by family or claim to see the others.")
front = f"◆ on the [Pareto front]({link('trade-off')}) of {plane[1]} and {plane[0]} · " if plane else ""
st.caption(
    f"★ best of its column · ≈ not told apart from the best · {front}↑ higher, ↓ lower is better · "
    f"[intervals]({link('about')}) are 95 % · pale: stand-in data, changed code, a failed A/A test or audit, "
    f"as it says · a claim is its author's word until the [audit]({link('exactness')}) has tested it"
)
means = {a.metric: metrics[a.metric].meaning for a in axes}
st.markdown("\n".join(f"- **{parts.plain(name)}**: {parts.plain(text)}" for name, text in means.items() if text))
parts.download(parts.ask(found, queries.numbers_as_rows, setting), "decodathlon", "All numbers of this setting as CSV")

reasons = parts.missing(lines, axes)
if reasons:
    st.subheader("Not measured")
    st.markdown("\n".join(f"- {parts.plain(reason)}" for reason in reasons[: parts.MOST_LINES]))
shown = {line.decoder for line in lines}
remarks = sorted({(c.decoder, remark) for c in cells for remark in c.remarks if c.decoder in shown})
if remarks:
    st.subheader("What a reader of these numbers must know")
    st.markdown("\n".join(f"- {parts.plain(': '.join(remark))}" for remark in remarks[: parts.MOST_LINES]))

columns = {parts.column_name(a.column, axes): a.column for a in axes}
if columns:
    st.subheader("One suite with all its metrics")
    chosen = columns[parts.choose("Suite", list(columns), "suite")]
    st.markdown(parts.plain(suites.get(chosen.suite, {}).get("asks", "")))
    whole = parts.cells(found, setting, None, "", chosen)
    names = findings.columns_of(whole).get(chosen, set())
    detail = [findings.Axis(chosen, m) for m in findings.table_of(chosen, names, suites, metrics)]
    body = [
        parts.decoder_row(line, setting)
        for line in sorted(findings.lines(whole, detail, baselines), key=lambda x: x.decoder)
        if line.decoder in shown
    ]
    head = ["decoder", *(parts.metric_head(a.metric, metrics) for a in detail)]
    st.html(table(head, body[: parts.MOST_LINES], f"All metrics of {chosen}"))
    if any(metrics[a.metric].unit != "1" for a in detail):
        st.caption(
            "Times, rates and sizes of two lines were measured at different moments: they do not compare, ratios do."
        )

absent = parts.ask(found, queries.elsewhere, setting)
if absent:
    st.subheader("Measured only in other settings")
    rows = []
    for other in absent[: parts.MOST_LINES]:
        address = link("", **{k: str(v) for k, v in other["at"].items()})
        rows.append([Field(other["name"], href=address), str(queries.Setting(**other["at"]))])
    st.html(table(["decoder", "last measured in"], rows, "Decoders measured only in other settings"))
