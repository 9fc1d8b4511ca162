"""Results files for tests of the board: a small one with everything that can happen, and one with a million metrics."""

import json

import numpy as np

from decodathlon.harness import about
from decodathlon.harness.cells import CellSpec, Outcome
from decodathlon.harness.measure import accuracy
from decodathlon.harness.measure.accuracy import Graded
from decodathlon.harness.measure.observations import Observations
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.results import shards, store
from decodathlon.harness.results.lines import Lines
from decodathlon.harness.results.lines import path_of as path_of_lines
from decodathlon.harness.results.metrics import METRICS
from decodathlon.leaderboard.queries import Column, Setting

WINDOWS = 12
PAIRS = 10
#: Where the demo was measured, and its two columns.
QUICK = Setting("tiny", "float32", "a CPU, 2 threads", "quick", 0)
SPEED = Column("throughput", 1, "batch-1", "wikitext-2-raw-v1")
TEXT = Column("wikitext2", 1, "joined", "wikitext-2-raw-v1")


def metric_row(name, found, baseline=None):
    """A row of a shard's metrics from Observations."""
    value, low, high, n = found.estimate()
    known = METRICS[name]
    return {
        "metric": name, "value": value, "unit": known.unit, "better": known.better, "ci_low": low, "ci_high": high,
        "n": n, "baseline": baseline, "units": found.as_json(),
    }  # fmt: skip


def text_metrics(seed, worse=0.0):
    """Perplexities over windows that all decoders share: `worse` nats above a common, noisy text."""
    hard = np.random.default_rng(0).normal(3.0, 0.3, WINDOWS)
    own = hard + worse + np.random.default_rng(seed).normal(0, 0.002, WINDOWS)
    rows = [f"window-{i}" for i in range(WINDOWS)]
    ppl = Observations(rows, list(own * 100), [100] * WINDOWS, scale="exp")
    cover = Observations(rows, [90.0 + i % 3 for i in range(WINDOWS)], [100] * WINDOWS, share=True)
    return [metric_row("ppl_epsilon", ppl), metric_row("coverage", cover)]


def speed_metrics(seed, ratio, baseline="greedy"):
    """A ratio to greedy with one per cent of noise, and its A/A row."""
    noise = np.random.default_rng(seed).normal(0, 0.01, (2, PAIRS))
    rows = [f"pair-{i}" for i in range(PAIRS)]
    found = [metric_row("ratio_to_self", Observations.each(rows, list(noise[1]), scale="exp"), "itself")]
    if ratio is not None:
        against = Observations.each(rows, list(np.log(ratio) + noise[0]), scale="exp")
        found.append(metric_row("ratio_to_greedy", against, baseline))
    fast = Observations.each(rows, [50 * (ratio or 1)] * PAIRS)
    peak = {"metric": "peak_memory_bytes", "value": 2.0**28 * (1 + seed % 3), "unit": "B", "better": "lower",
            "ci_low": None, "ci_high": None, "n": 1, "baseline": None, "units": None}  # fmt: skip
    return [*found, metric_row("tokens_per_s", fast), peak]


def cell(
    run_id, suite, decoder, metrics=(), *, started, scale="quick", slice="all", claim="shaped", params=None, **more
):
    """One cell of a decoder as its shard says it."""
    spec = CellSpec(suite, 1, slice, decoder, "tiny", scale, 0)
    name = decoder.partition("[")[0]
    known = {
        "decoder": {"name": name, "spec": decoder, "family": name, "params": params or {}, "claim": claim},
        "model": {"name": "tiny", "dtype": "float32", "device": "cpu", "threads": 2},
        "data": {"dataset": "wikitext-2-raw-v1", "split": "test", "source": "folder"},
        "metrics": list(metrics),
        "seconds": {"total": 1.5},
        "started": started,
    }
    return Outcome(spec, run_id, **(known | more))


def write_run(folder, run_id, outcomes, *, started, dirty=False, described=True, verdicts=(), planned=None):
    """The shards of a run; `planned` more cells than there are make it an unfinished one."""
    load_builtins()
    names = dict.fromkeys(o.spec.decoder for o in outcomes)
    record = {
        "run_id": run_id, "started": started, "git_commit": "0123456789abcdef", "git_dirty": dirty,
        "environment": {"cpu": "a CPU", "cores": 2, "gpus": [], "packages": {"torch": "2.13.0"}},
        "options": {"scale": "quick", "sweep": True},
        "about": about.describe(names, ["wikitext2", "throughput"]) if described else None,
    }  # fmt: skip
    shards.write(folder / run_id / shards.RUN_FILE, record)
    for o in outcomes:
        shards.write(folder / run_id / f"{o.spec.cell_id}.json", o.as_shard())
    if verdicts:
        shards.write(folder / run_id / shards.GATES_FILE, {"run_id": run_id, "verdicts": list(verdicts)})
    if planned:
        shards.write(folder / run_id / shards.PLAN_FILE, {"cells": [{}] * planned, "decoders": {}})
    return folder / run_id


