"""Tuning: the best parameters of a decoder on questions or a text that no report uses, by Optuna's trials.

A study is a file that grows; who stops it goes on with it. Every decoder of one call gets the same number of trials,
its default setting among them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from decodathlon.harness import decoder as decoders
from decodathlon.harness import spec
from decodathlon.harness.cells import CellSpec, Outcome
from decodathlon.harness.decoder import Decoder
from decodathlon.harness.errors import MissingError, SpecError
from decodathlon.harness.measure.observations import Observations, compared
from decodathlon.harness.measure.statistics import Estimate
from decodathlon.harness.registry import registry
from decodathlon.harness.results.metrics import METRICS

if TYPE_CHECKING:
    import optuna

    from decodathlon.harness.suite import Suite

Method = Literal["grid", "random", "tpe"]
METHODS: tuple[Method, ...] = ("grid", "random", "tpe")
#: From this ratio of the ends of a range on it is searched by its logarithm.
WIDE = 10.0


class Trial(NamedTuple):
    """A setting and what it scored on the validation questions."""

    decoder: str
    score: Estimate
    units: Observations | None
    #: Why it has no score.
    reason: str = ""


class Report(NamedTuple):
    """What came of a decoder's study."""

    metric: str
    default: Trial
    best: Trial
    #: The best less the default, question by question; None where nothing can be said.
    gain: Estimate | None
    trials: int
    failed: int


def check(suite: str, metric: str | None) -> str:
    """The metric that is tuned for.

    Raises:
        SpecError: the suite has no questions to spare, or does not report the metric.
    """
    found: Suite = registry.get("suite", suite)
    if not found.tuned_by:
        raise SpecError(
            f"--suite {suite} has nothing that is kept for tuning; "
            "math500 and truthfulqa have questions, wikitext2 has a text"
        )
    chosen = metric or found.table[0]
    if chosen not in METRICS or METRICS[chosen].better == "none":
        raise SpecError(f"--metric {chosen}: it has no better and worse")
    return chosen


def space(decoder: Decoder) -> dict[str, Sequence[Any]]:
    """The values of `sweep` by parameter.

    Raises:
        SpecError: the decoder has nothing to tune.
    """
    if not decoder.info.sweep:
        raise SpecError(f"{decoder.info.name} has no parameters with a sweep: there is nothing to tune")
    return {key: list(values) for key, values in decoder.info.sweep.items()}


def suggested(trial: optuna.Trial, ranges: Mapping[str, Sequence[Any]], method: Method) -> dict[str, Any]:
    """Values for one trial: those of the sweep on a grid, else anything between its ends."""
    found: dict[str, Any] = {}
    for key, values in ranges.items():
        numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
        if method == "grid" or not numbers or len(values) < 2:
            found[key] = trial.suggest_categorical(key, list(values))
            continue
        low, high = min(values), max(values)
        wide = low > 0 and high / low >= WIDE
        if all(isinstance(v, int) for v in values):
            found[key] = trial.suggest_int(key, low, high, log=wide)
        else:
            found[key] = float(f"{trial.suggest_float(key, float(low), float(high), log=wide):.4g}")
    return found


def sampler(method: Method, seed: int) -> optuna.samplers.BaseSampler:
    """Who proposes the next trial; a grid is walked by us."""
    import optuna

    return optuna.samplers.TPESampler(seed=seed) if method == "tpe" else optuna.samplers.RandomSampler(seed)


def grid(ranges: Mapping[str, Sequence[Any]], seed: int) -> list[dict[str, Any]]:
    """Every combination, in an order of its own, so that fewer trials than there are still see all of the range."""
    every = [dict(zip(ranges, values, strict=True)) for values in itertools.product(*ranges.values())]
    random.Random(seed).shuffle(every)
    return every


