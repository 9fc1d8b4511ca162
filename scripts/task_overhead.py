"""How much of a cell of questions is not the model's: prompts, grading, metrics, records, as a share of model time.

python scripts/task_overhead.py [--model SPEC] [--scale quick] [--decoder SPEC] [--data DIR] [--suite S] [--questions N]

Model time is what is spent in the decoder's `generate`, in its law, and in forward passes; everything else in a cell is
overhead. Every cell is measured the second time, because the first one pays for imports. What a cell spends once,
whatever its size (to make lm-eval's tasks), counts, so a short cell looks worse than a long one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

from decodathlon.harness.bench import Bench
from decodathlon.harness.cells import CellSpec
from decodathlon.harness.plan import Options, cells
from decodathlon.harness.registry import load_builtins, registry
from decodathlon.harness.results import environment
from decodathlon.harness.targets.transformers import TransformersTarget

SUITES = ("aime25", "math500", "mt_bench", "truthfulqa")


class Stopwatch:
    """Sums the time of the outermost of some calls."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*values: Any, **more: Any) -> Any:
            self._depth += 1
            began = time.perf_counter()
            try:
                return function(*values, **more)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.seconds += time.perf_counter() - began

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--scale", default="quick")
    parser.add_argument("--decoder", default="temperature")
    parser.add_argument("--suite", action="append", choices=SUITES)
    parser.add_argument("--questions", type=int, default=0, help="in place of those of the scale")
    parser.add_argument("--data", default=environment.data_folder())
    options = parser.parse_args()
    load_builtins()
    watch = Stopwatch()
    for cls, name in ((TransformersTarget, "forward"), (TransformersTarget, "logits")):
        setattr(cls, name, watch.around(getattr(cls, name)))
    made = [registry.get("decoder", name) for name in registry.names("decoder")]
    for method in ("generate", "shape"):
        for cls in {base for one in made for base in one.__mro__ if method in base.__dict__}:
            setattr(cls, method, watch.around(getattr(cls, method)))
    bench = Bench(lambda text: None)
    plan: list[CellSpec] = []
    for suite in options.suite or SUITES:
        plan += cells(Options(scale=options.scale, suite=[suite], decoder=[options.decoder], model=options.model,
                              data=options.data, limit=options.questions))  # fmt: skip
    for spec in plan:
        bench.measure(spec, "warm")
        watch.seconds = 0.0
        outcome = bench.measure(spec, "overhead")
        rest = outcome.seconds["total"] - outcome.seconds["prepare"] - watch.seconds
        sys.stdout.write(
            f"{spec.suite} {spec.slice}: {outcome.status}, model {watch.seconds:.2f} s, else {rest:.2f} s, "
            f"{rest / watch.seconds:.1%}\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
