"""HTTP to a server that speaks the OpenAI protocol: one request, its tries, its stream. Knows no engine by name.

Its messages do not say where the server is: they go into rows, which are published.

A request whose answer was lost is sent again: what is asked for is drawn by a seed of its own and counted by whoever
asks, so that nothing counts twice. A server that stays away is told apart from one that refuses.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from decodathlon.harness.errors import DecodathlonError, SpecError

#: Where the key of a server is looked for. It goes into no record.
KEYS = ("DECODATHLON_MODEL_KEY", "OPENAI_API_KEY")
#: Answers of a server that are worth another try: it is busy, restarting, or something before it is.
AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
#: Tries per request, seconds before the second one (doubled each time, up to the most), seconds that one may take.
TRIES, PAUSE, LONGEST_PAUSE, TIMEOUT = 6, 0.5, 30.0, 600.0
#: Characters of a server's own words that an error repeats.
QUOTED = 300


class EngineError(DecodathlonError):
    """A server refused a request: sent again it would refuse it again."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(_without_key(message))
        self.code = code


class EngineDownError(EngineError):
    """A server did not answer, however often it was asked."""


def key() -> str:
    """Of the server, from the environment; empty where there is none."""
    return next((os.environ[name].strip() for name in KEYS if os.environ.get(name, "").strip()), "")


def _without_key(text: str) -> str:
    """What a server says may hold what it was sent."""
    secret = key()
    return text.replace(secret, "[key]") if secret else text


def check_url(option: str, url: str) -> None:
    """
    Raises:
        SpecError: it is no address of a server.
    """
    form = "http://HOST:PORT/v1"
    if not re.match(r"https?://[^/\s]+", url) or re.search(r"\s", url):
        raise SpecError(f"{option} {url}: an address begins with http:// or https://, as {form}")
    parts = urllib.parse.urlsplit(url)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise SpecError(f"{option}: an address is {form} alone; a key belongs into {' or '.join(KEYS)}")
    try:
        port = parts.port
    except ValueError:
        port = -1
    if port == -1 or not parts.hostname:
        raise SpecError(f"{option} {url}: its port is no number from 1 to 65535; an address is {form}")
    if not key().isprintable():
        raise SpecError(f"the key in {' or '.join(KEYS)} has letters that no key has")


@dataclass(frozen=True)
class Chunk:
    """One event of a stream: seconds since it was asked for, and what it says."""

    seconds: float
    content: dict[str, Any]


@dataclass(frozen=True)
class Client:
    """Speaks to one server; may be used from several threads."""

    #: With its /v1.
    url: str
    timeout: float = TIMEOUT
    tries: int = TRIES
    pause: float = PAUSE

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request, asked for again where it was lost.

        Raises:
            EngineError: the server refuses it.
            EngineDownError: there is no answer.
        """
        found: dict[str, Any] = self._insist("POST", path, body)
        return found

    def get(self, path: str, *, tries: int | None = None) -> Any:
        """As `post`. A path that begins with a slash is one of the server, not of its /v1."""
        return self._insist("GET", path, None, tries)

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[Chunk]:
        """The events of a streamed answer, as they come; one try, for what was said cannot be unsaid.

        Raises:
            EngineError: the server refuses, or says in the middle that it failed.
            EngineDownError: it breaks off before its end.
        """
        connection = self._connect()
        try:
            connection.connect()  # before the clock: real clients keep theirs
            begun = time.perf_counter()
            response = self._ask(connection, "POST", path, body)
            ended = False
            for line in response:
                text = line.decode("utf-8", "replace").strip()
                if not text.startswith("data:"):  # comments that keep a connection alive, names of events
                    continue
                text = text.removeprefix("data:").strip()
                if text == "[DONE]":
                    ended = True
                    break
                event = _event(text)
                ended = ended or any(choice.get("finish_reason") for choice in event.get("choices") or ())
                yield Chunk(time.perf_counter() - begun, event)
            if not ended:
                raise EngineDownError("the server broke off in the middle of an answer")
        except (OSError, http.client.HTTPException) as error:
            raise EngineDownError(f"the server broke off in the middle of an answer: {_name(error)}") from None
        finally:
            connection.close()

    def _insist(self, method: str, path: str, body: Mapping[str, Any] | None, tries: int | None = None) -> Any:
        reason, wait, code = "", self.pause, 0
        tries = tries or self.tries
        for number in range(tries):
            if number:
                time.sleep(wait * (1 + random.random() / 4))  # those that were refused together do not come back so
                wait = min(2 * wait, LONGEST_PAUSE)
            connection = self._connect()
            try:
                answer = self._ask(connection, method, path, body).read()
                return json.loads(answer)
            except EngineDownError as error:
                reason, code = str(error), error.code
                wait = max(wait, min(getattr(error, "after", 0.0), LONGEST_PAUSE))
            except (OSError, http.client.HTTPException) as error:  # down, slow, or half an answer
                reason = _name(error)
            except ValueError:
                reason = "its answer is no JSON"
            finally:
                connection.close()
        raise EngineDownError(f"the server gave no answer in {tries} tries; the last: {reason}", code)

    def _connect(self) -> http.client.HTTPConnection:
        parts = urllib.parse.urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        return kind(parts.netloc, timeout=self.timeout)

    def _ask(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: Mapping[str, Any] | None
    ) -> http.client.HTTPResponse:
        """The response of a server that accepts; its redirections are followed by nobody, for a key goes along."""
        headers = {"User-Agent": "decodathlon", "Accept": "application/json, text/event-stream"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if secret := key():
            headers["Authorization"] = f"Bearer {secret}"
        base = urllib.parse.urlsplit(self.url).path.rstrip("/")
        place = path if path.startswith("/") else f"{base}/{path}"
        connection.request(method, place, None if body is None else json.dumps(body).encode(), headers)
        response = connection.getresponse()
        if response.status < 300:
            return response
        words = _words(response.read(1 << 16)).replace(urllib.parse.urlsplit(self.url).netloc, "[server]")
        told = f"the server answers {response.status} to {place}: {words}"
        if response.status not in AGAIN:
            raise EngineError(told, response.status)
        error = EngineDownError(told, response.status)
        after = response.headers.get("Retry-After", "")
        error.after = float(after) if after.isdigit() else 0.0  # type: ignore[attr-defined]
        raise error


def _event(text: str) -> dict[str, Any]:
    """
    Raises:
        EngineError: it says that the answer failed, or it is no JSON.
    """
    try:
        event = json.loads(text)
    except ValueError:
        raise EngineError(f"an event of the stream is no JSON: {text[:QUOTED]}") from None
    if not isinstance(event, dict) or "error" in event:
        raise EngineError(f"the server failed in the middle of an answer: {_shown(event)}")
    return event


def _words(body: bytes) -> str:
    """What an error's body says: OpenAI's form, a flat one, FastAPI's, or text."""
    text = body.decode("utf-8", "replace").strip()
    try:
        return _shown(json.loads(text))
    except ValueError:
        return _without_key(text)[:QUOTED] or "nothing"


def _shown(said: Any) -> str:
    for part in ("error", "message", "detail"):
        if isinstance(said, dict) and said.get(part):
            return _shown(said[part])
    text = said if isinstance(said, str) else json.dumps(said)
    return _without_key(text)[:QUOTED]


def _name(error: BaseException) -> str:
    return getattr(error, "strerror", None) or type(error).__name__
