"""Sets: how well do many answers to one prompt cover the law together, while each alone is an honest draw?"""

from decodathlon import suite


@suite(
    "sets",
    version=1,
    needs=["logits"],
    asks="How well do many answers to one prompt cover its law, against as many independent draws?",
    table=[
        "set_tvd_ratio",
        "set_tvd_bound",
        "set_variance_ratio",
        "set_weighted_variance_ratio",
        "set_distinct_ratio",
        "set_hit_ratio",
        "answer_positions",
        "goodness_p",
        "visible_tvd",
    ],
    protocol={
        "set": "so many answers to the empty prompt in one call; weighted where the decoder gives weights, else equal",
        "law": "of whole answers, enumerated: the target's, or of what is shaped the decoder's by its definition",
        "ratios": "to the expectation of as many independent draws from the same law, worked out and not drawn",
        "goodness": "of one answer per set, each place in turn: alone it must have the law that the decoder claims",
    },
    targets={"lm": "enumerable-lm[vocabulary=4]", "ring-4": "ising[n=4,beta=0.21]"},
    sizes={
        "smoke": {"slices": ["lm"], "sets": 20, "rows": 8},
        "quick": {"slices": ["lm", "ring-4"], "sets": 1000, "rows": 16},
        "full": {"slices": ["lm", "ring-4"], "sets": 1500, "rows": 16},
    },
)
def test_sets(cell):
    from decodathlon.harness.measure import exactness, sets
    from decodathlon.harness.measure.observations import Observations
    from decodathlon.harness.measure.statistics import Estimate

    count, rows = cell.sizes["sets"], cell.sizes["rows"]
    law = sets.known(cell.decoder, cell.target, rows)
    found, single, positions = [], [], []
    for number in cell.until_late(range(count)):
        answers = sets.drawn(cell.decoder, cell.target, law, number, cell.seed)
        found.append(sets.judged(answers, law))
        single.append(tuple(answers[number % rows].tokens))
        positions.append(sum(a.cost.target_positions for a in answers) / rows)
        cell.sample(f"set-{number}", **found[-1]._asdict(), positions=positions[-1])
    names = [f"set-{number}" for number in range(len(found))]

    def mean(values):
        return Observations(names, values, [1] * len(names))

    cell.report("set_tvd_ratio", mean([f.tvd for f in found]))
    cell.report("set_tvd_bound", Estimate(law.least / law.floor, n=rows))
    cell.report("set_variance_ratio", mean([f.squared_error for f in found]))
    if cell.decoder.claim != "heuristic":
        cell.report("set_weighted_variance_ratio", mean([f.weighted_error for f in found]))
    cell.report("set_distinct_ratio", mean([f.distinct for f in found]))
    cell.report("set_hit_ratio", mean([f.hits for f in found]))
    if all(positions):
        cell.report("answer_positions", mean(positions))
    if cell.decoder.claim != "heuristic":
        counts, p = exactness.counted(single, dict(zip(law.outcomes, law.p, strict=True)))
        cell.report("goodness_p", Estimate(exactness.p_value(counts, p), n=len(single)))
        cell.report("visible_tvd", Estimate(exactness.visible_tvd(p, len(single)), n=len(single)))
