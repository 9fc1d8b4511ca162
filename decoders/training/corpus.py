"""Texts that a model writes itself, to train a drafter on: what it would be asked, and what it answers.

The turn of the user is drawn from the model too, behind an empty chat template (Xu et al. 2024, Magpie, arXiv
2406.08464), so no data set is needed and none can leak; answers are greedy, as they are when speed is measured. What
shares eight words in a row with the text of a suite, or a whole text of five to seven, is left out all the same, and
counted.

What turns are about can be steered by what the model is told before them, as Magpie does for its domains; the answer is
to the turn alone, and to a line behind it where suites ask with one. Texts come in shards of their own random numbers.
A shard that is there is not written again, so that the work can be interrupted at any point.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from decodathlon.harness import datasets, progress
from decodathlon.harness import decoder as decoders
from decodathlon.harness.decoder import Limits
from decodathlon.harness.errors import SpecError
from decodathlon.harness.measure.cycles import loops
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.registry import registry

Say = Callable[[str], None]
#: Texts of a shard, and shards that are written side by side.
ROWS, BESIDE = 32, 3
#: How the user's turn is drawn, and the most tokens that it has.
ASKING, ASKED = "top-p[p=0.95]", 96
#: Words in a row that make two texts share something; what a suite has in fewer words is looked for as a whole, if it
#: has so many.
WORDS, WHOLE = 8, 5


@dataclass(frozen=True)
class Written:
    """A prompt, up to where the answer begins, and the answer; tokens."""

    prompt: list[int]
    answer: list[int]


class Shard(NamedTuple):
    """One file of texts: its number among those in which the model was told `about` before the user's turn, and each
    turn was given the line `behind` at its end."""

    number: int
    about: str = ""
    behind: str = ""

    @property
    def mark(self) -> str:
        told = "\n".join(part for part in (self.about, self.behind) if part)
        return f"{hashlib.sha256(told.encode()).hexdigest()[:8]}-" if told else ""

    def file(self, folder: Path) -> Path:
        return folder / f"texts-{self.mark}{self.number:04}.jsonl"


def write(
    target: Any, folder: Path, shards: Sequence[Shard], tokens: int, seed: int, say: Say, until: float = math.inf
) -> bool:
    """Have these shards of texts, with answers of at most so many tokens. False where `until`, a time of the clock
    `time.monotonic`, came before all were there.

    Raises:
        SpecError: the model has no chat template.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [shard for shard in shards if not shard.file(folder).exists()]
    groups = [missing[at : at + BESIDE] for at in range(0, len(missing), BESIDE)]
    for group in progress.told(groups, f"texts: groups of {BESIDE} shards", say):
        if time.monotonic() > until:
            return False
        for shard, texts in zip(group, _written(target, group, tokens, seed), strict=True):
            work = shard.file(folder).with_suffix(".part")
            work.write_text("".join(json.dumps({"prompt": w.prompt, "answer": w.answer}) + "\n" for w in texts))
            os.replace(work, shard.file(folder))
    return True


def read(folder: Path, shard: Shard) -> list[Written]:
    return [Written(**json.loads(line)) for line in shard.file(folder).read_text().splitlines()]


def _written(target: Any, shards: Sequence[Shard], tokens: int, seed: int) -> list[list[Written]]:
    """By shard. What is in one does not depend on which others are written beside it."""
    begins = [begin for shard in shards for begin in [empty_turn(target, shard.about)] * ROWS]
    keys = [f"{shard.mark}{shard.number}-{row}" for shard in shards for row in range(ROWS)]
    asked = decoders.build(ASKING).generate(target, begins, Limits(ASKED), RowRandom(seed, keys))
    prompts: list[list[list[int]]] = []
    for at, shard in zip(range(0, len(asked), ROWS), shards, strict=True):
        turns = [a.text.strip() for a in asked[at : at + ROWS] if a.stop_reason == "stop" and a.text.strip()]
        prompts.append([p for text in dict.fromkeys(turns) if (p := _asked(target, _line(text, shard.behind)))])
    whole = [p for some in prompts for p in some]
    if not whole:
        return [[] for _ in shards]
    rng = RowRandom(seed, range(len(whole)))
    answers = iter(decoders.build("greedy").generate(target, whole, Limits(tokens), rng))
    return [
        [Written(p, a.tokens) for p in some for a in [next(answers)] if len(a.tokens) > 1 and not loops(a.tokens)]
        for some in prompts
    ]


def _line(text: str, behind: str) -> str:
    return f"{text}\n{behind}" if behind else text


def _asked(target: Any, text: str, about: str = "") -> list[int] | None:
    """Models that think answer without: released drafters are trained and measured so."""
    before = [{"role": "system", "content": about}] if about else []
    found: list[int] | None = target.chat([*before, {"role": "user", "content": text}], thinking=False)
    return found


def empty_turn(target: Any, about: str = "") -> list[int]:
    """The tokens before what a user says: what the templates of two different turns have in common.

    Args:
        about: what the model is told before; nothing leaves that to its template.

    Raises:
        SpecError: the model has no chat template.
    """
    one, other = (_asked(target, text, about) for text in ("A", "7"))
    if one is None or other is None:
        raise SpecError(f"{target.name} has no chat template, from which it could write the turns of a user")
    same = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return list(one[:same])


def grams(text: str, lengths: Sequence[int] = range(WHOLE, WORDS + 1)) -> set[tuple[str, ...]]:
    """All runs of so many words; case and marks do not count."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + n]) for n in lengths for i in range(len(words) - n + 1)}


def looked_for(text: str) -> set[tuple[str, ...]]:
    """What a text of a suite is known by: its runs of eight words, or all of it if it is shorter; nothing of what has
    fewer than five."""
    return grams(text, [min(WORDS, max(WHOLE, len(re.findall(r"\w+", text))))])


def suite_grams(folder: str | None, say: Say) -> dict[str, set[tuple[str, ...]]]:
    """By data set of the suites, what the texts of its test split are known by.

    Raises:
        MissingError: `folder` was given and lacks one.
    """
    found = {}
    for name in registry.names("dataset"):
        text = datasets.find(name, "test", folder)
        if text.source == "stand-in":
            say(f"{name} is not at hand (no --data, not in the hub cache, no hub): its stand-in is looked for instead")
        rows = [{gram for words in _words(row) for gram in looked_for(words)} for row in text.rows]
        if short := sum(not row for row in rows):
            say(f"{name}: {short} of {len(rows)} rows have no text of {WHOLE} words, and cannot be looked for")
        found[text.name] = set().union(*rows)
    return found


def _words(row: str) -> list[str]:
    """The texts in a row, which may be JSON."""
    try:
        value = json.loads(row)
    except ValueError:
        return [row]
    return list(_strings(value))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(part)


def overlaps(target: Any, texts: Sequence[Written], suites: Mapping[str, set[tuple[str, ...]]]) -> list[set[str]]:
    """By text, the data sets with which it shares eight words in a row, or a whole shorter text; those of the template
    do not count."""
    template = grams(target.decode(empty_turn(target)))
    shared = [grams(target.decode(w.prompt)) | grams(target.decode(w.answer)) for w in texts]
    return [{name for name, theirs in suites.items() if (some - template) & theirs} for some in shared]
