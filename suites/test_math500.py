"""MATH-500: how many school and contest problems does the decoder solve?"""

from decodathlon import suite


@suite(
    "math500",
    version=1,
    asks="How many problems of MATH-500 does the decoder solve, at which cost?",
    data="math-500",
    table=["pass_at_1", "pass_at_k", "maj_at_k", "best_of_k", "answered", "answer_tokens", "answer_seconds", "oracle"],
    protocol={
        "problems": "450 of the 500 in a fixed random order; the other 50 are kept for tuning",
        "prompt": "the model's chat template, or where it has none 'Question: ... Answer:'",
        "answer": "the last box, read by math-verify, the right answer first; what cannot be read is wrong",
        "interval": "over problems; several answers to one problem are no new evidence",
    },
    sizes={
        "smoke": {"questions": 2, "samples": 2, "tokens": 16},
        "quick": {"questions": 8, "samples": 2, "tokens": 64},
        "full": {"questions": None, "samples": 4, "tokens": 2048},
    },
)
def test_math500(cell):
    from decodathlon.harness.datasets import questions
    from decodathlon.harness.measure import problems

    problems.measure(cell, questions.read(cell.text(), cell.sizes["questions"]))
