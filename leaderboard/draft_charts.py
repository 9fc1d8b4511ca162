"""Charts of drafting: how often the token at each place stays, and how many of a draft do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from decodathlon.leaderboard.charts import PALETTE

if TYPE_CHECKING:
    import altair


def by_place(stays: Sequence[float]) -> altair.Chart:
    """A point per place of a draft: the share that stays of what was drafted there and could."""
    import altair as alt

    rows = [{"place": i + 1, "stays": share} for i, share in enumerate(stays)]
    return (
        alt.Chart(alt.Data(values=rows))
        .mark_line(point=True, color=PALETTE[0])
        .encode(
            x=alt.X("place:Q", title="place in the draft", axis=alt.Axis(tickMinStep=1)),
            y=alt.Y("stays:Q", title="stays, if those before it did", scale=alt.Scale(domain=[0, 1])),
            tooltip=["place:Q", alt.Tooltip("stays:Q", format=".3f")],
        )
        .properties(height=220)
    )


def histogram(accepted: Sequence[float]) -> altair.Chart:
    """A bar per number of drafted tokens that stayed: the share of cycles."""
    import altair as alt

    total = sum(accepted) or 1.0
    rows = [{"accepted": n, "share": count / total, "cycles": count} for n, count in enumerate(accepted)]
    return (
        alt.Chart(alt.Data(values=rows))
        .mark_bar(color=PALETTE[0])
        .encode(
            x=alt.X("accepted:O", title="drafted tokens that stayed", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("share:Q", title="share of cycles", axis=alt.Axis(format="%")),
            tooltip=["accepted:O", "cycles:Q", alt.Tooltip("share:Q", format=".1%")],
        )
        .properties(height=220)
    )
