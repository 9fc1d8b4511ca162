"""Tasks: which decoder answers better, what that costs, what can be told at all, and every answer that was given."""

from typing import Any

import streamlit as st

from decodathlon.harness.results import answers, budgets
from decodathlon.harness.results.table import number as written
from decodathlon.leaderboard import charts, findings, particle_charts, particles, parts, queries, tasks
from decodathlon.leaderboard.tables import Field, link, table

#: Questions of which a table shows the grades at once.
MOST_QUESTIONS = 200

found = parts.begin()
setting = parts.setting(found)
metrics = parts.ask(found, queries.metrics)
suites = parts.ask(found, queries.suites)

st.title("Which decoder answers better?")
st.caption(parts.plain(str(setting)))
columns = tasks.columns_of_tasks(parts.ask(found, queries.columns, setting))
if not columns:
    st.info("No questions were asked in this setting: `pytest suites/ --benchmark --suite math500 --suite truthfulqa`")
    st.stop()
all_axes = [findings.Axis(c, "") for c in columns]
names = {parts.column_name(c, all_axes): c for c in columns}
column = names[parts.choose("Suite", list(names), "suite")]
cells = [c for c in parts.cells(found, setting, None, "", column) if c.measured.status in findings.MEASURED]
st.markdown(
    f"{parts.plain(suites.get(column.suite, {}).get('asks', ''))} Data: **{parts.plain(column.dataset or '–')}**. "
    "What each number means, and what it does not: `docs/tasks.md`."
)

present = {m for c in cells for m in c.measured.metrics}
axes = [findings.Axis(column, m) for m in findings.table_of(column, present, suites, metrics)]
lines = findings.lines(cells, axes, {})
ranked = [a for a in axes if findings.ranks(metrics[a.metric])]
if ranked:
    for name, sentence in findings.summary(lines, ranked[:1], {}):
        st.markdown(f"**{parts.plain(name)}**: {parts.plain(sentence)}")
head = ["decoder", *(parts.metric_head(a.metric, metrics) for a in axes)]
body = [parts.decoder_row(line, setting) for line in sorted(lines, key=lambda line: line.decoder)]
st.html(table(head, body[: parts.MOST_LINES], f"All metrics of {column}"))
st.caption(
    "Intervals are over questions: several answers to one are no new evidence. ★ and ≈ by a test of random "
    "signs over questions (exact McNemar where each is solved or not), at 5 % for the whole column; means by t."
)

# --- Equal cost --------------------------------------------------------------------------------------------------

samples = {c.key: parts.ask(found, answers.grades, *c.key) for c in cells}
graded = any(budgets.graded(s) for s in samples.values())
costs = [c for c in budgets.COSTS if c in present]
choices = list(budgets.CHOICES) if graded else [a.metric for a in ranked]
if costs and choices:
    st.subheader("At equal cost")
    with st.container(horizontal=True):
        cost = parts.choose("Cost", costs, "cost")
        choice = parts.choose("Quality", choices, "quality")
        purses = tasks.dearest(cells, samples, cost, choice)
        labels = {f"{written(b)} per question": b for b in purses}
        budget = labels[parts.choose("Budget", list(labels), "budget")] if labels else 0.0
    what = budgets.COSTS[cost]
    rows = tasks.curve(cells, samples, cost, choice)
    words = (f"{what} per question", choice)
    st.altair_chart(charts.at_cost(rows, *words), width="stretch", alt=charts.at_cost_in_words(rows, *words))
    if choice in budgets.CHOICES:
        st.caption(f"{choice}: {budgets.CHOICES[choice]}, by how many answers a question gets.")
    offers = tasks.at_budget(cells, samples, cost, budget, choice)
    st.html(
        table(
            ["decoder", Field("quality", small=choice), "answers", Field("spent", small=f"{what} per question")],
            [
                [
                    Field(o.cell.decoder, small=", ".join(o.cell.doubts), look="grey" if o.cell.doubts else "",
                          href=link("decoder", decoder=o.cell.name, **parts.address(setting))),
                    Field(findings.text_of(o.number), look=o.mark if o.mark in ("best", "tied") else "", number=True),
                    Field(str(o.bought.answers), small="no more were drawn" if o.bought.more else "", number=True),
                    Field(written(o.bought.cost), small=f"{o.bought.cost / budget:.0%} of the budget", number=True),
                ]
                for o in offers
            ],
            f"At most {written(budget)} {what} per question",
        )
    )  # fmt: skip
    st.caption(parts.plain(tasks.remark(offers, cells, cost, budget)))
    parts.download(rows, f"{column.suite}-{cost}")

# --- Every answer ------------------------------------------------------------------------------------------------

