"""Holds mathematical answers against right ones, in a process of its own that may be killed.

Started by measure/grading.py as `python -P -m decodathlon.harness.workers.grader`: a JSON line with `gold` and `answer`
(LaTeX) in, one with `correct` out, or with `trouble` where the answer cannot be read. Whoever asks keeps the time.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    """Serve until the other end closes its pipe."""
    import logging

    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)  # it reports what it cannot read; so do we, by what we answer
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        try:
            gold = parse(f"${request['gold']}$", parsing_timeout=None)
            found = parse(f"${request['answer']}$", parsing_timeout=None)
            # the right answer first: an interval may be written as a pair, not a pair as an interval
            reply = {"correct": bool(verify(gold, found, timeout_seconds=None))} if found else {"trouble": "unreadable"}
        except Exception as error:  # noqa: BLE001 - whatever LaTeX of a language model makes a parser do
            reply = {"trouble": f"unreadable: {type(error).__name__}"}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
