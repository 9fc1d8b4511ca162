"""Exactness: does each decoder draw from the law that it claims, how sure is that, and how fast does it get there?"""

from typing import Any

import streamlit as st

from decodathlon.harness.results.table import number as written
from decodathlon.leaderboard import audit_queries, charts, parts
from decodathlon.leaderboard.tables import Field, link, table

found = parts.begin()
st.title("Does it draw from the law that it claims?")
st.markdown(
    "The audit runs a decoder on a tiny transformer in float64 whose every text is enumerated, and holds its draws "
    "against the law that it claims. **fail**: an honest decoder would hardly ever fit so badly (Pearson's test, one "
    "false alarm in 1,000, corrected for all decoders of its run by Holm), or its code was shown to be off without a "
    "draw: a law against its definition, a chain against its own transition matrix. **pass**: nothing was found, and a "
    "total variation distance of 0.05 would have been seen with 90 % power. **weak**: nothing was found, but only a "
    "larger one would have been seen. **self**: a law without a definition besides the decoder's own code, held "
    "against what that code computes: only the drawing was checked. What fails has its speed and quality greyed on "
    "every page."
)
audits = parts.ask(found, audit_queries.audits)
if not audits:
    st.info("Nobody was audited yet: `pytest suites/ --benchmark --suite audit --decoder all`")
    st.stop()

LOOKS = {"pass": "pass", "weak": "unsure", "self": "unsure", "fail": "fail"}


def verdict(row: dict[str, Any]) -> Field:
    """The field that says what came of an audit."""
    if row["status"] != "ok":
        return Field(row["status"], small=row["reason"] or "", look="none")
    if row["verdict"] is None:
        return Field("no claim", small="the distance is for information", look="none")
    doubts = ["changed code"] if row["git_dirty"] else []
    return Field(row["verdict"], small=", ".join(doubts), look=LOOKS[row["verdict"]])


def number(value: float | None) -> Field:
    """A field with a number, or none."""
    return Field(written(value), number=value is not None)


rows = [
    [
        Field(row["decoder"], href=link("decoder", decoder=row["decoder"].partition("[")[0])),
        row["claim"] or "–",
        verdict(row),
        *(number(row[key]) for key in ("ratio", "p", "visible", "gap", "tvd", "floor")),
        Field(row["draws"] or "–", number=True),
        Field(row["run_id"], href=link("run", run=row["run_id"])),
    ]
    for row in audits
]
head = ["decoder", "claims", "verdict", Field("distance", small="over that of independent exact draws"),
        Field("p", small="an honest decoder fits no better"), Field("power", small="smallest distance seen"),
        Field("off by", small="without a draw"),
        Field("distance", small="total variation"), Field("floor", small="of independent exact draws"),
        "draws", "run"]  # fmt: skip
st.html(table(head, rows[: parts.MOST_LINES], "The newest audit of each decoder"))
parts.download(audits, "audits")

drawn = [row for row in audits if row["status"] == "ok"]
if drawn:
    st.subheader("The law and what was drawn")
    name = parts.choose("Decoder", [row["decoder"] for row in drawn], "audited")
    (one,) = [row for row in drawn if row["decoder"] == name]
    texts = parts.ask(found, audit_queries.outcomes, one["run_id"], one["cell_id"])
    if texts:
        st.altair_chart(charts.law(texts), width="stretch", alt=charts.law_in_words(texts, name))
        st.caption(
            "Each text is its token numbers; 1 is the stop token. Bars: the share of draws. Lines: the claimed law."
        )
        parts.download(texts, "law")
    else:
        st.caption("This row is older than the texts' laws in the record.")

targets = parts.ask(found, audit_queries.targets)
if targets:
    st.subheader("How fast the distance falls")
    target = parts.choose("Target", targets, "spins", first=targets.index("ring-8") if "ring-8" in targets else 0)
    everywhere = parts.ask(found, audit_queries.curves, target)
    places = list(dict.fromkeys(row["place"] for row in everywhere))
    place = parts.choose("Measured", places, "place")
    curves = [row for row in everywhere if row["place"] == place]
    names = list(dict.fromkeys(row["decoder"] for row in curves))
    chosen = st.multiselect("Decoders", names, default=names[:6], key="chains", bind="query-params")
    across = parts.choose("Over", ["draws", "seconds"], "over")
    shown = [row for row in curves if row["decoder"] in chosen]
    if shown:
        words = charts.distances_in_words(shown, across)
        st.altair_chart(charts.distances(shown, across), width="stretch", alt=words)
        st.caption(
            "Total variation distance of all draws so far, mean over trials; dashed: as many independent exact draws. "
            "Seconds are those of one trial where all run side by side, a burn-in included."
        )
        parts.download(shown, f"distances-{target}")
