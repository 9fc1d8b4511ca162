"""The pytest plugin: options, cells out of suites and decoders, progress, the summary, the exit code.

The controller knows no torch. run.py plans cells, hands each to an executor, and ingests the shards that come out.
"""

from __future__ import annotations

import argparse
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from decodathlon.harness import decoder_config, spec
from decodathlon.harness.cells import CellSpec
from decodathlon.harness.errors import DecodathlonError, SpecError, StoreError
from decodathlon.harness.measure.conditions import Conditions
from decodathlon.harness.plan import Options
from decodathlon.harness.registry import load_builtins, registry
from decodathlon.harness.results import environment, gates, table, team
from decodathlon.harness.run import CELL_TIMEOUT, Run, Settings
from decodathlon.harness.suite import SCALES
from decodathlon.harness.workers.executors import EXECUTORS

_RUN = pytest.StashKey["Run"]()
#: How many suites were deselected for want of --benchmark.
_IDLE = pytest.StashKey[int]()
#: What of a decoder's file has no effect.
_REMARK = pytest.StashKey[str]()
#: What else the machine did while pytest-benchmark timed an item.
_WATCH = pytest.StashKey[Conditions]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("decodathlon", "decodathlon: decoders x suites")

    def add(name: str, **options: Any) -> None:
        # `benchmark_*` belongs to pytest-benchmark, so every destination carries our own prefix.
        group.addoption(name, dest="decodathlon_" + name[2:].replace("-", "_"), **options)

    default = Options()
    add("--benchmark", action="store_true", help="measure: run the suites (without it they are deselected)")
    add(
        "--scale",
        choices=SCALES,
        default=default.scale,
        help="sample sizes: minutes, half an hour, a night (default quick)",
    )
    add("--size", action="append", default=[], metavar="[SUITE.]NAME=N", help="one size of the scale; repeatable")
    add("--decoder", action="append", default=[], metavar="SPEC", help="name[key=value,...] or all; repeatable")
    add("--suite", action="append", default=[], metavar="NAME", help="only this suite; repeatable")
    add(
        "--model", default=default.model, metavar="SPEC", help=f"name, hub id, folder or GGUF (default {default.model})"
    )
    add("--model-url", default=default.model_url, metavar="URL", help="of the server, with --model openai:NAME")
    add("--weights", default=None, metavar="WHERE", help="of a packed model: as weights=WHERE in its brackets")
    add("--memory", default=None, metavar="SIZE", help="of a packed model, such as 8GB: as memory=SIZE in its brackets")
    add("--baseline", default=default.baseline, metavar="SPEC", help="one more decoder to compare with, side by side")
    add("--data", default=None, metavar="DIR", help="folder with the data sets (or set DECODATHLON_DATA)")
    add(
        "--results",
        default=None,
        metavar="PATH",
        help="results file (default results.duckdb of the project), or postgres:CONNECTION of a team",
    )
    add("--seed", type=int, default=default.seed, metavar="N", help="same seed, same tokens (default 0)")
    add("--device", choices=["auto", "cpu", "cuda"], default=default.device, help="where the model runs (default auto)")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default=default.dtype, help="of the weights")
    add("--sweep", action="store_true", help="also the sweep values of every decoder, one parameter at a time")
    add("--decoder-file", action="append", default=[], metavar="PATH", help="a Python file with decoders; repeatable")
    add("--decoder-config", action=_Once, default=None, metavar="FILE", help="a YAML file with a decoder's parameters")
    add("--judge", default=default.judge, metavar="SPEC", help="none, openai:MODEL or local:MODEL (default none)")
    add("--judge-url", default=default.judge_url, metavar="URL", help="of a server that speaks the OpenAI protocol")
    add("--lm-eval-task", action="append", default=[], metavar="NAME", help="a task of lm-eval 0.4; repeatable")
    add("--profile", action="store_true", help="also where time and memory go, in cells of throughput")
    add(
        "--workload",
        default=default.workload,
        metavar="NAME",
        help="other prompts for throughput: spec-bench, spec-bench-ending, problems",
    )
    add("--cycle-trace", action="store_true", help="keep every cycle of decoders that draft, in cells of throughput")
    add(
        "--executor",
        choices=sorted(EXECUTORS),
        default="local",
        help="processes of this machine, a Ray cluster, or this very process for a debugger (default local)",
    )
    add(
        "--workers",
        type=_whole,
        default=None,
        metavar="N",
        help="at most so many at once (default one per GPU, or one)",
    )
    add("--ray-address", default="auto", metavar="WHERE", help="auto, local or HOST:PORT, with --executor ray")
    add(
        "--timing-exclusive",
        action="store_true",
        help="measure times with nothing of ours beside them on their machine",
    )
    add("--retry-lost", action="store_true", help="measure a cell once more whose machine was lost")
    add(
        "--cell-timeout",
        type=_seconds,
        default=None,
        metavar="SECONDS",
        help="how long a cell may measure, loading apart (default "
        + ", ".join(f"{k} {v:.0f}" for k, v in CELL_TIMEOUT.items())
        + ")",
    )
    add("--resume", default=None, metavar="RUN", help="go on with a run (its id, or `last`): what has no result yet")
    add(
        "--gates", default=None, metavar="PATH", help=f"rules that decide the exit code (default {gates.FILE}; or none)"
    )


