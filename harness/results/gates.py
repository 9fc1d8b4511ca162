"""Gates: rules that a run passes, fails, or cannot decide. docs/gating.md is the user's page.

A rule fails only where the whole interval lies beyond its limit, and passes only where the whole interval lies within;
what lies between is inconclusive. A measure of time must also differ from its limit by more than the decoder differed
from itself in the same run (the A/A row).
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from decodathlon.harness import decoder as decoders
from decodathlon.harness.errors import SpecError, near_miss
from decodathlon.harness.measure import statistics
from decodathlon.harness.measure.observations import compared
from decodathlon.harness.measure.statistics import Estimate
from decodathlon.harness.registry import load_builtins, registry
from decodathlon.harness.results.measured import Measured, Number, noise_floor
from decodathlon.harness.results.metrics import METRICS
from decodathlon.harness.suite import SCALES

FILE = "gates.toml"
#: The chance that a gate fails although the truth lies exactly at its limit: one tail of a 95 % interval.
FALSE_ALARM_RATE = (1 - statistics.LEVEL) / 2
EXIT_FAILED, EXIT_INCONCLUSIVE, EXIT_NOTHING_MEASURED = 1, 10, 11

#: What only some decoders have: those that claim a law, those that draw token by token. A rule on all decoders does
#: not mean the others.
OF_SOME = ("goodness_p", "visible_tvd", "definition_gap", "own_law", "sampler_share")

Outcome = Literal["pass", "fail", "inconclusive", "not run"]
_RULE = re.compile(r"(?P<suite>\w+)\s*:\s*(?P<metric>\w+)\s*(?P<sign><=|>=)\s*(?P<limit>.+)")
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_LIMIT = re.compile(rf"(?P<decoder>[a-z][\w-]*(?:\[[^\]]*\])?)(?:\s+(?P<operator>[-+*])\s+(?P<number>{_NUMBER}))?")
_FILTERS = ("slice", "scale", "model", "dataset")
_KEYS = ("rule", "decoder", "inconclusive", "exact", *_FILTERS)


@dataclass(frozen=True)
class Gate:
    """One rule. `decoder` is empty for every decoder of the run."""

    rule: str
    suite: str
    metric: str
    sign: str
    limit: float
    #: The decoder whose value the limit is relative to, and how: `+` adds the limit to it, `*` multiplies.
    reference: str | None
    operator: Literal["+", "*"]
    decoder: tuple[str, ...]
    where: dict[str, str]
    inconclusive: Literal["pass", "fail"]
    #: Judge the value alone, without an interval: for counts and shares that no noise moves.
    exact: bool

    @property
    def text(self) -> str:
        """The rule with what restricts it."""
        shown = ", ".join(f"{key} {value}" for key, value in self.where.items())
        return f"{self.rule} ({shown})" if shown else self.rule


class Verdict(NamedTuple):
    gate: Gate
    cell: Measured | None
    outcome: Outcome
    detail: str

    @property
    def line(self) -> str:
        name = self.cell.name if self.cell else ", ".join(self.gate.decoder) or "every decoder"
        return f"{self.outcome.upper():<12}  {self.gate.text}  [{name}]  {self.detail}"


def load(path: Path, known: Collection[str] = ()) -> list[Gate]:
    """The gates of a file.

    Args:
        known: decoders that may be named though none of that name is registered here: those of a stored run.

    Raises:
        SpecError: it is no TOML, or a rule, key, suite, metric or decoder is not known; the near miss is named.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"gates {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"gates {path}: {error}") from None
    for key in content:
        if key != "gate":
            raise SpecError(f"gates {path}: there is no table {key!r}{near_miss(key, ['gate'])}")
    load_builtins()
    tables = content.get("gate", [])
    if not isinstance(tables, list):
        raise SpecError(f"gates {path}: write [[gate]] with two brackets, one table per gate")
    return [_gate(table, f"gates {path}, gate {number}", known) for number, table in enumerate(tables, 1)]


