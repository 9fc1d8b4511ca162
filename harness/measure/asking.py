"""One protocol for all answers: how a question becomes a prompt, how many answers it gets, and what they cost.

It is the same for all decoders: the model's chat template, or where it has none the plain form below; the same greatest
length; and every answer draws from a random stream of its own, so that batches and resumed runs change nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from decodathlon.harness.decoder import Completion, Cost, Decoder, Limits
from decodathlon.harness.errors import UnsupportedError
from decodathlon.harness.measure.observations import Observations
from decodathlon.harness.measure.statistics import Estimate
from decodathlon.harness.randomness import RowRandom

if TYPE_CHECKING:
    from decodathlon.harness.results.lines import Lines
    from decodathlon.harness.targets.base import Target

#: How a model without a chat template is asked; what it writes behind the next "Question:" is not its answer.
PLAIN = "Question: {}\n\nAnswer:"
NEXT = "\n\nQuestion:"
#: Tokens without which there is no answer worth grading.
FEWEST_TOKENS = 16
#: A turn: who speaks (user or assistant), and what.
Turn = tuple[str, str]


@dataclass(frozen=True)
class Answer:
    """One answer to one question, as it is kept."""

    question: str
    sample: int
    text: str
    tokens: int
    stop_reason: str
    #: Of the whole answer under the model, where the decoder knows it.
    log_prob: float | None
    #: Its share of the time of its batch.
    seconds: float
    cost: Cost = field(default_factory=Cost)
    #: Of particle methods: how often they resampled, and the effective sample size at the end as a share.
    resample_count: int | None = None
    final_ess: float | None = None
    #: Their whole course, step by step: levels, effective sizes, constants, whose copy everyone is, weights at the end.
    particles: list[dict[str, Any]] | None = None

    @property
    def row(self) -> str:
        return f"{self.question}/{self.sample}"

    @classmethod
    def of(cls, question: str, sample: int, text: str, drawn: Completion, seconds: float) -> Answer:
        """What a decoder drew, as it is kept; `text` is what of it counts."""
        seen = [entry for entry in drawn.trace if "ess" in entry]
        return cls(
            question,
            sample,
            text,
            len(drawn.tokens),
            drawn.stop_reason,
            drawn.log_prob,
            seconds,
            drawn.cost,
            resample_count=sum(bool(entry.get("resampled", True)) for entry in seen) if seen else None,
            final_ess=float(seen[-1]["ess"]) if seen else None,
            particles=[{k: _short(v) for k, v in entry.items() if k != "texts"} for entry in seen] or None,
        )

    def facts(self) -> dict[str, Any]:
        """What a sample says of it besides its text."""
        spent = {"calls": self.cost.target_calls, "positions": self.cost.target_positions}
        found = {"tokens": self.tokens, "stop_reason": self.stop_reason, "log_prob": self.log_prob, **spent,
                 "resample_count": self.resample_count, "final_ess": self.final_ess,
                 "particles": self.particles}  # fmt: skip
        return {k: v for k, v in found.items() if v is not None}

    def as_line(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_line(cls, line: Mapping[str, Any]) -> Answer:
        return cls(**{k: v for k, v in line.items() if k in cls.__dataclass_fields__} | {"cost": Cost(**line["cost"])})


def _short(value: Any) -> Any:
    """Numbers with six digits, which is what a drawing needs."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return [_short(v) for v in value] if isinstance(value, list) else value


def prompt(target: Target, turns: Sequence[Turn]) -> list[int]:
    """The tokens before the answer to a talk that ends with the user's turn.

    Raises:
        UnsupportedError: the target reads no text.
    """
    if "text" not in target.capabilities:
        raise UnsupportedError("text", f"{target.name} has no tokenizer")
    tokens = target.chat([{"role": who, "content": text} for who, text in turns])
    if tokens is not None:
        return tokens
    parts = [PLAIN.format(text) if who == "user" else f" {text.strip()}\n\n" for who, text in turns]
    return target.encode("".join(parts))


def protocol(target: Target) -> str:
    """How prompts were made, for the record."""
    return "plain" if target.chat([{"role": "user", "content": "?"}]) is None else "chat template"