class _Once(argparse.Action):
    """An option that may be given once: the first of two would be lost in silence."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error(f"argument {option_string}: given twice; one file holds one decoder's parameters")
        setattr(namespace, self.dest, values)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return value


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return int(text)


def pytest_configure(config: pytest.Config) -> None:
    if not config.option.decodathlon_benchmark:
        return
    if getattr(config.option, "numprocesses", None) or hasattr(config, "workerinput"):  # pytest-xdist's
        raise pytest.UsageError("-n would measure decoders beside one another, and every speed would be wrong")
    try:
        config.stash[_RUN] = _run(config)
    except DecodathlonError as error:
        raise pytest.UsageError(str(error)) from None
    if threading.current_thread() is threading.main_thread():
        # What a cluster sends before it kills: the run then ends as after Ctrl-C, with its summary.
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _run(config: pytest.Config) -> Run:
    option = config.option
    # resolved, so that a link to a shared file stays a link
    named = option.decodathlon_results
    results = (team.path_of(named) if named else environment.results_file()).resolve()
    rules = Path(option.decodathlon_gates or config.rootpath / gates.FILE)
    wanted = option.decodathlon_gates != "none" and (option.decodathlon_gates is not None or rules.exists())
    if option.decodathlon_ray_address != "auto" and option.decodathlon_executor != "ray":
        raise SpecError(f"--ray-address {option.decodathlon_ray_address} goes with --executor ray")
    settings = Settings(
        results=results,
        executor=option.decodathlon_executor,
        workers=option.decodathlon_workers,
        ray_address=option.decodathlon_ray_address,
        timing_exclusive=option.decodathlon_timing_exclusive,
        retry_lost=option.decodathlon_retry_lost,
        cell_timeout=option.decodathlon_cell_timeout,
        gates=rules if wanted else None,
    )
    own = [f.name for f in fields(Options) if hasattr(option, "decodathlon_" + f.name)]
    given = {name: getattr(option, "decodathlon_" + name) for name in own}
    resume = option.decodathlon_resume
    packed = {"weights": option.decodathlon_weights, "memory": option.decodathlon_memory}
    if resume is not None:
        if option.decodathlon_decoder_config:
            raise SpecError("--resume takes what it measures from the run; leave --decoder-config out")
        for name, value in (given | packed).items():
            usual: Any = getattr(Options(), name, None)
            if value != (list(usual) if isinstance(value, list) else usual):
                raise SpecError(f"--resume takes what it measures from the run; leave --{name.replace('_', '-')} out")
        return Run(settings, None, resume, _sayer(config))
    given["model"] = spec.also(given["model"], "model", packed)
    given["data"] = given["data"] or environment.data_folder()
    given["decoder_file"] = [*given["decoder_file"], *_suite_files(config.args)]
    say = _sayer(config)
    if option.decodathlon_decoder_config:
        given["decoder"] = _configured(option.decodathlon_decoder_config, given, config)
    return Run(settings, Options(**given), None, say)


def _configured(path: str, given: Mapping[str, Any], config: pytest.Config) -> list[str]:
    """The named decoders with the parameters of a file."""
    load_builtins()
    registry.load_entry_points()
    for file in given["decoder_file"]:
        registry.load_file(file)
    found, aside = decoder_config.applied(path, given["decoder"])
    if aside:  # there is no terminal to write to yet
        remark = f"{path}: left aside, for the harness has its own options or needs none: {', '.join(aside)}"
        config.stash[_REMARK] = remark
    return found


def pytest_report_header(config: pytest.Config) -> str | None:
    return config.stash.get(_REMARK, None)


def _suite_files(words: Sequence[str]) -> list[str]:
    """Files named on the command line that hold suites of the user's own: plugins, which the workers import, too."""
    found = []
    for word in words:
        path = Path(word.partition("::")[0])
        ours = path.resolve().parent == environment.ROOT / "suites"
        if path.suffix == ".py" and path.is_file() and not ours and "@suite" in path.read_text(errors="replace"):
            found.append(str(path))
    return list(dict.fromkeys(found))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    suite = getattr(metafunc.function, "__decodathlon_suite__", None)
    if suite is not None and "cell" in metafunc.fixturenames:
        run = metafunc.config.stash.get(_RUN, None)
        specs = [s for s in run.specs if s.suite == suite] if run else []
        metafunc.parametrize("cell", specs, ids=[s.label for s in specs])


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    run = config.stash.get(_RUN, None)
    ours = [i for i in items if hasattr(getattr(i, "function", None), "__decodathlon_suite__")]
    idle = [i for i in ours if run is None or _spec(i) is None]
    # pytest-benchmark times these; an image without it measures the rest.
    wanted = run.timed_suites if run is not None and config.pluginmanager.hasplugin("benchmark") else []
    idle += [i for i in items if (name := _timed(i)) and name not in wanted]
    if idle:
        items[:] = [i for i in items if i not in idle]
        config.hook.pytest_deselected(items=idle)
        if run is None:
            config.stash[_IDLE] = len(idle)
    if run is not None:
        run.waiting = {spec.cell_id: spec for i in items if (spec := _spec(i)) is not None}


