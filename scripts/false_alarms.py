"""Forty A/A gates on live measurements: how often does a gate fail although nothing differs?

Measures one decoder against itself under two names, 40 times, and judges `ratio_to_greedy >= 1` and `<= 1` each time:
both are true exactly at their limit, the worst case. Writes the log-ratios, on which a test repeats the judgement.

    python scripts/false_alarms.py [--model SPEC] [--times 40] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from decodathlon.harness import datasets, models
from decodathlon.harness import decoder as decoders
from decodathlon.harness.measure import speed, texts
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.results import environment, gates
from decodathlon.harness.results.measured import Measured, Number


def cell(ratio: list[float], own: list[float]) -> Measured:
    """One A/A cell out of the log-ratios of its pairs."""
    from decodathlon.harness.measure.observations import Observations

    names = [f"pair-{i}" for i in range(len(ratio))]
    metrics = {}
    for metric, values in (("ratio_to_greedy", ratio), ("ratio_to_self", own)):
        units = Observations.each(names, values, scale="exp")
        metrics[metric] = Number(units.estimate(), "1", "higher", units)
    return Measured(
        "c", "throughput", 2, "batch-1", "quick", "top-p", "m", "float32", "cpu", None, 0, "ok", "", metrics
    )


def alarms(measurements: list[dict[str, list[float]]], folder: Path) -> dict[str, int]:
    """Verdicts of both gates over all measurements."""
    rules = folder / "false_alarms.toml"
    rules.write_text("".join(f'[[gate]]\nrule = "throughput: ratio_to_greedy {sign} 1.0"\n' for sign in (">=", "<=")))
    loaded = gates.load(rules)
    found: dict[str, int] = {}
    for one in measurements:
        for verdict in gates.judge(loaded, [cell(one["ratio"], one["self"])]):
            found[verdict.outcome] = found.get(verdict.outcome, 0) + 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--decoder", default="greedy")
    parser.add_argument("--times", type=int, default=40)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("false_alarms.json"))
    options = parser.parse_args()
    load_builtins()
    target = models.load(models.resolve(options.model), device="auto", dtype="auto", say=lambda text: None)
    text = datasets.find("wikitext-2-raw-v1", "test", environment.data_folder())
    batches = texts.prompts(text, target, pairs=options.pairs, rows=1, length=16).batches
    decoder, measurements, began = decoders.build(options.decoder), [], time.monotonic()
    for number in range(options.times):
        rivals = {"ratio_to_greedy": decoder, "ratio_to_self": decoder}
        pairs = list(speed.measure(decoder, rivals, target, batches, options.tokens, seed=number))
        measurements.append(
            {
                "ratio": [round(p.log_ratio("ratio_to_greedy"), 6) for p in pairs],
                "self": [round(p.log_ratio("ratio_to_self"), 6) for p in pairs],
            }
        )
        left = (time.monotonic() - began) / (number + 1) * (options.times - number - 1)
        sys.stderr.write(f"[{number + 1}/{options.times}] about {left:.0f} s left\n")
    record = {"model": options.model, "decoder": options.decoder, "cpu": environment.cpu_name(),
              "tokens": options.tokens, "measurements": measurements}  # fmt: skip
    options.out.write_text(json.dumps(record) + "\n", encoding="utf-8")
    found = alarms(measurements, options.out.resolve().parent)
    sys.stdout.write(f"{found}; stated rate of failures: at most {gates.FALSE_ALARM_RATE:.1%}\n")


if __name__ == "__main__":
    main()
