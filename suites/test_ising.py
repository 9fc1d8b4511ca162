"""Ising: does a decoder draw from the law that it claims, where that law is known exactly?"""

from decodathlon import Chain, suite

#: States of a target over which a transition matrix is worked out.
MOST_STATES = 16


@suite(
    "ising",
    version=1,
    asks="How far from its law is what the decoder draws, against independent exact draws?",
    table=["tvd_floor_ratio", "tvd", "tvd_floor", "spectral_gap", "accept_rate", "goodness_p", "visible_tvd"],
    protocol={
        "trials": "each on its own; every state of a chain after a step is one draw; gradient chains and gibbs start "
        "uniform over all states, those that write anew from a draw of their proposals",
        "law": "exact: the target's; shaped: the whole text's under the decoder's own law of each token, enumerated",
        "floor": "total variation distance of as many independent exact draws, simulated",
        "beta": "0.21 per bond, each bond counted once: the 0.42 of papers that halve the sum over pairs",
    },
    targets={
        "ring-4": "ising[n=4,beta=0.21]",
        "ring-8": "ising[n=8,beta=0.21]",
        "ring-16": "ising[n=16,beta=0.21]",
        "cold-ring-8": "ising[n=8,beta=1.5,field=0.05]",
        "torus-3x3": "ising[n=9,beta=0.3,field=0.05,rows=3]",
    },
    sizes={
        "smoke": {"slices": ["ring-4"], "trials": 4, "draws": 200},
        "quick": {
            "slices": ["ring-4", "ring-8", "ring-16", "cold-ring-8", "torus-3x3"],
            "trials": 30,
            "draws": 1000,
        },
        "full": {
            "slices": ["ring-4", "ring-8", "ring-16", "cold-ring-8", "torus-3x3"],
            "trials": 100,
            "draws": 10_000,
        },
    },
)
def test_ising(cell):
    from decodathlon.harness.measure import draws, exactness, mixing
    from decodathlon.harness.measure.observations import Observations
    from decodathlon.harness.measure.statistics import Estimate

    claim, length = cell.decoder.claim, cell.target.context_length
    law = draws.claimed_law(cell.decoder, cell.target, length)
    count, each = cell.sizes["trials"], cell.sizes["draws"]
    _, p = exactness.counted([], law)
    floor = exactness.floor(p, each, repeats=400)
    stream = draws.trials(cell.decoder, cell.target, law, count, each, cell.seed)
    trials, rows = [], []
    for number in cell.until_late(range(count)):
        trials.append(next(stream))
        rows.append(f"trial-{number}")
        cell.sample(rows[-1], tvd=exactness.tvd(trials[-1].counts, p), accepted=trials[-1].accepted)
    found = [exactness.tvd(t.counts, p) for t in trials]
    for marks in zip(*(t.curve for t in trials), strict=True):
        at = marks[0].draws
        cell.sample(
            f"after-{at}",
            draws=at,
            tvd=sum(m.tvd for m in marks) / len(marks),
            independent=exactness.floor(p, at, repeats=100).mean,
            seconds=sum(m.seconds for m in marks) / len(marks),
        )
    cell.report("tvd", Observations(rows, found, [1] * len(found), share=True))
    cell.report("tvd_floor", Estimate(floor.mean, n=each))
    if floor.mean > 0:  # else there is one right answer
        cell.report("tvd_floor_ratio", Observations(rows, [x / floor.mean for x in found], [1] * len(found)))
    if isinstance(cell.decoder, Chain):
        if len(law) <= MOST_STATES and not cell.decoder.burn_in:
            cell.report("spectral_gap", mixing.spectral_gap(cell.decoder, cell.target, length, cell.seed))
        cell.report("accept_rate", Observations(rows, [t.accepted for t in trials], [1] * len(trials), share=True))
    elif cell.decoder.independent and claim != "heuristic":  # which promises no law
        total = sum(t.counts for t in trials)
        cell.report("goodness_p", Estimate(exactness.p_value(total, p), n=int(total.sum())))
        cell.report("visible_tvd", Estimate(exactness.visible_tvd(p, int(total.sum())), n=int(total.sum())))
