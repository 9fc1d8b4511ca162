"""lm-eval: any of its tasks on any decoder, with its own prompts and metrics (`--lm-eval-task NAME`)."""

from decodathlon import suite


@suite(
    "lm_eval",
    version=1,
    asks="What does a task of lm-eval say of the decoder?",
    table=["lm_eval", "lm_eval_loss"],
    protocol={
        "task": "as lm-eval 0.4 ships it: its data, prompt, few-shot examples, filters, metrics and aggregation",
        "likelihoods": "under the decoder's own law; without one the task is unsupported",
        "answers": "drawn by the decoder; of the task's settings the length and the stops count, not its temperature",
    },
    sizes={
        "smoke": {"slices": [], "limit": 2},
        "quick": {"slices": [], "limit": 20},
        "full": {"slices": [], "limit": None},
    },
)
def test_lm_eval(cell):
    from decodathlon.harness.measure import lm_eval_tasks

    lm_eval_tasks.measure(cell, cell.slice, limit=cell.sizes["limit"])
