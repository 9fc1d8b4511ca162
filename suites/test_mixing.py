"""Mixing: how fast does a chain reach and explore the texts of a model, against drawing them token by token?"""

from decodathlon import Chain, suite


@suite(
    "mixing",
    version=1,
    needs=["logits"],
    clocked=True,
    asks="How fast does a chain reach the model's own law, against drawing texts token by token?",
    table=[
        "energy_excess",
        "reward",
        "reward_independent",
        "ess_per_s",
        "ess_per_call",
        "split_rhat",
        "accept_rate",
        "target_calls",
        "flops",
        "mfu",
    ],
    protocol={
        "texts": "behind the start token, all of one length, stop tokens like any other",
        "chains": "side by side in one batch; a step's clock includes everything that the chain does",
        "reference": "independent draws of the model's own law, in the same cell",
        "energy": "minus the log-probability under the model; the excess is that of the second half of all steps",
        "reward": "of a decoder that has one: of the texts on which the chains end, or of as many answers "
        "as there are independent draws; and of those",
    },
    sizes={
        "smoke": {"chains": 2, "steps": 6, "tokens": 8, "independent": 8},
        "quick": {"chains": 4, "steps": 100, "tokens": 20, "independent": 64},
        "full": {"chains": 16, "steps": 5000, "tokens": 20, "independent": 1024},
    },
)
def test_mixing(cell):
    import dataclasses

    import numpy as np

    from decodathlon.harness.errors import UnsupportedError
    from decodathlon.harness.measure import mixing
    from decodathlon.harness.measure.observations import Observations
    from decodathlon.harness.measure.statistics import Estimate
    from decodathlon.harness.rewards import Rewarded

    chains, tokens, target = cell.sizes["chains"], cell.sizes["tokens"], cell.target
    claim, is_chain, valued = cell.decoder.claim, isinstance(cell.decoder, Chain), isinstance(cell.decoder, Rewarded)
    if not (is_chain or valued) and (claim != "exact" or not cell.decoder.independent):
        wanted = "a chain, a reward, or independent draws of the model's own law"
        raise UnsupportedError(wanted, f"it has none and claims to be {claim}")
    independent = mixing.ancestral(target, cell.sizes["independent"], tokens, cell.seed)
    reference = independent.log_prob
    cell.sample("reference", energies=[float(f"{-x:.6g}") for x in reference], seconds=independent.seconds)
    before = dataclasses.replace(target.spent)
    if is_chain:
        log_probs, accepted, times = [], None, []
        walked = mixing.walk(cell.decoder, target, chains, tokens, cell.seed)
        for _ in cell.until_late(range(cell.sizes["steps"])):
            step = next(walked)
            log_probs.append(step.log_prob.numpy())
            times.append(step.seconds)
            accepted = step.accepted
        energies = -np.stack(log_probs, 1)
        for row, trace in enumerate(energies):
            cell.sample(f"chain-{row}", energies=[float(f"{x:.6g}") for x in trace])
        cell.array("seconds", times)
        later, taken, moves = energies[:, energies.shape[1] // 2 :], sum(times), max(1, energies.shape[1] - 1)
        rows = [f"chain-{i}" for i in range(chains)]
        cell.report("accept_rate", Observations(rows, [float(a) / moves for a in accepted], [1] * chains, share=True))
        if valued:
            found = mixing.rewards(cell.decoder, target, step.sequences, step.log_prob.numpy())
            cell.report("reward", Observations(rows, found, [1] * chains))
        rhat = mixing.split_rhat(later)
        if rhat == rhat:
            cell.report("split_rhat", Estimate(rhat, n=later.size))
        effective = mixing.ess(later)
    else:
        answers = cell.sizes["independent"]
        drawn = mixing.drawn(cell.decoder, target, answers, tokens, cell.seed)
        later, effective, taken = -drawn.log_prob[:, None], float(answers), drawn.seconds
        if valued:
            found = mixing.rewards(cell.decoder, target, drawn.sequences, drawn.log_prob)
            cell.report("reward", Observations([f"answer-{i}" for i in range(answers)], found, [1] * answers))
    spent = target.spent.since(before)
    if valued:
        usual = mixing.rewards(cell.decoder, target, independent.sequences, reference)
        cell.report(
            "reward_independent", Observations([f"draw-{i}" for i in range(len(usual))], usual, [1] * len(usual))
        )
    if claim == "exact" or (claim == "heuristic" and not valued):  # another law has another energy
        cell.report("energy_excess", mixing.excess(later.mean(1), -reference, tokens))
    if effective == effective:  # a chain that stands still has none
        cell.report("ess_per_s", Estimate(effective / taken, n=later.size))
        cell.report("ess_per_call", Estimate(effective / spent.calls, n=later.size))
    cell.report("target_calls", Estimate(spent.calls, n=1))
    cell.report("target_positions", Estimate(spent.positions, n=1))
    work = mixing.flops(target, spent)
    cell.report("flops", Estimate(work, n=1))
    cell.report("mfu", Estimate(work / taken / mixing.peak_flops(target.device, target.dtype), n=1))
