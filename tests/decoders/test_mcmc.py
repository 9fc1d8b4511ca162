"""The Markov chains against their own kernels: enumerated from the decoders' functions, balanced to 1e-12."""

import itertools
from dataclasses import fields

import numpy as np
import pytest
import torch

from decodathlon import Limits, RowRandom
from decodathlon.decoders.mcmc import multiple_try
from decodathlon.decoders.mcmc.proposals import Distances, log_density
from decodathlon.harness import decoder as decoders
from decodathlon.harness.errors import SpecError, UnsupportedError
from decodathlon.harness.measure import mixing
from decodathlon.harness.targets import toy, transformers

WEIGHTS = ("lam1", "iw", "lb", "sqrt-pi", "pi")
TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def lm():
    return toy.enumerable_lm(vocabulary=4)


def everything(target, length):
    """Every sequence of so many free tokens behind the start token, if there is one: (M, L), and where they begin."""
    tokens = torch.tensor(list(itertools.product(range(target.vocab_size), repeat=length)))
    if target.start_token is None:
        return tokens, 0
    return torch.cat([torch.full((len(tokens), 1), target.start_token), tokens], 1), 1


def repeated(state, index):
    """The rows of a state in another order, some of them several times."""
    taken = {f.name: getattr(state, f.name) for f in fields(state)}
    return type(state)(**{k: v[index] if isinstance(v, torch.Tensor) else v for k, v in taken.items()})


def law_of(target, length):
    sequences, free = everything(target, length)
    return target.score(sequences, free).log_softmax(0).exp()


def with_rest(kernel):
    """A kernel of moves with what is left of each row on its diagonal."""
    kernel = kernel.clone()
    kernel.fill_diagonal_(0.0)
    kernel += torch.diag(1 - kernel.sum(1))
    return kernel


def imbalance(kernel, law):
    flow = law[:, None] * kernel
    return float((flow - flow.T).abs().max())


def all_at_once_kernel(chain, target, length):
    sequences, free = everything(target, length)
    M = len(sequences)
    state = chain.begin(target, sequences, free)
    x, y = torch.arange(M).repeat_interleave(M), torch.arange(M).repeat(M)
    table = chain.log_proposal(state)[x]
    there = log_density(table, state.tokens[y])
    ratio = chain.log_ratio(repeated(state, x), table, repeated(state, y))
    return with_rest((there + ratio.clamp(max=0)).exp().view(M, M)), there.exp().view(M, M)


TARGETS = {
    "ring-3": (lambda: toy.Ising(3, 0.42), 3),
    "ring-4": (lambda: toy.Ising(4, 1.5, 0.1), 4),
    "torus-2x2": (lambda: toy.Ising(4, 0.3, -0.2, rows=2), 4),
    "lm": (toy.enumerable_lm, 3),
}


@pytest.fixture(params=TARGETS)
def target_and_length(request):
    make, length = TARGETS[request.param]
    return make(), length


@pytest.mark.parametrize("spec", ["pncg", "pncg[p=1]", "pncg[alpha=0.5,label_term=false]", "dlp[alpha=20]"])
def test_all_at_once_is_in_detailed_balance(target_and_length, spec):
    target, length = target_and_length
    chain = decoders.build(spec)
    kernel, proposal = all_at_once_kernel(chain, target, length)
    assert torch.allclose(mixing.transitions(chain, target, length), kernel, rtol=0, atol=TOLERANCE)
    assert torch.allclose(proposal.sum(1), torch.ones(len(proposal), dtype=torch.float64), atol=1e-6)
    assert kernel.min() >= -1e-6
    assert imbalance(kernel, law_of(target, length)) < TOLERANCE
    # without the test the same proposals would have another law: this one can fail
    assert imbalance(with_rest(proposal), law_of(target, length)) > 1e-4