def day(number, minute=0):
    return f"2026-11-{number:02d}T10:{minute:02d}:00.000+00:00"


def _both(run_id, when, decoder, seed, ratio, worse, **more):
    return [
        cell(run_id, "throughput", decoder, speed_metrics(seed, ratio), started=when, slice="batch-1", **more),
        cell(run_id, "wikitext2", decoder, text_metrics(seed, worse), started=when, slice="joined", **more),
    ]


#: As harness/measure/profile.py stores it.
PROFILE = {
    "seconds": 0.5, "profiled_seconds": 0.75,
    "time": {"generate": 0.05, "generate;prefill;linear": 0.1, "generate;forward;linear;mm": 0.4,
             "generate;forward;<b>odd</b>": 0.05, "generate;sampler;topk": 0.15},
    "memory": {"generate;forward;linear;mm": 3e6, "generate;sampler;topk": 1e6},
    "stacks": ["generate", "generate;forward", "generate;forward;linear"],
    "events": [[0, 0.0, 100.0], [1, 10.0, 60.0], [2, 12.0, 40.0]],
}  # fmt: skip


def demo(path):
    """Everything that can happen: sweeps, history, gates, failures, stand-in data, changed code, contention."""
    folder = path.parent / "demo"
    unsupported = cell("demo-1", "wikitext2", "hf-generate", started=day(18), slice="joined", claim="greedy-exact",
                       status="unsupported", reason="needs a next-token law")  # fmt: skip
    boom = cell("demo-1", "throughput", "boom[x=1]", started=day(18), slice="batch-1", claim="heuristic",
                status="failed", reason="ValueError: <b>boom</b>", error="Traceback:\n<b>boom</b>",
                log="it said & died\n", data={})  # fmt: skip
    stand_in = {"dataset": "prose", "split": "test", "source": "stand-in"}
    runs = [
        write_run(
            folder,
            "demo-1",
            [
                *_both("demo-1", day(18), "greedy", 1, None, 0.5, claim="greedy-exact"),
                *_both("demo-1", day(18), "top-p", 2, 0.95, 0.2, params={"p": 0.9, "temperature": 1.0}),
                unsupported,
                boom,
            ],
            started=day(18),
        ),
        write_run(
            folder,
            "demo-2",
            [
                *_both("demo-2", day(19), "mine", 3, 2.0, -0.5),
                cell("demo-2", "wikitext2", "typical", text_metrics(4), started=day(19), slice="joined", data=stand_in),
                cell("demo-2", "throughput", "elsewhere", speed_metrics(5, 1.1), started=day(19), slice="batch-1",
                     scale="smoke", samples=[{"row": "profile", "data": PROFILE}]),
            ],
            started=day(19),
            dirty=True,
        ),
        write_run(
            folder,
            "demo-3",
            [
                *_both("demo-3", day(20), "temperature", 6, 0.99, 0.0, claim="exact",
                       notes=["contended: by a neighbour"]),
                *_both("demo-3", day(20, 1), "top-p", 7, 0.94, 0.2, params={"p": 0.9, "temperature": 1.0}),
                *_both("demo-3", day(20, 2), "top-p[p=0.5]", 8, 0.93, 0.4, params={"p": 0.5, "temperature": 1.0}),
                *_both("demo-3", day(20, 3), "top-p[p=0.8]", 9, 0.935, 0.3, params={"p": 0.8, "temperature": 1.0}),
                *_both("demo-3", day(20, 4), "turbo", 10, 1.3, 0.35, claim="heuristic"),
                cell("demo-3", "wikitext2", "late", text_metrics(11, 1.0), started=day(20, 5), slice="joined",
                     status="partial", reason="after 9 s 12 of 24 units were measured"),
            ],
            started=day(20),
            verdicts=[
                {"gate": "throughput: ratio_to_greedy >= 0.98", "decoder": d, "cell_id": d, "outcome": o,
                 "detail": "as it was found", "judged": day(20, 9)}
                for d, o in (("turbo", "pass"), ("top-p", "fail"), ("temperature", "inconclusive"), ("boom", "not run"))
            ],
        ),
    ]  # fmt: skip
    store.ingest(path, runs)
    return path


