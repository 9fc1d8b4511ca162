"""A set of pairs and its votes: plain files in a folder of their own, which a page, a command or a service may read.

`set.json` says what the set is and who wrote which answer, `pairs.jsonl` holds prompts and answers, `votes.jsonl` grows
by a line per vote. Which answer stands left is drawn anew for each annotator and pair, from their names.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from decodathlon.harness.cells import now
from decodathlon.harness.errors import SpecError
from decodathlon.harness.locks import file_lock

SET, PAIRS, VOTES, LOCK = "set.json", "pairs.jsonl", "votes.jsonl", ".lock"
#: What an annotator may say: which side is better, that none is, or that both are bad.
Said = Literal["left", "right", "tie", "bad"]
#: The same of the answers themselves.
Choice = Literal["first", "second", "tie", "bad"]


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, in the order of the set's decoders."""

    id: str
    prompt: str
    source: str
    category: str
    answers: tuple[str, str]


@dataclass(frozen=True)
class Vote:
    """What an annotator said of a pair."""

    pair: str
    annotator: str
    choice: Choice
    when: str


@dataclass(frozen=True)
class Arena:
    """A set of pairs in its folder."""

    folder: Path
    name: str
    #: Specs of the two decoders, in the order of the answers.
    decoders: tuple[str, str]
    model: str
    pairs: tuple[Pair, ...]
    #: Of the pairs' file; a vote holds for that file alone.
    sha256: str

    def flipped(self, pair: str, annotator: str) -> bool:
        """Whether this annotator sees the second decoder's answer at the left."""
        return hashlib.sha256(f"{self.sha256}/{annotator}/{pair}".encode()).digest()[0] % 2 == 1

    def shown(self, pair: Pair, annotator: str) -> tuple[str, str]:
        """The answers as this annotator sees them, left and right."""
        first, second = pair.answers
        return (second, first) if self.flipped(pair.id, annotator) else (first, second)

    def votes(self) -> list[Vote]:
        """All votes so far; a torn last line is left out.

        Raises:
            SpecError: a vote is of a pair that the set does not have, or a line is damaged.
        """
        path, known = self.folder / VOTES, {p.id for p in self.pairs}
        found: dict[tuple[str, str], Vote] = {}
        *lines, _ = path.read_text(encoding="utf-8").split("\n") if path.is_file() else [""]
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                of = row.pop("set", self.sha256)
                one = Vote(**row)
            except (ValueError, TypeError, AttributeError):
                raise SpecError(f"{path}, line {number} is no vote; put the file back as it was") from None
            if of != self.sha256 or one.pair not in known:
                raise SpecError(f"{path}, line {number}: this vote is of another set of pairs")
            if one.choice not in get_args(Choice):
                raise SpecError(f"{path}, line {number}: {one.choice!r} is none of {', '.join(get_args(Choice))}")
            found.setdefault((one.pair, one.annotator), one)  # the first of two counts
        return list(found.values())

    def left(self, annotator: str) -> list[Pair]:
        """The pairs that an annotator has not judged yet, in the order of the set, which is the same for all."""
        done = {v.pair for v in self.votes() if v.annotator == annotator}
        return [p for p in self.pairs if p.id not in done]

    def vote(self, pair: str, annotator: str, said: Said) -> Vote:
        """Put down what an annotator said of a pair as he sees it.

        Raises:
            SpecError: he has judged it already, it is not in the set, the word is none of the four, or the set's file
                has been changed since it was opened.
        """
        if said not in get_args(Said):
            raise SpecError(f"{said!r} is none of {', '.join(get_args(Said))}")
        annotator = annotator.strip()
        if not annotator:
            raise SpecError("an annotator needs a name")
        if pair not in {p.id for p in self.pairs}:
            raise SpecError(f"there is no pair {pair!r} in the set {self.name}")
        with file_lock(self.folder / LOCK, timeout=30.0):
            if _digest(self.folder / PAIRS) != self.sha256:
                raise SpecError(f"{self.folder / PAIRS} was changed while it was open; open the set again")
            if any(v.pair == pair and v.annotator == annotator for v in self.votes()):
                raise SpecError(f"{annotator} has judged {pair} already; nobody votes twice on a pair")
            one = Vote(pair, annotator, self._meant(pair, annotator, said), now())
            path = self.folder / VOTES
            _mend(path)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(one) | {"set": self.sha256}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        return one

    def _meant(self, pair: str, annotator: str, said: Said) -> Choice:
        if said in ("tie", "bad"):
            return said
        return "first" if (said == "left") != self.flipped(pair, annotator) else "second"


def _mend(path: Path) -> None:
    """Take a torn last line away, which a killed process has left."""
    if path.is_file() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        path.write_bytes(content[: content.rfind(b"\n") + 1])


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def save(folder: Path, *, decoders: Sequence[str], model: str, pairs: Sequence[Pair], more: dict[str, Any]) -> Arena:
    """Write a new set.

    Raises:
        SpecError: the folder holds one already.
    """
    if (folder / SET).exists():
        raise SpecError(f"{folder} holds a set already; name another, or remove it together with its votes")
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asdict(p)) for p in pairs]  # in ASCII: answers may hold whatever ends a line in Unicode
    (folder / PAIRS).write_text("\n".join(lines) + "\n", encoding="utf-8")
    head = {"decoders": list(decoders), "model": model, "made": now(), "sha256": _digest(folder / PAIRS), **more}
    (folder / SET).write_text(json.dumps(head, indent=1) + "\n", encoding="utf-8")
    return load(folder)


def load(folder: Path) -> Arena:
    """
    Raises:
        SpecError: the folder holds no set, or its pairs are not those that it was made with, or two share an id.
    """
    try:
        head = json.loads((folder / SET).read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in (folder / PAIRS).read_text(encoding="utf-8").split("\n") if line]
        pairs = tuple(Pair(**row | {"answers": tuple(row["answers"])}) for row in rows)
        first, second = head["decoders"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SpecError(f"{folder} holds no set of pairs ({error}); make one: decodathlon arena build") from None
    digest = _digest(folder / PAIRS)
    if digest != head.get("sha256"):
        raise SpecError(f"{folder / PAIRS} is not what the set was made with; votes on it would mean nothing")
    seen: set[str] = set()
    for pair in pairs:
        if pair.id in seen:
            raise SpecError(f"{folder / PAIRS} has two pairs {pair.id!r}")
        seen.add(pair.id)
    return Arena(folder, folder.name, (first, second), str(head.get("model", "")), pairs, digest)


def home(results: Path) -> Path:
    """Where the sets lie beside a results file."""
    return results.with_suffix(".arena")


def sets(results: Path) -> list[str]:
    """The names of the sets beside a results file."""
    return sorted(p.parent.name for p in home(results).glob(f"*/{SET}"))
