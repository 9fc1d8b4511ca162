"""WikiText-2: how well does the decoder's own next-token law predict real text?"""

from decodathlon import suite


@suite(
    "wikitext2",
    version=2,
    needs=["logits"],
    asks="How well does the decoder's own next-token law predict real text?",
    data="wikitext-2-raw-v1",
    table=["ppl_epsilon", "sparsemax_score", "coverage", "ppl", "ppl_mixture", "ppl_word", "ppl_byte"],
    protocol={
        "joined": "rows joined, sliding window, stride half the context, only new tokens counted, teacher forcing",
        "pages": "lm-eval 0.4 wikitext: detokenised pages, disjoint windows as long as the model reads",
    },
    sizes={
        "smoke": {"slices": ["joined"], "tokens": 512, "validation": 256, "context": 256},
        "quick": {"slices": ["joined", "pages"], "tokens": 8192, "validation": 2048, "context": 1024, "pages": 1},
        "full": {"slices": ["joined", "pages"], "tokens": None, "validation": 32768, "context": 1024, "pages": None},
    },
)
def test_wikitext2(cell):
    from decodathlon.harness.measure import pages, perplexity, texts

    if cell.slice == "pages":  # lm-eval's protocol, for those who compare
        read = pages.pages(cell.text(), cell.sizes["pages"])
        for metric, found in pages.metrics(cell.decoder, cell.target, read, cell.until_late).items():
            cell.report(metric, found)
        return
    scores = {}
    for split, size in (("validation", "validation"), ("test", "tokens")):
        read = texts.head(cell.text(split), cell.target, cell.sizes[size])
        cell.sample(split, rows=[0, read.rows - 1], tokens=len(read.tokens))
        scores[split] = perplexity.score(cell.decoder, cell.target, read.tokens, cell.sizes["context"], cell.until_late)
    for metric, estimate in perplexity.metrics(scores["test"], scores["validation"]).items():
        cell.report(metric, estimate)
    if scores["test"].filters is not None:
        cell.note("its law is itself random: intervals are over the text, copies_error and copies_bias come on top")
    cell.array("decoder_log_prob", scores["test"].decoder)
    cell.array("model_log_prob", scores["test"].model)
    cell.array("concentration", scores["test"].concentration)
    cell.array("cluster", scores["test"].cluster)
