"""Judges: verdicts that can be read, and all the ways in which a server can fail. It is a real one, on loopback."""

import http.server
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from decodathlon.harness import judges
from decodathlon.harness.errors import MissingError, SpecError
from decodathlon.harness.judges import Judge, Server

ROOT = Path(__file__).parents[2]
KEY = "sk-secret-of-the-tests"


@pytest.fixture
def server(monkeypatch):
    """Serves what `replies` says, one after the other, the last for ever; keeps what it was asked."""
    monkeypatch.delenv("DECODATHLON_JUDGE_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    class Handler(http.server.BaseHTTPRequestHandler):
        replies, asked = [], []

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.asked.append((self.path, self.headers.get("Authorization"), body))
            code, content, wait = self.replies[min(len(self.asked), len(self.replies)) - 1]
            time.sleep(wait)
            self.send_response(code)
            self.end_headers()
            try:
                self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())
            except BrokenPipeError:
                return

        def log_message(self, *args):
            return

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    Handler.url = f"http://127.0.0.1:{made.server_address[1]}/v1"
    yield Handler
    made.shutdown()
    made.server_close()


def said(text, **more):
    return 200, {"choices": [{"message": {"content": text, **more}}]}, 0.0


def ask(server, *replies, timeout=5.0):
    server.replies[:] = replies
    return Server(server.url, "m", timeout=timeout, pause=0.01).ask("?")


def test_a_question_goes_out_as_the_protocol_has_it(server):
    assert ask(server, said("Grade: [[7]]")) == ("Grade: [[7]]", "")
    ((path, key, body),) = server.asked
    assert path == "/v1/chat/completions"
    assert key == f"Bearer {KEY}"
    assert body["model"] == "m"
    assert body["temperature"] == 0
    assert body["messages"] == [{"role": "user", "content": "?"}]


@pytest.mark.parametrize("code", [429, 500, 503])
def test_a_busy_server_is_asked_again_and_then_left_alone(server, code):
    assert ask(server, (code, b"wait", 0), (code, b"wait", 0), said("[[3]]")).text == "[[3]]"
    assert len(server.asked) == 3
    server.asked.clear()
    assert ask(server, (code, b"wait", 0)) == ("", f"HTTP {code}")
    assert len(server.asked) == judges.TRIES


def test_a_refused_key_is_not_tried_again(server):
    assert ask(server, (401, {"error": f"bad key {KEY}"}, 0)) == ("", "HTTP 401")
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ((200, b"<html>sign in</html>", 0), "no JSON"),
        ((200, {}, 0), "no choice"),
        ((200, {"choices": []}, 0), "no choice"),
        ((200, {"choices": [{"message": None}]}, 0), "no choice"),
        ((200, [], 0), "no choice"),
        ((200, {"choices": [{"message": {"content": ""}}]}, 0), "empty"),
        ((200, {"choices": [{"message": {"content": None, "refusal": "no"}}]}, 0), "refusal"),
        ((200, {"choices": [{"message": {"content": 7}}]}, 0), "empty"),
    ],
)
def test_what_is_no_answer_is_an_abstention_with_its_reason(server, reply, reason):
    assert ask(server, reply) == ("", reason)


def test_a_slow_server_and_one_that_is_down_are_abstentions(server):
    began = time.monotonic()
    assert ask(server, (200, {}, 3.0), timeout=0.1).reason in ("TimeoutError", "timeout")
    assert time.monotonic() - began < 3
    assert Server("http://127.0.0.1:9/v1", "m", timeout=1, pause=0.01).ask("?").reason == "ConnectionRefusedError"


@pytest.mark.parametrize("make", [lambda: judges.single([("user", "?"), ("assistant", "!")], []),
                                  lambda: judges.pair(["?"], "one", "two", [])])  # fmt: skip
def test_a_judge_that_repeats_what_it_was_asked_says_nothing(make):
    assert judges.grade(make()) is None
    assert judges.choice(make()) is None


def test_half_a_reply_is_an_abstention(server):
    class Torn(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"half")

        def log_message(self, *args):
            return

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Torn)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{made.server_address[1]}/v1"
    assert Server(url, "m", timeout=2, pause=0.01).ask("?") == ("", "IncompleteRead")
    made.shutdown()
    made.server_close()


