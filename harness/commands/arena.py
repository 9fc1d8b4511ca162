"""`decodathlon arena`: pairs of answers for people to compare, blind; their votes, and what these say."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path

from decodathlon.harness import decoder as decoders
from decodathlon.harness import embedded
from decodathlon.harness.arena import pairs, ratings
from decodathlon.harness.arena.pairs import Arena
from decodathlon.harness.commands.command import Command, results_option, say
from decodathlon.harness.errors import SpecError, near_miss
from decodathlon.harness.measure.statistics import Estimate
from decodathlon.harness.registry import registry
from decodathlon.harness.results import environment
from decodathlon.harness.results.table import DASH, aligned

#: Who votes for an outside service whose annotators have no names.
SERVICE = "service"


def _arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="build|export|import|ratings")
    build = kinds.add_parser("build", help="draw the answers of two decoders to public prompts")
    build.add_argument("--name", required=True, metavar="NAME", help="of the set, kebab-case")
    build.add_argument("--pairs", type=int, default=100, metavar="N")
    build.add_argument("--decoder", action="append", default=[], metavar="SPEC", help="given twice")
    build.add_argument("--model", default=embedded.NAME, metavar="SPEC")
    build.add_argument("--tokens", type=int, default=256, metavar="N", help="the most that an answer may have")
    build.add_argument("--seed", type=int, default=0)
    build.add_argument("--data", metavar="DIR")
    build.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    build.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    build.add_argument("--decoder-file", action="append", default=[], metavar="PATH")
    export = kinds.add_parser("export", help="a set as JSON lines for an annotation service, blind")
    export.add_argument("name", metavar="NAME")
    export.add_argument("--out", type=Path, metavar="FILE", help="default the terminal")
    taken = kinds.add_parser("import", help="votes of an annotation service, JSON lines")
    taken.add_argument("name", metavar="NAME")
    taken.add_argument("file", type=Path, metavar="FILE")
    rated = kinds.add_parser("ratings", help="win rates, ratings, agreement; of one set or all")
    rated.add_argument("names", nargs="*", metavar="NAME")
    for kind in (build, export, taken, rated):
        results_option(kind)


def _run(options: argparse.Namespace) -> int:
    return {"build": _build, "export": _export, "import": _import, "ratings": _ratings}[options.kind](options)


def _build(options: argparse.Namespace) -> int:
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", options.name):
        raise SpecError(f"--name {options.name}: small letters and digits, words joined by -, such as top-p-or-min-p")
    if len(options.decoder) != 2:
        raise SpecError(f"--decoder is given twice, not {len(options.decoder)} times: people compare two")
    for name in ("pairs", "tokens"):
        if getattr(options, name) < 1:
            raise SpecError(f"--{name} {getattr(options, name)}: at least 1")
    for path in options.decoder_file:
        registry.load_file(path)
    chosen = [decoders.build(text) for text in options.decoder]
    folder = pairs.home(options.results.resolve()) / options.name
    from decodathlon.harness import models
    from decodathlon.harness.arena.build import build

    model = models.resolve(options.model)
    models.check(model, options.device)
    target = models.load(model, device=options.device, dtype=options.dtype, say=say)
    made = build(
        folder, target=target, decoders=chosen, count=options.pairs, tokens=options.tokens, seed=options.seed,
        data=options.data or environment.data_folder(), say=say,
    )  # fmt: skip
    say(f"{len(made.pairs)} pairs in {folder}. Compare them: decodathlon board, page Arena")
    return 0


def _open(options: argparse.Namespace, name: str) -> Arena:
    results = options.results.resolve()
    known = pairs.sets(results)
    if name not in known:
        raise SpecError(f"there is no set {name!r} in {pairs.home(results)}{near_miss(name, known)}")
    return pairs.load(pairs.home(results) / name)


def _export(options: argparse.Namespace) -> int:
    arena = _open(options, options.name)
    lines = []
    for pair in arena.pairs:
        left, right = arena.shown(pair, SERVICE)
        row = {"set": arena.name, "sha256": arena.sha256, "pair": pair.id, "prompt": pair.prompt, "left": left,
               "right": right}  # fmt: skip
        lines.append(json.dumps(row, ensure_ascii=False))
    text = "\n".join(lines) + "\n"
    if options.out is None:
        sys.stdout.write(text)
    else:
        options.out.write_text(text, encoding="utf-8")
        say(f"{len(lines)} pairs in {options.out}; votes come back as lines with pair, annotator and choice: left, "
            "right, tie or bad")  # fmt: skip
    return 0


def _import(options: argparse.Namespace) -> int:
    """All votes, or where one of them is wrong none."""
    arena = _open(options, options.name)
    try:
        content = options.file.read_text(encoding="utf-8")
    except OSError as error:
        raise SpecError(f"{options.file} cannot be read: {error.strerror}") from None
    known = {p.id for p in arena.pairs}
    done = {(v.pair, v.annotator) for v in arena.votes()}
    votes = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{options.file}, line {number}"
        try:
            row = json.loads(line)
            pair, who, said = str(row["pair"]), str(row.get("annotator") or SERVICE), row["choice"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise SpecError(f"{where} is no vote: it needs pair and choice") from None
        if row.get("sha256", arena.sha256) != arena.sha256:
            raise SpecError(f"{where} is of another set of pairs")
        if pair not in known:
            raise SpecError(f"{where}: there is no pair {pair!r} in {arena.name}")
        if said not in ("left", "right", "tie", "bad"):
            raise SpecError(f"{where}: choice {said!r} is none of left, right, tie, bad")
        if (pair, who) in done:
            raise SpecError(f"{where}: {who} has judged {pair} already; nobody votes twice on a pair")
        done.add((pair, who))
        # the service saw the sides as `export` wrote them; this annotator's own sides may be the other way round
        other = arena.flipped(pair, SERVICE) != arena.flipped(pair, who)
        swapped = {"left": "right", "right": "left"}.get(said, said) if other else said
        votes.append((pair, who, swapped))
    for pair, who, said in votes:
        arena.vote(pair, who, said)
    say(f"{len(votes)} votes added to {arena.name}")
    return 0


def _ratings(options: argparse.Namespace) -> int:
    results = options.results.resolve()
    names = options.names or pairs.sets(results)
    if not names:
        raise SpecError(f"there are no sets in {pairs.home(results)}; make one: decodathlon arena build")
    arenas = [_open(options, name) for name in names]
    rows = [["set", "A", "B", "votes", "annotators", "A wins", "B wins", "ties", "both bad", "A's rate", "kappa"]]
    for arena in arenas:
        votes = arena.votes()
        said = Counter(v.choice for v in votes)
        agreed = ratings.kappa(votes)
        rate = ratings.win_rate(ratings.games([arena]))
        rows.append(
            [arena.name, *arena.decoders, str(len(votes)), str(len({v.annotator for v in votes})),
             *(str(said[key]) for key in ("first", "second", "tie", "bad")), _interval(rate) if votes else DASH,
             DASH if agreed is None else f"{agreed.value:.2f} ({agreed.n} pairs)"]
        )  # fmt: skip
    for line in aligned(rows):
        say(line)
    rated = ratings.ratings(ratings.games(arenas))
    if rated:
        say()
        table = [["decoder", "rating", "games"]]
        for name, found in sorted(rated.items(), key=lambda item: -item[1].value):
            table.append([name, _interval(found, ".0f"), str(found.n)])
        for line in aligned(table):
            say(line)
    say()
    say("Rates and ratings with 95 % intervals over prompts; a tie, or both bad, is half a win for each.")
    return 0


def _interval(found: Estimate, form: str = ".3f") -> str:
    if found.low is None:
        return f"{found.value:{form}}"
    return f"{found.value:{form}} [{found.low:{form}}, {found.high:{form}}]"


registry.add("command", "arena", Command("blind comparison of two decoders by people", _arguments, _run), __file__)