def tune(
    first: CellSpec,
    *,
    metric: str,
    method: Method,
    trials: int,
    study_file: Path,
    measure: Callable[[CellSpec], Outcome],
    say: Callable[[str], None],
    basis: str = "",
    ranges: Mapping[str, Sequence[Any]] | None = None,
) -> Report:
    """Go on with the study of a decoder until it has so many trials.

    Args:
        first: the cell of its default setting on the validation questions.
        measure: runs a cell.
        ranges: values by parameter; default those of the decoder's sweep.
        basis: what the questions and weights are; trials on others belong to another study.

    Raises:
        MissingError: Optuna is not installed.
    """
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage
    except ImportError:
        raise MissingError("decodathlon tune needs Optuna: pip install 'optuna>=4'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    base = decoders.build(first.decoder)
    if ranges is None:
        ranges = space(base)
    else:  # a study of other values is another one
        basis += "-" + hashlib.sha256(json.dumps(ranges, sort_keys=True, default=str).encode()).hexdigest()[:8]
    study_file.parent.mkdir(parents=True, exist_ok=True)
    backend = JournalFileBackend(str(study_file), lock_obj=JournalFileOpenLock(str(study_file)))
    study = optuna.create_study(
        storage=JournalStorage(backend),
        sampler=sampler(method, first.seed),
        study_name=f"{first.cell_id}-{metric}-{method}-{basis}",
        direction="maximize" if METRICS[metric].better == "higher" else "minimize",
        load_if_exists=True,
    )
    done = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
    if done:
        say(f"{base.info.name}: going on behind {len(done)} trials in {study_file}")
    found: dict[str, Trial] = {
        t.user_attrs["decoder"]: _stored(t.user_attrs) for t in done if "decoder" in t.user_attrs
    }
    if base.spec not in found:
        found[base.spec] = _measured(first, metric, measure)
        if found[base.spec].reason.startswith("unsupported"):
            raise SpecError(f"{base.spec} cannot be tuned on {first.suite}: {found[base.spec].reason}")
        trial = study.ask()
        _tell(study, trial, found[base.spec])
        done.append(study.get_trials(deepcopy=False)[trial.number])
        say(f"  {base.spec}: {_said(found[base.spec], metric)} (default)")
    left = [values for values in grid(ranges, first.seed) if _of(base, values)[0] not in found]
    while len(done) < trials and (left or method != "grid"):
        if method == "grid":
            study.enqueue_trial(left.pop())
        trial = study.ask()
        values = suggested(trial, ranges, method)
        setting, refused = _of(base, values)
        if refused:
            found[setting] = Trial(setting, Estimate(math.nan, n=0), None, refused)
        known = setting in found
        if not known:
            mine = _measured(dataclasses.replace(first, decoder=setting), metric, measure)
            found[setting] = _on_the_same(mine, found[base.spec])
        _tell(study, trial, found[setting])
        done.append(study.get_trials(deepcopy=False)[trial.number])
        again = " (as before)" if known else ""
        say(f"  [{len(done)}/{trials}] {setting}: {_said(found[setting], metric)}{again}")
    return _report(metric, found, base.spec, len(done))


def _of(base: Decoder, values: Mapping[str, Any]) -> tuple[str, str]:
    """The spec of a setting; or what stands for it, and why the decoder refuses it."""
    try:
        return cast("str", dataclasses.replace(cast("Any", base), **values).spec), ""
    except SpecError as error:
        return f"{base.info.name}{values}", str(error)


def _measured(cell: CellSpec, metric: str, measure: Callable[[CellSpec], Outcome]) -> Trial:
    outcome = measure(cell)
    row = next((m for m in outcome.metrics if m["metric"] == metric), None)
    if outcome.status != "ok" or row is None:
        if outcome.status == "ok":  # nor will any other setting
            there = [m["metric"] for m in outcome.metrics if METRICS[m["metric"]].better != "none"]
            where = f"{cell.suite} {cell.slice}"
            raise SpecError(f"{where} does not report {metric} for {cell.decoder}; --metric {', '.join(there)}")
        reason = outcome.reason
        return Trial(cell.decoder, Estimate(math.nan, n=0), None, f"{outcome.status}: {reason}")
    units = Observations.from_json(row["units"]) if row["units"] is not None else None
    return Trial(cell.decoder, Estimate(row["value"], row["ci_low"], row["ci_high"], row["n"]), units)


def _on_the_same(mine: Trial, default: Trial) -> Trial:
    """A trial, unless it says something of other questions than the default: who skips the hard ones has not won."""
    if mine.units is None or default.units is None or set(mine.units.rows) == set(default.units.rows):
        return mine
    reason = f"it says something of {len(mine.units.rows)} questions, the default of {len(default.units.rows)}"
    return Trial(mine.decoder, Estimate(math.nan, n=0), None, reason)


def _tell(study: optuna.Study, trial: optuna.Trial, found: Trial) -> None:
    import optuna

    for key, value in _to_store(found).items():
        trial.set_user_attr(key, value)
    if math.isfinite(found.score.value):
        study.tell(trial, found.score.value)
    else:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)


def _to_store(found: Trial) -> dict[str, Any]:
    value, low, high, n = found.score
    units = None if found.units is None else found.units.as_json()
    stated = value if math.isfinite(value) else None
    return {"decoder": found.decoder, "score": [stated, low, high, n], "units": units, "reason": found.reason}


def _stored(attrs: Mapping[str, Any]) -> Trial:
    value, low, high, n = attrs["score"]
    units = None if attrs["units"] is None else Observations.from_json(attrs["units"])
    return Trial(attrs["decoder"], Estimate(math.nan if value is None else value, low, high, n), units, attrs["reason"])


def _said(found: Trial, metric: str) -> str:
    value, low, high, _ = found.score
    if found.reason:
        return found.reason
    return f"{metric} {value:.4g}" + ("" if low is None or high is None else f" [{low:.4g}, {high:.4g}]")


def _report(metric: str, found: Mapping[str, Trial], default: str, trials: int) -> Report:
    scored = [t for t in found.values() if math.isfinite(t.score.value)]
    if not scored:
        reasons = {t.reason for t in found.values()}
        raise SpecError(f"no setting of {spec.parse(default).name} has a score: {'; '.join(sorted(reasons))}")
    sign = 1.0 if METRICS[metric].better == "higher" else -1.0
    best = max(scored, key=lambda t: (sign * t.score.value, t.decoder == default))
    before = found[default]
    gain = None
    if best.units is not None and before.units is not None and best.decoder != default:
        gain = compared(best.units, before.units, "difference")
    return Report(metric, before, best, gain, trials, len(found) - len(scored))
