"""Throughput: how fast is the decoder, against greedy search on the same engine and against `transformers.generate`?"""

from decodathlon import Chain, Sampler, suite

KINDS = ["mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag"]
ENDING = [f"{kind}-ending" for kind in KINDS]
PROBLEMS = {"math500": "math-500", "aime25": "aime25"}
MATCHED = {f"{kind}-matched": data for kind, data in PROBLEMS.items()}


@suite(
    "throughput",
    version=3,
    needs=["logits"],
    clocked=True,
    asks="How fast is the decoder, and how much memory does it take?",
    data={
        "batch-1": "wikitext-2-raw-v1",
        "batch-4": "wikitext-2-raw-v1",
        **dict.fromkeys([*KINDS, *ENDING], "spec-bench"),
        **PROBLEMS,
        **MATCHED,
    },
    rivals=["greedy", "hf-generate"],
    table=[
        "tokens_per_s",
        "ratio_to_greedy",
        "ratio_to_baseline",
        "ratio_to_hf_generate",
        "ratio_to_self",
        "tau",
        "greedy_match",
        "peak_memory_bytes",
    ],
    protocol={
        "order": "each pair runs all decoders forth and back (A B B A); who is first turns from pair to pair",
        "warm_up": "each decoder once on the first prompts, not timed",
        "stop": "the same number of tokens for all, stop tokens ignored; where answers are to end, each where it does",
        "sampler_share": "from the first token to the last, in a further run on every pair's prompts",
        "clock": "wall-clock around generate, prefill included; on CUDA synchronised before and after",
    },
    sizes={
        "smoke": {"slices": ["batch-1"], "pairs": 2, "tokens": 12, "prompt": 24},
        "quick": {"slices": ["batch-1", "batch-4"], "pairs": 8, "tokens": 32, "prompt": 32},
        "full": {"slices": ["batch-1", "batch-4"], "pairs": 20, "tokens": 512, "prompt": 64},
    },
    workloads={
        "spec-bench": {
            "smoke": {"slices": KINDS[:1], "pairs": 1, "tokens": 12},
            "quick": {"slices": KINDS, "pairs": 10, "tokens": 64},
            "full": {"slices": KINDS, "pairs": 80, "tokens": 512},
        },
        "spec-bench-ending": {
            "smoke": {"slices": ENDING[:1], "pairs": 1, "tokens": 12, "ending": True},
            "quick": {"slices": ENDING, "pairs": 10, "tokens": 128, "ending": True},
            "full": {"slices": ENDING, "pairs": 80, "tokens": 1024, "ending": True},
        },
        "problems": {
            "smoke": {"slices": ["aime25"], "pairs": 1, "tokens": 12, "ending": True},
            "quick": {"slices": list(PROBLEMS), "pairs": 10, "tokens": 128, "ending": True},
            "full": {"slices": list(PROBLEMS), "pairs": 128, "tokens": 2048, "ending": True},
        },
        "problems-matched": {
            "smoke": {"slices": ["aime25-matched"], "pairs": 1, "tokens": 12},
            "quick": {"slices": list(MATCHED), "pairs": 10, "tokens": 128},
            "full": {"slices": list(MATCHED), "pairs": 128, "tokens": 2048},
        },
    },
)
def test_throughput(cell):
    from decodathlon.harness.errors import UnsupportedError
    from decodathlon.harness.measure import drafts, memory, speed, texts
    from decodathlon.harness.measure.statistics import Estimate

    if isinstance(cell.decoder, Chain):
        raise UnsupportedError("answers that grow token by token", "a chain is as fast as it mixes")
    sizes, ending = cell.sizes, cell.sizes.get("ending", False)
    kind = cell.slice.removesuffix("-ending").removesuffix("-matched")
    asked = kind in KINDS or kind in PROBLEMS
    rows = 1 if asked else int(cell.slice.removeprefix("batch-"))
    batches, row_ids, hashes = (
        texts.asked(cell.text(), cell.target, kind=kind, pairs=sizes["pairs"], tokens=sizes["tokens"])
        if asked
        else texts.prompts(cell.text(), cell.target, pairs=sizes["pairs"], rows=rows, length=sizes["prompt"])
    )
    pairs = []
    for pair in speed.measure(
        cell.decoder, cell.rivals, cell.target, cell.until_late(batches), sizes["tokens"], cell.seed, ending=ending
    ):
        number = len(pairs)
        cell.sample(
            f"pair-{number}",
            rows=row_ids[number],
            hashes=hashes[number],
            seconds=pair.seconds,
            first=pair.first,
            prefill=pair.prefill,
        )
        pairs.append(pair)

    speeds = speed.metrics(pairs, sizes["tokens"])
    for metric, estimate in speeds.items():
        cell.report(metric, estimate)
    looping = speed.looping(pairs)
    for metric, rival in cell.rivals.items():
        cell.report(metric, speed.ratio(pairs, metric), baseline=rival.spec)
        straight = speed.ratio(pairs, metric, leaving=looping)
        if looping and straight is not None:
            cell.report(f"{metric}(without loops)", straight, baseline=rival.spec)
    apart = speed.decode_ratio(pairs, "ratio_to_greedy") if "ratio_to_greedy" in cell.rivals else None
    if asked and apart is not None:
        cell.report("ratio_to_greedy(decode)", apart, baseline="greedy")
    for metric, rival in cell.rivals.items() if ending else ():
        cell.report(metric.replace("ratio", "length"), speed.lengths_ratio(pairs, metric), baseline=rival.spec)
        cell.report(f"{metric}(per token)", speed.token_ratio(pairs, metric), baseline=rival.spec)
    if cell.decoder.drafts:
        drafts.report(cell, pairs)

    if cell.decoder.claim == "greedy-exact" and "ratio_to_greedy" in cell.rivals:
        parted = speed.divergences(cell.target, pairs, "ratio_to_greedy")
        for d in parted:
            cell.sample(f"pair-{d.pair}-row-{d.row}", first_divergence=d.position, top2_gap=d.top2_gap)
        answers = len(pairs) * rows
        cell.report("greedy_match", Estimate(1 - len(parted) / answers, n=answers), baseline="greedy")
    for remark in speed.remarks(pairs):
        cell.note(remark)
    if "tpot_s" in speeds and isinstance(cell.decoder, Sampler) and cell.target.device.type == "cpu":
        shares = speed.sampler_shares(cell.decoder, cell.target, pairs, sizes["tokens"], cell.seed, ending=ending)
        if shares is not None:
            cell.report("sampler_share", shares)
    if cell.profile and cell.target.device.type != "cpu":
        cell.note("no profile: the replay of a CUDA graph has no phases that a profiler could tell apart")
    elif cell.profile:
        from decodathlon.harness.measure import profile

        found = profile.profile(cell.decoder, cell.target, batches[0], min(8, sizes["tokens"]), cell.seed)
        cell.sample("profile", **found.as_sample())
        cell.note("profiled: see the board's page Profile, or decodathlon export --trace last")
        for phase in ("forward", "sampler"):
            cell.report(f"profiled_{phase}_share", Estimate(found.share(getattr(profile, phase.upper())), n=1))
        cell.report("profiled_slowdown", Estimate(found.profiled_seconds / found.seconds, n=1))
    cell.target.release()
    speed.generate(cell.decoder, cell.target, batches[0], 2, cell.seed)  # a drafter is made before, not while
    call = lambda: speed.generate(cell.decoder, cell.target, batches[0], sizes["tokens"], cell.seed, ending=ending)  # noqa: E731
    for metric, value in memory.of_a_call(call, cell.target, drafts=cell.decoder.drafts).items():
        cell.report(metric, Estimate(value, n=1))