def _gate(table: dict[str, Any], place: str, known: Collection[str]) -> Gate:
    for key in table:
        if key not in _KEYS:
            raise SpecError(f"{place}: there is no key {key!r}{near_miss(key, _KEYS)}")
    rule = str(table.get("rule"))
    match = _RULE.fullmatch(rule.strip())
    if match is None:
        raise SpecError(f"{place}: rule {rule!r} is not of the form 'SUITE: METRIC >= LIMIT' or '... <= LIMIT'")
    place = f"{place} ({rule})"
    if match["suite"] not in registry.names("suite"):
        raise SpecError(
            f"{place}: there is no suite {match['suite']!r}{near_miss(match['suite'], registry.names('suite'))}"
        )
    if match["metric"] not in METRICS:
        raise SpecError(f"{place}: there is no metric {match['metric']!r}{near_miss(match['metric'], METRICS)}")
    limit, reference, operator = _limit(match["limit"].strip(), place)
    if reference and METRICS[match["metric"]].unit in ("s", "1/s"):
        raise SpecError(
            f"{place}: times of two cells were not measured at the same time; write a rule on a ratio_to_..."
        )
    chosen = table.get("decoder", "*")
    named = [] if chosen == "*" else [chosen] if isinstance(chosen, str) else chosen
    if not isinstance(named, list) or not all(isinstance(n, str) for n in named) or chosen == []:
        raise SpecError(f"{place}: decoder must be a spec, a list of specs, or '*'")
    inconclusive = table.get("inconclusive", "pass")
    if inconclusive not in ("pass", "fail"):
        raise SpecError(f"{place}: inconclusive must be 'pass' or 'fail', not {inconclusive!r}")
    if not isinstance(table.get("exact", False), bool):
        raise SpecError(f"{place}: exact must be true or false")
    for key in _FILTERS:
        if not isinstance(table.get(key, ""), str):
            raise SpecError(f"{place}: {key} must be a text")
    suite = registry.get("suite", match["suite"])
    slices = {part for scale in SCALES for load in ("", *suite.workloads) for part in suite.slices(scale, load)}
    for key, valid in (("scale", SCALES), ("slice", slices)):
        if key in table and table[key] not in valid:
            raise SpecError(f"{place}: suite {suite.name} has no {key} {table[key]!r}{near_miss(table[key], valid)}")

    def spec(text: str) -> str:
        try:
            return decoders.build(text).spec
        except SpecError as error:
            if text in known:
                return text
            raise SpecError(f"{place}: {error}") from None

    specs = tuple(map(spec, named))
    reference = spec(reference) if reference else None
    return Gate(
        rule=rule, suite=match["suite"], metric=match["metric"], sign=match["sign"], limit=limit, reference=reference,
        operator=operator, decoder=specs, where={k: table[k] for k in _FILTERS if k in table},
        inconclusive=inconclusive, exact=table.get("exact", False),
    )  # fmt: skip


def _limit(text: str, place: str) -> tuple[float, str | None, Literal["+", "*"]]:
    if re.fullmatch(_NUMBER, text):
        return float(text), None, "+"
    match = _LIMIT.fullmatch(text)
    if match is None:
        raise SpecError(f"{place}: {text!r} is neither a number nor DECODER, DECODER - NUMBER or DECODER * NUMBER")
    if match["operator"] == "*":
        return float(match["number"]), match["decoder"], "*"
    number = float(match["number"] or 0.0)
    return (-number if match["operator"] == "-" else number), match["decoder"], "+"


def judge(gates: Sequence[Gate], cells: Sequence[Measured]) -> list[Verdict]:
    """Every gate on every cell that it speaks of; a gate that finds none is `not run`."""
    verdicts = []
    for gate in gates:
        meant = [c for c in cells if _is_meant(gate, c)]
        verdicts += [_judge(gate, cell, cells) for cell in meant]
        missing = [d for d in gate.decoder if d not in {c.decoder for c in meant}]
        verdicts += [Verdict(gate, None, "not run", f"no cell of {d} in this run") for d in missing]
        if not meant and not missing:
            verdicts.append(Verdict(gate, None, "not run", "no such cell in this run"))
    return verdicts


def exit_code(verdicts: Sequence[Verdict]) -> int:
    """0 where nothing speaks against the run; else that of failed, inconclusive (where it matters), or unmeasured."""
    if any(v.outcome == "fail" for v in verdicts):
        return EXIT_FAILED
    if any(v.outcome == "inconclusive" and v.gate.inconclusive == "fail" for v in verdicts):
        return EXIT_INCONCLUSIVE
    not_run = [v for v in verdicts if v.outcome == "not run"]
    lost = any(v.cell is None or v.cell.status != "unsupported" for v in not_run)
    return EXIT_NOTHING_MEASURED if lost or (verdicts and len(not_run) == len(verdicts)) else 0


