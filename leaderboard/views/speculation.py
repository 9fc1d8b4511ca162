"""Speculation: where the speed of decoders that draft comes from, and where it goes."""

from typing import Any

import streamlit as st

from decodathlon.harness.results.table import number as written
from decodathlon.leaderboard import draft_charts, draft_queries, parts
from decodathlon.leaderboard.tables import Field, table

found = parts.begin()
cells = parts.ask(found, draft_queries.drafting)
st.title("Where does the speed of drafting come from?")
if not cells:
    st.info(
        "No decoder that drafts was timed yet: `pytest suites/ --benchmark --suite throughput --workload spec-bench "
        "--decoder prompt-lookup --decoder quantised-self`"
    )
    st.stop()

settings = {f"{c['model']} · {c['dtype']} · {c['hardware']} · {c['scale']}": c for c in cells}
where = parts.choose("Measured on", list(settings), "on")
here = [c for c in cells if f"{c['model']} · {c['dtype']} · {c['hardware']} · {c['scale']}" == where]


def field(cell: dict[str, Any], metric: str) -> Field:
    """A number with its interval."""
    value, low, high = cell["numbers"].get(metric, (None, None, None))
    if value is None:
        return Field("–", number=True)
    interval = "" if low is None else f" [{written(low, 3)}, {written(high, 3)}]"
    return Field(f"{written(value)}{interval}", number=True)


st.html(
    table(
        ["decoder", "prompts", *draft_queries.METRICS],
        [[c["decoder"], c["slice"], *(field(c, m) for m in draft_queries.METRICS)] for c in here[: parts.MOST_LINES]],
        "Decoders that draft",
    )
)
st.caption(
    "`ratio_to_greedy` is measured, side by side; `ratio_predicted` follows from the cycles of a further run: where "
    "they differ by more than the interval, something beside the cycles takes time. Loops flatter who looks up."
)

names = {f"{c['decoder']} · {c['slice']}": c for c in here}
chosen = names[parts.choose("Cell", list(names), "cell")]
drafts = chosen["drafts"]
accepted = drafts["accepted"]
cycles = sum(accepted)
stayed = sum(n * count for n, count in enumerate(accepted))
left, right = st.columns(2)
with left:
    st.subheader("By place")
    st.altair_chart(draft_charts.by_place(drafts["stays"]), width="stretch")
with right:
    st.subheader("By cycle")
    st.altair_chart(draft_charts.histogram(accepted), width="stretch")
if cycles:
    tau = chosen["numbers"].get("tau", (None,))[0]
    same = tau is not None and abs(stayed / cycles + 1 - tau) < 1e-3
    st.caption(
        f"{cycles:.0f} cycles; {stayed:.0f} drafted tokens stayed, and each cycle made one more: "
        f"{written(stayed / cycles + 1)} tokens per cycle, "
        + ("which is `tau`." if same else f"but `tau` is {written(tau) if tau is not None else 'not known'}.")
    )
if drafts["cycle"]:
    whole = sum(drafts["cycle"].values())
    st.html(
        table(
            ["part of a cycle", "seconds", "share"],
            [
                [part, Field(written(seconds), number=True), Field(f"{seconds / whole:.1%}", number=True)]
                for part, seconds in drafts["cycle"].items()
            ],
            "A cycle on average",
        )
    )
st.caption(
    "How fast the model reads several tokens at once is the suite `verify_cost`. Single cycles are kept with "
    "`--cycle-trace`, and written out by `decodathlon export --samples`."
)
