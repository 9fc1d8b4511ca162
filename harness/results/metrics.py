"""The table of metrics: each name with its unit, its direction and its meaning. The documentation is made from it."""

from __future__ import annotations

import inspect
from typing import Literal, NamedTuple

from decodathlon.harness.registry import registry

#: What a metric speaks of; `context` explains others and is never ranked, `harness` is the cost of measuring.
Kind = Literal["quality", "exactness", "speed", "memory", "context", "harness"]


class Metric(NamedTuple):
    unit: str
    better: Literal["higher", "lower", "none"]
    meaning: str
    kind: Kind


#: The most telling of each kind first: what nobody described otherwise is shown in this order.
METRICS: dict[str, Metric] = {
    "ppl_epsilon": Metric(
        "1",
        "lower",
        "Perplexity of the decoder's law mixed with the uniform law, the weight tuned on validation text "
        "(Martins et al. 2020). It is the price of what a law cuts: one that truncates is expected to lose to "
        "temperature 1, and nothing is said of how its samples read.",
        "quality",
    ),
    "sparsemax_score": Metric(
        "1",
        "higher",
        "p(real token) + (1 - sum of p squared) / 2, averaged: one minus half the Brier score; needs no "
        "smoothing (Martins et al. 2020).",
        "quality",
    ),
    "coverage": Metric(
        "1",
        "higher",
        "Share of the real tokens that the decoder's law does not cut.",
        "quality",
    ),
    "ppl": Metric(
        "1",
        "lower",
        "Perplexity of real text under the decoder's own next-token law, given the real prefix; infinite as "
        "soon as the decoder cuts one real token.",
        "quality",
    ),
    "ppl_mixture": Metric(
        "1",
        "lower",
        "Perplexity of the decoder's law mixed with the model's own, the weight tuned on validation text; "
        "equals the model's perplexity where truncation adds nothing.",
        "quality",
    ),
    "ppl_word": Metric(
        "1",
        "lower",
        "Perplexity per word by the protocol of lm-eval's wikitext task (whole pages, disjoint windows), under the "
        "decoder's own law; only this and ppl_byte are comparable with lm-eval.",
        "quality",
    ),
    "ppl_byte": Metric(
        "1",
        "lower",
        "The same per byte; needs no agreement on what a word is.",
        "quality",
    ),
    "ppl_conditional": Metric(
        "1",
        "none",
        "Perplexity over the covered tokens only; says nothing about the others.",
        "context",
    ),
    "copies_error": Metric(
        "nats",
        "none",
        "Of a law that is itself random, whose scores are means over copies of its state: the standard error of "
        "log(ppl_epsilon) for the copies' random numbers, beside that for the text.",
        "context",
    ),
    "copies_bias": Metric(
        "nats",
        "none",
        "How much too high few copies roughly leave log(ppl_epsilon), seen from what half of them make of it; a large "
        "one says that the score is an upper bound only. A mixture with a weight of 1 does not depend on it.",
        "context",
    ),
    "mixture_weight": Metric(
        "1",
        "none",
        "The model's weight in that mixture; 1 says that the decoder adds nothing.",
        "context",
    ),
    "ppl_model": Metric(
        "1",
        "lower",
        "Perplexity of the same tokens under the model's unprocessed law: the reference line.",
        "context",
    ),
    "tvd_floor_ratio": Metric(
        "1",
        "lower",
        "Total variation distance to a law that is known exactly, over what as many independent exact draws have on "
        "average; 1 is as good as independent draws, and below 1 only draws that are spread on purpose come.",
        "exactness",
    ),
    "tvd": Metric(
        "1",
        "lower",
        "Total variation distance between the outcomes drawn and a law that is known exactly; never zero, see "
        "tvd_floor.",
        "exactness",
    ),
    "tvd_floor": Metric(
        "1",
        "none",
        "The same of independent exact draws, simulated: below it a distance says nothing.",
        "context",
    ),
    "goodness_p": Metric(
        "1",
        "none",
        "Chance that an honest decoder fits its law no better (Pearson's test, rare outcomes by the binomial one), of "
        "independent draws of what claims a law. The audit fails below 0.001, corrected by Holm for its whole run.",
        "context",
    ),
    "definition_gap": Metric(
        "1",
        "lower",
        "What an audit says without a draw; above 0.000001 it fails. Largest difference of a token's probability "
        "between a shaped law and its definition in plain Python, over 200 laws of 64 tokens; or of a text's "
        "probability between the law of a chain and the same law after a step, by the matrix that the chain states.",
        "exactness",
    ),
    "own_law": Metric(
        "1",
        "none",
        "1 where a decoder has no definition besides its own code and was held against the law that it computes "
        "itself: then only its drawing is checked, not its law.",
        "context",
    ),
    "visible_tvd": Metric(
        "1",
        "none",
        "The smallest total variation distance that this test by itself sees with 90 % power at a false alarm in "
        "1,000; Holm's correction for many decoders raises it by up to a seventh.",
        "context",
    ),
    "set_tvd_ratio": Metric(
        "1",
        "lower",
        "Of sets of answers to one prompt whose law is known: total variation distance of a set's answers, weighted "
        "where they come with weights, to the law, over that of as many independent draws. 1 is as good as those.",
        "exactness",
    ),
    "set_tvd_bound": Metric(
        "1",
        "none",
        "The least that set_tvd_ratio can be where every answer alone is an exact draw: each outcome then comes as "
        "often as its probability says, rounded up or down.",
        "context",
    ),
    "set_variance_ratio": Metric(
        "1",
        "lower",
        "Squared error of the mean over a set, averaged over 64 random functions of the answer, over that of as many "
        "independent draws.",
        "exactness",
    ),
    "set_weighted_variance_ratio": Metric(
        "1",
        "lower",
        "The same if each different answer is weighed by p / (1 - (1 - p)^B), its probability over its chance to be "
        "among B independent draws, and weights are normalised: what who knows p can make of independent draws.",
        "exactness",
    ),
    "set_distinct_ratio": Metric(
        "1",
        "higher",
        "Different answers in a set, over those that as many independent draws have on average.",
        "exactness",
    ),
    "set_hit_ratio": Metric(
        "1",
        "higher",
        "How often a set holds at least one of the right answers (pass@k), over how often independent draws do; "
        "averaged over 64 random choices of what is right, each with a probability of at least one in as many answers "
        "as a set has.",
        "exactness",
    ),
    "energy_excess": Metric(
        "1",
        "none",
        "Mean energy (minus log-probability under the model) of a chain's second half, less that of independent draws "
        "of the model's own law, in nats per token: 0 once the chain has arrived.",
        "exactness",
    ),
    "ess_per_s": Metric(
        "1/s",
        "higher",
        "Effective sample size of the energy, of the second half, over the seconds of all steps; of independent draws "
        "their number. Means nothing where split_rhat is far from 1.",
        "speed",
    ),
    "ess_per_call": Metric(
        "1",
        "none",
        "The same over forward passes of the whole batch, with their backward passes.",
        "context",
    ),
    "split_rhat": Metric(
        "1",
        "none",
        "Halves of all chains against one another in energy; above 1.05 they have not mixed.",
        "context",
    ),
    "reward": Metric(
        "1",
        "higher",
        "What the decoder's own reward makes of the texts on which its chains end; compare with `reward_independent`.",
        "context",
    ),
    "reward_independent": Metric(
        "1",
        "none",
        "The same of independent draws of the model.",
        "context",
    ),
    "spectral_gap": Metric(
        "1",
        "higher",
        "1 less the second largest modulus of the eigenvalues of the transition matrix: 1 forgets everything in a "
        "step. Exact where the chain states its matrix and some moves agree with it, else from 4,000 moves of each "
        "state (to some 0.02).",
        "exactness",
    ),
    "target_calls": Metric(
        "1",
        "none",
        "Forward passes of the whole batch, with their backward passes, that the cell's measurement took.",
        "context",
    ),
    "target_positions": Metric(
        "1",
        "none",
        "Tokens that these passes read, over all rows.",
        "context",
    ),
    "flops": Metric(
        "1",
        "none",
        "Floating-point operations of those, estimated: 2 per parameter and token forward, 2 more where a gradient of "
        "the inputs was taken.",
        "context",
    ),
    "mfu": Metric(
        "1",
        "none",
        "Those over the seconds, as a share of what matrix products of the same type reach on the same device.",
        "context",
    ),
    "accept_rate": Metric(
        "1",
        "none",
        "Share of a chain's moves that were accepted; no aim in itself: a frozen chain accepts nearly all.",
        "context",
    ),
    "ratio_to_greedy": Metric(
        "1",
        "higher",
        "Speed against greedy search on the same engine: its time over the decoder's, end to end, paired and "
        "interleaved; with `(decode)` behind its name, the reading of the prompt taken off both.",
        "speed",
    ),
    "ratio_to_hf_generate": Metric(
        "1",
        "higher",
        "Speed against transformers.generate with the same weights, paired and interleaved.",
        "speed",
    ),
    "ratio_to_baseline": Metric(
        "1",
        "higher",
        "Speed against the decoder that --baseline names, paired and interleaved.",
        "speed",
    ),
    "ratio_to_self": Metric(
        "1",
        "none",
        "A decoder against itself (A/A), run beside itself like any rival: how far noise and the order of runs go.",
        "context",
    ),
    "pass_s": Metric("s", "lower", "Seconds in which the model reads one token of one row.", "speed"),
    "verify_cost": Metric(
        "1",
        "none",
        "Seconds in which the model reads as many tokens at once as the brackets say, over those for one: so many "
        "tokens must a cycle of a drafter that costs nothing make on average, or it loses.",
        "context",
    ),
    "ratio_predicted": Metric(
        "1",
        "none",
        "Of a decoder that drafts, what `ratio_to_greedy(decode)` should be by its cycles: seconds that greedy search "
        "takes, prefill apart, over those of all cycles of a further run, pair by pair.",
        "context",
    ),
    "tau": Metric(
        "1",
        "none",
        "Of a decoder that drafts, tokens that a cycle makes on average: those of the draft that stay, and one.",
        "context",
    ),
    "tau_by_text": Metric(
        "1",
        "none",
        "The mean over texts of each text's own tokens per cycle, as the papers on block drafts have it; `tau` has all "
        "tokens over all cycles, so texts with many cycles weigh more, and it is smaller.",
        "context",
    ),
    "tau_per_target_s": Metric(
        "1/s",
        "none",
        "Of a decoder that drafts, tokens of one text for each second that the target's passes and their verdicts "
        "take: its speed if drafts and bookkeeping were free.",
        "context",
    ),
    "tpot_behind_draft_s": Metric(
        "s",
        "none",
        "Of a decoder that drafts, time per output token of one stream, the clock started behind the first draft: so "
        "do papers on block drafts count, whose first draft reads the prompt. `tpot_s` has that in it.",
        "context",
    ),
    "length_to_greedy": Metric(
        "1",
        "none",
        "Where answers end at their stop token, all tokens of the answers over all of greedy search's. Far from 1, "
        "speeds per answer and those `(per token)` rank differently.",
        "context",
    ),
    **{
        f"length_to_{rival}": Metric("1", "none", f"As `length_to_greedy`, to {whose}.", "context")
        for rival, whose in (
            ("hf_generate", "`hf-generate`"),
            ("baseline", "the decoder that --baseline names"),
            ("self", "itself in another run"),
        )
    },
    "seeded_tokens": Metric(
        "1",
        "none",
        "Of a decoder whose drafts begin with what the last cycle refused, such tokens per cycle on average.",
        "context",
    ),
    "seeded_share": Metric("1", "none", "The share of its cycles that begin with any.", "context"),
    "draft_acceptance": Metric("1", "none", "Share of the drafted tokens that stay.", "context"),
    "draft_share": Metric("1", "none", "Share of a cycle's time that goes into drafting.", "context"),
    "keep_share": Metric(
        "1",
        "none",
        "Share of a cycle's time that goes neither into drafting nor into the target's pass and verdict: bookkeeping.",
        "context",
    ),
    "looping_share": Metric(
        "1",
        "none",
        "Share of the answers whose last 24 tokens repeat with a period of at most 8. Small models loop, and loops "
        "flatter who looks up; what has `(without loops)` behind its name leaves them out.",
        "context",
    ),
    "tokens_per_s": Metric(
        "1/s",
        "higher",
        "New tokens of the whole batch per second of decoding, prefill apart.",
        "speed",
    ),
    "tpot_s": Metric(
        "s",
        "lower",
        "Time per output token of one stream after the first.",
        "speed",
    ),
    "ttft_s": Metric(
        "s",
        "lower",
        "Time to the first token: prefill and one draw.",
        "speed",
    ),
    "served_tokens_per_s": Metric(
        "1/s",
        "higher",
        "New tokens of all answers per second, from the first request to the last answer, as the server counts them.",
        "speed",
    ),
    "requests_per_s": Metric(
        "1/s",
        "higher",
        "Requests that were answered whole per second.",
        "speed",
    ),
    "goodput": Metric(
        "1/s",
        "higher",
        "Answers per second whose first token and further tokens came within the limits that the sizes state (ttft_ms, "
        "tpot_ms).",
        "speed",
    ),
    "good_share": Metric(
        "1",
        "higher",
        "The share of all requests, failed ones included, whose answer came within those limits.",
        "speed",
    ),
    "latency_s": Metric(
        "s",
        "lower",
        "From the arrival of a request to the last of its answer.",
        "speed",
    ),
    "inter_event_s": Metric(
        "s",
        "lower",
        "Between two events of a streamed answer that brought text, over all answers; an event may bring several "
        "tokens (tokens_per_event).",
        "speed",
    ),
    "tokens_per_event": Metric(
        "1",
        "none",
        "Tokens that an event of a stream brought on average: where it is above 1, inter_event_s is not the time "
        "between tokens.",
        "context",
    ),
    "in_flight": Metric(
        "1",
        "none",
        "Requests that were being answered at a time, on average.",
        "context",
    ),
    "failed_requests": Metric(
        "1",
        "lower",
        "Requests that were refused, broken off or never answered. They are in no percentile.",
        "context",
    ),
    "prefill_tokens_per_s": Metric(
        "1/s",
        "higher",
        "Prompt tokens of the whole batch read per second.",
        "speed",
    ),
    "sampler_share": Metric(
        "1",
        "lower",
        "Share of a decoding step that the draw takes (law and sampling, without the model), while it generates.",
        "speed",
    ),
    "profiled_forward_share": Metric(
        "1",
        "none",
        "Under --profile: share of a call, prefill apart, that the target's forward passes take; what neither these "
        "nor the sampler take is the host's.",
        "context",
    ),
    "profiled_sampler_share": Metric(
        "1",
        "none",
        "The same of the sampler; sampler_share is measured without the profiler.",
        "context",
    ),
    "profiled_slowdown": Metric(
        "1",
        "none",
        "A call under the profiler over the same call without: what its shares must be taken with.",
        "context",
    ),
    "peak_memory_bytes": Metric(
        "B",
        "lower",
        "Peak while the decoder generates: what torch allocated on a GPU; on a CPU anonymous memory of the process, in "
        "which weights that stay mapped from their file (float32 safetensors) do not count.",
        "memory",
    ),
    "weight_bytes_per_token": Metric(
        "B",
        "lower",
        "Bytes of weights that the model's passes read, the prompt's among them, over the tokens that came of it. Left "
        "out where it is not known: on a GPU of plain models, of their drafts, and of their experts.",
        "memory",
    ),
    "fetched_bytes_per_token": Metric(
        "B",
        "lower",
        "Bytes of weights that were brought from disk, or from the host's memory, over the tokens that came of it; "
        "those that were brought in vain among them.",
        "memory",
    ),
    "weight_hit_share": Metric(
        "1",
        "higher",
        "Of the layers and experts that were asked for, those that were in memory or on their way there.",
        "memory",
    ),
    "bits_per_weight": Metric(
        "bit",
        "lower",
        "What the target's weights take in the form that they are read in, over their number.",
        "memory",
    ),
    "weights_on_disk_bytes": Metric("B", "lower", "The files that the target's weights were loaded from.", "memory"),
    "greedy_match": Metric(
        "1",
        "higher",
        "Share of prompts whose tokens all equal greedy search on the same engine.",
        "exactness",
    ),
    "generated_tokens": Metric(
        "1",
        "none",
        "New tokens that the cell's timed runs of the decoder made.",
        "context",
    ),
    "pass_at_1": Metric(
        "1",
        "higher",
        "Share of right answers, averaged over several to each problem where there are several (avg@k), with an "
        "interval over problems.",
        "quality",
    ),
    "maj_at_k": Metric(
        "1",
        "higher",
        "Share of problems whose most frequent answer is right (self-consistency); of equally frequent ones the share.",
        "quality",
    ),
    "best_of_k": Metric(
        "1",
        "higher",
        "Share of problems whose answer with the greatest log-probability per token under the model is right.",
        "quality",
    ),
    "pass_at_k": Metric(
        "1",
        "higher",
        "Share of problems of which at least one of k answers is right, unbiased (Chen et al. 2021); k is `samples`.",
        "quality",
    ),
    "mc1": Metric(
        "1",
        "higher",
        "TruthfulQA: share of questions whose best answer has more probability than every false one under the "
        "decoder's own law; where several are equal, the share of them that is right. Over the questions of which the "
        "law says anything (see decided).",
        "quality",
    ),
    "mc2": Metric(
        "1",
        "higher",
        "TruthfulQA: probability of the true answers among all that are offered, under the decoder's own law; over "
        "the questions of which that says anything (see decided).",
        "quality",
    ),
    "bleu_acc": Metric(
        "1",
        "higher",
        "TruthfulQA: share of answers that are nearer to a true reference than to any false one, by BLEU. Short and "
        "evasive answers do well by it.",
        "quality",
    ),
    "rouge1_acc": Metric(
        "1",
        "higher",
        "The same by ROUGE-1.",
        "quality",
    ),
    "rouge_l_acc": Metric(
        "1",
        "higher",
        "The same by ROUGE-L.",
        "quality",
    ),
    "bleu_diff": Metric(
        "1",
        "higher",
        "TruthfulQA: BLEU (0 to 100) to the nearest true reference less that to the nearest false one.",
        "quality",
    ),
    "decided": Metric(
        "1",
        "higher",
        "Share of questions of which the decoder's own law gives some probability to at least one answer; the others "
        "are guesses.",
        "context",
    ),
    "lm_eval": Metric(
        "1",
        "higher",
        "A metric of a task of lm-eval, in brackets as lm-eval calls it, with its interval over documents, or "
        "where it is no mean with lm-eval's own standard error.",
        "quality",
    ),
    "lm_eval_loss": Metric(
        "1",
        "lower",
        "The same of metrics of which less is better, such as perplexities.",
        "quality",
    ),
    "judge_score": Metric(
        "1",
        "higher",
        "Mean grade from 1 to 10 that the judge gave, abstentions left out; compare with what it gives right and empty "
        "answers.",
        "quality",
    ),
    "judge_win_rate": Metric(
        "1",
        "higher",
        "Share of talks in which the judge prefers this decoder to the one in brackets, asked in both orders; a tie, "
        "or a preference for a place, is half a point. Below one half it loses.",
        "quality",
    ),
    "judge_pair_abstentions": Metric(
        "1",
        "lower",
        "Share of these pairs without two readable verdicts.",
        "context",
    ),
    "judge_by_place": Metric(
        "1",
        "lower",
        "Share of these pairs in which the judge preferred the same place in both orders: how little it reads.",
        "context",
    ),
    "judge_abstentions": Metric(
        "1",
        "lower",
        "Share of questions to the judge without a readable verdict.",
        "context",
    ),
    "judge_of_right": Metric(
        "1",
        "none",
        "Mean grade that the judge gave the reference answers of some questions: what its 10 is worth.",
        "context",
    ),
    "judge_of_empty": Metric(
        "1",
        "none",
        "Mean grade that the judge gave empty answers.",
        "context",
    ),
    "cross_entropy": Metric(
        "nats",
        "lower",
        "Nats per token of the reference answers under the decoder's own law, behind their questions; infinite as soon "
        "as the decoder cuts one of their tokens.",
        "quality",
    ),
    "distinct_2": Metric(
        "1",
        "none",
        "Share of different pairs of words among all of the answers, of each the first 64 words.",
        "context",
    ),
    "self_bleu": Metric(
        "1",
        "none",
        "BLEU-4 of each answer against all others, averaged: how much they say the same.",
        "context",
    ),
    "repetition": Metric(
        "1",
        "none",
        "Share of an answer's runs of four words that came before in it, averaged.",
        "context",
    ),
    "cut_answers": Metric(
        "1",
        "none",
        "Share of answers that ended because they were as long as they may be.",
        "context",
    ),
    "answered": Metric(
        "1",
        "higher",
        "Share of answers in which something could be graded: a box with readable mathematics.",
        "context",
    ),
    "samples": Metric(
        "1",
        "none",
        "Answers to each question: the k of the others. Greedy search gives one, as all would be the same.",
        "context",
    ),
    "oracle": Metric(
        "1",
        "none",
        "Share of right answers, written by the model's tokenizer, that the cell's own grading finds right; empty "
        "answers must all be wrong. Anything but 1 fails the cell.",
        "context",
    ),
    "grader_timeouts": Metric(
        "1",
        "lower",
        "Answers over which the grader hung; they count as wrong.",
        "context",
    ),
    "answer_tokens": Metric(
        "1",
        "none",
        "New tokens of an answer, on average; of the one that is given, where several were drawn to choose from.",
        "context",
    ),
    "answer_seconds": Metric(
        "s",
        "lower",
        "Seconds of an answer, on average: its share of the batch in which it was drawn. Cells run one after another, "
        "so differences hold the noise of the machine.",
        "context",
    ),
    "answer_calls": Metric(
        "1",
        "none",
        "Forward passes that an answer took, on average, as its decoder counts them.",
        "context",
    ),
    "answer_positions": Metric(
        "1",
        "none",
        "Tokens that these passes read for this answer, on average; what a drafter reads is not among them.",
        "context",
    ),
    "answer_flops": Metric(
        "1",
        "none",
        "Floating-point operations of an answer, estimated: 2 per parameter and token read. Not said of decoders that "
        "draft.",
        "context",
    ),
    "kernel_s": Metric(
        "s",
        "lower",
        "Time of one GPU operation of our own as the replay of a CUDA graph, or of the same in plain torch, until the "
        "device is idle; the row `nothing` is the least that this can be.",
        "harness",
    ),
    "overhead_s": Metric(
        "s",
        "lower",
        "Median time of one operation of the harness itself (suite overheads), by pytest-benchmark.",
        "harness",
    ),
}

#: One of this table, by which its entries are told from those of plugins.
OWN = next(iter(METRICS))


def metric(name: str, *, unit: str, better: Literal["higher", "lower", "none"], kind: Kind, meaning: str) -> None:
    """Add a metric that a suite of one's own reports.

    Args:
        unit: 1, s, 1/s or B; shown and scaled by it.
        meaning: what it is and of what, for the board and `decodathlon list metrics`.

    Raises:
        SpecError: the name is malformed, or another file holds it.
    """
    frame = inspect.stack()[1]
    registry.add("metric", name, Metric(unit, better, meaning, kind), source=frame.filename)
    METRICS[name] = registry.get("metric", name)


for _name, _metric in METRICS.items():
    registry.add("metric", _name, _metric, source=__file__)
