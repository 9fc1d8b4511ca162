"""The board: `decodathlon board`, or `streamlit run leaderboard/app.py`. This is the frame; the pages are in pages/."""

from pathlib import Path

import streamlit as st

from decodathlon.leaderboard import parts

st.set_page_config(page_title="Decodathlon", page_icon="🏁", layout="wide")
st.html(Path(__file__).with_name("board.css"))
page = st.navigation(
    [
        st.Page("pages/overview.py", title="Overview", icon=":material/table_chart:", default=True),
        st.Page("pages/trade_off.py", title="Trade-off", icon=":material/scatter_plot:", url_path="trade-off"),
        st.Page("pages/exactness.py", title="Exactness", icon=":material/verified:", url_path="exactness"),
        st.Page("pages/decoder.py", title="Decoder", icon=":material/tune:", url_path="decoder"),
        st.Page("pages/run.py", title="Run", icon=":material/history:", url_path="run"),
        st.Page("pages/about.py", title="About", icon=":material/help:", url_path="about"),
    ],
    position="top",
)
parts.watch()
page.run()