def test_single_scan_is_in_detailed_balance(target_and_length):
    target, length = target_and_length
    chain = decoders.build("pncg[scan=single]")
    sequences, free = everything(target, length)
    M, state = len(sequences), chain.begin(target, sequences, free)
    table, tokens = chain.log_single(state), state.tokens
    kernel = torch.zeros(M, M, dtype=torch.float64)
    for x, y in itertools.product(range(M), repeat=2):
        (turn,) = ((tokens[x] != tokens[y]).nonzero()[:, 0].tolist() or [None])[:1] if x != y else [None]
        if turn is None or (tokens[x] != tokens[y]).sum() != 1:
            continue
        there, back = table[x, turn, tokens[y, turn]].double(), table[y, turn, tokens[x, turn]].double()
        ratio = state.score[y] - state.score[x] + back - there
        kernel[x, y] = (there + ratio.clamp(max=0)).exp() / length
    assert imbalance(with_rest(kernel), law_of(target, length)) < TOLERANCE
    assert torch.allclose(mixing.transitions(chain, target, length), with_rest(kernel), rtol=0, atol=TOLERANCE)


def one_row_each(chain, target, length, rows=24_000, start=3):
    """Counts of where `rows` copies of one state go in one step."""
    sequences, free = everything(target, length)
    state = chain.begin(target, sequences[start : start + 1].repeat(rows, 1), free)
    u = RowRandom(0, [0]).uniforms(rows, chain.uniforms(length))[0]
    moved = chain.step(target, state, u)
    code = (moved.tokens * target.vocab_size ** torch.arange(length - 1, -1, -1)).sum(1)
    assert torch.allclose(moved.score, target.score(moved.sequences, free), atol=1e-5), (
        "the score goes with its sequence"
    )
    return torch.bincount(code, minlength=len(sequences)).double()


