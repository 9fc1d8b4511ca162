"""From options to cells: everything that a user can get wrong is found here, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decodathlon.harness import datasets, embedded, judges, models
from decodathlon.harness import decoder as decoders
from decodathlon.harness.cells import TOY, CellSpec
from decodathlon.harness.engines import remote
from decodathlon.harness.errors import MissingError, SpecError, near_miss
from decodathlon.harness.registry import load_builtins, registry
from decodathlon.harness.suite import Suite


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user asked for; the fields are the command-line options."""

    scale: str = "quick"
    size: Sequence[str] = ()
    decoder: Sequence[str] = ()
    suite: Sequence[str] = ()
    model: str = embedded.NAME
    model_url: str = ""
    baseline: str = "greedy"
    data: str | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    sweep: bool = False
    decoder_file: Sequence[str] = ()
    lm_eval_task: Sequence[str] = ()
    judge: str = "none"
    judge_url: str = ""
    profile: bool = False
    cycle_trace: bool = False
    workload: str = ""
    #: Of the command tune, not of pytest.
    split: str = "test"
    limit: int = 0


#: The suite whose slices are the tasks of --lm-eval-task.
LM_EVAL = "lm_eval"


def cells(options: Options, *, ahead: bool = False) -> list[CellSpec]:
    """Every cell of a run, in the order of suites, then decoders.

    Args:
        ahead: it is a plan for another day or machine: neither model nor server nor device need be there yet.

    Raises:
        SpecError, MissingError: the first thing that is wrong, with its remedy.
    """
    load_builtins()
    registry.load_entry_points()
    for path in options.decoder_file:
        registry.load_file(path)
    suites: list[Suite] = [registry.get("suite", name) for name in dict.fromkeys(options.suite or _all_suites(options))]
    if options.lm_eval_task:
        _check_tasks(options.lm_eval_task)
        suites += [registry.get("suite", LM_EVAL)] if LM_EVAL not in options.suite else []
    elif LM_EVAL in options.suite:
        raise SpecError("--suite lm_eval measures the tasks that --lm-eval-task names; name one, such as arc_easy")
    if options.workload:
        _check_workload(options.workload, suites)
    sizes = _sizes(options, suites)
    chosen = _decoders(options, suites)
    baseline = decoders.build(options.baseline).spec
    if not -(2**63) <= options.seed < 2**63:
        raise SpecError(f"--seed {options.seed} does not fit into 64 bits")
    model = models.resolve(options.model, options.model_url)
    if not ahead:
        models.check(model, options.device, options.dtype)
    judges.check(options.judge, options.judge_url)
    if options.data is not None:
        if not Path(options.data).is_dir():
            raise MissingError(f"--data {options.data}: there is no such folder")
        parts = [(s, part) for s in suites for part in s.slices(options.scale, options.workload)]
        for name in sorted({name for s, part in parts if (name := s.data_of(part)) is not None}):
            datasets.check_folder(name, options.data)
    common: dict[str, Any] = {
        "model": model.name,
        "model_spec": options.model,
        "model_url": options.model_url,
        "scale": options.scale,
        "seed": options.seed,
        "device": options.device,
        "dtype": options.dtype,
        "baseline": baseline,
        "data": str(Path(options.data).resolve()) if options.data else None,
        "judge_url": options.judge_url,
        "profile": options.profile,
        "cycle_trace": options.cycle_trace,
        "split": options.split,
        "limit": options.limit,
        "decoder_files": tuple(str(Path(p).resolve()) for p in options.decoder_file),
    }

    toy = {"model": TOY, "model_url": ""}

    def places(s: Suite, part: str) -> dict[str, Any]:
        judge = {"judge": options.judge} if s.judged else {}
        own: dict[str, Any] = {"workload": options.workload if options.workload in s.workloads else ""}
        own |= {"sizes": tuple(sorted(sizes[s.name].items()))}
        return common | own | judge | (toy | {"model_spec": s.targets[part]} if s.targets else {})

    return [
        CellSpec(suite=s.name, suite_version=s.version, slice=part, decoder=d, broken=error, **places(s, part))
        for s in suites
        for part in (options.lm_eval_task if s.name == LM_EVAL else s.slices(options.scale, options.workload))
        for d, error in ([(baseline, None)] if s.of_target else chosen)
    ]