def _timed(item: pytest.Item) -> str | None:
    """The suite of an item that pytest-benchmark times."""
    name: str | None = getattr(getattr(item, "function", None), "__decodathlon_timed__", None)
    return name


def _spec(item: pytest.Item) -> CellSpec | None:
    callspec = getattr(item, "callspec", None)
    spec = callspec.params.get("cell") if callspec is not None else None
    return spec if isinstance(spec, CellSpec) else None


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    run = session.config.stash.get(_RUN, None)
    timed = any(_timed(item) for item in session.items)
    if run is None or session.config.option.collectonly or not (run.waiting or timed):
        return
    try:
        run.begin(list(run.waiting.values()))
    except DecodathlonError as error:
        run.refused = True
        raise pytest.UsageError(str(error)) from None
    reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter._show_progress_info = False  # our lines tell how far we are; pytest's percentage would cut in


def pytest_runtest_setup(item: pytest.Item) -> None:
    if _timed(item):
        item.stash[_WATCH] = Conditions()
        item.stash[_WATCH].begin(None)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    spec = _spec(pyfuncitem)
    if spec is None:
        return None
    try:
        outcome = pyfuncitem.config.stash[_RUN].measure(spec)
    except StoreError as error:  # no shard can be written, so nothing more can be kept: what is there stays
        pyfuncitem.session.shouldstop = str(error)
        pytest.fail(str(error), pytrace=False)
    if outcome.status == "unsupported":
        pytest.skip(outcome.reason)
    if outcome.status != "ok":
        text = f"{outcome.status}: {outcome.reason}\n{outcome.error}".rstrip()
        pytest.fail(text, pytrace=False)
    return True


def pytest_report_teststatus(report: pytest.TestReport, config: pytest.Config) -> tuple[str, str, str] | None:
    run = config.stash.get(_RUN, None)
    if run is None or report.when != "call" or not any(key == "decodathlon" for key, _ in report.user_properties):
        return None
    return report.outcome, "", report.outcome.upper()  # the progress line has said it


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report: pytest.TestReport = yield  # type: ignore[assignment]
    spec, suite = _spec(item), _timed(item)
    if spec is not None and report.when == "call":
        report.user_properties.append(("decodathlon", spec.cell_id))
    if suite is not None and report.when == "call" and report.passed:
        stats = getattr(item.funcargs["benchmark"], "stats", None)  # type: ignore[attr-defined]
        if stats is not None:  # None under --benchmark-disable
            rounds = list(stats.stats.data)
            item.config.stash[_RUN].record_timed(suite, item.name.removeprefix("test_"), rounds, item.stash[_WATCH])
    return report  # type: ignore[return-value]


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    run = session.config.stash.get(_RUN, None)
    if run is None or session.config.option.collectonly:
        return
    run.finish()
    fine = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    if not fine:
        return
    if run.measured_nothing:
        session.exitstatus = gates.EXIT_NOTHING_MEASURED
    elif run.failed_to_ingest or run.dishonest:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    else:
        # A default rule that speaks of nothing in this run is no verdict on it.
        code = gates.exit_code(run.verdicts)
        session.exitstatus = 0 if code == gates.EXIT_NOTHING_MEASURED else code


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    idle = config.stash.get(_IDLE, 0)
    if idle:
        terminalreporter.write_line(f"{idle} suites deselected: they measure for minutes and run only with --benchmark")
    run = config.stash.get(_RUN, None)
    if run is None or config.option.collectonly:
        return
    if not run.outcomes and not run.refused:
        terminalreporter.write_line("nothing was measured: name the suites, as in `pytest suites/ --benchmark`")
        return
    if run.refused:
        return
    terminalreporter.section("decodathlon")
    judged = [v.line for v in run.verdicts if v.cell is not None]
    silent = len({v.gate.text for v in run.verdicts if v.cell is None})
    if silent:
        judged.append(f"{silent} rules speak of nothing that this run measured")
    judged = [f"FAIL audit: {one} does not draw from the law that it claims" for one in run.dishonest] + judged
    for line in [*table.tables(run.outcomes)[1:], *(["", "gates:", *judged] if judged else []), "", *run.closing]:
        terminalreporter.write_line(line)


def _sayer(config: pytest.Config) -> Any:
    """Writes a line past pytest's capture, without making it name the suite's file anew for every cell."""
    announced: Any = None

    def say(text: str) -> None:
        nonlocal announced
        reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
        capture: Any = config.pluginmanager.get_plugin("capturemanager")
        if reporter is None:
            return
        with capture.global_and_fixture_disabled() if capture is not None else nullcontext():
            path = reporter.currentfspath
            if path != announced:
                reporter.ensure_newline()
            reporter.currentfspath = None
            reporter.write_line(text)
            reporter.currentfspath = announced = path

    return say
