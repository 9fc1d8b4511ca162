"""Why is multiple-try bad? Spectral gaps over the full factorial of weight, p, step size, temperature and tries.

    python scripts/mcmc_factorial.py          # a minute on two cores
    python scripts/mcmc_factorial.py --draw   # the figure alone, from the table that is there

Writes docs/findings/mcmc-factorial.csv and .svg. Gaps are those of the transition matrix over all 16 states of a ring
of four spins, by the decoders' own proposals, weights and tests: exact up to four tries, to one in ten thousand beyond.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
import time
from pathlib import Path

import torch

from decodathlon.harness import decoder as decoders
from decodathlon.harness.measure import mixing
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.targets import toy

PLACE = Path(__file__).parents[1] / "docs" / "findings"
TABLE, FIGURE = PLACE / "mcmc-factorial.csv", PLACE / "mcmc-factorial.svg"
SPINS = 4
WEIGHTS = ("lam1", "iw", "lb", "sqrt-pi", "pi")
NORMS = (1, 2)
SIZES = (0.5, 2.0, 8.0, 64.0)
#: Of the bonds: beta 0.21 is the seed's ring, 1 a cold one.
TEMPERATURES = (0.21, 0.5, 1.0)
TRIES = (1, 2, 4, 8, 16, 32)


def measured() -> list[dict[str, object]]:
    rows, cells = [], list(itertools.product(TEMPERATURES, NORMS, SIZES, WEIGHTS, TRIES))
    began = time.monotonic()
    for number, (beta, p, alpha, weight, tries) in enumerate(cells):
        target = toy.Ising(SPINS, beta)
        chain = decoders.build(f"mt-pncg[weight={weight},p={p},alpha={alpha},tries={tries}]")
        gap = mixing.gap(chain.transitions(target, chain.begin(target, *mixing.all_texts(chain, target, SPINS))))
        evaluations = 1 if tries == 1 else 2 * tries - 1
        rows.append(
            {"beta": beta, "p": p, "alpha": alpha, "weight": weight, "tries": tries, "gap": round(gap, 5),
             "gap_per_evaluation": round(1 - (1 - gap) ** (1 / evaluations), 6)}
        )  # fmt: skip
        if number % 20 == 19:
            left = (time.monotonic() - began) / (number + 1) * (len(cells) - number - 1)
            sys.stderr.write(f"  {number + 1}/{len(cells)} kernels, about {left / 60:.0f} min left\n")
    return rows


def draw(rows: list[dict[str, str]]) -> None:
    """Gap over tries, a line per weight, a row of panels per temperature, a column per step size; p = 1."""
    import altair as alt

    shown = [{k: v if k == "weight" else float(v) for k, v in row.items()} for row in rows if row["p"] == "1"]
    chart = (
        alt.Chart(alt.Data(values=shown))
        .mark_line(point=True)
        .encode(
            x=alt.X("tries:Q", scale=alt.Scale(type="log", base=2)),
            y=alt.Y("gap:Q", title="gap per step"),
            color=alt.Color("weight:N", scale=alt.Scale(range=["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00"])),
            strokeDash="weight:N",
            column=alt.Column("alpha:Q", title="step size alpha"),
            row=alt.Row("beta:Q", title="beta per bond"),
        )
        .properties(width=150, height=120)
        .resolve_scale(y="independent")
    )
    chart.save(str(FIGURE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw", action="store_true", help="only draw, from the table that is there")
    if not parser.parse_args().draw:
        load_builtins()
        torch.manual_seed(0)
        rows = measured()
        with TABLE.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    with TABLE.open(encoding="utf-8") as file:
        draw(list(csv.DictReader(file)))


if __name__ == "__main__":
    main()
