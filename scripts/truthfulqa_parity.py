"""Do mc1 and mc2 of `temperature` agree with lm-eval's own Hugging Face model on all of TruthfulQA? Needs lm-eval.

python scripts/truthfulqa_parity.py --model 'stories-260k[path=DIR]' --data DIR      # 817 questions, a few minutes
"""

from __future__ import annotations

import argparse
import sys
import time

from decodathlon.harness import datasets, models
from decodathlon.harness import decoder as decoders
from decodathlon.harness.datasets import Text
from decodathlon.harness.measure import lm_eval_tasks, truthful
from decodathlon.harness.measure.lm_eval_model import DecoderLM
from decodathlon.harness.registry import load_builtins, registry
from decodathlon.harness.results import environment
from decodathlon.harness.suite import Cell
from decodathlon.harness.targets.base import Target

NAMES = (truthful.MC1, truthful.MC2)


def questions(folder: str | None) -> Text:
    """All that are reported and all that are kept for tuning."""
    name = "truthfulqa-choice"
    parts = [datasets.find(name, split, folder) for split in datasets.splits(name)]
    return registry.get("dataset", name).text("test", parts[0].source, [row for p in parts for row in p.rows], None)


def theirs(target: Target, batch: int) -> object:
    """lm-eval's Hugging Face model around the same weights and the same tokens."""
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    tokenizer = target.tokenizer
    if not isinstance(tokenizer, PreTrainedTokenizerBase):  # ours encodes; lm-eval wants to see one of its own kind
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel({"?": 0}, unk_token="?")), pad_token="?"
        )
    model = HFLM(
        pretrained=target.model,
        tokenizer=tokenizer,
        batch_size=batch,
        max_length=target.context_length,
        prefix_token_id=target.start_token,
    )
    model.tok_encode = lambda text, add_special_tokens=None, **more: target.encode(
        text, special=add_special_tokens is not False
    )
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--data", default=environment.data_folder())
    parser.add_argument("--questions", type=int, default=None)
    parser.add_argument("--batch", type=int, default=8, help="rows that lm-eval reads side by side")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    load_builtins()
    target = models.load(models.resolve(options.model), device="auto", dtype=options.dtype, say=lambda text: None)
    cell = Cell(
        suite=registry.get("suite", "truthfulqa"), decoder=decoders.build("temperature"), target=target, rivals={},
        scale="full", slice="choice", seed=0, texts={"test": questions(options.data)},
        sizes={"questions": options.questions}, say=lambda text: sys.stderr.write(f"{text}\n"),
    )  # fmt: skip
    with truthful._tasks(cell, NAMES) as folder:
        began = time.monotonic()
        ours = lm_eval_tasks.run(DecoderLM(cell), NAMES, folder=folder)
        sys.stdout.write(f"{len(ours[NAMES[0]].samples)} questions; decodathlon in {time.monotonic() - began:.0f} s\n")
        sys.stdout.flush()
        began = time.monotonic()
        with target.native():
            peer = lm_eval_tasks.run(theirs(target, options.batch), NAMES, folder=folder)
        sys.stdout.write(f"lm-eval in {time.monotonic() - began:.0f} s\n")
    for name in NAMES:
        (a,), (b,) = (list(found[name].metrics.values()) for found in (ours, peer))
        own = [score or 0.0 for score in truthful._scores(ours[name], name)]
        pairs = [
            (x[0], y[0])
            for mine, other in zip(ours[name].samples, peer[name].samples, strict=True)
            for x, y in zip(mine["filtered_resps"], other["filtered_resps"], strict=True)
        ]
        sys.stdout.write(
            f"{name}: decodathlon {a.estimate().value:.6f} (ties shared {sum(own) / len(own):.6f}), lm-eval "
            f"{b.estimate().value:.6f}; of {len(pairs)} log-likelihoods the furthest apart differ by "
            f"{max(abs(x - y) for x, y in pairs):.1e}\n"
        )


if __name__ == "__main__":
    main()
