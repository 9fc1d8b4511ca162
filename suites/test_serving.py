"""Serving: how does a server behave under load? Of models behind one alone (--model openai:NAME --model-url URL)."""

from decodathlon import suite

TABLE = [
    "served_tokens_per_s", "ttft_s", "ttft_s(p95)", "tpot_s", "inter_event_s(p95)", "latency_s(p95)", "goodput",
    "good_share", "failed_requests",
]  # fmt: skip


@suite(
    "serving",
    version=1,
    clocked=True,
    needs=["server"],
    asks="How fast does a server answer, and what do its users see, at a given load?",
    data="mt-bench",
    table=TABLE,
    protocol={
        "closed": "so many clients, each of which asks again as soon as it was answered",
        "rate": "requests arrive at random (Poisson) so many times a second, and are timed from their arrival",
        "ttft": "from arrival to the first event with text; the connection is made before",
        "tpot": "from the first event to the last, over the server's count of tokens less those of one event",
        "warm_up": "as many requests as there are clients, on other questions, not timed",
        "good": "answers whose ttft_ms and tpot_ms are not above those of the sizes; goodput counts them per second",
        "stop": "every answer has `tokens` tokens where the engine can be told so; else it ends where it ends",
    },
    sizes={
        "smoke": {"slices": ["closed-2"], "requests": 4, "tokens": 8, "ttft_ms": 1000, "tpot_ms": 100},
        "quick": {
            "slices": ["closed-1", "closed-4", "rate-1"], "requests": 40, "tokens": 64, "ttft_ms": 1000, "tpot_ms": 100,
        },
        "full": {
            "slices": ["closed-1", "closed-8", "closed-32", "closed-128", "rate-1", "rate-4", "rate-16"],
            "requests": 400, "tokens": 256, "ttft_ms": 1000, "tpot_ms": 100,
        },
    },
)  # fmt: skip
def test_serving(cell):
    from decodathlon.harness.datasets import questions
    from decodathlon.harness.measure import serving

    serving.measure(cell, questions.read(cell.text(), None))