class Asker(Protocol):
    """Who asks: a cell, or the arena."""

    decoder: Decoder
    target: Target
    seed: int
    lines: Lines

    def until_late(self, units: Sequence[Sequence[str]]) -> Iterator[Sequence[str]]:
        """The batches, as long as there is time."""

    def note(self, text: str) -> None:
        """Something that a reader should know."""


def ask(
    cell: Asker, prompts: Mapping[str, Sequence[int]], *, tokens: int, samples: int = 1, rows: int = 8
) -> Iterator[list[Answer]]:
    """All answers to one question after the other, in the order of the prompts.

    Args:
        prompts: by the name of the question.
        tokens: the most that an answer may have.
        samples: answers per question; greedy search gives one, the others would be the same.
        rows: answers that are drawn side by side.

    Raises:
        UnsupportedError: the model's context is too short for the prompts.
    """
    room = cell.target.context_length - max(map(len, prompts.values()), default=0)
    if room < FEWEST_TOKENS:
        raise UnsupportedError(
            f"a context of {cell.target.context_length - room + FEWEST_TOKENS} tokens",
            f"{cell.target.name} reads {cell.target.context_length}",
        )
    if room < tokens:
        cell.note(f"answers end after {room} tokens, not {tokens}: the model reads {cell.target.context_length}")
    limits = Limits(min(tokens, room))
    if cell.decoder.claim == "greedy-exact":
        samples = 1
    names = list(prompts)
    each = max(1, rows // samples)
    batches = [names[i : i + each] for i in range(0, len(names), each)]
    for batch in cell.until_late(batches):
        found = _known(cell, prompts, batch, samples)
        if found:
            cell.note("an earlier attempt drew some of the answers: their seconds are of another process")
        else:
            found = _drawn(cell, prompts, batch, limits, samples)
        for name in batch:
            yield [a for a in found if a.question == name]


def _known(cell: Asker, prompts: Mapping[str, Sequence[int]], batch: Sequence[str], samples: int) -> list[Answer]:
    """What an earlier attempt has drawn of a batch; nothing if any of it is missing, or answers another prompt."""
    lines = [(name, cell.lines.earlier.get(f"{name}/{i}")) for name in batch for i in range(samples)]
    found = [
        Answer.from_line(line)
        for name, line in lines
        if line is not None and line.get("prompt") == cell.target.decode(prompts[name])
    ]
    return found if len(found) == len(lines) else []


def _drawn(
    cell: Asker, prompts: Mapping[str, Sequence[int]], batch: Sequence[str], limits: Limits, samples: int
) -> list[Answer]:
    keys = [f"{name}/{i}" for name in batch for i in range(samples)]
    plain = protocol(cell.target) == "plain"
    begun = time.perf_counter()
    drawn = cell.decoder.generate(
        cell.target,
        [list(prompts[name]) for name in batch for _ in range(samples)],
        limits,
        RowRandom(cell.seed, keys),
    )
    each = (time.perf_counter() - begun) / len(keys)
    found = []
    for key, one in zip(keys, drawn, strict=True):
        name, _, number = key.rpartition("/")
        text = one.text.partition(NEXT)[0] if plain else one.text
        found.append(Answer.of(name, int(number), text, one, each))
        cell.lines.write(key, **found[-1].as_line(), prompt=cell.target.decode(prompts[name]))
    return found


def costs(answers: Sequence[Answer], target: Target) -> dict[str, Estimate | Observations]:
    """What an answer cost, so that decoders can be compared at equal any-of-these; drafts are counted apart."""

    def per_question(values: Sequence[float]) -> Observations:
        return Observations.grouped([a.question for a in answers], values)

    found: dict[str, Estimate | Observations] = {
        "answer_tokens": per_question([a.tokens for a in answers]),
        # Answers of one batch take the same time, so they are no units of their own.
        "answer_seconds": Estimate(sum(a.seconds for a in answers) / len(answers), n=len(answers)),
    }
    if all(a.cost.target_calls for a in answers):  # a decoder that does not tell has not computed for nothing
        found["answer_calls"] = per_question([a.cost.target_calls for a in answers])
        found["answer_positions"] = per_question([a.cost.target_positions for a in answers])
        each = 2.0 * target.parameters
        if not any(a.cost.draft_calls for a in answers):  # what a drafter computes is not known here
            found["answer_flops"] = per_question([each * a.cost.target_positions for a in answers])
    return found
