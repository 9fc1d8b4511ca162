"""A model behind a server that speaks the OpenAI protocol: it writes answers, and shows no logits.

What decoders call tokens are pieces of text here, numbered as they come: a whole talk (the prompt), and of an answer
the tokens as the server tells them, or where it tells none its text, with empty pieces so that their number is right.
The server renders talks by its own template; with `tokenizer=` they are rendered here and sent as text.

Every answer is kept as it comes (`remember`), so that a server that dies costs nothing that it has said.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from decodathlon.harness.engines.client import Client, EngineError
from decodathlon.harness.engines.dialects import Engine, Law
from decodathlon.harness.errors import UnsupportedError
from decodathlon.harness.results.lines import Lines
from decodathlon.harness.targets.base import Context, Target

#: Who speaks, and what.
Turn = tuple[str, str]
#: Renders a talk as the text that the model reads, up to where its answer begins; `bare` without what a tokenizer puts
#: before every text.
Template = Callable[[Sequence[Turn], bool], str]
#: What a context may hold where the server does not tell: it will refuse what is too long.
UNTOLD = 1 << 20


class _Elsewhere:
    """Stands for a device that we do not see."""

    type = "server"

    def __init__(self, label: str) -> None:
        self._label = label

    def __str__(self) -> str:
        return f"server ({self._label})"


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One answer that is wanted, or the rest of one."""

    prompt: Sequence[int]
    #: Pieces of the answer that are there already.
    begun: Sequence[int] = ()
    #: The most new tokens.
    tokens: int
    law: Law
    seed: int
    #: Go on past the end of the text, so that every answer has as many tokens.
    ignore_eos: bool = False


@dataclass(frozen=True)
class Written:
    """What the server wrote."""

    #: New pieces, the end of the text among them where it ended.
    tokens: list[int]
    #: Natural-log probability of each piece under the law that the server states; None where it tells none.
    log_probs: list[float] | None
    ended: bool
    #: Tokens that the server has read for it.
    read: int = 0


@dataclass
class Pieces:
    """Texts and talks by number."""

    _known: list[str | tuple[Turn, ...]] = field(default_factory=list)
    _numbers: dict[str | tuple[Turn, ...], int] = field(default_factory=dict)

    def number(self, piece: str | tuple[Turn, ...]) -> int:
        if piece not in self._numbers:
            self._numbers[piece] = len(self._known)
            self._known.append(piece)
        return self._numbers[piece]

    def __getitem__(self, number: int) -> str | tuple[Turn, ...]:
        return self._known[number]


