"""Run: what was run, where, by which code; what its gates said; what another run says of the same cells."""

import streamlit as st

from decodathlon.harness.results import measured
from decodathlon.leaderboard import parts, queries
from decodathlon.leaderboard.tables import Field, link, table

MOST_CELLS = 500
LOOKS = {"pass": "pass", "fail": "fail", "inconclusive": "unsure", "not run": "none"}

found = parts.begin()
runs = {r["run_id"]: r for r in parts.ask(found, queries.runs)}
if not runs:
    st.title("No runs yet")
    st.info("Run `pytest suites/ --benchmark`; this page fills while it runs.")
    st.stop()
chosen = parts.choose("Run", list(runs), "run")
record, brief = parts.ask(found, queries.run, chosen), runs[chosen]

st.title(parts.plain(f"Run {chosen}"))
code = (record["git_commit"] or "unknown")[:12]
changed = " **with uncommitted changes**" if record["git_dirty"] else ""
st.markdown(
    f"Began {parts.moment(record['started'])} UTC on **{parts.plain(record['hardware'])}**, code `{code}`{changed}. "
    f"{brief['ok']} of {brief['cells']} cells ok; "
    f"{parts.plain(brief['models'] or 'no model')}, {parts.plain(brief['scales'] or 'no scale')}."
)

st.subheader("Gates")
verdicts = parts.ask(found, queries.gates, chosen)
passed = [g for g in verdicts if g["outcome"] == "pass"]


def _gates(some: list[queries.Row], caption: str) -> str:
    rows = [
        [
            g["gate"],
            g["decoder"] or "–",
            Field(g["outcome"], look=LOOKS.get(g["outcome"], "")),
            Field(g["detail"], look="prose"),
        ]
        for g in some
    ]
    return table(["rule", "decoder", "outcome", "why"], rows, caption)


if not verdicts:
    st.caption("This run was judged by no gates.")
elif len(passed) < len(verdicts):
    st.html(_gates([g for g in verdicts if g not in passed], "Gates that did not pass"))
if passed:
    with st.expander(f"{len(passed)} of {len(verdicts)} passed"):
        st.html(_gates(passed, "Gates that passed"))

cells = parts.ask(found, queries.run_cells, chosen)
st.subheader(f"{len(cells)} cells")
rows = []
for cell in cells[:MOST_CELLS]:
    name = cell["decoder"].partition("[")[0]
    address = "" if name == queries.HARNESS else link("decoder", decoder=name)
    rows.append(
        [
            Field(cell["decoder"], href=address),
            queries.part_name(cell["suite"], cell["slice"]),
            Field(cell["status"], small=cell["reason"], look="" if cell["status"] == "ok" else "none"),
            Field("–" if cell["seconds"] is None else f"{cell['seconds']:.1f} s", number=True),
            (cell["dataset"] or "–") + (" (stand-in)" if cell["source"] == "stand-in" else ""),
            Field("; ".join(cell["notes"] or []) or "–", look="prose"),
        ]
    )
st.html(table(["decoder", "suite", "status", "took", "data", "notes"], rows, "Cells of the run"))
if len(cells) > len(rows):
    st.caption(f"{len(rows)} of {len(cells)}; the CSV has them all.")
parts.download([{k: v for k, v in c.items() if k not in ("error", "log")} for c in cells], chosen)
for cell in [c for c in cells if c["error"] or c["log"]][:20]:
    with st.expander(f"{cell['decoder']} on {cell['suite']} {cell['slice']}: {cell['status']}"):
        st.code((cell["error"] or "") + (cell["log"] or ""), language=None)

st.subheader("Against another run")
others = [run for run in runs if run != chosen]
other = st.selectbox("Compare with", others, index=None, key="with", bind="query-params")
if other:
    before = {(c.decoder, c.where): c for c in measured.of_run(found.path, other)}
    now = measured.of_run(found.path, chosen)
    pairs = [(before[c.decoder, c.where], c) for c in now if (c.decoder, c.where) in before]
    if pairs:
        parts.comparison(pairs, (other, chosen), f"Run {chosen} against {other}")
    else:
        st.info("No cell in common: suite and its version, model, type, data, scale and seed must be the same.")

st.subheader("Environment")
environment, options = record["environment"], record["options"]
machine = {k: v for k, v in environment.items() if k != "packages" and v not in ("", [], None)}
if isinstance(machine.get("memory_bytes"), int):
    machine["memory_bytes"] = f"{machine['memory_bytes'] / 2**30:.1f} GiB"
machine |= {k: ", ".join(map(str, v)) for k, v in machine.items() if isinstance(v, list)}
left, right = st.columns(2)
with left:
    st.html(table(["machine", ""], [[k, str(v)] for k, v in machine.items()], "Machine"))
with right:
    packages = environment.get("packages", {})
    st.html(table(["package", "version"], [[k, str(v)] for k, v in packages.items()], "Packages"))
asked = [[k, str(v)] for k, v in options.items() if v not in ([], None, False)]
st.html(table(["option", "value"], asked, "Options"))
