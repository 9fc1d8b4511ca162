"""What a throughput cell says of a decoder that drafts, from a further run in which cycles are kept."""

from __future__ import annotations

from collections.abc import Sequence

from decodathlon.harness.measure import cycles, speed
from decodathlon.harness.measure.speed import Pair
from decodathlon.harness.suite import Cell


def report(cell: Cell, pairs: Sequence[Pair]) -> None:
    """Tokens per cycle, acceptance, where the time goes, and what speed that predicts, beside what was measured."""
    tokens = cell.sizes["tokens"]
    ending = cell.sizes.get("ending", False)
    answers = speed.traced(cell.decoder, cell.target, pairs, tokens, cell.seed, ending=ending)
    for metric, found in cycles.metrics(answers, cell.target.stop_tokens).items():
        cell.report(metric, found)
    cell.sample(
        "drafts",
        accepted=cycles.histogram(answers),
        stays=[float(f"{x:.5g}") for x in cycles.by_position(answers)],
        cycle={part: float(f"{x:.4g}") for part, x in cycles.mean_seconds(answers).items()},
    )
    for flaw in cycles.flaws(answers):
        cell.note(f"cycles do not add up: {flaw}")
    if (ratio := speed.predicted(pairs, answers)) is not None:
        cell.report("ratio_predicted", ratio, baseline="greedy")
    if cell.cycle_trace:
        for answer in answers:
            cell.sample(f"cycles-{answer.row}", cycles=[dict(cycle) for cycle in answer.cycles])
