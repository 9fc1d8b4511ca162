"""A set of pairs for the arena: prompts from public sets, each answered by two decoders under one protocol."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from decodathlon.harness import datasets
from decodathlon.harness.arena import pairs
from decodathlon.harness.arena.pairs import Arena, Pair
from decodathlon.harness.datasets import questions
from decodathlon.harness.errors import MissingError, SpecError
from decodathlon.harness.progress import told
from decodathlon.harness.results.lines import Lines

if TYPE_CHECKING:
    from decodathlon.harness.decoder import Decoder
    from decodathlon.harness.targets.base import Target

#: Where prompts come from, in turn.
SOURCES = ("mt-bench", "spec-bench", "truthfulqa-generation")


class Prompt(NamedTuple):
    """What both decoders are asked."""

    text: str
    source: str
    category: str


@dataclass
class Interview:
    """Asks one decoder everything (asking.Asker)."""

    decoder: Decoder
    target: Target
    seed: int
    lines: Lines
    say: Callable[[str], None]
    notes: list[str] = field(default_factory=list)

    def until_late(self, units: Sequence[Any]) -> Iterator[Any]:
        """All of them; says how long it will take."""
        return told(units, self.decoder.spec, self.say)

    def note(self, text: str) -> None:
        """Say it once, and keep it with the set."""
        self.notes.append(text)
        self.say(f"  {text}")


def prompts(folder: str | None, say: Callable[[str], None]) -> list[Prompt]:
    """Every prompt once, the sources taking turns as long as they have some.

    Raises:
        MissingError: `folder` was given and lacks a file.
    """
    by_source: list[list[Prompt]] = []
    seen: set[str] = set()
    for name in SOURCES:
        text = datasets.find(name, "test", folder, say)
        found = []
        for q in questions.read(text):
            words = str(q["turns"][0] if "turns" in q else q["question"]).strip()
            if words not in seen:
                seen.add(words)
                found.append(Prompt(words, text.name, str(q.get("category", ""))))
        if not found:
            say(f"{name}: no prompts at hand, the others are taken")
        by_source.append(found)
    longest = max(map(len, by_source))
    return [some[i] for i in range(longest) for some in by_source if i < len(some)]


def build(
    folder: Path,
    *,
    target: Target,
    decoders: Sequence[Decoder],
    count: int,
    tokens: int,
    seed: int,
    data: str | None,
    say: Callable[[str], None],
) -> Arena:
    """Draw answers of both decoders to `count` prompts; none comes twice before all came once.

    Stopped and begun again with the same words it goes on where it was.

    Raises:
        SpecError: the decoders are one, or the folder holds a set already.
        MissingError: there are no prompts.
    """
    from decodathlon.harness.measure import asking

    first, second = decoders
    if first.spec == second.spec:
        raise SpecError(f"both decoders are {first.spec}: people would compare it with itself")
    if (folder / pairs.SET).exists():
        raise SpecError(f"{folder} holds a set already; name another, or remove it together with its votes")
    every = prompts(data, say)
    if not every:
        raise MissingError("there are no prompts: name a folder with --data")
    if count > len(every):
        say(f"there are {len(every)} prompts; some come again, with other answers")
    asked = {f"{i:04d}": every[i % len(every)] for i in range(count)}
    read = {key: asking.prompt(target, [("user", p.text)]) for key, p in asked.items()}
    answers: list[dict[str, str]] = []
    notes: list[str] = []
    for decoder in decoders:
        decoder.check(target)
        drawn = [decoder.spec, seed, tokens, target.name, str(target.dtype), asking.protocol(target)]
        digest = hashlib.sha256(json.dumps(drawn).encode()).hexdigest()[:12]
        lines = Lines(folder / f".{decoder.info.name}-{digest}.lines.jsonl")
        interview = Interview(decoder, target, seed, lines, say)
        found = [one for some in asking.ask(interview, read, tokens=tokens) for one in some]
        lines.close()
        answers.append({a.question: a.text for a in found})
        notes += interview.notes
    made = [Pair(key, p.text, p.source, p.category, (answers[0][key], answers[1][key])) for key, p in asked.items()]
    more = {"tokens": tokens, "seed": seed, "notes": sorted(set(notes)), "protocol": asking.protocol(target)}
    return pairs.save(folder, decoders=[first.spec, second.spec], model=target.name, pairs=made, more=more)
