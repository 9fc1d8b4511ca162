"""MT-Bench: open questions in two turns, with a judge or without."""

from decodathlon import suite


@suite(
    "mt_bench",
    version=1,
    asks="What does the decoder answer to open questions, and how likely does it find right answers?",
    data="mt-bench",
    judged=True,
    table=[
        "judge_score",
        "judge_win_rate",
        "judge_by_place",
        "judge_of_right",
        "judge_of_empty",
        "judge_abstentions",
        "cross_entropy",
        "coverage",
        "ppl_mixture",
        "sparsemax_score",
        "distinct_2",
        "self_bleu",
        "repetition",
        "cut_answers",
        "answer_tokens",
    ],
    protocol={
        "prompt": "the model's chat template, or where it has none 'Question: ... Answer:'",
        "references": "of the first turn, teacher forcing; the weight of a mixture is tuned on every other reference",
        "judge": "one answer at a time, temperature 0, prompts of our own; in mathematics, reasoning and coding it "
        "sees the reference; what cannot be read is an abstention",
        "pairs": "the whole talk against that of --baseline, drawn by the same protocol, asked in both orders",
    },
    sizes={
        "smoke": {"questions": 2, "turns": 1, "tokens": 12},
        "quick": {"questions": 12, "turns": 1, "tokens": 32},
        "full": {"questions": None, "turns": 2, "tokens": 1024},
    },
)
def test_mt_bench(cell):
    from decodathlon.harness.datasets import questions
    from decodathlon.harness.measure import open_answers

    open_answers.measure(cell, questions.read(cell.text(), cell.sizes["questions"]))
