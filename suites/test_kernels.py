"""Kernels: what does a step of our own GPU operations take, beside the same in plain torch? Timed on a GPU only.

No kernel is timed that does not draw what its definition draws. Each round starts with the cache flushed and ends when
the device is idle; `nothing` is the same around an empty launch, the least that any of them can take.
"""

from pathlib import Path

import pytest

from decodathlon.harness.suite import timed

kernels = timed("kernels", version=1, asks="What does a step of our own GPU operations take?", table=["kernel_s"])
pytestmark = pytest.mark.skipif(not Path("/dev/nvidiactl").exists(), reason="kernels are timed on a GPU")
ROUNDS = 200


@kernels
def test_nothing(benchmark):
    """An empty launch."""
    from decodathlon.harness.measure import kernels

    benchmark.pedantic(*kernels.nothing(), rounds=ROUNDS)


@kernels
@pytest.mark.parametrize("form", ["fused", "eager"])
@pytest.mark.parametrize("cut", ["none", "top_k", "top_p", "min_p"])
def test_sample(benchmark, cut, form):
    """One draw for 4 rows over a vocabulary of 151,936."""
    from decodathlon.harness import law
    from decodathlon.harness.measure import kernels
    from decodathlon.kernels.sample import dispatch, reference

    settings = {"top_k": 50} if cut == "top_k" else {"top_p": 0.95} if cut == "top_p" else {}
    settings |= {"min_p": 0.05} if cut == "min_p" else {}
    logits, u = kernels.logits(), kernels.uniforms()
    key = reference.keys(u[:, 0])
    args = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings
    works = {
        "fused": lambda: dispatch.sample(logits, key, **args),
        "reference": lambda: reference.sample(logits, key, **args),
    }
    kernels.check(works)
    works["eager"] = lambda: law.draw(law.process(logits, **settings), u[:, 0])  # what it took the place of
    benchmark.pedantic(*kernels.replayed(works[form]), rounds=ROUNDS)


@kernels
@pytest.mark.parametrize("form", ["fused", "eager"])
def test_reservoir(benchmark, form):
    """One step of 32 slots and the 64 likeliest, for 4 rows over a vocabulary of 151,936."""
    from decodathlon.harness.measure import kernels
    from decodathlon.kernels.reservoir import dispatch, reference

    logits, u = kernels.logits(), kernels.uniforms(33)
    options = {"top_k": 64, "every": 1, "cross": False, "fresh": "one"}
    empty = reference.Reservoirs(*(part.to(logits.device) for part in reference.start(len(logits), 32)))
    _, state = dispatch.step(logits, empty, u, temperature=1.0, **options)
    works = {
        "fused": lambda: dispatch.step(logits, state, u, temperature=1.0, **options)[0],
        "eager": lambda: reference.pick(reference.step(logits, state, u[:, 1:], **options), u[:, 0]),
    }
    kernels.check(works)
    # the plain form asks the host whether scores are equal, and so is no graph
    benchmark.pedantic(*(kernels.replayed if form == "fused" else kernels.plain)(works[form]), rounds=ROUNDS)


def packed(weights, scheme):
    """A matrix in the planes of a scheme of packed weights, where the matrix is."""
    import torch

    from decodathlon.kernels.delta import reference

    bits = weights.flatten().view(torch.int16)
    known = reference.plan(reference.patterns(bits).cpu())
    if scheme == "fixed12":
        return reference.fixed12(bits, known)
    return reference.nested(bits, known)._replace(means=known.means.to(bits.device))


#: (rows, columns) of what a step of an 8B-shaped model multiplies by.
MATRICES = {"qkv": (6144, 4096), "gate-up": (28672, 4096), "down": (4096, 14336)}


@kernels
@pytest.mark.parametrize("form", ["bf16", "nested", "fixed12", "draft-5", "nested-read", "fixed12-read"])
@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize("matrix", MATRICES)
def test_product(benchmark, matrix, rows, form):
    """Rows of activations times a matrix: in bfloat16 by cuBLAS, decoded as it is read out of packed planes, and the
    planes only read."""
    from decodathlon.harness.measure import kernels
    from decodathlon.kernels.delta import dispatch, triton

    weights, x = kernels.matrix(*MATRICES[matrix]), kernels.matrix(rows, MATRICES[matrix][1], spread=1.0, seed=1)
    if form == "bf16":
        work = lambda: x @ weights.T  # noqa: E731
    else:
        planes = packed(weights, "fixed12" if form.startswith("fixed12") else "nested")
        bits = 5 if form == "draft-5" else 0
        work = triton.reading(planes) if form.endswith("-read") else lambda: dispatch.product(planes, x, bits)
        if form in ("nested", "fixed12"):
            kernels.check_product(work(), x, weights)
    benchmark.pedantic(*kernels.replayed(work), rounds=ROUNDS)


@kernels
@pytest.mark.parametrize("form", ["copy", "nested", "fixed12", "draft-5"])
@pytest.mark.parametrize("matrix", MATRICES)
def test_rebuild(benchmark, matrix, form):
    """A matrix out of its planes into memory; a copy of it in bfloat16 beside it."""
    import torch

    from decodathlon.harness.measure import kernels
    from decodathlon.kernels.delta import dispatch

    weights = kernels.matrix(*MATRICES[matrix])
    out = torch.empty_like(weights).flatten()
    if form == "copy":
        work = lambda: out.copy_(weights.flatten())  # noqa: E731
    else:
        planes = packed(weights, "fixed12" if form == "fixed12" else "nested")
        work = {
            "draft-5": lambda: dispatch.draft(planes, 5, out),
        }.get(form, lambda: dispatch.rebuild(planes, out.view(torch.int16)))
        work()
        if form != "draft-5":
            assert torch.equal(out.view(torch.int16), weights.flatten().view(torch.int16)), "it is not the matrix"
    benchmark.pedantic(*kernels.replayed(work), rounds=ROUNDS)
