"""Charts of particle methods: levels and effective sizes, who descends from whom, the weights of the last pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from decodathlon.leaderboard.charts import GREY, PALETTE

if TYPE_CHECKING:
    import altair

#: Height of a particle's line, and of the chart at most.
_LINE, _TALLEST = 22, 420


def course(rows: Sequence[dict[str, Any]], axis: str) -> altair.LayerChart:
    """Level and share of effective particles, step by step; a filled point where particles were copied."""
    import altair as alt

    base = alt.Chart(alt.Data(values=list(rows))).encode(
        x=alt.X("at:Q", title=axis, axis=alt.Axis(tickMinStep=1)),
        y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=True)),
        color=alt.Color("line:N", scale=alt.Scale(range=PALETTE), legend=alt.Legend(orient="bottom", title=None)),
    )
    points = base.mark_point(size=50).encode(
        fillOpacity=alt.condition("datum.copied", alt.value(1.0), alt.value(0.0)),
        fill=alt.Fill("line:N", scale=alt.Scale(range=PALETTE), legend=None),
        tooltip=[alt.Tooltip("at:Q", title=axis), "line:N", "value:Q", alt.Tooltip("copied:N", title="copied here")],
    )
    return alt.layer(base.mark_line(opacity=0.6), points).properties(height=220)


def genealogy(rows: Sequence[dict[str, Any]], axis: str) -> altair.Chart:
    """Particles from left to right; dark what has descendants at the end."""
    import altair as alt

    most = max((row["y2"] for row in rows), default=1)
    return (
        alt.Chart(alt.Data(values=list(rows)))
        .mark_rule()
        .encode(
            x=alt.X("x:Q", title=f"{axis}s so far", axis=alt.Axis(tickMinStep=1)),
            x2="x2:Q",
            y=alt.Y("y:Q", title="particle", axis=alt.Axis(tickMinStep=1), scale=alt.Scale(reverse=True, zero=False)),
            y2="y2:Q",
            color=alt.Color("kept:N", scale=alt.Scale(domain=["yes", "no"], range=[PALETTE[0], GREY]),
                            legend=alt.Legend(orient="bottom", title="has descendants at the end")),
            opacity=alt.condition("datum.kept == 'yes'", alt.value(1.0), alt.value(0.35)),
        )
        .properties(height=min(_TALLEST, _LINE * int(most) + 40))
    )  # fmt: skip


def weights(rows: Sequence[dict[str, Any]]) -> altair.Chart:
    """A bar per answer of the pool; the one that was given stands out."""
    import altair as alt

    return (
        alt.Chart(alt.Data(values=list(rows)))
        .mark_bar()
        .encode(
            x=alt.X("answer:O", title="answer of the pool", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            y=alt.Y("weight:Q", title="weight"),
            color=alt.Color("given:N", scale=alt.Scale(domain=["yes", "no"], range=[PALETTE[5], PALETTE[0]]),
                            legend=alt.Legend(orient="bottom", title="given")),
            tooltip=["answer:O", "weight:Q", "score:Q", "given:N"],
        )
        .properties(height=200)
    )  # fmt: skip
