"""The board: `decodathlon board`, or `streamlit run leaderboard/app.py`. This is the frame.

The pages are in views/. In a folder called pages/ Streamlit would find them itself, and show a page without its frame
to whom a link leads there first.
"""

from pathlib import Path

import streamlit as st

from decodathlon.leaderboard import parts

st.set_page_config(page_title="Decodathlon", page_icon="🏁", layout="wide")
st.html(Path(__file__).with_name("board.css"))
page = st.navigation(
    [
        st.Page("views/overview.py", title="Overview", icon=":material/table_chart:", default=True),
        st.Page("views/trade_off.py", title="Trade-off", icon=":material/scatter_plot:", url_path="trade-off"),
        st.Page("views/tasks.py", title="Tasks", icon=":material/quiz:", url_path="tasks"),
        st.Page("views/exactness.py", title="Exactness", icon=":material/verified:", url_path="exactness"),
        st.Page("views/arena.py", title="Arena", icon=":material/compare:", url_path="arena"),
        st.Page("views/profile.py", title="Profile", icon=":material/local_fire_department:", url_path="profile"),
        st.Page("views/speculation.py", title="Speculation", icon=":material/fast_forward:", url_path="speculation"),
        st.Page("views/decoder.py", title="Decoder", icon=":material/tune:", url_path="decoder"),
        st.Page("views/run.py", title="Run", icon=":material/history:", url_path="run"),
        st.Page("views/about.py", title="About", icon=":material/help:", url_path="about"),
    ],
    position="top",
)
parts.watch()
page.run()
