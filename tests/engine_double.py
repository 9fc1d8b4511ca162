"""A server of the OpenAI protocol that tests know through and through: its law is enumerated, its faults are chosen.

The "model" writes letters; which one comes next depends on the last letter and on how many there are. Its tokens are
letters, its talk goes on where the assistant's message ends.
"""

from __future__ import annotations

import json
import math
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LETTERS = " ab"
END = "<end>"


def logits(text: str) -> dict[str, float]:
    """Of the letters and the end, behind an answer so far."""
    last = LETTERS.find(text[-1]) if text else 0
    found = {letter: math.sin(3.0 * i + 2.0 * last + 0.7 * len(text)) for i, letter in enumerate(LETTERS)}
    return found | {END: -0.6 + 0.2 * len(text)}


def law(text: str, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> dict[str, float]:
    """The law that the parameters stand for, by their definitions."""
    scores = logits(text)
    if temperature == 0:
        best = max(scores, key=scores.__getitem__)
        return {best: 1.0}
    weights = {t: math.exp(s / temperature) for t, s in scores.items()}
    total = sum(weights.values())
    p = {t: w / total for t, w in weights.items()}
    kept = dict(p)
    if top_k > 0:
        kept = {t: x for t, x in kept.items() if sum(o > x for o in p.values()) < top_k}
    if top_p < 1:
        kept = {t: x for t, x in kept.items() if sum(o for o in p.values() if o > x) < top_p}
    kept = {t: x for t, x in kept.items() if x >= min_p * max(p.values())}
    total = sum(kept.values())
    return {t: x / total for t, x in kept.items()}


def answers(most: int, **parameters) -> dict[str, float]:
    """Every answer of at most so many letters with its probability; an ended one has the end behind it."""
    found: dict[str, float] = {}

    def grow(text: str, p: float) -> None:
        for token, share in law(text, **parameters).items():
            if token == END:
                found[text + END] = found.get(text + END, 0.0) + p * share
            elif len(text) + 1 == most:
                found[text + token] = found.get(text + token, 0.0) + p * share
            else:
                grow(text + token, p * share)

    grow("", 1.0)
    return found


@dataclass
class Double:
    """The server. Everything it is asked to write is in `asked`."""

    #: Parameters that it does not know, and passes over in silence.
    ignores: frozenset[str] = frozenset()
    #: Whether it goes on with an assistant's message, tells log-probabilities, of the model's own law, heeds seeds.
    goes_on: bool = True
    tells: bool = True
    raw: bool = True
    seeded: bool = True
    #: What it says to the next requests before it answers: HTTP codes, or "drop", "half", "garbage", "hang".
    faults: list = field(default_factory=list)
    #: After so many answers it is gone; None for never.
    dies_after: int | None = None
    #: Seconds before the first token, and before each further one.
    first: float = 0.0
    each: float = 0.0
    #: How many tokens an event of a stream brings.
    bundle: int = 1
    #: Whether it answers one request at a time.
    serial: bool = False
    #: Of a stream, breaks off after so many events.
    breaks_after: int | None = None
    asked: list = field(default_factory=list)
    begun: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    turn: threading.Lock = field(default_factory=threading.Lock)

    def write(self, body) -> tuple[list[str], list[float], bool]:
        """Tokens, what is told of each, and whether the text ended."""
        with self.lock:
            self.asked.append(body)
            number = len(self.asked)
        begun = self.beginning(body)
        stated = {k: body[k] for k in ("temperature", "top_k", "top_p", "min_p") if k in body and k not in self.ignores}
        stated["top_k"] = max(0, stated.get("top_k", 0))
        rng = random.Random(f"{body.get('seed')} {begun}" if self.seeded else number)
        tokens, told, text = [], [], begun
        while len(tokens) < body["max_tokens"]:
            p = law(text, **stated)
            token = rng.choices(list(p), list(p.values()))[0]
            tokens.append(token)
            told.append(math.log((law(text) if self.raw else p)[token]))
            if token == END and not body.get("ignore_eos"):
                return tokens, told, True
            text += token if token != END else "a"
        return ["a" if t == END else t for t in tokens], told, False

    def beginning(self, body) -> str:
        if "prompt" in body:
            return body["prompt"].rpartition("A:")[2] if self.goes_on else ""
        last = body["messages"][-1]
        return last["content"] if last["role"] == "assistant" and self.goes_on else ""

    def reply(self, body, *, chat: bool) -> dict:
        tokens, told, ended = self.write(body)
        shown = [t for t in tokens if t != END]
        text = "".join(shown)
        entries = [{"token": t, "logprob": p, "bytes": list(t.encode())} for t, p in zip(tokens, told, strict=True)]
        choice = {"index": 0, "finish_reason": "stop" if ended else "length", "logprobs": None}
        if chat:
            choice |= {"message": {"role": "assistant", "content": text}}
            choice["logprobs"] = {"content": entries} if self.tells and body.get("logprobs") else None
        else:
            choice |= {"text": text}
            if self.tells and body.get("logprobs"):
                choice["logprobs"] = {"tokens": tokens, "token_logprobs": told}
        return {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": len(tokens)}}

    def counts(self) -> Counter:
        """How often each request was answered, by its body."""
        return Counter(json.dumps(body, sort_keys=True) for body in self.asked)


def serve(double: Double, port: int = 0):
    """Start it on loopback; the server has `url`, and `close()` ends it at once, with what is in the air."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *words):
            """Tests look at `asked`."""

        def do_GET(self):
            known = {"/v1/models": {"data": [{"id": "m", "max_model_len": 512}]}, "/version": {"version": "0.33.0"}}
            self._say(200 if self.path in known else 404, known.get(self.path, {"detail": "Not Found"}))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with double.lock:
                double.begun += 1
                if double.dies_after is not None and double.begun > double.dies_after:
                    self.close_connection = True
                    self.connection.close()
                    return
                fault = double.faults.pop(0) if double.faults else None
            if fault == "drop":
                self.connection.close()
            elif fault == "half":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"choices": [')
                self.wfile.flush()
                self.connection.close()
            elif fault == "garbage":
                self._say(200, "<html>no JSON</html>")
            elif fault == "hang":
                time.sleep(5)
            elif fault is not None:
                self._say(fault, {"error": {"message": "told to say so"}}, {"Retry-After": "0"})
            elif body.get("stream"):
                self._stream(body)
            else:
                with double.turn if double.serial else threading.Lock():
                    time.sleep(double.first)
                    self._say(200, double.reply(body, chat=self.path.endswith("chat/completions")))

        def _say(self, code, content, headers=None):
            text = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(code)
            for name, value in {"Content-Length": str(len(text)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)

        def _stream(self, body):
            with double.turn if double.serial else threading.Lock():
                tokens, _, ended = double.write(body)
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Connection", "close")
                self.end_headers()
                self.close_connection = True
                self._event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
                self.wfile.write(b": keep-alive\n\n")
                time.sleep(double.first)
                shown = [t for t in tokens if t != END]
                for place in range(0, len(shown), double.bundle):
                    if double.breaks_after is not None and place >= double.breaks_after:
                        return
                    if place:
                        time.sleep(double.each * double.bundle)
                    self._event({"choices": [{"delta": {"content": "".join(shown[place : place + double.bundle])}}]})
                self._event({"choices": [{"delta": {}, "finish_reason": "stop" if ended else "length"}]})
                if body.get("stream_options", {}).get("include_usage"):
                    self._event({"choices": [], "usage": {"completion_tokens": len(tokens), "prompt_tokens": 7}})
                self.wfile.write(b"data: [DONE]\n\n")

        def _event(self, content):
            self.wfile.write(b"data: " + json.dumps(content).encode() + b"\n\n")
            self.wfile.flush()

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        allow_reuse_address = True
        request_queue_size = 128

        def handle_error(self, request, client_address):
            """Clients that go away are a part of the tests."""

    server = Server(("127.0.0.1", port), Handler)
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close():
        server.shutdown()
        server.server_close()

    server.close = close
    return server
