"""AIME25: how many of the problems of a hard contest does the decoder solve?"""

from decodathlon import suite


@suite(
    "aime25",
    version=1,
    asks="How many of the 30 problems of AIME 2025 does the decoder solve, at which cost?",
    data="aime25",
    table=["pass_at_1", "pass_at_k", "maj_at_k", "best_of_k", "answered", "answer_tokens", "answer_seconds", "oracle"],
    protocol={
        "prompt": "the model's chat template, or where it has none 'Question: ... Answer:'",
        "answer": "the last box, read by math-verify, the right answer first; what cannot be read is wrong",
        "interval": "over problems; several answers to one problem are no new evidence",
    },
    sizes={
        "smoke": {"questions": 1, "samples": 2, "tokens": 16},
        "quick": {"questions": 4, "samples": 2, "tokens": 64},
        "full": {"questions": None, "samples": 16, "tokens": 8192},
    },
)
def test_aime25(cell):
    from decodathlon.harness.datasets import questions
    from decodathlon.harness.measure import problems

    problems.measure(cell, questions.read(cell.text(), cell.sizes["questions"]))
