"""The table of metrics: each name with its unit, its direction and its meaning. The documentation is made from it."""

from __future__ import annotations

from typing import Literal, NamedTuple

from decodathlon.harness.registry import registry


class Metric(NamedTuple):
    unit: str
    better: Literal["higher", "lower", "none"]
    meaning: str


METRICS: dict[str, Metric] = {
    "ppl": Metric(
        "1",
        "lower",
        "Perplexity of real text under the decoder's own next-token law, given the real prefix; infinite as "
        "soon as the decoder cuts one real token.",
    ),
    "coverage": Metric(
        "1",
        "higher",
        "Share of the real tokens that the decoder's law does not cut.",
    ),
    "ppl_conditional": Metric(
        "1",
        "none",
        "Perplexity over the covered tokens only; says nothing about the others.",
    ),
    "ppl_mixture": Metric(
        "1",
        "lower",
        "Perplexity of the decoder's law mixed with the model's own, the weight tuned on validation text; "
        "equals the model's perplexity where truncation adds nothing.",
    ),
    "mixture_weight": Metric(
        "1",
        "none",
        "The model's weight in that mixture; 1 says that the decoder adds nothing.",
    ),
    "ppl_epsilon": Metric(
        "1",
        "lower",
        "Perplexity of the decoder's law mixed with the uniform law, the weight tuned on validation text "
        "(Martins et al. 2020).",
    ),
    "sparsemax_score": Metric(
        "1",
        "higher",
        "p(real token) + (1 - sum of p squared) / 2, averaged: one minus half the Brier score; needs no "
        "smoothing (Martins et al. 2020).",
    ),
    "ppl_model": Metric(
        "1",
        "lower",
        "Perplexity of the same tokens under the model's unprocessed law: the reference line.",
    ),
    "ppl_word": Metric(
        "1",
        "lower",
        "Perplexity per word by the protocol of lm-eval's wikitext task (whole pages, disjoint windows), under the "
        "decoder's own law; only this and ppl_byte are comparable with lm-eval.",
    ),
    "ppl_byte": Metric(
        "1",
        "lower",
        "The same per byte; needs no agreement on what a word is.",
    ),
    "tokens_per_s": Metric(
        "1/s",
        "higher",
        "New tokens of the whole batch per second of decoding, prefill apart.",
    ),
    "tpot_s": Metric(
        "s",
        "lower",
        "Time per output token of one stream after the first.",
    ),
    "ttft_s": Metric(
        "s",
        "lower",
        "Time to the first token: prefill and one draw.",
    ),
    "prefill_tokens_per_s": Metric(
        "1/s",
        "higher",
        "Prompt tokens of the whole batch read per second.",
    ),
    "peak_memory_bytes": Metric(
        "B",
        "lower",
        "Peak while the decoder generates: what torch allocated on a GPU; on a CPU anonymous memory of the process, in "
        "which weights that stay mapped from their file (float32 safetensors) do not count.",
    ),
    "sampler_share": Metric(
        "1",
        "lower",
        "Share of a decoding step that the draw takes (law and sampling, without the model).",
    ),
    "ratio_to_greedy": Metric(
        "1",
        "higher",
        "Speed against greedy search on the same engine: its time over the decoder's, end to end, paired and "
        "interleaved.",
    ),
    "ratio_to_baseline": Metric(
        "1",
        "higher",
        "The same against the decoder that --baseline names.",
    ),
    "ratio_to_hf_generate": Metric(
        "1",
        "higher",
        "The same against transformers.generate with the same weights.",
    ),
    "ratio_to_self": Metric(
        "1",
        "none",
        "A decoder against itself (A/A), run beside itself like any rival: how far noise and the order of runs go.",
    ),
    "greedy_match": Metric(
        "1",
        "higher",
        "Share of prompts whose tokens all equal greedy search on the same engine.",
    ),
    "overhead_s": Metric(
        "s",
        "lower",
        "Median time of one operation of the harness itself (suite overheads), by pytest-benchmark.",
    ),
    "generated_tokens": Metric(
        "1",
        "none",
        "New tokens that the cell's timed runs of the decoder made.",
    ),
}

for _name, _metric in METRICS.items():
    registry.add("metric", _name, _metric, source=__file__)
