"""Profile: where the time and the memory of a decoder go, as flame graphs."""

import json

import streamlit as st

from decodathlon.harness.results import profiles
from decodathlon.leaderboard import charts, parts, profile_queries
from decodathlon.leaderboard.tables import Field, table

found = parts.begin()
cells = parts.ask(found, profile_queries.profiled)
st.title("Where time and memory go")
if not cells:
    st.info("Nothing was profiled yet: `pytest suites/ --benchmark --suite throughput --profile` does it.")
    st.stop()

names = {f"{c['decoder']} · {c['slice']} · {c['model']} · {c['scale']} · {c['run_id']}": c for c in cells}
chosen = names[parts.choose("Cell", list(names), "cell")]
stored = parts.ask(found, profile_queries.profile, chosen["run_id"], chosen["cell_id"])
st.caption(parts.plain(f"{chosen['hardware']}, {parts.moment(chosen['started'])} UTC"))

slower = stored["profiled_seconds"] / stored["seconds"]
shares = profiles.shares(stored["time"])
st.html(
    table(
        ["phase", "share of the call"],
        [[phase, Field(f"{share:.1%}", number=True)] for phase, share in shares.items()],
        "Phases of a profiled call",
    )
)
st.caption(
    f"The call took {stored['seconds']:.3g} s, and under the profiler {stored['profiled_seconds']:.3g} s "
    f"({slower:.2f} times as long): shares of many small operations look larger than they are."
)
for kind, unit, what in (("time", "s", "Time"), ("memory", "B", "Memory that was allocated, freed or not")):
    boxes = profiles.flame(stored[kind], least=0.001)
    st.subheader(what)
    if boxes:
        st.altair_chart(charts.flame(boxes, unit), width="stretch", alt=charts.flame_in_words(boxes, unit))
    else:
        st.caption("The profiler saw none.")
st.caption("Scroll over a graph to zoom, drag to move, double-click for the whole. A box stands over what called it.")
st.download_button(
    "Chrome trace", json.dumps(profiles.chrome_trace(stored)), f"{chosen['cell_id']}.trace.json", "application/json"
)