def agrees(counts, law):
    """Pearson's chi-square below its 0.999 quantile (Wilson and Hilferty), cells of less than five put together."""
    expected = law * counts.sum()
    small = expected < 5
    observed = torch.cat([counts[~small], counts[small].sum()[None]])
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    kept = expected > 0
    chi2 = float(((observed[kept] - expected[kept]) ** 2 / expected[kept]).sum())
    freedom = max(1, int(kept.sum()) - 1)
    return chi2 < freedom * (1 - 2 / (9 * freedom) + 3.09 * np.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize("spec", ["pncg", "pncg[p=1,alpha=64]", "dlp"])
def test_a_step_draws_from_the_kernel(spec, lm):
    for target, length in ((toy.Ising(4, 0.42), 4), (lm, 3)):
        chain = decoders.build(spec)
        kernel, proposal = all_at_once_kernel(chain, target, length)
        counts = one_row_each(chain, target, length)
        assert agrees(counts, kernel[3])
        assert not agrees(counts, proposal[3]), "it would see a missing test"


@pytest.mark.parametrize(
    "spec", ["gibbs", "gwg", "pncg", "pncg[scan=single]", "dlp", *(f"mt-pncg[weight={w},tries=3]" for w in WEIGHTS)]
)
def test_the_law_stays_where_it_is(spec, lm):
    """From exact samples one step leads to exact samples."""
    for target, length in ((toy.Ising(4, 0.42, 0.2), 4), (lm, 3)):
        chain, law = decoders.build(spec), law_of(target, length)
        sequences, free = everything(target, length)
        uniforms = RowRandom(1, [0]).uniforms(12_000, chain.uniforms(length) + 1)[0]
        begun = torch.searchsorted(law.cumsum(0), uniforms[:, 0].contiguous()).clamp(max=len(law) - 1)
        moved = chain.step(target, chain.begin(target, sequences[begun], free), uniforms[:, 1:])
        code = (moved.tokens * target.vocab_size ** torch.arange(length - 1, -1, -1)).sum(1)
        assert agrees(torch.bincount(code, minlength=len(law)).double(), law)
        assert 0 < float(moved.accepted.mean()) <= 1


def test_gibbs_goes_by_the_exact_conditionals(lm):
    """One site of one sweep against the law by enumeration."""
    for target, length in ((toy.Ising(3, 0.7, 0.1), 3), (lm, 2)):
        law = law_of(target, length).view([target.vocab_size] * length)
        counts = one_row_each(decoders.build("gibbs"), target, length, start=1)
        tokens = everything(target, length)[0][1, -length:].tolist()
        expected, V = torch.ones(1, dtype=torch.float64), target.vocab_size
        # left to right: site i given the new tokens before it and the old ones behind it
        expected = {(): 1.0}
        for place in range(length):
            grown = {}
            for beginning, p in expected.items():
                conditional = law[(*beginning, slice(None), *tokens[place + 1 :])]
                for v in range(V):
                    grown[(*beginning, v)] = p * float(conditional[v] / conditional.sum())
            expected = grown
        assert agrees(counts, torch.tensor(list(expected.values()), dtype=torch.float64))


@pytest.mark.parametrize("weight", WEIGHTS)
def test_one_try_is_plain_metropolis(weight, target_and_length):
    target, length = target_and_length
    many, plain = decoders.build(f"mt-pncg[weight={weight},tries=1]"), decoders.build("pncg")
    sequences, free = everything(target, length)
    M, state = len(sequences), many.begin(target, sequences, free)
    x, y = torch.arange(M).repeat_interleave(M), torch.arange(M).repeat(M)
    one, other = repeated(state, x), repeated(state, y)
    table, back = many.log_proposal(one), many.log_proposal(other)
    weights = many.log_weights(target, one, table, other.tokens[:, None])
    first = torch.zeros(M * M, dtype=torch.long)
    ratio = many.log_ratio_of(target, one, table, weights, first, other, back, one.tokens[:, None])
    assert torch.allclose(ratio, plain.log_ratio(one, table, other), atol=1e-9)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("make", [lambda: toy.Ising(3, 0.42), lambda: toy.Ising(3, 1.5, 0.1)])
def test_two_tries_are_in_detailed_balance(weight, make):
    """Both tries, the choice and the reference enumerated: M^3 * 2 paths from each of the M = 8 states."""
    target, chain = make(), decoders.build(f"mt-pncg[weight={weight},tries=2,alpha=5.8,p=1]")
    sequences, free = everything(target, 3)
    M, state = len(sequences), chain.begin(target, sequences, free)
    x, a, b, c, z = (t.flatten() for t in torch.meshgrid(*[torch.arange(n) for n in (M, M, M, 2, M)], indexing="ij"))
    y = torch.where(c == 0, a, b)
    one, other = repeated(state, x), repeated(state, y)
    table, back = chain.log_proposal(one), chain.log_proposal(other)
    tries = torch.stack([state.tokens[a], state.tokens[b]], 1)
    weights = chain.log_weights(target, one, table, tries)
    references = torch.stack([state.tokens[z], one.tokens], 1)
    ratio = chain.log_ratio_of(target, one, table, weights, c, other, back, references)
    log_path = log_density(table, tries[:, 0]) + log_density(table, tries[:, 1]) + log_density(back, references[:, 0])
    log_path = log_path + weights.log_softmax(1).gather(1, c[:, None])[:, 0] + ratio.clamp(max=0)
    kernel = torch.zeros(M, M, dtype=torch.float64).index_put_((x, y), log_path.exp(), accumulate=True)
    assert imbalance(with_rest(kernel), law_of(target, 3)) < TOLERANCE
    assert torch.allclose(mixing.transitions(chain, target, 3), with_rest(kernel), rtol=0, atol=TOLERANCE)
    forgotten = (log_path - ratio.clamp(max=0)).exp()
    naive = torch.zeros(M, M, dtype=torch.float64).index_put_((x, y), forgotten, accumulate=True)
    assert torch.allclose(naive.sum(1), torch.ones(M, dtype=torch.float64)), "every path was enumerated"
    assert imbalance(with_rest(naive), law_of(target, 3)) > 1e-4


@pytest.mark.parametrize(
    "spec",
    ["gibbs", "gwg", "dula", "dlp", "pncg[scan=single]", *(f"mt-pncg[weight={w},tries=3,alpha=8]" for w in WEIGHTS)],
)
def test_a_step_draws_from_the_matrix_that_the_chain_states(spec, lm):
    for target, length in ((toy.Ising(4, 0.42, 0.2), 4), (lm, 2)):
        chain, law = decoders.build(spec), law_of(target, length)
        matrix = mixing.transitions(chain, target, length)
        assert torch.allclose(matrix.sum(1), torch.ones(len(law), dtype=torch.float64))
        counts = one_row_each(chain, target, length)
        assert agrees(counts, matrix[3])
        assert not agrees(counts, matrix[2]), "it would see another row"
        if spec == "dula":
            assert float((law @ matrix - law).abs().max()) > 1e-3
        else:
            assert torch.allclose(law @ matrix, law, rtol=0, atol=TOLERANCE)
        if spec not in ("dula", "gibbs"):  # a sweep leaves the law alone and is not in detailed balance
            assert imbalance(matrix, law) < TOLERANCE


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_merged_sums_of_tries_stand_for_all_of_them(weight, beta, monkeypatch):
    target, chain = toy.Ising(4, beta), decoders.build(f"mt-pncg[weight={weight},tries=5,alpha=0.5]")
    exact = mixing.transitions(chain, target, 4)
    monkeypatch.setattr(multiple_try, "MOST_SUMS", 1)
    merged = mixing.transitions(chain, target, 4)
    assert not torch.equal(exact, merged), "3,876 sums are more than one"
    assert mixing.gap(merged) == pytest.approx(mixing.gap(exact), rel=1e-4)
    assert imbalance(merged, law_of(target, 4)) < TOLERANCE


def test_without_a_test_the_law_is_another(lm):
    for target, length in ((toy.Ising(4, 0.42), 4), (lm, 3)):
        _, proposal = all_at_once_kernel(decoders.build("dula[alpha=64]"), target, length)
        stationary = torch.linalg.matrix_power(proposal, 500)[0]
        tvd = 0.5 * float((stationary - law_of(target, length)).abs().sum())
        assert tvd > 0.05


def test_the_label_term_moves_the_last_position(lm):
    sequences = torch.tensor([[0, 2, 3, 2]])
    _, blind = lm.local_changes(sequences, 1, label_term=False)
    _, seeing = lm.local_changes(sequences, 1)
    assert float(blind[0, -1].abs().max()) == 0.0, "nothing stands behind the last token"
    exact = torch.stack([lm.score(torch.tensor([[0, 2, 3, v]]), 1)[0] for v in range(4)]) - lm.score(sequences, 1)[0]
    assert torch.allclose(seeing[0, -1].double(), exact, atol=1e-6), "there it is not even an approximation"


def test_without_the_start_token_the_first_token_is_uniform(lm):
    sequences = torch.tensor([[2, 3, 2], [3, 3, 2]])
    expected = [float(lm.log_prob([s.tolist()], given=1)) for s in sequences]
    assert torch.allclose(lm.score(sequences, 0), torch.tensor(expected, dtype=torch.float64), atol=1e-6)
    score, change = lm.local_changes(sequences, 0)
    assert torch.allclose(score, lm.score(sequences, 0), atol=1e-6)
    assert change.shape == (2, 3, 4)


@pytest.mark.parametrize("p", [1, 2])
def test_distances_equal_the_naive_ones(p, monkeypatch):
    embeddings = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(0, 50, (3, 5), generator=torch.Generator().manual_seed(1))
    naive = (embeddings[None, None] - embeddings[tokens][:, :, None]).abs().pow(p).sum(-1)
    assert torch.allclose(Distances(embeddings, p)(tokens), naive, atol=1e-5)
    monkeypatch.setattr("decodathlon.decoders.mcmc.proposals.SMALL", 0)
    monkeypatch.setattr("decodathlon.decoders.mcmc.proposals.MOST_ROWS", 4)
    rows = Distances(embeddings, p)
    for _ in range(2):
        assert torch.allclose(rows(tokens), naive, atol=1e-5)


def test_an_answer_ends_at_its_stop_token_and_keeps_the_law(lm):
    """What stands behind the stop token is drawn and left out: the law of the rest is that of ordinary sampling."""
    N, length = 3000, 3
    prompts, rng = [[]] * N, RowRandom(0, range(N))
    answers = decoders.build("gibbs[steps=12]").generate(lm, prompts, Limits(length), rng)
    law = toy.law_of(lm, [lm.start_token], length)
    found = {tuple(a.tokens): 0.0 for a in answers}
    for a in answers:
        found[tuple(a.tokens)] += 1 / N
        assert a.stop_reason == ("stop" if a.tokens[-1] in lm.stop_tokens else "length")
    tvd = 0.5 * sum(abs(found.get(t, 0.0) - p) for t, p in law.items())
    assert set(found) <= set(law)
    assert tvd < 0.06


def test_prompts_of_different_lengths_have_chains_of_their_own(lm):
    answers = decoders.build("gwg[steps=5]").generate(lm, [[0, 2], [], [0, 3]], Limits(3), RowRandom(0, [1, 2, 3]))
    alone = decoders.build("gwg[steps=5]").generate(lm, [[0, 3]], Limits(3), RowRandom(0, [3]))
    assert answers[2].tokens == alone[0].tokens, "no row depends on its neighbours"


@pytest.mark.parametrize(
    "spec", ["pncg[alpha=0]", "pncg[alpha=-1]", "mt-pncg[tries=0]", "pncg[p=3]", "mt-pncg[weight=x]"]
)
def test_bad_parameters_are_refused(spec):
    with pytest.raises(SpecError):
        decoders.build(spec)


def test_what_a_target_lacks_is_named(lm):
    class NoGradient(toy.Ising):
        capabilities = frozenset({"logits", "energy"})

    with pytest.raises(UnsupportedError, match="gradient"):
        decoders.build("pncg").check(NoGradient(4, 0.4))

    class Large(toy.Ising):
        vocab_size = 50_000

    large = toy.Ising(4, 0.4)
    large.vocab_size = 50_000
    with pytest.raises(UnsupportedError, match="small vocabulary"):
        decoders.build("gibbs").check(large)


def test_a_burn_in_finds_a_step_size_and_keeps_it():
    from decodathlon.decoders.mcmc.gradient import SIZES

    target, chain = toy.Ising(8, 0.21), decoders.build("pncg[p=1,burn_in=100]")
    walk = chain.walk(target, [[]] * 20, Limits(8), RowRandom(0, range(20)), range(20))
    first, *_, last = itertools.islice(walk, 30)
    assert torch.equal(first.alpha, last.alpha), "it is frozen"
    assert set(first.alpha.tolist()) <= set(SIZES)
    assert float(first.alpha.min()) > 1.0, "small steps do not jump"
    assert float(first.accepted.sum()) == 0, "the burn-in does not count"
    alone = next(chain.walk(target, [[]], Limits(8), RowRandom(0, [7]), [0]))
    assert float(alone.alpha[0]) == float(first.alpha[7]), "no chain depends on its neighbours"


@pytest.mark.parametrize("spec", ["pncg[steps=1]", "mt-pncg[tries=32,steps=1]", "mt-pncg[tries=32,weight=lb,steps=1]"])
def test_no_table_of_all_embeddings_is_ever_held(spec):
    """B = 1, N = 20, V = 49152, E = 576: one tensor (N, V, E) alone would take 2.3 GB."""
    import transformers

    from decodathlon.harness.measure import memory
    from decodathlon.harness.targets.transformers import TransformersTarget

    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=64, num_hidden_layers=1, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    target, chain = TransformersTarget(transformers.LlamaForCausalLM(config), name="wide"), decoders.build(spec)
    before = memory.anonymous_bytes() if memory.SMAPS.exists() else None
    peak = memory.peak_bytes(lambda: chain.generate(target, [[0]], Limits(20), RowRandom(0, [0])), "cpu")
    if before is None or peak is None:
        pytest.skip("this system does not say how much memory is in use")
    assert peak - before < 1e9


@pytest.mark.parametrize("weight", WEIGHTS)
def test_what_is_split_for_memory_is_the_same_and_one_call(weight, lm, monkeypatch):
    chain = decoders.build(f"mt-pncg[tries=3,weight={weight},steps=4]")

    def answered():
        before = lm.spent.calls
        (answer,) = chain.generate(lm, [[0]], Limits(3), RowRandom(5, [0]))
        return answer.tokens, answer.cost, lm.spent.calls - before

    whole = answered()
    monkeypatch.setattr(multiple_try, "MOST_NUMBERS", 1)
    monkeypatch.setattr(transformers, "MOST_LOGITS", 1)
    assert answered() == whole
    assert whole[1].target_calls == whole[2] > 4
