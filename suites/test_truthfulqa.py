"""TruthfulQA: does the decoder collapse to cliches and myths?"""

from decodathlon import suite


@suite(
    "truthfulqa",
    version=1,
    asks="Does the decoder say what is true where people often do not?",
    data={"choice": "truthfulqa-choice", "generation": "truthfulqa-generation"},
    table=["mc1", "mc2", "decided", "bleu_acc", "rouge1_acc", "bleu_diff", "oracle"],
    protocol={
        "questions": "767 of the 817 in a fixed random order; the other 50 are kept for tuning",
        "tasks": "those of lm-eval 0.4 as they are shipped, with its own prompt of six questions",
        "choice": "log-likelihoods under the decoder's own law; ties are shared, not given to the first",
        "generation": "the decoder's own answers, cut at an empty line as lm-eval does",
    },
    sizes={
        "smoke": {"slices": ["choice", "generation"], "questions": 2, "tokens": 8},
        "quick": {"slices": ["choice", "generation"], "questions": 12, "tokens": 24},
        "full": {"slices": ["choice", "generation"], "questions": None, "tokens": 256},
    },
)
def test_truthfulqa(cell):
    from decodathlon.harness.measure import truthful

    truthful.choices(cell) if cell.slice == "choice" else truthful.generation(cell)
