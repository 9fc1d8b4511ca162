"""Do `ppl_word` and `ppl_byte` agree with lm-eval's own Hugging Face model on the same pages? Needs lm-eval.

python scripts/lm_eval_parity.py [--model SPEC] [--pages N]      # all 62 pages take about 20 minutes on 2 cores
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from typing import Any

from decodathlon.harness import datasets, models
from decodathlon.harness import decoder as decoders
from decodathlon.harness.measure import pages
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.results import environment


def _accepted(tokenizer: Any) -> Any:
    """What lm-eval takes for a tokenizer: its own kind, or a hollow one where ours encodes."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, unk_token="?")), pad_token="?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--pages", type=int, default=None)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    load_builtins()
    target = models.load(models.resolve(options.model), device="auto", dtype=options.dtype, say=lambda text: None)
    found = pages.pages(datasets.find("wikitext-2-raw-v1", "test", environment.data_folder()), options.pages)
    words, size = sum(p.words for p in found), sum(p.size for p in found)

    began = time.monotonic()
    ours = {k: v.estimate().value for k, v in pages.metrics(decoders.build("temperature"), target, found).items()}
    sys.stdout.write(f"{len(found)} pages; decodathlon {ours} in {time.monotonic() - began:.0f} s\n")
    sys.stdout.flush()

    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer

    began = time.monotonic()
    with target.native() as model:
        theirs = HFLM(
            pretrained=model,
            tokenizer=_accepted(target.tokenizer),
            batch_size=1,
            max_length=target.context_length,
            prefix_token_id=target.start_token,
        )
        theirs.tok_encode = lambda text, **options: target.encode(text, special=False)
        texts = [wikitext_detokenizer({"page": p.raw}) for p in found]
        requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
        scores = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    counted = [process_results({"page": p.raw}, (s,)) for p, s in zip(found, scores, strict=True)]
    if words != sum(c["word_perplexity"][1] for c in counted):
        raise SystemExit("the two count words differently")
    peer = {"ppl_word": math.exp(-sum(scores) / words), "ppl_byte": math.exp(-sum(scores) / size)}
    sys.stdout.write(f"lm-eval {peer} in {time.monotonic() - began:.0f} s\n")
    sys.stdout.write(f"relative difference { ({k: ours[k] / peer[k] - 1 for k in peer}) }\n")


if __name__ == "__main__":
    main()