class RemoteTarget(Target):
    """Asks a server for answers, several at once."""

    dtype = "unstated"
    vocab_size = 1 << 31

    def __init__(
        self,
        client: Client,
        model: str,
        engine: Engine,
        *,
        name: str,
        hardware: str = "",
        context: int = 0,
        concurrency: int = 8,
        template: Template | None = None,
    ) -> None:
        """
        Args:
            model: what the server calls it.
            name: what rows call it.
            hardware: as the user says, for a server tells none.
            context: tokens that it reads; 0 believes the server.
            concurrency: answers that are asked for at once.
            template: renders talks here; the server then gets text.
        """
        self.name = name
        self.client, self.engine, self._model, self._template = client, engine, model, template
        self.context_length = context or engine.context or UNTOLD
        self.concurrency = concurrency
        self.processor = f"{hardware or 'hardware unstated'}, {engine.label}"
        self.device = _Elsewhere(self.processor)
        self.capabilities = frozenset({"text", "server"})
        #: Parts of a law that the server is seen to follow; whether its log-probabilities are of the model's own law.
        self.parts: frozenset[str] = frozenset()
        self.raw_log_probs = engine.dialect.raw_log_probs
        self.pieces = Pieces()
        self.end = self.pieces.number("")
        self.stop_tokens = frozenset({self.end})
        #: An empty piece that ends nothing: where the server counts tokens that it does not show.
        self.blank = self.pieces.number((("", ""),))
        self._lines = Lines(None)
        self.revision = engine.label

    @property
    def weights_fingerprint(self) -> str:
        """What can be known of which model answers: its name, its engine, how much it reads."""
        known = f"{self._model} {self.engine.label} {self.engine.context} {self.engine.told}"
        return hashlib.sha256(known.encode()).hexdigest()[:32]

    def remember(self, lines: Lines) -> None:
        """Keep every answer in these lines, and take from them what an earlier attempt was answered."""
        self._lines = lines

    def open(
        self, prompts: Sequence[Sequence[int]], *, capacity: int | None = None, hidden: Sequence[int] = ()
    ) -> Context:
        raise UnsupportedError("logits", f"{self.name} is a server, which shows none")

    # --- Text and pieces ---------------------------------------------------------------------------------------

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        return [self.pieces.number(text)] if text else []

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(_shown(self.pieces[token]) for token in tokens)

    def chat(self, messages: Sequence[Mapping[str, str]], *, thinking: bool = True) -> list[int] | None:
        if "chat" not in self.parts and self._template is None:
            return None
        return [self.pieces.number(tuple((m["role"], m["content"]) for m in messages))]

    # --- Answers -----------------------------------------------------------------------------------------------

    def write(self, asks: Sequence[Ask]) -> list[Written]:
        """All of them, in their order; those that were answered stay answered when one fails.

        Raises:
            EngineError: the server refused one of them.
            EngineDownError: it is gone.
        """
        if not asks:
            return []
        with ThreadPoolExecutor(self.concurrency) as pool:
            waiting = [pool.submit(self._written, ask) for ask in asks]
            try:
                return [one.result() for one in waiting]
            except EngineError:
                pool.shutdown(wait=True, cancel_futures=True)  # those on their way come in, and are kept
                raise

    def _written(self, ask: Ask) -> Written:
        path, body = self.request(ask)
        asked = json.dumps([self.weights_fingerprint, path, body], sort_keys=True)
        row = "reply " + hashlib.sha256(asked.encode()).hexdigest()[:24]
        earlier = self._lines.earlier.get(row)
        reply = earlier["reply"] if earlier is not None else self.client.post(path, body)
        found = self._read(reply)
        if earlier is None:
            self._lines.write(row, reply=_kept(reply))
        return found

    def request(self, ask: Ask, *, streamed: bool = False) -> tuple[str, dict[str, Any]]:
        """Where a request goes, and its body."""
        dialect = self.engine.dialect
        body: dict[str, Any] = {"model": self._model, "seed": ask.seed, **dialect.sampling(ask.law, ask.tokens)}
        if ask.ignore_eos and dialect.ignore_eos is None:
            raise UnsupportedError("answers of a given length", f"{self.engine.label} ends them where the text ends")
        body |= dialect.ignore_eos or {} if ask.ignore_eos else {}
        first, begun = self.pieces[ask.prompt[0]], self.decode(ask.begun)
        if streamed:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if isinstance(first, tuple) and self._template is None:
            talk = [{"role": who, "content": text} for who, text in first]
            if begun:
                talk.append({"role": "assistant", "content": begun})
                body |= dialect.go_on or {}
            if not streamed:
                body |= {"logprobs": True}
            return "chat/completions", body | {"messages": talk}
        if isinstance(first, tuple) and self._template is not None:
            text = self._template(first, not dialect.plain_text)
            body |= dialect.plain_text
        else:
            text = _shown(first)
        rest = self.decode(ask.prompt[1:])
        if not streamed:
            body |= {"logprobs": 1}
        return "completions", body | {"prompt": text + rest + begun}

    def _read(self, reply: Mapping[str, Any]) -> Written:
        """
        Raises:
            EngineError: the reply is none of the protocol's.
        """
        try:
            choice = reply["choices"][0]
            text = choice["message"].get("content") or "" if "message" in choice else choice["text"]
            usage = reply.get("usage") or {}
            counted, read = int(usage.get("completion_tokens") or 0), int(usage.get("prompt_tokens") or 0)
            why = choice.get("finish_reason")
            ended = why == "stop"
            told = _told(choice.get("logprobs"))
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            said = json.dumps(reply)[:200]
            raise EngineError(f"the server answers what is no answer ({type(error).__name__}): {said}") from None
        if why in ("abort", "error"):
            raise EngineError(f"the server ended an answer with {why}")
        if why not in ("stop", "length", None):
            self.happened(f"the server ended answers for other reasons: {why}")
        if not counted and told is None:
            self.happened("the server does not say how many tokens it wrote: lengths of answers are not known")
        texts, log_probs = told if told is not None else ([], [])
        last = 0.0  # of the end of the text, where it is told as a token of its own
        if ended and texts and not _same(texts, text) and _same(texts[:-1], text):
            texts, last, log_probs = texts[:-1], log_probs[-1], log_probs[:-1]
        if not _same(texts, text) or (
            not texts and counted
        ):  # the text as a whole, and as many empty pieces as it has further tokens
            further = max(len(texts), counted - ended) - bool(text)
            texts = [*[text] * bool(text), *[""] * further]
        tokens = [self.pieces.number(piece) if piece else self.blank for piece in texts]
        whole = told is not None and len(log_probs) == len(tokens)
        return Written([*tokens, *[self.end] * ended], [*log_probs, *[last] * ended] if whole else None, ended, read)


def _same(texts: Sequence[str], text: str) -> bool:
    """Whether these tokens are the text; some servers take spaces off its ends."""
    return "".join(texts).strip() == text.strip()


def _shown(piece: str | tuple[Turn, ...]) -> str:
    """A talk as people read it; what stands between the turns is not what the model reads."""
    if isinstance(piece, str):
        return piece
    return "".join(f"<{who}>\n{text}\n" for who, text in piece if who)


def _kept(reply: Mapping[str, Any]) -> dict[str, Any]:
    """What of a reply is read again."""
    choice = reply["choices"][0]
    small = {k: choice[k] for k in ("message", "text", "finish_reason", "logprobs") if k in choice}
    return {"choices": [small], "usage": reply.get("usage")}


def _told(log_probs: Any) -> tuple[list[str], list[float]] | None:
    """Texts and log-probabilities of the tokens, in either form that servers have; None where they tell none.

    A token may be a part of a letter: its bytes go to the piece that makes the letter whole.
    """
    if not log_probs:
        return None
    if log_probs.get("content"):
        reader = codecs.getincrementaldecoder("utf-8")("replace")
        entries = log_probs["content"]
        texts = [
            reader.decode(bytes(e["bytes"]) if e.get("bytes") is not None else str(e["token"]).encode())
            for e in entries
        ]
        return texts, [float(e["logprob"]) for e in entries]
    if log_probs.get("tokens") and log_probs.get("token_logprobs"):
        values = log_probs["token_logprobs"]
        return [str(t) for t in log_probs["tokens"]], [float(v) for v in values]
    return None
