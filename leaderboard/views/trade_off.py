"""Trade-off: quality against speed or memory, with intervals, and how sure it is who is on the Pareto front."""

import streamlit as st

from decodathlon.leaderboard import charts, findings, parts, queries
from decodathlon.leaderboard.tables import Field, link, table

found = parts.begin()
setting = parts.setting(found)
metrics = parts.ask(found, queries.metrics)
baselines = parts.ask(found, queries.baselines, setting)
suites = parts.ask(found, queries.suites)

st.title("Quality against cost")
st.caption(parts.plain(str(setting)))

axes = findings.axes(parts.ask(found, queries.columns, setting), suites, metrics)
ranked = [a for a in axes if findings.ranks(metrics[a.metric])]
cost = [a for a in ranked if metrics[a.metric].kind == "speed"]
cost += [a for a in axes if metrics[a.metric].kind == "memory"]
quality = [a for kind in ("quality", "exactness") for a in ranked if metrics[a.metric].kind == kind]
if not cost or not quality:
    absent = "quality" if cost else "speed or memory"
    st.info(f"No metric of {absent} was measured here. `pytest suites/ --benchmark` runs every suite.")
    st.stop()

with st.container(horizontal=True):
    x = parts.choose_axis("Across: speed or memory", cost, "x")
    y = parts.choose_axis("Upwards: quality", quality, "y")
cells = parts.cells(found, setting, tuple(sorted({x.metric, y.metric, "ratio_to_self"})))
points, lacking = findings.points(
    [c for c in cells if c.column.part in (x.column.part, y.column.part)], x, y, baselines
)

st.altair_chart(charts.trade_off(points, x, y), width="stretch", alt=charts.trade_off_in_words(points, x, y))
st.caption(parts.plain(charts.not_drawn(points)))
st.caption(
    "Better is to the right and up. The dashed line joins the front by the values alone: nobody is at least as good "
    "in both and better in one. Its probability is the share of bootstrap resamples of the units (windows of text, "
    "pairs of runs) in which the decoder is on it; speeds also carry the decoder's error against itself. It does not "
    "know how far another visit of the machine would move them. A peak of memory is one measurement: how sure it is "
    "nobody knows. ◆ is on the front, more likely than not."
)
rows = []
for p in sorted(points, key=lambda p: (-(p.probability or 0), p.decoder))[: parts.MOST_LINES]:
    sure = "–" if p.probability is None else f"{p.probability:.0%}"
    why = "" if p.probability is not None else ", ".join(p.doubts) or "too few observations"
    rows.append(
        [
            Field(
                p.decoder,
                look="front" if p.likely else "",
                href=link("decoder", decoder=p.decoder.partition("[")[0], **parts.address(setting)),
            ),
            Field(sure, small=why, number=True),
            Field(findings.text_of(p.x), number=True),
            Field(findings.text_of(p.y), number=True),
        ]
    )
head = ["decoder", "on the front", parts.axis_head(x, metrics), parts.axis_head(y, metrics)]
st.html(table(head, rows, "Decoders with both numbers"))
parts.download([findings.as_row(p) for p in points], "trade-off")
if lacking:
    names = findings.listed([line.decoder for line in lacking], 20)
    st.markdown(parts.plain(f"Without one of the two: {names}."))
    st.markdown("\n".join(f"- {parts.plain(reason)}" for reason in parts.missing(lacking, [x, y])))