#: How many of its four answers to problem i a decoder of `asked` gets right, and what an answer costs it in tokens.
PROBLEMS = 12
SOLVERS = {"greedy": (1, lambda i: i < 2, 50), "temperature": (4, lambda i: 2 if i < 10 else 0, 100),
           "thrifty": (4, lambda i: 1 if i < 10 else 0, 25)}  # fmt: skip


def asked(path):
    """A results file with twelve problems that three decoders answered, and the lines that they left."""
    folder = path.with_suffix(".shards")
    data = {"dataset": "math-500", "split": "test", "source": "folder"}
    made = []
    for name, (drawn, right, tokens) in SOLVERS.items():
        graded, samples = [], []
        for i in range(PROBLEMS):
            for k in range(drawn):
                correct = k < right(i)
                says = 0 if correct else 1 + k
                graded.append(Graded(f"math-{i}", correct, says, -0.1 * (k + 1)))
                said = {
                    "correct": correct,
                    "says": says,
                    "response": f"{name} says {k} to {i}",
                    "ground_truth": "7",
                    "tokens": tokens,
                    "log_prob": -0.1 * (k + 1) * tokens,
                    "trouble": "" if k else "no box",
                }
                samples.append({"row": f"math-{i}/{k}", "data": said})
        names = [f"math-{i}" for i in range(PROBLEMS)]
        metrics = [metric_row(m, f) for m, f in accuracy.metrics(graded).items() if isinstance(f, Observations)]
        metrics.append(
            metric_row("answer_tokens", Observations(names, [tokens * drawn] * PROBLEMS, [drawn] * PROBLEMS))
        )
        made.append(cell("asked", "math500", name, metrics, started=day(20), data=data, samples=samples))
    write_run(folder, "asked", made, started=day(20))
    lines = Lines(path_of_lines(folder / "asked", made[1].spec.cell_id))
    for i in range(PROBLEMS):
        lines.write(f"math-{i}/0", prompt=f"What is {i} + 7 - {i}? <b>Think</b>")
    lines.close()
    store.ingest(path, [folder / "asked"])
    return path


def million(path, cells=50_000, metrics=20):
    """A results file with cells x metrics rows, made in SQL: 25 decoders with 8 settings each, 10 models, 100 runs."""
    names = list(METRICS)[:metrics]
    rows = [f"pair-{i}" for i in range(8)]
    units = json.dumps(Observations.each(rows, [1.0] * 8).as_json()).replace("1.0", "{}").replace("{}", "@")
    load_builtins()
    described = json.dumps(about.describe(["top-p"], ["wikitext2", "throughput"]))

    def fill(connection):
        connection.execute(
            """
            INSERT INTO run (run_id, started, hardware, git_commit, git_dirty, environment, options, about)
            SELECT 'run-' || i, TIMESTAMPTZ '2026-01-01' + to_hours(i::INTEGER), 'machine ' || i % 5, 'abc', false,
                   '{}', '{}', $about
            FROM range(100) r(i)
            """,
            {"about": described},
        )
        connection.execute(
            """
            INSERT INTO cell (run_id, cell_id, started, suite, suite_version, slice, scale, decoder, family, params,
                              claim, model, dtype, device, dataset, data, seed, status, reason, notes)
            SELECT 'run-' || (i // 500) , 'cell-' || i, TIMESTAMPTZ '2026-01-01' + to_seconds(i),
                   ['throughput', 'wikitext2'][1 + i % 2], 1, ['batch-1', 'joined'][1 + i % 2], 'quick',
                   'decoder-' || (i // 2 % 25) || '[p=0.' || (i // 50 % 8) || ']', 'family-' || (i // 2 % 25),
                   '{"p": 0.' || (i // 50 % 8) || '}', 'shaped', 'model-' || (i // 400 % 10), 'float32', 'cpu',
                   'wikitext-2-raw-v1', '{"source": "folder"}', 0, 'ok', '', '[]'
            FROM range($cells) r(i)
            """,
            {"cells": cells},
        )
        connection.execute(
            """
            INSERT INTO metric
            SELECT run_id, cell_id, metric, v, '1', better, v * 0.99, v * 1.01, 8, baseline,
                   replace($units, '@', round(v, 6)::VARCHAR)
            FROM (SELECT run_id, cell_id, 1 + random() AS v, unnest($names) AS metric, unnest($better) AS better,
                         unnest($baseline) AS baseline FROM cell)
            """,
            {
                "units": units,
                "names": names,
                "better": [METRICS[n].better for n in names],
                "baseline": ["decoder-0" if n.startswith("ratio_to") else None for n in names],
            },
        )

    store.update(path, fill)
    return path
