"""Outcomes as a table that a tired person can read: one per suite and slice, a line per decoder, best values marked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from decodathlon.harness.cells import Outcome
from decodathlon.harness.registry import registry
from decodathlon.harness.results import audited, measured

DASH = "–"
#: How the remark on a busy machine begins, behind the decoder's name.
CONTENDED = ": contended:"
#: Beginnings of notes that the reader of a number must see.
LOUD = ("contended", "throttled", "left behind", "the same seed", "the second run", "audit", "the judge", "an earlier")
#: Metrics whose interval the table shows; the others have theirs in the results file.
INTERVALS_OF = ("ratio_", "ppl_epsilon", "pass_at_1", "mc1", "mc2", "bleu_acc", "judge_score", "judge_win_rate")


def number(value: float | None, digits: int = 4) -> str:
    """So many significant digits, no exponent for what a person would not write with one."""
    if value is None:
        return DASH
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value != 0 and not 1e-3 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}g}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:.0f}"
    return f"{value:.{digits}g}"


def quantity(metric: dict[str, Any], *, interval: bool = False) -> str:
    """A metric in the unit that a person would say it in, with its interval if that is wanted and there is one."""
    scale, unit = {"B": (2**-20, " MiB"), "s": (1e3, " ms")}.get(metric["unit"], (1.0, ""))
    text = number(metric["value"] * scale)
    if interval and metric["ci_low"] is not None:
        text += f" [{number(metric['ci_low'] * scale, 3)}, {number(metric['ci_high'] * scale, 3)}]"
    return text + unit


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table for a page; the first row is its head."""
    head, *body = ("| " + " | ".join(line) + " |" for line in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def rewritten(page: str, name: str, rows: Sequence[Sequence[str]]) -> str:
    """The page with another table between its two marks of that name.

    Raises:
        ValueError: it has none.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if begin not in page or end not in page:
        raise ValueError(f"the page has no {begin} ... {end}")
    before, rest = page.split(begin, 1)
    return f"{before}{begin}\n{markdown(rows)}\n{end}{rest.split(end, 1)[1]}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines with columns one under the other; what is beyond the last column of a short row does not count."""
    whole = max(map(len, rows))
    widths = [max(len(r[i]) for r in rows if len(r) == whole) for i in range(whole)]
    widths[0] = max((len(r[0]) for r in rows if len(r) > 1), default=widths[0])
    return ["  ".join(x.ljust(w) for x, w in zip(r, widths, strict=False)).rstrip() for r in rows]


def short(outcome: Outcome) -> str:
    """The first metric that the suite's table shows, or the reason why there is none."""
    if outcome.status not in ("ok", "partial"):
        return outcome.reason
    by_name = {m["metric"]: m for m in outcome.metrics}
    shown = [name for name in registry.get("suite", outcome.spec.suite).table if name in by_name]
    return f"{shown[0]} {quantity(by_name[shown[0]])}" if shown else ""


def tables(outcomes: Sequence[Outcome]) -> list[str]:
    """Lines of all tables."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        timed = registry.get("suite", outcome.spec.suite).timed
        groups.setdefault((outcome.spec.suite, "" if timed else outcome.spec.slice), []).append(outcome)
    verdicts = audited.verdicts(outcomes)
    lines: list[str] = []
    for (suite, part), members in groups.items():
        lines += ["", *(_one(suite, part, members, verdicts) if part else _operations(suite, members))]
    return lines


def _operations(suite: str, members: Sequence[Outcome]) -> list[str]:
    """What the harness itself costs: one line per operation."""
    rows = [["operation", "median", "rounds"]]
    for outcome in members:
        (metric,) = outcome.metrics
        rows.append([outcome.spec.slice, quantity(metric, interval=True), str(metric["n"])])
    body = aligned(rows)
    remarks = [f"! {o.spec.slice}: {note}" for o in members for note in o.notes if note.startswith(LOUD)]
    return [f"{suite}: {registry.get('suite', suite).asks}", body[0], "-" * len(body[0]), *body[1:], *remarks]


def _one(suite: str, part: str, members: Sequence[Outcome], verdicts: Mapping[str, audited.Verdict]) -> list[str]:
    kinds = registry.get("suite", suite).table
    names = dict.fromkeys(m["metric"] for o in members for m in o.metrics)
    columns = [n for kind in kinds for n in names if n.partition("(")[0] == kind]
    ranked = measured.of_outcomes(members)
    trusted = (
        []
        if any(o.data.get("source") == "stand-in" for o in members)
        else [m for m in ranked if not measured.biased(m) and verdicts.get(m.decoder) != "fail"]
    )
    marks = {c: measured.marks(c, trusted, _baseline(c, members, trusted)) for c in columns}
    rows = [["decoder", "claims", *columns]]
    remarks = []
    for outcome in members:
        label = outcome.decoder.get("spec", outcome.spec.decoder)
        remarks += [f"! {label}: {note}" for note in outcome.notes if note.startswith(LOUD)]
        if outcome.status == "partial":
            remarks.append(f"! {label}: partial: {outcome.reason}")
        if outcome.status in ("ok", "partial"):
            texts = [_cell_text(outcome, c, marks[c].get(outcome.spec.cell_id), members) for c in columns]
            rows.append([label, outcome.decoder["claim"], *texts])
        else:
            rows.append([label, f"{outcome.status}: {outcome.reason}"])
    body = aligned(rows)
    title = f"{suite} {part}" if part != "all" else suite
    what = "it does not draw from the law that it claims" if suite == audited.SUITE else "its numbers do not count"
    grave = [f"! {m.decoder}: audit failed: {what}" for m in ranked if verdicts.get(m.decoder) == "fail"]
    grave += [f"! {m.decoder}: A/A failed: its speed against itself is not 1" for m in ranked if measured.biased(m)]
    weak = [m.decoder for m in ranked if suite == audited.SUITE and verdicts.get(m.decoder) == "weak"]
    if weak:
        grave.append(f"! weak: so few draws would not have shown a distance of {audited.SEEN}: {', '.join(weak)}")
    remarks = grave + _together(remarks)
    warning = []
    if any(marks.values()):
        warning = ["* best of its column, ~ not told apart from it"]
    elif len([o for o in members if o.status == "ok"]) > 1:
        why = _undecided(columns, trusted) or "too few observations to rank, or nothing told apart"
        warning = [f"({why if trusted else 'nothing is ranked'})"]
    return [f"{title}: {_about(members)}", body[0], "-" * len(body[0]), *body[1:], *warning, *remarks]


def _undecided(columns: Sequence[str], cells: Sequence[measured.Measured]) -> str:
    """What the first column of solved questions says of all of them; nothing where there is none."""
    for column in columns:
        said = measured.cannot_rank([c.metrics[column] for c in cells if c.status == "ok" and column in c.metrics])
        if said:
            return f"{column}: {said}"
    return ""


def _together(remarks: Sequence[str]) -> list[str]:
    """The same remarks, those of a busy machine in one line."""
    busy = [r for r in remarks if CONTENDED in r]
    if len(busy) < 2:
        return list(remarks)
    names = ", ".join(r.partition(CONTENDED)[0].removeprefix("! ") for r in busy)
    most = max((r.partition(CONTENDED)[2] for r in busy), key=lambda r: int("0" + "".join(filter(str.isdigit, r))))
    return [*(r for r in remarks if CONTENDED not in r), f"! contended:{most} at most, beside {names}"]


def _about(members: Sequence[Outcome]) -> str:
    """Model, data and sizes; rows that differ in them never share a table, so one of them speaks for all."""
    one = next((o for o in members if o.status == "ok"), members[0])
    data = one.data.get("dataset", "no data")
    stand_in = " (stand-in)" if one.data.get("source") == "stand-in" else ""
    sizes = ", ".join(f"{k} {v if v is not None else 'all'}" for k, v in one.sizes.items() if k != "slices")
    model = " ".join(str(one.model.get(k, "")) for k in ("name", "dtype", "device")).strip() or one.spec.model
    return f"{model}; {data}{stand_in}; {one.spec.scale}: {sizes}"


def _metric(outcome: Outcome, name: str) -> dict[str, Any] | None:
    return next((m for m in outcome.metrics if m["metric"] == name), None)


def _cell_text(outcome: Outcome, name: str, mark: measured.Mark | None, members: Sequence[Outcome]) -> str:
    metric = _metric(outcome, name)
    sign = {"best": " *", "tied": " ~", "unlike": " (unlike the others)"}[mark] if mark else ""
    if metric is None:
        return f"1{sign} (baseline)" if _baseline_name(name, members) == outcome.spec.decoder else DASH
    return quantity(metric, interval=name.startswith(INTERVALS_OF)) + sign


def _baseline(name: str, members: Sequence[Outcome], cells: Sequence[measured.Measured]) -> measured.Measured | None:
    """Of a ratio, the cell that it is relative to, where it was measured."""
    return next((c for c in cells if c.status == "ok" and c.decoder == _baseline_name(name, members)), None)


def _baseline_name(name: str, members: Sequence[Outcome]) -> str | None:
    if not name.startswith("ratio_to_"):
        return None
    return next((m["baseline"] for o in members if (m := _metric(o, name)) and m.get("baseline")), None)
