"""The leaderboard. So far it holds the published results as text (`published/`); `results.duckdb` is made from them."""
