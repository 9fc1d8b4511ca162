"""What every method of training needs first: a folder that is its own, texts that the model wrote, without those that
share something with a suite, and its hidden states in them."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from decodathlon.decoders.speculative.made import fingerprint
from decodathlon.decoders.training import corpus
from decodathlon.decoders.training.corpus import Shard
from decodathlon.harness.commands.command import say
from decodathlon.harness.errors import MissingError, SpecError, StoreError
from decodathlon.harness.locks import file_lock

if TYPE_CHECKING:
    from decodathlon.decoders.training.features import Seen

#: Texts that are looked at, of the first shard of each kind, which is held out.
LOOKED_AT = 24
#: Answers that begin with the same so many tokens, and how many of them are kept: small models have phrases for all
#: that they do not understand.
OPENING, ALIKE = 16, 16
#: What the options say where they are not given.
DEFAULTS = {"shards": 60, "answer_tokens": 192}


class Ready(NamedTuple):
    """Hidden states on disk."""

    states: Path
    #: Numbers of the shards to train on.
    shards: list[int]
    held_out: list[Seen]
    #: What became of the texts, with a hash of those that are left.
    report: dict[str, Any]


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep the folder to ourselves.

    Raises:
        SpecError: somebody else trains there.
        MissingError: it cannot be written.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(file_lock(folder / ".lock", timeout=0.0))
        except StoreError as error:
            raise SpecError(f"--out {folder}: somebody else trains there now") from error
        except OSError as error:
            raise MissingError(f"--out {folder} cannot be written: {error.strerror}") from error
        yield


def check(options: argparse.Namespace, least: Mapping[str, int]) -> None:
    """
    Raises:
        SpecError: an option has no meaning; of those that methods share, and the `least` of others.
        MissingError: the folder of --data is not there, or --out cannot be.
    """
    if options.data is not None and not Path(options.data).is_dir():
        raise MissingError(f"--data {options.data} is no folder")
    if Path(options.out).exists() and not Path(options.out).is_dir():
        raise MissingError(f"--out {options.out} is no folder")
    for name, low in {"shards": 2, "answer_tokens": 2, "steps": 1, "classes": 0, **least}.items():
        if (value := getattr(options, name)) is not None and value < low:
            raise SpecError(f"--{name.replace('_', '-')} {value}: the least is {low}")
    for count, about in options.about:
        if count < 1 or not about.strip():
            raise SpecError(f"--about {count}:{about}: give a number of shards and what the model is told, as 20:TEXT")
    if len({about for _, about in options.about}) < len(options.about):
        raise SpecError("--about: the same text twice; give it once, with all its shards")
    if options.behind and not options.about:
        raise SpecError(f"--behind {options.behind} stands behind the turns of --about, which was not given")
    if options.soft is not None and not 0 <= options.soft <= 1:
        raise SpecError(f"--soft {options.soft} is no share; it lies between 0 and 1")
    if options.rate is not None and not 0 < options.rate <= 1:
        raise SpecError(f"--rate {options.rate} is no learning rate; it lies between 0 and 1")


#: Options of one method alone.
OWN = {
    "dflash": ("layers", "fused", "intermediate", "block", "short", "anchors"),
    "self-distillation": ("decoder",),
}


def refuse(options: argparse.Namespace, other: str) -> None:
    """
    Raises:
        SpecError: an option of another method was given.
    """
    for name in OWN[other]:
        if getattr(options, name) is not None:
            raise SpecError(f"--{name} is of --method {other}, not of {options.method}")


def given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of the options that were given."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def made_by(options: argparse.Namespace, target: Any, **more: Any) -> dict[str, Any]:
    """What all that lies in the folder depends on."""
    return {
        "model": target.name,
        "weights": fingerprint(target),
        "dtype": str(target.dtype).removeprefix("torch."),
        "answer_tokens": options.answer_tokens or DEFAULTS["answer_tokens"],
        "seed": options.seed,
        **more,
    }


def claim(folder: Path, made: Mapping[str, Any]) -> None:
    """
    Raises:
        SpecError: the folder holds what was made of another model, or with other options.
        MissingError: it cannot be written.
    """
    file = folder / "made-by.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = json.loads(file.read_text()) if file.exists() else None
        if before is None:
            file.write_text(json.dumps(made, indent=2) + "\n")
    except ValueError as error:
        raise SpecError(f"{file} is torn; remove {folder} and begin anew") from error
    except OSError as error:
        raise MissingError(f"--out {folder} cannot be written: {error.strerror}") from error
    for name, value in made.items():
        if before is not None and before.get(name) != value:
            raise SpecError(
                f"--out {folder} holds what was made with {name} {before.get(name)}, not {value}; take another folder"
            )


def ready(
    options: argparse.Namespace, target: Any, ids: Sequence[int], made: Mapping[str, Any], until: float
) -> Ready | None:
    """Texts and hidden states `ids` of them, as `Context.extend` numbers them, in a folder that was claimed as `made`;
    made where they are not there. None where `until`, a time of `time.monotonic`, came before all were.

    Raises:
        SpecError: nothing is left to train on.
        MissingError: a data set of `--data` is not there.
    """
    from decodathlon.decoders.training import features

    folder = Path(options.out)
    groups = [
        [Shard(number, about, options.behind if about else "") for number in range(count)]
        for count, about in [(options.shards or DEFAULTS["shards"], ""), *options.about]
    ]
    every = [shard for group in groups for shard in group]
    known = corpus.suite_grams(options.data, say)
    if not corpus.write(target, folder / "texts", every, made["answer_tokens"], options.seed, say, until):
        say("the time is over, and the texts are not all there; the same command goes on")
        return None
    shards, report = _fit(target, [corpus.read(folder / "texts", shard) for shard in every], known)
    say(report["told"])
    full = [number for number, texts in enumerate(shards) if texts]
    firsts = [next((n for n in full if every[n] in group), None) for group in groups]
    held_out = [n for n in firsts if n is not None]
    if len(full) <= len(held_out):
        raise SpecError(f"of {len(every)} shards of texts {len(full)} have any left to train on; give --shards more")
    report["hash"] = hashlib.sha256("".join(features.hash_of(texts) for texts in shards).encode()).hexdigest()[:16]
    gib = features.size(target, ids, shards) / 2**30
    say(f"{report['texts']} answers of {report['tokens']} tokens; the model's states in them take {gib:.1f} GiB")
    if not features.make(target, ids, shards, folder / "states", say, until):
        say("the time is over, and the hidden states are not all there; the same command goes on")
        return None
    target.release()  # what generating needed is room for training
    looked_at = [s for n in held_out for s in features.load(folder / "states", n)[: max(1, LOOKED_AT // len(held_out))]]
    return Ready(folder / "states", [n for n in full if n not in held_out], looked_at, report)


def _fit(
    target: Any, shards: Sequence[Sequence[corpus.Written]], known: dict[str, set[tuple[str, ...]]]
) -> tuple[list[list[corpus.Written]], dict[str, Any]]:
    """The texts that share nothing with the suites, each prompt once, few with the same opening; and what became of the
    others."""
    every = [w for shard in shards for w in shard]
    shared = iter(corpus.overlaps(target, every, known))
    seen, counts, again, alike = set(), Counter[str](), 0, 0
    openings = Counter[tuple[int, ...]]()
    kept: list[list[corpus.Written]] = []
    for shard in shards:
        kept.append([])
        for text in shard:
            names, prompt = next(shared), tuple(text.prompt)
            counts.update(names)
            again += prompt in seen
            if not names and prompt not in seen:
                openings[tuple(text.answer[:OPENING])] += 1
                if openings[tuple(text.answer[:OPENING])] <= ALIKE:
                    kept[-1].append(text)
                else:
                    alike += 1
            seen.add(prompt)
    left = [w for shard in kept for w in shard]
    looked = ", ".join(f"{name} {counts[name]}" for name in sorted(known)) or "none at hand"
    told = (
        f"{len(every)} texts, {again} of them a second time, and {alike} that begin as {ALIKE} others do; left out, "
        f"for they share {corpus.WORDS} words in a row with a suite: {looked}"
    )
    tokens = sum(len(w.answer) for w in left)
    return kept, {"told": told, "texts": len(left), "tokens": tokens, "left_out": {n: counts[n] for n in sorted(known)}}
