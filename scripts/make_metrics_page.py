"""Write docs/metrics.md from the table of metrics. A test checks that the page is the table's."""

from __future__ import annotations

from pathlib import Path

from decodathlon.harness.results.metrics import METRICS

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
HEAD = """# Metrics

Made from `harness/results/metrics.py` by `python scripts/make_metrics_page.py`. Intervals are 95 %: for ratios and
times the sign-test interval of the median over pairs, for text scores the t interval of a ratio over windows. `context`
metrics explain others and are never ranked.

| metric | speaks of | unit | better | meaning |
|---|---|---|---|---|
"""


def page() -> str:
    rows = [f"| `{name}` | {m.kind} | {m.unit} | {m.better} | {m.meaning} |\n" for name, m in METRICS.items()]
    return HEAD + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
