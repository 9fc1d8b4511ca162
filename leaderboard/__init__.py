"""The leaderboard: `source` takes snapshots, `queries` asks, `findings` judges, `charts` and `tables` draw for `pages`.

Only `app`, `parts` and `pages` know Streamlit; only `source` and `queries` know DuckDB.

`published/` holds the published results as text; `results.duckdb` is made from them.
"""