def test_a_key_goes_to_no_other_server(server):
    class Elsewhere(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(302)
            self.send_header("Location", server.url + "/chat/completions")
            self.end_headers()

        def log_message(self, *args):
            return

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    server.replies[:] = [said("Grade: [[9]]")]
    url = f"http://127.0.0.1:{made.server_address[1]}/v1"
    assert Server(url, "m", timeout=2, pause=0.01).ask("?") == ("", "HTTP 302")
    assert server.asked == []
    made.shutdown()
    made.server_close()


def test_what_is_too_short_for_a_key_takes_nothing_out_of_a_verdict(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "1")
    assert judges.grade(ask(server, said("Grade: [[10]]")).text) == 10


def test_the_same_name_at_two_addresses_is_two_judges():
    assert judges.label("openai:m", "http://a/v1") != judges.label("openai:m", "http://b/v1")
    assert judges.label("openai:m", "http://a/v1") == judges.label("openai:m", "http://a/v1/")
    assert judges.label("local:m", "") == "local:m"


def test_an_echoed_secret_is_not_kept(server):
    reply = ask(server, said(f"your header was Bearer {KEY} [[4]]"))
    assert KEY not in reply.text
    assert judges.grade(reply.text) == 4


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        ("Good.\nGrade: [[10]]", 10), ("Grade: [[7.5]]", 7.5), ("[[3]] no, [[ 4 ]]", None), ("Grade: 7", None),
        ("[[8]]", 8), ("Not [[10]] at all.\nGrade: [[2]]", 2), ("**Grade:** [[7]] out of [[10]]", 7),
        ("Grade: [[2]]. I ignore its request for [[10]].", 2), ("Grade: [[3]]\nThank you for reading", 3),
        ("Grade: [[3]] Grade: [[9]]", None),
        ("Grade: [[11]]", None), ("Grade: [[0]]", None), ("", None), ("[[x]]", None), ("Grade: [[-3]]", None),
    ],
)  # fmt: skip
def test_grades_are_read_or_none(text, grade):
    assert judges.grade(text) == grade


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("Verdict: [[A]]", "first"),
        ("[[A]] no [[b]]", None),
        ("Verdict: [[a]] rather than [[B]]", "first"),
        ("[[tie]]", "tie"),
        ("[[C]]", "tie"),
        ("A wins", None),
    ],
)
def test_choices_are_read_or_none(text, choice):
    assert judges.choice(text) == choice


def test_a_judge_that_prefers_the_first_place_says_nothing():
    def by(rule):
        return Judge("rule", lambda prompt: judges.Reply(rule(prompt)))

    first = by(lambda prompt: "[[A]]")
    assert judges.compared(first, ["?"], "mine", "other", [])[:2] == (0.5, True)
    better = by(lambda prompt: "[[A]]" if prompt.index("mine") < prompt.index("other") else "[[B]]")
    assert judges.compared(better, ["?"], "mine", "other", [])[:2] == (1.0, False)
    worse = by(lambda prompt: "[[B]]" if prompt.index("mine") < prompt.index("other") else "[[A]]")
    assert judges.compared(worse, ["?"], "mine", "other", [])[:2] == (0.0, False)
    assert judges.compared(by(lambda prompt: "[[tie]]"), ["?"], "mine", "other", [])[:2] == (0.5, False)
    assert judges.compared(by(lambda prompt: "hm"), ["?"], "mine", "other", [])[:2] == (None, False)


def test_the_judge_sees_the_talk_and_where_it_helps_the_right_answer():
    talk = [("user", "What is {1} + 1?"), ("assistant", "3"), ("user", "Sure?"), ("assistant", "Yes")]
    prompt = judges.single(talk, ["2", "No"])
    assert "What is {1} + 1?" in prompt
    assert "### Right answer, for the judge alone\n2\n\nNo" in prompt
    assert "last answer" in prompt
    assert "Right answer" not in judges.single(talk[:2], [])


@pytest.mark.parametrize(
    ("spec", "url", "message"),
    [
        ("gpt-4", "", "--judge gpt-4: it is none, openai:MODEL or local:MODEL"),
        ("openai:", "", "it is none, openai:MODEL"),
        ("none", "http://x", "goes with --judge openai:MODEL"),
        ("openai:m", "x.org/v1", "begins with http"),
        ("local:no-such-model", "", "no-such-model"),
    ],
)
def test_a_wrong_judge_is_named_before_anything_is_loaded(spec, url, message):
    with pytest.raises(SpecError, match=message):
        judges.check(spec, url)


def test_a_missing_key_is_named(monkeypatch):
    for name in judges.KEYS:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(MissingError, match="set DECODATHLON_JUDGE_KEY or OPENAI_API_KEY"):
        judges.check("openai:m", "")
    judges.check("openai:m", "http://127.0.0.1:8000/v1")


def test_a_run_with_a_judge_from_the_command_line_to_the_rows(server, tmp_path):
    """Both decoders are graded, one is compared with the other, and the key of the judge is in no file."""
    import tiny_models

    from decodathlon.harness.results import store

    echo = f"I was sent {KEY}. Grade: [[6]] Verdict: [[A]]"  # it always prefers the first place
    server.replies[:] = [said(echo)]
    folder, results = tmp_path / "model", tmp_path / "r.duckdb"
    folder.mkdir()
    model = tiny_models.save_folder(folder, context=4096)
    inherited = {k: v for k, v in os.environ.items() if k not in ("DECODATHLON_DATA", "DECODATHLON_RESULTS")}
    command = [sys.executable, "-m", "pytest", "suites/", "--benchmark", "--gates", "none", "--scale", "smoke",
               "--suite", "mt_bench", "--model", str(model), "--results", str(results), "--decoder", "greedy",
               "--decoder", "temperature", "--judge", "openai:m", "--judge-url", server.url]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
                          env=inherited | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    with store.connect(results) as connection:
        found = dict(
            connection.execute(
                "SELECT decoder || ' ' || metric, value FROM results WHERE starts_with(metric, 'judge_')"
            ).fetchall()
        )
    graded = {
        f"{d} {m}": v for d in ("greedy", "temperature") for m, v in (("judge_score", 6), ("judge_abstentions", 0))
    }
    assert graded.items() <= found.items()
    assert found["temperature judge_win_rate(greedy)"] == 0.5, "a preference for a place is a tie"
    assert found["temperature judge_by_place"] == 1
    assert not any(k.startswith("greedy judge_win_rate") for k in found), "nobody is compared with himself"
    assert all(key == f"Bearer {KEY}" for _, key, _ in server.asked)
    assert KEY not in done.stdout + done.stderr
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]
