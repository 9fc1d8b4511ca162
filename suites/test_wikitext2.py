"""WikiText-2: how well does the decoder's own next-token law predict real text?"""

from decodathlon import suite


@suite(
    "wikitext2",
    version=1,
    asks="How well does the decoder's own next-token law predict real text?",
    data="wikitext-2-raw-v1",
    table=["ppl_epsilon", "sparsemax_score", "coverage", "ppl", "ppl_mixture"],
    sizes={
        "smoke": {"tokens": 512, "validation": 256, "context": 256},
        "quick": {"tokens": 8192, "validation": 2048, "context": 1024},
        "full": {"tokens": None, "validation": 32768, "context": 1024},
    },
)
def test_wikitext2(cell):
    from decodathlon.harness.measure import perplexity, texts

    scores = {}
    for split, size in (("validation", "validation"), ("test", "tokens")):
        read = texts.head(cell.text(split), cell.target, cell.sizes[size])
        cell.sample(split, rows=[0, read.rows - 1], tokens=len(read.tokens))
        scores[split] = perplexity.score(cell.decoder, cell.target, read.tokens, cell.sizes["context"], cell.until_late)
    for metric, estimate in perplexity.metrics(scores["test"], scores["validation"]).items():
        cell.report(metric, estimate)
    cell.array("decoder_log_prob", scores["test"].decoder)
    cell.array("model_log_prob", scores["test"].model)
    cell.array("concentration", scores["test"].concentration)
    cell.array("cluster", scores["test"].cluster)