def _is_meant(gate: Gate, cell: Measured) -> bool:
    if cell.suite != gate.suite or (gate.decoder and cell.decoder not in gate.decoder):
        return False
    if gate.reference == cell.decoder:
        return False
    if cell.status == "ok" and gate.metric in OF_SOME and gate.metric not in cell.metrics and not gate.decoder:
        return False  # it has no such number by its nature
    # a cell that failed before its data were read has no data set; it is meant all the same
    seen = {key: value for key, value in gate.where.items() if getattr(cell, key) is not None or cell.status == "ok"}
    return all(getattr(cell, key) == value for key, value in seen.items())


def _judge(gate: Gate, cell: Measured, cells: Sequence[Measured]) -> Verdict:
    if cell.status != "ok":
        return Verdict(gate, cell, "not run", f"{cell.status}: {cell.reason}")
    number = cell.metrics.get(gate.metric)
    if number is None:
        return Verdict(gate, cell, "not run", f"the cell has no {gate.metric}")
    limit, how = gate.limit, ""
    if gate.reference is None:
        found = number.estimate
        floor = noise_floor(gate.metric, cell)
    else:
        other = next((c for c in cells if c.decoder == gate.reference and c.where == cell.where), None)
        rival = other.metrics.get(gate.metric) if other is not None and other.status == "ok" else None
        if other is None or rival is None:
            return Verdict(gate, cell, "not run", f"{gate.reference} was not measured beside it")
        found, how = _relative(number, rival, "ratio" if gate.operator == "*" else "difference")
        floor = max(noise_floor(gate.metric, cell), noise_floor(gate.metric, other))
        if gate.operator == "+":  # a difference of ratios strays as far as either of them
            floor *= max(abs(number.estimate.value), abs(rival.estimate.value))
    return _decide(gate, cell, found, limit, floor, how)


def _relative(number: Number, rival: Number, how: Literal["difference", "ratio"]) -> tuple[Estimate, str]:
    """A against B unit by unit; where their units do not pair, from the two intervals at their worst."""
    paired = compared(number.units, rival.units, how) if number.units and rival.units else None
    if paired is not None:
        word = "relative to it" if how == "difference" else "times it"
        return paired, f" {word}, paired over {paired.n} units"
    a, b = number.estimate, rival.estimate
    if how == "ratio":
        value = a.value / b.value if b.value else math.nan
        if None in (a.low, a.high, b.low, b.high) or b.low <= 0:  # type: ignore[operator]
            return Estimate(value, None, None, a.n), " times it, not paired"
        return Estimate(value, a.low / b.high, a.high / b.low, a.n), " times it, not paired"  # type: ignore[operator]
    value = a.value - b.value
    if None in (a.low, a.high, b.low, b.high):
        return Estimate(value, None, None, a.n), " relative to it, not paired"
    return Estimate(value, a.low - b.high, a.high - b.low, a.n), " relative to it, not paired"  # type: ignore[operator]


def _decide(gate: Gate, cell: Measured, found: Estimate, limit: float, floor: float, how: str) -> Verdict:
    def within(x: float) -> bool:
        return x >= limit if gate.sign == ">=" else x <= limit

    text = f"{found.value:.4g}{how}"
    if math.isnan(found.value):
        return Verdict(gate, cell, "inconclusive", f"{text}: no number")
    if gate.exact or math.isinf(found.value):
        return Verdict(gate, cell, "pass" if within(found.value) else "fail", text)
    if found.low is None or found.high is None:
        why = "no interval (too few observations, or none that vary); a larger --scale, or exact = true"
        return Verdict(gate, cell, "inconclusive", f"{text}: {why}")
    low, high = found.low, found.high
    text += f" [{low:.4g}, {high:.4g}]"
    if floor > 0 and gate.reference and gate.operator == "+":
        low, high = min(low, found.value - floor), max(high, found.value + floor)
        text += f", A/A spread {floor:.3g}"
    elif floor > 0 and found.value > 0:
        low, high = min(low, found.value * math.exp(-floor)), max(high, found.value * math.exp(floor))
        text += f", A/A spread {math.exp(floor) - 1:.1%}"
    if within(low) and within(high):
        return Verdict(gate, cell, "pass", text)
    if not within(low) and not within(high):
        return Verdict(gate, cell, "fail", text)
    reach = (high - low) / 2 * _POWER_FACTOR
    return Verdict(gate, cell, "inconclusive", f"{text}: a distance of {reach:.3g} from the limit would be seen")


#: From half an interval to what would be seen with 80 % power: (z_0.975 + z_0.8) / z_0.975.
_POWER_FACTOR = (1.959964 + 0.841621) / 1.959964
