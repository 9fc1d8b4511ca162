"""Rewards: what a sharpened decoder values in an answer. `@reward` registers one; three come with the harness.

A reward is a function from answers to numbers. In a spec string it is a name, with an argument behind a colon where it
takes one: `log-power`, `length:20`, `model:FOLDER`.
"""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from decodathlon.harness import law
from decodathlon.harness.decoder import Decoder
from decodathlon.harness.errors import DecodathlonError, MissingError, RewardError, SpecError, UnsupportedError
from decodathlon.harness.lazy import torch
from decodathlon.harness.registry import registry

if TYPE_CHECKING:
    from torch import Tensor

    from decodathlon.harness.targets.base import Target

#: Answers that a reward model reads at once.
BATCH = 16
#: Stands for what a user says, where it is looked up what a template puts around it.
_SAID = "<<said>>"


@dataclass(frozen=True)
class Answer:
    """An answer as a reward sees it."""

    prompt: Sequence[int]
    #: Its stop token included.
    tokens: Sequence[int]
    #: Natural log-probability under the law that the decoder draws answers from.
    log_prob: float
    target: Target = field(repr=False)

    @cached_property
    def text(self) -> str:
        return self.target.decode(self.tokens)

    @cached_property
    def prompt_text(self) -> str:
        return self.target.decode(self.prompt)

    @cached_property
    def problem(self) -> str:
        """What the user said, without what the model's chat template puts around it."""
        around = self.target.chat([{"role": "user", "content": _SAID}])
        before, said, behind = self.target.decode(around or []).partition(_SAID)
        text = self.prompt_text
        framed = bool(said) and text.startswith(before) and text.endswith(behind)
        return text[len(before) : len(text) - len(behind)] if framed else text


@dataclass(frozen=True)
class Reward:
    """A reward as a spec string names it."""

    spec: str
    function: Callable[[Sequence[Answer]], Sequence[float]]
    #: What the target must have, such as `text`.
    needs: frozenset[str]
    #: The file that defines it, and what stood behind the colon.
    defined: Path
    argument: Any = None

    @property
    def sources(self) -> tuple[Path, ...]:
        """What its values follow from: the file that defines it; the program, or files of the folder, that it names."""
        words = self.argument if isinstance(self.argument, tuple) else (self.argument,)
        named = [Path(str(word).rpartition("@")[0] or str(word)) for word in words]
        found = [f for path in named for f in ([path] if path.is_file() else path.glob("*") if path.is_dir() else ())]
        return (self.defined, *sorted(f for f in found if f.is_file()))

    def check(self, target: Target) -> None:
        """
        Raises:
            UnsupportedError: the target lacks what the reward reads.
        """
        for capability in sorted(self.needs - target.capabilities):
            raise UnsupportedError(capability, f"the reward {self.spec} reads it, and {target.name} has none")

    def __call__(self, answers: Sequence[Answer]) -> Tensor:
        """(len(answers),) float64.

        Raises:
            RewardError: the reward raised, or gave another number of values, or one that is not finite.
        """
        try:
            found = self.function(answers)
            if not isinstance(found, Iterable):
                raise TypeError(f"it gave {type(found).__name__}; it must give one number per answer")
            values = [float(x) for x in found]
        except DecodathlonError:
            raise
        except Exception as error:
            raise RewardError(f"reward {self.spec} raised {type(error).__name__}: {error}") from error
        if len(values) != len(answers):
            raise RewardError(f"reward {self.spec} gave {len(values)} values for {len(answers)} answers")
        for value, answer in zip(values, answers, strict=True):
            if not math.isfinite(value):
                raise RewardError(
                    f"reward {self.spec} is {value} for the tokens {list(answer.tokens)[:20]}; it must be finite: for "
                    "what is forbidden return a number far below the others"
                )
        return torch.tensor(values, dtype=torch.float64)


F = TypeVar("F", bound=Callable[..., Sequence[float]])


@dataclass(frozen=True)
class Registered:
    """A reward in the registry."""

    function: Callable[..., Sequence[float]]
    argument: Callable[[str], Any] | None
    needs: frozenset[str]

    @property
    def source(self) -> Path:
        return Path(inspect.getfile(self.function)).resolve()

    @property
    def argument_name(self) -> str:
        """What the function calls what stands behind the colon."""
        return list(inspect.signature(self.function).parameters)[1].upper()


def reward(name: str, *, needs: Sequence[str] = (), argument: Callable[[str], Any] | None = None) -> Callable[[F], F]:
    """Register a function from a list of answers to as many numbers.

    Args:
        needs: what the target must have, such as `text` for what reads `Answer.text`.
        argument: makes the function's second parameter of the text behind the colon; raises ValueError if it cannot.
            Without it the reward takes none.

    Raises:
        SpecError: the name is taken or malformed, or the function takes other parameters than these.
    """

    def register(function: F) -> F:
        wanted = 1 if argument is None else 2
        if len(inspect.signature(function).parameters) != wanted:
            raise SpecError(f"reward {name!r}: its function takes {'answers' if wanted == 1 else 'answers, argument'}")
        if isinstance(needs, str):
            raise SpecError(f"reward {name!r}: needs is a list of capabilities, such as ['text']")
        registry.add("reward", name, Registered(function, argument, frozenset(needs)), inspect.getfile(function))
        return function

    return register


