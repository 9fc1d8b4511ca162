"""Audit: does a decoder draw what it claims, from a real transformer whose every outcome is known?"""

from decodathlon import suite

LENGTH = 3


@suite(
    "audit",
    version=2,
    asks="Does the decoder draw from the law that it claims?",
    table=["goodness_p", "tvd", "tvd_floor", "tvd_floor_ratio", "visible_tvd", "definition_gap"],
    protocol={
        "target": "a random two-layer Llama in float64 with four tokens, read by the same code as a real model; texts "
        "of at most three tokens, 40 outcomes, the stop token among them",
        "draws": "independent: a chain's last state, of what is spread over equal prompts one answer per set of four",
        "law": "greedy-exact: the one text; exact: the target's; shaped: by the decoder's definition where it has one, "
        "else by its own shape; sharpened: the proposals' times the tilt that it states",
        "definition": "of a shaped law, also compared with its shape on 200 laws of 64 tokens; of a chain that states "
        "its transition matrix, the law of all texts with the same law after a step",
    },
    targets={"lm": "enumerable-lm[vocabulary=4]"},
    sizes={
        "smoke": {"slices": ["lm"], "draws": 500},
        "quick": {"slices": ["lm"], "draws": 12_000},
        "full": {"slices": ["lm"], "draws": 60_000},
    },
)
def test_audit(cell):
    from decodathlon.harness.measure import draws, exactness
    from decodathlon.harness.measure.statistics import Estimate

    count = cell.sizes["draws"]
    law = draws.claimed_law(cell.decoder, cell.target, LENGTH)
    answers = draws.answers(cell.decoder, cell.target, count, LENGTH, cell.seed)
    counts, p = exactness.counted(answers, law)
    for name in draws.untouched(cell.decoder, cell.target, LENGTH, cell.seed):
        cell.note(f"audit: in texts so short {name} is always 0, so nothing is said of what it does")
    floor, found = exactness.floor(p, count), exactness.tvd(counts, p)
    cell.sample("counts", outcomes=[list(o) for o in law], counts=[int(c) for c in counts], law=[float(x) for x in p])
    cell.report("tvd", Estimate(found, n=count))
    cell.report("tvd_floor", Estimate(floor.mean, n=count))
    if floor.mean > 0:  # else there is one right answer
        cell.report("tvd_floor_ratio", floor.ratio(found, count))
    if cell.decoder.claim != "heuristic":  # which promises no law: the distance is for information
        cell.report("goodness_p", Estimate(exactness.p_value(counts, p), n=count))
        cell.report("visible_tvd", Estimate(exactness.visible_tvd(p, count), n=count))
        gap = draws.definition_gap(cell.decoder, cell.target, LENGTH)
        if gap is not None:
            cell.report("definition_gap", gap)
        cell.report("own_law", Estimate(float(not draws.is_defined(cell.decoder)), n=1))
        if not draws.is_defined(cell.decoder):
            cell.note("audit: without a definition, it was held against the law that it computes itself")
