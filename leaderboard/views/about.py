"""About: how to read the board, what every metric means, and the rules of the contest."""

import re

import streamlit as st

from decodathlon.harness.results import environment
from decodathlon.harness.results.table import quantity
from decodathlon.leaderboard import parts, queries
from decodathlon.leaderboard.tables import Field, table

KINDS = {
    "quality": "How good is what it says?",
    "exactness": "Does it draw from what it claims?",
    "speed": "How fast is it?",
    "memory": "How much memory does it take?",
    "context": "What explains the others (never ranked)",
    "harness": "What does measuring cost?",
}
CLAIMS = {
    "exact": "samples the target's own law",
    "greedy-exact": "equals greedy search token for token",
    "shaped": "samples a stated transform of the law, such as top-p",
    "sharpened": "samples p to the power beta, or a reward-tilted law",
    "heuristic": "claims nothing of the law",
}

found = parts.begin()
st.title("About")
st.markdown(
    """
Decodathlon measures decoders of language models: how well their law predicts text, how fast they are, what memory they
take. A number here rests on raw observations that were kept; `results.duckdb` is made from them.

- **A line** is a decoder with its parameters, in one setting: model, type, hardware, scale and seed never mix.
- **★** is the best of a column, **≈** what cannot be told apart from it: the 95 % interval of their difference, unit
  by unit, holds zero, or the difference is smaller than a decoder's from itself (which may mean: measured with much
  noise). Of questions that are solved or not McNemar's exact test decides. Where nobody is told apart, nobody is
  marked. Times and sizes are not marked, because cells run one after another; only ratios, measured side by side, rank.
- **◆** is on the Pareto front, more likely than not: nobody is at least as good in both metrics and better in one.
- **Pale** is what does not count: measured on stand-in data, by code with uncommitted changes, by a decoder whose
  audit failed, or with a failed A/A test (its speed against itself is not 1). It says which. It gets no mark, takes
  part in no front and in no sentence at the top.
- **A claim** is the word of a decoder's author. Every run checks `greedy-exact`; the suite `audit` checks the others,
  and the page *Exactness* shows what came of it.
- **unsupported** says that a question does not apply to a decoder; **failed, crashed, oom, timeout** that it did not
  survive it. Nothing is left out, and no missing number counts as zero.
"""
)

st.subheader("Metrics")
metrics = parts.ask(found, queries.metrics)
for kind, asks in KINDS.items():
    rows = [
        [
            Field(name),
            m.unit,
            {"higher": "↑ higher", "lower": "↓ lower"}.get(m.better, "–"),
            Field(m.meaning or "undescribed", look="prose"),
        ]
        for name, m in metrics.items()
        if m.kind == kind and "(" not in name
    ]
    if rows:
        st.markdown(f"**{asks}**")
        st.html(table(["metric", "unit", "better", "meaning"], rows, asks))

st.subheader("Claims")
st.html(table(["claim", "the decoder ..."], [[k, Field(v, look="prose")] for k, v in CLAIMS.items()], "Claims"))

costs = parts.ask(found, queries.overheads)
if costs:
    st.subheader("What the harness itself costs")
    rows = [
        [c["operation"], Field(quantity({**c, "unit": "s"}, interval=True), number=True), str(c["n"]), c["hardware"]]
        for c in costs
    ]  # fmt: skip
    st.html(table(["operation", "median", "rounds", "hardware"], rows, "Overheads"))

st.subheader("The rules of the contest")
rules = environment.ROOT / "docs" / "principles.md"
if rules.is_file():
    text = rules.read_text(encoding="utf-8")
    text = re.sub(r"\[([^\]]+)\]\([^)#]+\.md\)", r"docs/\1", text)  # files of the repository are no pages of the board
    st.markdown(text.partition("\n")[2].replace("\n## ", "\n#### "))
else:
    st.markdown("They are in `docs/principles.md` of the repository.")
