"""Charts, each with the words that say the same. Altair only: no database, no Streamlit.

Colour goes by family (Okabe and Ito's palette, told apart by colour-blind readers) and shape by claim, so that nothing
is said by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from decodathlon.harness.results.measured import Number
from decodathlon.harness.results.table import number as written

if TYPE_CHECKING:
    import altair

    from decodathlon.harness.results.profiles import Box
    from decodathlon.leaderboard.findings import Axis, Point

PALETTE = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999933", "#888888"]
#: Legible on white and on black.
GREY = "#888888"
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"]
#: Above so many points their names would cover one another; then only those likely on the front are written.
MOST_LABELS = 16
#: Above this ratio of the largest to the smallest value an axis is logarithmic.
WIDE = 8
#: Texts of an enumerated law that are drawn.
MOST_TEXTS = 60


def trade_off(points: Sequence[Point], x: Axis, y: Axis) -> altair.LayerChart:
    """Two metrics with their intervals; the front as a line, what is doubted pale."""
    import altair as alt

    rows = [
        {
            "decoder": p.decoder,
            "family": p.family,
            "claim": p.claim,
            **_coordinates("x", p.x),
            **_coordinates("y", p.y),
            "front": "yes" if p.on_front else "no",
            "probability": "–" if p.probability is None else f"{p.probability:.0%}",
            "pale": bool(p.doubts),
            "label": p.decoder if len(points) <= MOST_LABELS or p.likely else "",
        }
        for p in points
        if all(math.isfinite(n.estimate.value) for n in (p.x, p.y))
    ]
    base = alt.Chart(alt.Data(values=rows))
    like = (points[0].x, points[0].y) if points else (None, None)
    at_x = alt.X("x:Q", title=_title(x, like[0], "→"), scale=_scale([r["x"] for r in rows], like[0]))
    at_y = alt.Y("y:Q", title=_title(y, like[1], "↑"), scale=_scale([r["y"] for r in rows], like[1]))
    colour = alt.Color(
        "family:N", scale=alt.Scale(range=PALETTE), legend=alt.Legend(orient="bottom", columns=3, symbolOpacity=1)
    )
    shape = alt.Shape(
        "claim:N",
        scale=alt.Scale(range=SHAPES),
        legend=alt.Legend(orient="top", columns=3, symbolFillColor=GREY, symbolStrokeColor=GREY),
    )
    faint = alt.condition("datum.pale", alt.value(0.3), alt.value(1.0))
    tips = [alt.Tooltip(f"{f}:N") for f in ("decoder", "claim", "x_text", "y_text", "front", "probability")]
    whole = "isValid(datum.{0}_low)"
    return alt.layer(
        base.mark_line(strokeDash=[4, 3], opacity=0.6, color=GREY)
        .transform_filter("datum.front == 'yes'")
        .encode(x=at_x, y=at_y, order="x:Q"),
        base.mark_rule(opacity=0.45)
        .transform_filter(whole.format("x"))
        .encode(x="x_low:Q", x2="x_high:Q", y="y:Q", color=colour),
        base.mark_rule(opacity=0.45)
        .transform_filter(whole.format("y"))
        .encode(x="x:Q", y="y_low:Q", y2="y_high:Q", color=colour),
        base.mark_point(size=110, filled=True).encode(
            x=at_x, y=at_y, color=colour, shape=shape, opacity=faint, tooltip=tips
        ),
        base.mark_text(dx=9, dy=-9, align="left", fontSize=12, color=GREY).encode(x="x:Q", y="y:Q", text="label:N"),
    ).properties(height=520)


def trade_off_in_words(points: Sequence[Point], x: Axis, y: Axis) -> str:
    """What the chart shows, for who cannot see it."""
    front = [p for p in points if p.on_front]
    said = "; ".join(
        f"{p.decoder} at {written(p.x.estimate.value)} and {written(p.y.estimate.value)}"
        + (f", on the front in {p.probability:.0%} of resamples" if p.probability is not None else "")
        for p in front
    )
    hidden = not_drawn(points)
    text = f"{x.metric} of {x.column} across, {y.metric} of {y.column} upwards, {len(points)} decoders. "
    text += f"On the Pareto front: {said or 'none'}."
    return f"{text} {hidden}" if hidden else text


def not_drawn(points: Sequence[Point]) -> str:
    """Who has no place on the chart, in a sentence; empty where everybody has."""
    hidden = [p.decoder for p in points if not all(math.isfinite(n.estimate.value) for n in (p.x, p.y))]
    return f"Not drawn, because infinite or no number: {', '.join(hidden)}." if hidden else ""


def over_time(rows: Sequence[dict[str, Any]], metric: str) -> altair.LayerChart:
    """One metric from run to run, a line per setting of the decoder."""
    return _lines(
        [
            {
                **row,
                "at": row["started"].isoformat(),
                "low": row["ci_low"],
                "high": row["ci_high"],
                "code": (row["git_commit"] or "")[:10] + (" (changed)" if row["git_dirty"] else ""),
                "line": row["decoder"],
            }
            for row in rows
        ],
        "at:T",
        "measured",
        metric,
        ["line", "run_id", "at", "value", "low", "high", "code"],
    )


def sweep(rows: Sequence[dict[str, Any]], parameter: str, metric: str) -> altair.LayerChart:
    """One metric over the values of one parameter.

    Args:
        rows: `value`, `low` and `high` of the metric `at` a value of the parameter, `decoder`.
    """
    numeric = all(isinstance(row["at"], int | float) for row in rows)
    return _lines(
        [row | {"line": parameter} for row in rows],
        "at:Q" if numeric else "at:N",
        parameter,
        metric,
        ["decoder", "at", "value", "low", "high"],
    )


def series_in_words(rows: Sequence[dict[str, Any]], metric: str, over: str) -> str:
    """What a line of values shows, for who cannot see it."""
    said = "; ".join(f"{row['at']}: {written(row['value'])}" for row in rows[:40])
    more = f"; and {len(rows) - 40} more" if len(rows) > 40 else ""
    return f"{metric} over {over}, {len(rows)} points. {said}{more}."


def law(rows: Sequence[dict[str, Any]]) -> altair.LayerChart:
    """Shares of the draws as bars, the claimed law as a line across each; likeliest first.

    Args:
        rows: `text`, `law` and `drawn`.
    """
    import altair as alt

    base = alt.Chart(alt.Data(values=list(rows[:MOST_TEXTS])))
    x = alt.X("text:N", sort=None, title="text", axis=alt.Axis(labelAngle=-60))
    tips = [alt.Tooltip("text:N"), alt.Tooltip("law:Q", format=".4g"), alt.Tooltip("drawn:Q", format=".4g")]
    return alt.layer(
        base.mark_bar(color=PALETTE[0], opacity=0.6).encode(x=x, y=alt.Y("drawn:Q", title="probability"), tooltip=tips),
        base.mark_tick(color=PALETTE[5], thickness=3).encode(x=x, y="law:Q", tooltip=tips),
    ).properties(height=320)


def law_in_words(rows: Sequence[dict[str, Any]], decoder: str) -> str:
    """What that shows, for who cannot see it."""
    worst = max(rows, key=lambda row: abs(row["law"] - row["drawn"]))
    return (
        f"{len(rows)} texts of {decoder}, the likeliest {min(len(rows), MOST_TEXTS)} drawn. Furthest from its law is "
        f"{worst['text']}: {written(worst['law'])} claimed, {written(worst['drawn'])} drawn."
    )


def distances(rows: Sequence[dict[str, Any]], across: str) -> altair.LayerChart:
    """Distance to a law over draws or seconds, a line per decoder; dashed in the same colour: independent draws.

    Args:
        rows: `decoder`, `draws`, `seconds`, `tvd`, `independent`.
        across: `draws` or `seconds`.
    """
    import altair as alt

    base = alt.Chart(alt.Data(values=[row for row in rows if row[across] > 0]))
    x = alt.X(f"{across}:Q", scale=alt.Scale(type="log", nice=False), title=across)
    colour = alt.Color(
        "decoder:N", scale=alt.Scale(range=PALETTE), legend=alt.Legend(orient="bottom", columns=2), title=None
    )
    tips = [alt.Tooltip(f"{t}:N") for t in ("decoder", "draws", "seconds", "tvd", "independent")]
    y = alt.Y("tvd:Q", scale=alt.Scale(type="log", nice=False), title="distance")
    return alt.layer(
        base.mark_line(strokeDash=[4, 3], opacity=0.5).encode(x=x, y="independent:Q", color=colour),
        base.mark_line(opacity=0.7).encode(x=x, y=y, color=colour),
        base.mark_point(size=60, filled=True).encode(x=x, y=y, color=colour, tooltip=tips),
    ).properties(height=380)


def at_cost(rows: Sequence[dict[str, Any]], cost: str, quality: str) -> altair.LayerChart:
    """Quality over what a question costs, a line per decoder that may answer it more than once, a point for the others.

    Args:
        rows: `decoder`, `answers`, `cost`, `value`, `low`, `high`, `pale`.
        cost, quality: what the axes are called.
    """
    import altair as alt

    base = alt.Chart(alt.Data(values=list(rows)))
    costs = [row["cost"] for row in rows]
    wide = bool(costs) and max(costs) > WIDE * min(costs)
    x = alt.X(
        "cost:Q", title=cost, scale=alt.Scale(type="log", nice=False) if wide else alt.Scale(zero=False, padding=20)
    )
    y = alt.Y("value:Q", title=quality, scale=alt.Scale(zero=False))
    legend = alt.Legend(orient="bottom", columns=2, symbolOpacity=1)
    colour = alt.Color("decoder:N", scale=alt.Scale(range=PALETTE), legend=legend, title=None)
    shape = alt.Shape("decoder:N", scale=alt.Scale(range=SHAPES), legend=legend, title=None)
    faint = alt.condition("datum.pale", alt.value(0.3), alt.value(1.0))
    tips = [alt.Tooltip(f"{t}:N") for t in ("decoder", "answers", "cost", "value", "low", "high")]
    return alt.layer(
        base.mark_line(opacity=0.6).encode(x=x, y=y, color=colour),
        base.mark_rule(opacity=0.35)
        .transform_filter("isValid(datum.low)")
        .encode(x=x, y="low:Q", y2="high:Q", color=colour),
        base.mark_point(size=80, filled=True).encode(x=x, y=y, color=colour, shape=shape, opacity=faint, tooltip=tips),
    ).properties(height=380)


def at_cost_in_words(rows: Sequence[dict[str, Any]], cost: str, quality: str) -> str:
    """What that shows, for who cannot see it."""
    last = {row["decoder"]: row for row in rows}
    said = "; ".join(
        f"{decoder} {written(row['value'])} for {written(row['cost'])} with {row['answers']} answers"
        for decoder, row in last.items()
    )
    return f"{quality} over {cost}, {len(last)} decoders. {said}."


def distances_in_words(rows: Sequence[dict[str, Any]], across: str) -> str:
    """What that shows, for who cannot see it."""
    last = {row["decoder"]: row for row in rows}
    said = "; ".join(
        f"{decoder} {written(row['tvd'])} after {written(row[across])} {across}, independent draws "
        f"{written(row['independent'])}"
        for decoder, row in last.items()
    )
    return f"Distance to the law over {across}, {len(last)} decoders. {said}."


def _lines(rows: Sequence[dict[str, Any]], at: str, title: str, metric: str, tips: Sequence[str]) -> altair.LayerChart:
    import altair as alt

    plain = [{k: v for k, v in row.items() if isinstance(v, str | int | float | type(None))} for row in rows]
    base = alt.Chart(alt.Data(values=plain))
    x = alt.X(at, title=title, scale=alt.Scale(zero=False) if at.endswith(":Q") else alt.Undefined)
    y = alt.Y("value:Q", title=metric, scale=alt.Scale(zero=False))
    many = len({row["line"] for row in plain}) > 1
    legend = alt.Legend(orient="bottom", columns=2, symbolOpacity=1) if many else None
    colour = alt.Color("line:N", scale=alt.Scale(range=PALETTE), legend=legend, title=None)
    shape = alt.Shape("line:N", scale=alt.Scale(range=SHAPES), legend=legend, title=None)
    return alt.layer(
        base.mark_line(opacity=0.6).encode(x=x, y=y, color=colour),
        base.mark_rule(opacity=0.45)
        .transform_filter("isValid(datum.low)")
        .encode(x=x, y="low:Q", y2="high:Q", color=colour),
        base.mark_point(size=80, filled=True).encode(
            x=x, y=y, color=colour, shape=shape, tooltip=[alt.Tooltip(f"{t}:N") for t in tips]
        ),
    ).properties(height=280)


def _coordinates(axis: str, number: Number) -> dict[str, Any]:
    value, low, high, _ = number.estimate
    text = written(value) + ("" if low is None else f" [{written(low, 3)}, {written(high, 3)}]")
    return {axis: value, f"{axis}_low": low, f"{axis}_high": high, f"{axis}_text": text}


def _scale(values: Sequence[float], like: Number | None) -> altair.Scale:
    """Logarithmic where the values span so much that a linear axis would press most of them together; better is always
    to the right and up, so what is better lower runs backwards."""
    import altair as alt

    wide = bool(values) and min(values) > 0 and max(values) > WIDE * min(values)
    back = like is not None and like.better == "lower"
    if wide:
        return alt.Scale(type="log", nice=False, padding=20, reverse=back)
    return alt.Scale(zero=False, nice=True, reverse=back)


def _title(axis: Axis, number: Number | None, arrow: str) -> list[str]:
    """Two lines, so that it fits a phone."""
    better = "" if number is None or number.better == "none" else f"better {arrow} ({number.better})"
    unit = "" if number is None or number.unit == "1" else f" in {number.unit}"
    return [f"{axis.metric}{unit}", f"{axis.column}  {better}"]


#: Height of a box of a flame graph, and the least share of the width at which its name is written.
BOX, LEAST_NAMED = 22, 0.06
PHASES = {"prefill": PALETTE[4], "forward": PALETTE[0], "sampler": PALETTE[5], "generate": GREY}


def flame(boxes: Sequence[Box], unit: str) -> altair.LayerChart:
    """Folded stacks as boxes, those that call below those that are called; the wheel zooms."""
    import altair as alt

    rows = [
        {
            "stack": b.stack.replace(";", " › "), "name": b.name if b.end - b.begin >= LEAST_NAMED else "",
            "begin": b.begin, "end": b.end, "low": b.depth, "high": b.depth + 0.94,
            "phase": (b.stack.split(";")[1:2] or ["generate"])[0],
            "whole": _amount(b.whole, unit), "own": _amount(b.own, unit), "share": f"{b.end - b.begin:.1%}",
        }
        for b in boxes
    ]  # fmt: skip
    for row in rows:
        row["phase"] = row["phase"] if row["phase"] in PHASES else "generate"
    base = alt.Chart(alt.Data(values=rows))
    at = {
        "x": alt.X("begin:Q", title="share of the whole", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1])),
        "x2": "end:Q",
        "y": alt.Y("low:Q", axis=None),
    }
    colour = alt.Color(
        "phase:N",
        scale=alt.Scale(domain=list(PHASES), range=list(PHASES.values())),
        legend=alt.Legend(orient="bottom", title=None),
    )
    drawn = base.mark_rect(stroke="white", strokeWidth=0.5, opacity=0.75).encode(
        **at, y2="high:Q", color=colour, tooltip=[f"{t}:N" for t in ("stack", "whole", "own", "share")]
    )
    names = base.mark_text(align="left", dx=3, dy=-BOX / 2, baseline="middle", clip=True).encode(
        x="begin:Q", y="low:Q", text="name:N"
    )
    depth = 1 + max((b.depth for b in boxes), default=0)
    layers: altair.LayerChart = (drawn + names).properties(height=BOX * depth + 60)
    return layers.interactive(bind_y=False)


def flame_in_words(boxes: Sequence[Box], unit: str) -> str:
    """The greatest parts of a flame graph."""
    greatest = sorted(boxes, key=lambda b: -b.own)[:5]
    return "Most by themselves: " + "; ".join(f"{b.stack.replace(';', ' ')} {_amount(b.own, unit)}" for b in greatest)


def _amount(value: float, unit: str) -> str:
    return f"{1000 * value:.3g} ms" if unit == "s" else f"{value / 2**20:.3g} MiB"
