"""Judges of open answers: any server that speaks the OpenAI chat protocol, or a model of one's own.

A judge's verdict is a number in double brackets. What cannot be read, a refusal, a server that stays away after some
tries: each is an abstention, counted and never a zero. Keys come from the environment and go into no record.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from decodathlon.harness.errors import MissingError, SpecError

#: Where the key of a server is looked for.
KEYS = ("DECODATHLON_JUDGE_KEY", "OPENAI_API_KEY")
OPENAI_URL = "https://api.openai.com/v1"
#: Tries per question, seconds between them (doubled each time), and the most that one may take.
TRIES, PAUSE, TIMEOUT = 4, 1.0, 120.0
#: Answers of a server that are worth another try.
AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}
#: What a judge may write.
MOST_TOKENS = 1024
#: Categories in which a reference answer helps.
GUIDED = frozenset({"math", "reasoning", "coding"})
Verdict = Literal["first", "second", "tie"]
Turn = tuple[str, str]

_SINGLE = """You grade the answer of an assistant. Judge only what it says: whether it does what was asked, \
is correct, is complete and is clear. Its length alone is neither a merit nor a fault.

{talk}
{reference}
Explain in a few sentences what is good and what is wrong in the assistant's {which}answer. Then grade it with a \
whole number N from 1 (useless) to 10 (could hardly be better), on a last line of exactly this form: Grade: [[N]]"""
_PAIR = """You compare the answers of two assistants to the same question. Judge only what they say: whether they do \
what was asked, are correct, are complete and are clear. Neither their order nor their length may count.

{question}
{reference}
### Assistant A
{first}

### Assistant B
{second}

Explain the differences that matter in a few sentences. Then decide, on a last line of exactly one of these forms: \
Verdict: [[A]] or Verdict: [[B]] or Verdict: [[tie]]"""
_GRADE = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")
_CHOICE = re.compile(r"\[\[\s*(A|B|tie|C)\s*\]\]", re.IGNORECASE)
#: Shorter keys are none, and would take letters out of verdicts.
SHORTEST_KEY = 8


class Reply(NamedTuple):
    """What a judge wrote; nothing and a reason where it abstained."""

    text: str
    reason: str = ""


class Judge(NamedTuple):
    """A judge as the options name it, and how it is asked."""

    name: str
    ask: Callable[[str], Reply]


def grade(text: str) -> float | None:
    """The grade from 1 to 10 that a reply states; None where it states none, or it is not clear which."""
    found = _stated(text, "grade", _GRADE)
    return float(found) if found is not None and 1 <= float(found) <= 10 else None


def choice(text: str) -> Verdict | None:
    """The choice that a reply states; None where it states none, or it is not clear which."""
    found = _stated(text, "verdict", _CHOICE)
    if found is None:
        return None
    return {"a": "first", "b": "second"}.get(found.lower(), "tie")  # type: ignore[return-value]


def _stated(text: str, word: str, pattern: re.Pattern[str]) -> str | None:
    """What stands behind the word in the last line that has it; without the word what its last line with brackets says.

    A line that says several things, such as our own words repeated, says nothing.
    """
    lines = [line for line in text.splitlines() if pattern.search(line)]
    after = re.compile(rf"{word}\W{{0,6}}{pattern.pattern}", re.IGNORECASE)
    for asked in (after, pattern):
        for line in reversed(lines):
            said = {x.lower() for x in asked.findall(line)}
            if said:
                return said.pop() if len(said) == 1 else None
    return None


