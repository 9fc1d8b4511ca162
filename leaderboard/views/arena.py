"""Arena: two answers to one prompt, blind. Which is better? And, for who has judged them all, what came of it."""

from typing import get_args

import streamlit as st

from decodathlon.harness.arena import pairs, ratings
from decodathlon.harness.errors import DecodathlonError
from decodathlon.leaderboard import parts

SHORTCUTS = {"left": ("Left is better", "Left"), "right": ("Right is better", "Right"),
             "tie": ("Equally good", "Up"), "bad": ("Both bad", "Down")}  # fmt: skip
assert set(SHORTCUTS) == set(get_args(pairs.Said))

st.title("Which answer is better?")
results = parts.source().results
names = pairs.sets(results)
if not names:
    st.info("There are no pairs yet: `decodathlon arena build --name mine --pairs 100 --decoder top-p --decoder min-p`")
    st.stop()
left_column, right_column = st.columns(2)
with left_column:
    name = parts.choose("Set", names, "set")
with right_column:
    annotator = st.text_input("Your name", key="annotator", max_chars=40, bind="query-params").strip()
try:
    arena = pairs.load(pairs.home(results) / name)
    votes = arena.votes()
except DecodathlonError as error:
    st.error(parts.plain(str(error)))
    st.stop()
if not annotator:
    st.info("Enter a name: your votes are kept under it, and you can stop and go on at any time.")
    st.stop()


def put_down(pair: str, said: pairs.Said) -> None:
    """A vote, or why it does not count."""
    try:
        arena.vote(pair, annotator, said)
    except DecodathlonError as error:
        st.session_state["refused"] = str(error)


left = arena.left(annotator)
done = len(arena.pairs) - len(left)
st.progress(done / len(arena.pairs), text=f"{done} of {len(arena.pairs)} judged")
if refused := st.session_state.pop("refused", None):
    st.error(parts.plain(refused))
if left:
    pair = left[0]
    st.subheader("Prompt")
    st.text(pair.prompt)
    for column, title, answer in zip(st.columns(2), ("Left", "Right"), arena.shown(pair, annotator), strict=True):
        with column, st.container(border=True):
            st.caption(title)
            st.text(answer or "(nothing)")
    for column, (said, (label, shortcut)) in zip(st.columns(4), SHORTCUTS.items(), strict=True):
        column.button(
            label, key=f"{said}-{pair.id}", shortcut=shortcut, on_click=put_down, args=(pair.id, said), width="stretch"
        )
    st.caption("Keys: ← left, → right, ↑ equally good, ↓ both bad. Who wrote what is told when you have judged all.")
    st.stop()

first, second = arena.decoders
rate, agreed = ratings.win_rate(ratings.games([arena])), ratings.kappa(votes)
st.success("You have judged them all. Thank you.")
st.subheader("What came of it")
interval = "" if rate.low is None else f" [{rate.low:.1%}, {rate.high:.1%}]"
st.markdown(
    f"**{parts.plain(first, code=True)}** against **{parts.plain(second, code=True)}** on {parts.plain(arena.model)}: "
    f"it gets **{rate.value:.1%}**{interval} of the points, over {rate.n} votes of "
    f"{len({v.annotator for v in votes})} people. A tie, or both bad, is half a point for each; the "
    "interval is over prompts."
)
if agreed is None:
    st.caption("No pair was judged by two people yet, or all always say the same: nothing can be said of agreement.")
else:
    st.caption(f"Agreement beyond chance (Fleiss' kappa): {agreed.value:.2f}, over {agreed.n} pairs.")
parts.download([{"pair": v.pair, "annotator": v.annotator, "choice": v.choice, "when": v.when} for v in votes], "votes")