def build(text: str) -> Reward:
    """The reward that `name` or `name:argument` stands for.

    Raises:
        SpecError: there is no such reward, or it takes an argument and has none, or the other way round.
    """
    name, colon, argument = text.partition(":")
    found: Registered = registry.get("reward", name)
    if found.argument is None:
        if colon:
            raise SpecError(f"reward {name!r} takes no argument, and got {argument!r}")
        return Reward(text, found.function, found.needs, found.source)
    if not argument:
        raise SpecError(f"reward {name!r} takes an argument: {name}:VALUE")
    try:
        bound = found.argument(argument)
    except ValueError as error:
        raise SpecError(f"reward {text}: {error}") from None
    return Reward(text, lambda answers: found.function(answers, bound), found.needs, found.source, bound)


class Rewarded(Decoder):
    """A decoder that draws answers and values them by a reward."""

    #: Divides the logits of the proposals.
    temperature: float

    #: As `build` reads it.
    reward: str

    def __post_init__(self) -> None:
        build(self.reward)

    def check(self, target: Target) -> None:
        super().check(target)
        build(self.reward).check(target)

    def sources(self) -> list[Path]:
        return sorted({*super().sources(), *build(self.reward).sources})

    def shape(self, logits: Tensor) -> Tensor:
        """(N, V) logits to (N, V) log-probabilities: the law that proposals are drawn from, token by token."""
        return law.process(logits, temperature=self.temperature)


class Tilted(Rewarded):
    """A decoder whose law is known up to a constant: that of its proposals, tilted by what a subclass states."""

    @abstractmethod
    def log_tilt(self, answers: Sequence[Answer]) -> Tensor:
        """(len(answers),) what the log of the decoder's law has at whole answers beyond that of its proposals."""


# --- The harness's own -------------------------------------------------------------------------------------------


@reward("log-power")
def log_power(answers: Sequence[Answer]) -> list[float]:
    """The answer's own log-probability: p^(1/beta) where the law has no other factor, p^(1 + 1/beta) where it has p."""
    return [a.log_prob for a in answers]


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{text!r} is not a whole number from 1 on")
    return int(text)


@reward("length", argument=_whole)
def length(answers: Sequence[Answer], goal: int) -> list[float]:
    """Minus how many tokens the answer is away from a length; its stop token counts."""
    return [-float(abs(len(a.tokens) - goal)) for a in answers]


def folder_or_hub_id(where: str) -> str:
    whole = Path(where).expanduser()
    folder, at, label = (str(whole), "", "") if whole.is_dir() else _split(where)
    path = Path(folder).expanduser()
    if folder.startswith((".", "/", "~")) and not path.is_dir():
        raise ValueError(f"there is no folder {folder}")
    return (str(path) if path.is_dir() else folder) + at + label


def _split(where: str) -> tuple[str, str, str]:
    """A folder or hub id, and the label behind the last `@`."""
    folder, at, label = where.rpartition("@")
    return (folder, at, label) if at else (label, "", "")


@reward("model", needs=["text"], argument=folder_or_hub_id)
def model(answers: Sequence[Answer], where: str) -> list[float]:
    """A sequence-classification model from a folder or the hub, its one logit; of several labels the one behind `@`."""
    folder, _, label = (where, "", "") if Path(where).is_dir() else _split(where)
    stamp = max((f.stat().st_mtime_ns for f in Path(folder).glob("*")), default=0)  # it may be written anew
    found: list[float] = []
    with torch.inference_mode():
        for start in range(0, len(answers), BATCH):
            judge = _judge(folder, label, str(answers[0].target.device), stamp)
            found += judge(answers[start : start + BATCH])
    return found


@lru_cache(maxsize=2)
def _judge(folder: str, label: str, device: str, stamp: int) -> Callable[[Sequence[Answer]], list[float]]:
    import transformers

    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
        judge = transformers.AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise MissingError(f"reward model:{folder} cannot be loaded: {first}") from error
    judge = judge.to(device).eval()
    labels = {str(name): int(number) for number, name in judge.config.id2label.items()}
    if (len(labels) > 1 or label) and label not in labels:
        raise SpecError(f"reward model:{folder} has the labels {', '.join(labels)}; name one: model:{folder}@LABEL")

    def values(answers: Sequence[Answer]) -> list[float]:
        if tokenizer.chat_template:
            turns = [
                [{"role": "user", "content": a.prompt_text}, {"role": "assistant", "content": a.text}] for a in answers
            ]
            texts = [tokenizer.apply_chat_template(t, tokenize=False) for t in turns]
        else:
            texts = [a.prompt_text + a.text for a in answers]
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        judge.config.pad_token_id = tokenizer.pad_token_id
        own = not tokenizer.chat_template  # a template writes the special tokens itself
        read = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, add_special_tokens=own)
        logits = judge(**read.to(device)).logits.double()
        chosen = logits[:, 0] if len(labels) == 1 else logits.log_softmax(-1)[:, labels[label]]
        return [float(x) for x in chosen]

    return values
