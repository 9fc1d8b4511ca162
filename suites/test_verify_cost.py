"""Verify cost: what does it cost the model to read q tokens at once, against one?"""

from decodathlon import suite


@suite(
    "verify_cost",
    version=1,
    needs=["logits"],
    clocked=True,
    asks="What does it cost the model to read q tokens at once, against one?",
    of_target=True,
    table=["pass_s", "verify_cost"],
    protocol={
        "order": "each round reads all widths forth and back; which is first turns from round to round",
        "text": "behind a random text, one row, nothing kept; logits and the likeliest token behind each",
        "break_even": "a drafter that costs nothing needs as many tokens per cycle as the ratio says; any other more",
    },
    sizes={
        "smoke": {"context": 64, "rounds": 2},
        "quick": {"context": 256, "rounds": 12},
        "full": {"context": 1024, "rounds": 40},
    },
)
def test_verify_cost(cell):
    from decodathlon.harness.measure import verify_cost
    from decodathlon.harness.measure.observations import Observations

    found = []
    measured = verify_cost.rounds(cell.target, cell.sizes["context"], cell.sizes["rounds"], cell.seed)
    for _, seconds in zip(cell.until_late(range(cell.sizes["rounds"])), measured, strict=False):
        cell.sample(f"round-{len(found)}", seconds={str(q): s for q, s in seconds.items()})
        found.append(seconds)
    cell.report("pass_s", Observations.each([f"round-{i}" for i in range(len(found))], [r[1] for r in found]))
    for width, ratio in verify_cost.ratios(found).items():
        cell.report(f"verify_cost({width})", ratio)