def single(turns: Sequence[Turn], reference: Sequence[str]) -> str:
    """The prompt that asks for a grade of the last answer.

    Args:
        turns: user and assistant in turn; the last is the answer.
        reference: right answers to each question, or nothing.
    """
    talk = "\n\n".join(f"### {'User' if who == 'user' else 'Assistant'}\n{text}" for who, text in turns)
    which = "last " if len(turns) > 2 else ""
    return _SINGLE.format(talk=talk, reference=_reference(reference[: len(turns) // 2]), which=which)


def pair(questions: Sequence[str], first: str, second: str, reference: Sequence[str]) -> str:
    """The prompt that asks which of two answers to the same question is better."""
    question = "\n\n".join(f"### User\n{text}" for text in questions)
    return _PAIR.format(question=question, reference=_reference(reference), first=first, second=second)


def _reference(answers: Sequence[str]) -> str:
    if not answers:
        return ""
    return "\n### Right answer, for the judge alone\n" + "\n\n".join(answers) + "\n"


class Compared(NamedTuple):
    """What a judge says of two answers, asked in both orders."""

    #: 1 if it prefers `mine` in both orders, 0 if `other`, one half for a tie; None where it abstains.
    points: float | None
    #: Whether it preferred the same place twice, which says nothing of the answers: that is a tie.
    by_place: bool
    replies: tuple[Reply, ...]


def compared(judge: Judge, questions: Sequence[str], mine: str, other: str, reference: Sequence[str]) -> Compared:
    """Ask which of two answers is better, in both orders; an abstention in one is one of the pair."""
    points, said, replies = [], [], []
    for first, second, me in ((mine, other, "first"), (other, mine, "second")):
        replies.append(judge.ask(pair(questions, first, second, reference)))
        said.append(choice(replies[-1].text))
        if said[-1] is None:
            return Compared(None, False, tuple(replies))
        points.append(0.5 if said[-1] == "tie" else float(said[-1] == me))
    by_place = said[0] == said[1] != "tie"
    return Compared(1.0 if min(points) == 1 else 0.0 if max(points) == 0 else 0.5, by_place, tuple(replies))


def check(spec: str, url: str) -> None:
    """
    Raises:
        SpecError: the judge is not of a known form, or the address is none.
        MissingError: its key is not in the environment.
    """
    kind, _, name = spec.partition(":")
    if spec != "none" and (kind not in ("openai", "local") or not name):
        raise SpecError(f"--judge {spec}: it is none, openai:MODEL or local:MODEL")
    if url and kind != "openai":
        raise SpecError("--judge-url is the address of a server; it goes with --judge openai:MODEL")
    if url and not re.match(r"https?://[^/]", url):
        raise SpecError(f"--judge-url {url}: an address begins with http:// or https://")
    if kind == "openai" and not url and not _key():
        raise MissingError(f"--judge {spec} asks {OPENAI_URL}, which needs a key: set {' or '.join(KEYS)}")
    if kind == "local":
        from decodathlon.harness import models

        models.resolve(name)


def label(spec: str, url: str) -> str:
    """What a row calls its judge: servers at different addresses may call other models by the same name."""
    return f"{spec}@{hashlib.sha256(url.rstrip('/').encode()).hexdigest()[:6]}" if url else spec


def build(spec: str, url: str, *, device: str, dtype: str, say: Callable[[str], None]) -> Judge | None:
    """The judge that the options name, or None."""
    kind, _, name = spec.partition(":")
    if kind == "openai":
        return Judge(spec, Server(url or OPENAI_URL, name).ask)
    if kind == "local":
        return Judge(spec, _Local(name, device, dtype, say).ask)
    return None


def _key() -> str:
    return next((os.environ[name] for name in KEYS if os.environ.get(name)), "")


class _Stay(urllib.request.HTTPRedirectHandler):
    """A key goes to the server that was named, and to no other."""

    def redirect_request(self, *values: Any) -> None:
        return None


_DIRECT = urllib.request.build_opener(_Stay)


@dataclass(frozen=True)
class Server:
    """A server that speaks the OpenAI chat protocol."""

    url: str
    model: str
    timeout: float = TIMEOUT
    pause: float = PAUSE

    def ask(self, prompt: str) -> Reply:
        """One question at temperature 0; an abstention after `TRIES` tries."""
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0,
                "max_tokens": MOST_TOKENS}  # fmt: skip
        reason = ""
        for number in range(TRIES):
            if number:
                time.sleep(self.pause * 2 ** (number - 1))
            try:
                return self._read(self._post(body))
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}"
                if error.code not in AGAIN:
                    break
            except http.client.HTTPException as error:  # half a reply, or none that is HTTP
                reason = type(error).__name__
            except (OSError, TimeoutError) as error:  # down, or slow
                reason = type(getattr(error, "reason", error)).__name__
            except ValueError:
                reason = "no JSON"
        return Reply("", reason)

    def _post(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json", "User-Agent": "decodathlon"}
        key = _key()
        if key:
            headers["Authorization"] = f"Bearer {key}"
        address = self.url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        with _DIRECT.open(request, timeout=self.timeout) as answer:
            return json.loads(answer.read())

    @staticmethod
    def _read(reply: Any) -> Reply:
        try:
            message = reply["choices"][0]["message"]
            text = message.get("content") or ""
        except (KeyError, IndexError, TypeError, AttributeError):
            return Reply("", "no choice")
        if not isinstance(text, str) or not text.strip():
            return Reply("", "refusal" if isinstance(message, dict) and message.get("refusal") else "empty")
        key = _key()
        return Reply(text.replace(key, "[key]") if len(key) >= SHORTEST_KEY else text)  # it may echo what it was sent


class _Local:
    """A model of one's own, loaded at the first question, that answers by greedy search."""

    def __init__(self, name: str, device: str, dtype: str, say: Callable[[str], None]) -> None:
        self._name, self._device, self._dtype, self._say = name, device, dtype, say
        self._target: Any = None

    def ask(self, prompt: str) -> Reply:
        from decodathlon.harness import decoder as decoders
        from decodathlon.harness import models
        from decodathlon.harness.decoder import Limits
        from decodathlon.harness.measure import asking
        from decodathlon.harness.randomness import RowRandom

        if self._target is None:
            model = models.resolve(self._name)
            self._say(f"loading the judge {model.name}")
            self._target = models.load(model, device=self._device, dtype=self._dtype, say=self._say)
        tokens = asking.prompt(self._target, [("user", prompt)])
        room = self._target.context_length - len(tokens)
        if room < asking.FEWEST_TOKENS:
            return Reply("", "too long")
        limits = Limits(min(MOST_TOKENS, room))
        (answer,) = decoders.build("greedy").generate(self._target, [tokens], limits, RowRandom(0, ["judge"]))
        plain = asking.protocol(self._target) == "plain"
        return Reply(answer.text.partition(asking.NEXT)[0] if plain else answer.text)