st.subheader("Every answer")
by_label = {f"{c.decoder} (newer, does not count)" if c.beside else c.decoder: c for c in cells}
by_label = {label: c for label, c in by_label.items() if samples[c.key]}
if not by_label:
    st.info("The cells of this suite have left no answers.")
    st.stop()
left, right = st.columns(2)
with left:
    mine = by_label[parts.choose("Decoder", list(by_label), "answers")]
with right:
    others = [label for label in by_label if by_label[label] is not mine]
    rival = st.selectbox("Beside", others, index=None, key="beside", bind="query-params")
theirs = by_label.get(rival or "")
questions = tasks.by_question(parts.ask(found, answers.samples, *mine.key))
other_questions = tasks.by_question(parts.ask(found, answers.samples, *theirs.key)) if theirs else None
kinds = tasks.kinds(questions, beside=theirs is not None)
counts = {kind: tasks.chosen(questions, kind, other_questions) for kind in kinds}
kind = st.segmented_control(
    "Questions",
    kinds,
    default="all",
    format_func=lambda k: f"{k} ({len(counts[k])})",
    key="kind",
    required=True,
    bind="query-params",
)
shown = counts[kind]
if not shown:
    st.info("There are no such questions.")
    st.stop()


def grade_field(samples_of: list[tasks.Sample] | None) -> Field:
    """The mean grade of a question's answers."""
    value = tasks.grade(samples_of or [])
    return Field("–" if value is None else written(value, 3), number=value is not None)


with st.expander(f"Grades of {min(len(shown), MOST_QUESTIONS)} questions", expanded=False):
    heads = ["question", mine.decoder, *([theirs.decoder] if theirs else [])]
    grades = [
        [q, grade_field(questions[q]), *([grade_field((other_questions or {}).get(q))] if theirs else [])]
        for q in shown[:MOST_QUESTIONS]
    ]
    st.html(table(heads, grades, "Mean grade by question"))
question = parts.choose("Question", shown, "question")
asked = answers.questions(parts.source().results, mine.run_id, mine.measured.cell_id)
texts = {row: line for row, line in asked.items() if row.startswith((f"{question}/", f"{question}#"))}
prompts = list(dict.fromkeys(str(line["prompt"]) for line in texts.values() if line.get("prompt")))
for prompt in prompts:
    with st.container(border=True):
        st.caption("Question, as it was asked")
        st.text(prompt)
if not prompts:
    st.caption("The question itself is not here: only the machine that measured it keeps it, beside its shards.")
gold = next((s.data["ground_truth"] for s in questions[question] if "ground_truth" in s.data), None)
if gold is not None:
    st.markdown(f"Right answer: **{parts.plain(str(gold))}**")


def draw(course: list[dict[str, Any]], key: str) -> None:
    """How the particles came to this answer."""
    words, axis = particles.in_words(course), particles.axis(course)
    lines, bars = particles.genealogy(course), particles.weights(course)
    with st.expander(f"Particles: {words}"):
        for title, chart in (
            ("Level and effective particles", particle_charts.course(particles.levels(course), axis)),
            ("Who descends from whom", particle_charts.genealogy(lines, axis) if lines else None),
            ("Weights at the end", particle_charts.weights(bars) if bars else None),
        ):
            if chart is not None:
                st.caption(title)
                st.altair_chart(chart, width="stretch", alt=words, key=f"{key}{title}")


def show(cell: queries.Cell, some: list[tasks.Sample]) -> None:
    """All that a decoder said to the question."""
    st.markdown(f"**{parts.plain(cell.decoder)}**")
    for sample in some:
        with st.container(border=True):
            st.caption(parts.plain(f"{sample.name} · {sample.facts}"))
            for text in sample.texts:
                st.text(text or "(nothing)")
            if sample.data.get(tasks.PARTICLES):
                draw(sample.data[tasks.PARTICLES], f"{cell.key}{sample.name}")
            if "log_probs" in sample.data:
                choices = texts.get(f"{question}/{sample.name}", {}).get("choices")
                st.html(
                    table(
                        ["choice", "is", Field("log-likelihood", small="nats")],
                        [
                            [
                                Field(str(choice), look="prose"),
                                {0: "false", 1: "true"}.get(label, "–"),
                                Field("–" if x is None else written(float(x)), number=True),
                            ]
                            for choice, label, x in tasks.choices(sample, choices)
                        ],
                        f"Choices of {sample.name}",
                    )
                )


if theirs and other_questions is not None:
    one, two = st.columns(2)
    with one:
        show(mine, questions[question])
    with two:
        show(theirs, other_questions.get(question, []))
else:
    show(mine, questions[question])
