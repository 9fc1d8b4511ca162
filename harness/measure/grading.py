"""Is a mathematical answer right? Its last box is read by math-verify, in a process that is killed when it hangs."""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import time
from types import TracebackType
from typing import ClassVar, NamedTuple, Self

#: Seconds that one answer may take; and the first one, for which the process must import its algebra.
HARD_TIMEOUT, FIRST_TIMEOUT = 5.0, 60.0
#: Characters of an answer beyond which nobody means it.
MOST_CHARACTERS = 1000
#: What a grader that hung is recorded as.
TIMEOUT = "grader_timeout"
_BOXES = ("\\boxed", "\\fbox")


class Verdict(NamedTuple):
    """What a grader makes of an answer."""

    correct: bool
    #: What stands in the last box.
    extracted: str | None
    #: Why it could not be graded (no box, unclosed box, too long, unreadable, grader_timeout); it then counts as wrong.
    trouble: str = ""


def last_box(text: str) -> tuple[str | None, str]:
    """What stands in the last \\boxed{...}, braces balanced; or None and the reason."""
    at = max(text.rfind(box) for box in _BOXES)
    if at < 0:
        return None, "no box"
    begin = text.find("{", at)
    if begin < 0 or text[at:begin].strip() not in _BOXES:
        return None, "no box"
    depth = 0
    for place in range(begin, len(text)):
        if text[place] == "\\":
            continue
        escaped = text[place - 1] == "\\"
        depth += {"{": 1, "}": -1}.get(text[place], 0) if not escaped else 0
        if depth == 0:
            inside = text[begin + 1 : place].strip()
            return (inside, "") if inside else (None, "empty box")
    return None, "unclosed box"


class Grader:
    """A process that grades one answer after the other; use it as a context manager.

    The process stays for the next one, because to start it takes as long as to grade a thousand answers.
    """

    #: A process without work, if there is one.
    _idle: ClassVar[list[subprocess.Popen[bytes]]] = []

    def __init__(self, timeout: float = HARD_TIMEOUT) -> None:
        self._timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
        #: Whether it closed its output.
        self._ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:  # perhaps between a question and its reply
            self._stop()
        elif self._process is not None:
            self._idle.append(self._process)
            self._process = None

    def grade(self, gold: str, text: str) -> Verdict:
        """Whether the last box of a text says the same as `gold` (LaTeX without dollar signs).

        Raises:
            RuntimeError: the grader cannot be started.
        """
        inside, trouble = last_box(text)
        if inside is None:
            return Verdict(False, None, trouble)
        return self.same(gold, inside)

    def same(self, gold: str, answer: str) -> Verdict:
        """Whether an answer (LaTeX) says the same as `gold`."""
        if len(answer) > MOST_CHARACTERS:
            return Verdict(False, answer[:MOST_CHARACTERS], "too long")
        reply = self._ask({"gold": gold, "answer": answer})
        if reply is None:
            return Verdict(False, answer, TIMEOUT)
        return Verdict(bool(reply.get("correct", False)), answer, str(reply.get("trouble", "")))

    def _ask(self, request: dict[str, str], *, again: bool = False) -> dict[str, object] | None:
        """Its reply; None where it hangs, or twice takes the whole process with it."""
        if self._process is None:
            while self._idle and self._process is None:
                waiting = self._idle.pop()
                self._process = waiting if waiting.poll() is None else None
        if self._process is None:
            self._process = _started()
            if self._reply(self._process, {"gold": "1", "answer": "1"}, FIRST_TIMEOUT) is None:
                self._stop()
                raise RuntimeError("math-verify cannot be run: is it installed (pip install math-verify)?")
        reply = self._reply(self._process, request, self._timeout)
        if reply is None:
            died = self._process.poll() is not None or self._ended
            self._stop()
            if died and not again:  # somebody killed it, which says nothing of the answer
                return self._ask(request, again=True)
        return reply

    def _reply(
        self, process: subprocess.Popen[bytes], request: dict[str, str], seconds: float
    ) -> dict[str, object] | None:
        self._ended = False
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            self._ended = True
            return None
        line, deadline = b"", time.monotonic() + seconds
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(process.stdout.fileno(), 1 << 16) if ready else b""
            if not part:
                self._ended = bool(ready)
                return None
            line += part
        reply: dict[str, object] = json.loads(line)
        return reply

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


@atexit.register
def _end() -> None:
    """Its input ends with this process, and it with that; this only spares it the wait."""
    for process in Grader._idle:
        process.kill()


def _started() -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "decodathlon.harness.workers.grader"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
