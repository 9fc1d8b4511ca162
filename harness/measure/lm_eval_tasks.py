"""lm-eval's own tasks on a cell's decoder: its prompts, its metrics, its aggregation."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import lm_eval
import lm_eval.utils
import torch
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager, get_task_dict
from tqdm import tqdm

from decodathlon.harness.errors import MissingError
from decodathlon.harness.measure import asking
from decodathlon.harness.measure.observations import Observations
from decodathlon.harness.measure.statistics import Estimate

if TYPE_CHECKING:
    from decodathlon.harness.suite import Cell

#: Where lm-eval keeps the tasks that it ships.
SHIPPED = Path(lm_eval.__file__).parent / "tasks"


class Result(NamedTuple):
    """What lm-eval found of one task."""

    #: By metric and filter, such as "acc,none".
    metrics: dict[str, Estimate | Observations]
    higher_is_better: Mapping[str, bool | None]
    #: Per document, with lm-eval's own fields.
    samples: list[dict[str, Any]]
    version: str


def redirect(folder: Path, name: str, file: str, data: Path, split: str = "validation") -> None:
    """Put a task that lm-eval ships into a folder, as it is but for its name and its data, which are a local file's."""
    task = {
        "include": str(SHIPPED / file),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(data)}},
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML


def run(model: LM, tasks: Sequence[str], *, limit: int | None = None, folder: Path | None = None) -> dict[str, Result]:
    """Evaluate tasks, of each the first `limit` documents.

    Args:
        folder: where the tasks are; by default those that lm-eval ships.

    Raises:
        MissingError: a task cannot be made, mostly because its data cannot be had.
    """
    with _quiet(), _own_seeds(), _compiled_once():
        where: dict[str, Any] = {} if folder is None else {"include_path": str(folder), "include_defaults": False}
        manager = TaskManager(**where)
        try:
            made = get_task_dict(list(tasks), manager)
        except Exception as error:
            first = (str(error).strip() or repr(error)).splitlines()[0]
            raise MissingError(f"lm-eval cannot make {', '.join(tasks)}: {first}") from error
        found = evaluate(lm=model, task_dict=made, limit=limit, bootstrap_iters=1000, log_samples=True)
    return {
        name: Result(
            _metrics(found["results"][name], samples),
            found["higher_is_better"].get(name, {}),
            samples,
            str(found["versions"].get(name)),
        )
        for name, samples in found["samples"].items()
        if name in found["results"]
    }


def _says_something(sample: Mapping[str, Any]) -> bool:
    """Whether one choice is likelier than all others; lm-eval takes the first of equals, wherever that comes from."""
    replies = sample["filtered_resps"]
    if len(replies) < 2 or not all(isinstance(r, (tuple, list)) and len(r) == 2 for r in replies):
        return True
    scores = sorted((float(r[0]) for r in replies), reverse=True)
    return scores[0] > scores[1]


def measure(cell: Cell, task: str, *, limit: int | None) -> None:
    """Report every metric of a task, or of each task of a group.

    Raises:
        MissingError: the data of the task cannot be had.
    """
    from decodathlon.harness.measure.lm_eval_model import DecoderLM

    asked = DecoderLM(cell)
    found = run(asked, [task], limit=limit)
    for name, result in found.items():
        prefix = "" if len(found) == 1 else f"{name},"
        decided = [_says_something(s) for s in result.samples]
        metrics = result.metrics
        if not all(decided):
            some = [s for s, so in zip(result.samples, decided, strict=True) if so]
            means = {key: _each(key, some) for key, value in metrics.items() if isinstance(value, Observations)}
            metrics = {key: each for key, each in means.items() if each is not None}
            cell.note(
                f"{name}: over the {sum(decided)} of {len(decided)} documents of which the law says anything; "
                "of equally likely choices lm-eval takes the first, so its own number would be another"
            )
        for key, value in metrics.items():
            higher = result.higher_is_better.get(key.partition(",")[0])
            kind = "lm_eval_loss" if higher is False else "lm_eval"
            cell.report(f"{kind}({prefix}{key.removesuffix(',none')})", value)
        cell.note(f"lm-eval: {name} version {result.version}")
        for sample in result.samples:
            replies = [str(reply) for reply in sample["filtered_resps"]]
            row = f"{name}/{sample.get('filter', 'none')}/{sample['doc_id']}/0"
            scores = {m: float(sample[m]) for m in sample.get("metrics", []) if isinstance(sample.get(m), (int, float))}
            cell.sample(row, responses=replies, **scores)
            cell.lines.keep(row, prompt=str(sample["arguments"][0][0]))
    if asked.answers:
        for metric, cost in asking.costs(list(asked.answers.values()), cell.target).items():
            cell.report(metric, cost)


def _metrics(results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, Estimate | Observations]:
    """Per metric its units where it is their mean, else the value with the interval of lm-eval's standard error."""
    found: dict[str, Estimate | Observations] = {}
    for key, value in results.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        each = _each(key, samples)
        if each is not None and math.isclose(sum(each.sums) / len(each.sums), value, rel_tol=1e-9, abs_tol=1e-12):
            found[key] = each
            continue
        error = results.get(f"{metric}_stderr,{kind}")
        half = 1.96 * float(error) if isinstance(error, (int, float)) and math.isfinite(float(error)) else None
        low, high = (None, None) if half is None else (float(value) - half, float(value) + half)
        found[key] = Estimate(float(value), low, high, len({s["doc_id"] for s in samples}))
    return found


def _each(key: str, samples: Sequence[Mapping[str, Any]]) -> Observations | None:
    """A metric document by document; None where documents have no number of it."""
    metric, _, kind = key.partition(",")
    some = [s for s in samples if s.get("filter", "none") == kind and metric in s]
    if not some or not all(isinstance(s[metric], (bool, int, float)) or hasattr(s[metric], "item") for s in some):
        return None
    rows, numbers = [f"doc-{s['doc_id']}" for s in some], [float(s[metric]) for s in some]
    solved = all(x in (0.0, 1.0) for x in numbers)
    return Observations.questions(rows, numbers) if solved else Observations(rows, numbers, [1.0] * len(rows))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval logs and draws bars, which leave threads behind; a cell has its own lines."""
    before, interval = logging.root.manager.disable, tqdm.monitor_interval
    logging.disable(logging.WARNING)
    tqdm.monitor_interval = 0
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        tqdm.monitor_interval = interval


@contextlib.contextmanager
def _compiled_once() -> Iterator[None]:
    """lm-eval compiles a task's few templates anew for every document, which takes longer than to fill them."""
    whole = lm_eval.utils.env.from_string
    lm_eval.utils.env.from_string = functools.lru_cache(maxsize=256)(whole)
    try:
        yield
    finally:
        lm_eval.utils.env.from_string = whole


@contextlib.contextmanager
def _own_seeds() -> Iterator[None]:
    """lm-eval may seed the global generators; nobody else's draws shall depend on that."""
    with torch.random.fork_rng(devices=[]):
        yield