def _check_workload(name: str, suites: Sequence[Suite]) -> None:
    """
    Raises:
        SpecError: no chosen suite has such a workload.
    """
    known = set[str]().union(*(s.workloads for s in suites))
    if name not in known:
        raise SpecError(f"--workload {name}: no chosen suite has it{near_miss(name, known)}")


def _sizes(options: Options, suites: Sequence[Suite]) -> dict[str, dict[str, int | None]]:
    """Of every suite, the sample sizes that --size states in place of those of the scale.

    Raises:
        SpecError: no chosen suite has such a size, or it is no positive whole number.
    """
    found: dict[str, dict[str, int | None]] = {s.name: {} for s in suites}
    by_name: dict[str, set[str]] = {s.name: set() for s in suites}
    for text in options.size:
        place, _, value = text.partition("=")
        name, _, key = place.rpartition(".")
        named = [s for s in suites if not name or s.name == name]
        if not named:
            raise SpecError(f"--size {text}: {name} is not measured{near_miss(name, found)}")
        having = [s for s in named if key in _countable(s.sized(options.scale, options.workload))]
        if not having:
            known = sorted(set().union(*(_countable(s.sized(options.scale, options.workload)) for s in named)))
            raise SpecError(f"--size {text}: no such size{near_miss(key, known)}")
        whole = value == "all" and all(s.sizes["full"].get(key, 0) is None for s in having)
        if not whole and not (value.isascii() and value.isdigit() and len(value) < 10 and int(value) > 0):
            raise SpecError(f"--size {text[:80]}: a positive whole number is wanted, as in {place}=32")
        for s in having:
            if name or key not in by_name[s.name]:  # what names a suite has the last word
                found[s.name][key] = None if whole else int(value)
            by_name[s.name] |= {key} if name else set()
    return found


def _countable(sizes: Mapping[str, Any]) -> set[str]:
    """The sizes that are a number, or all that there is."""
    return {key for key, value in sizes.items() if value is None or type(value) is int}


def _all_suites(options: Options) -> list[str]:
    """Who names tasks of lm-eval and no suite wants those alone; what the kind of model cannot have is left out."""
    if options.lm_eval_task:
        return []
    lacks = "logits" if options.model.startswith(remote.PREFIX) else "server"
    return [name for name in registry.names("suite") if lacks not in registry.get("suite", name).needs]


def _check_tasks(names: Sequence[str]) -> None:
    """
    Raises:
        MissingError: lm-eval is not installed.
        SpecError: it has no such task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise MissingError("--lm-eval-task needs lm-eval: pip install 'lm-eval>=0.4.9,<0.5'") from None
    known = [str(name) for name in TaskManager().all_tasks]
    for name in names:
        if name not in known:
            raise SpecError(f"--lm-eval-task {name}: lm-eval has no such task{near_miss(name, known)}")


def _decoders(options: Options, suites: Sequence[Suite]) -> list[tuple[str, str | None]]:
    """Spec strings with the import error of those that stand for a broken plugin.

    Who asks for nothing but suites on targets of their own, such as the audit, asks it of all decoders.
    """
    named = options.decoder or [*headline(), *_of_files(options.decoder_file)]
    if not options.decoder and not options.decoder_file and options.suite and all(s.targets for s in suites):
        named = ["all"]
    if "all" in named:
        named = [*dict.fromkeys([*(n for n in named if n != "all"), *headline(), *registry.names("decoder")])]
    wanted = [decoders.build(text) for text in named]
    if options.sweep:
        wanted = [neighbour for one in wanted for neighbour in decoders.swept(one)]
    specs: list[tuple[str, str | None]] = [(d.spec, None) for d in wanted]
    broken = [(b.name, f"{b.source}\n{b.error}") for b in registry.broken]
    return list(dict.fromkeys([*specs, *broken]))


def _of_files(paths: Sequence[str]) -> list[str]:
    """Every decoder of the named files that is not in the headline set anyway: who names a file wants to see it run."""
    files = {Path(p).resolve() for p in paths}
    entries = [e for (kind, _), e in registry.entries.items() if kind == "decoder"]
    return [e.name for e in entries if Path(e.source).resolve() in files and e.value.info.headline is None]


def headline() -> list[str]:
    """One good setting per family, in the order in which they registered."""
    classes: list[Any] = [e.value for (kind, _), e in registry.entries.items() if kind == "decoder"]
    return [c.info.headline for c in classes if c.info.headline is not None]
