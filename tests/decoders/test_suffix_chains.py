"""QUEST, QAlign and several tries: kernels enumerated from the decoders' own functions, laws, codes, bad rewards."""

import math
from dataclasses import replace

import pytest
import torch

from decodathlon import Limits, RowRandom
from decodathlon.decoders.mcmc.writing import Desk, code_of
from decodathlon.harness import decoder as decoders
from decodathlon.harness.errors import RewardError, SpecError, UnsupportedError
from decodathlon.harness.measure import draws, exactness
from decodathlon.harness.registry import load_builtins, registry
from decodathlon.harness.rewards import Answer, reward
from decodathlon.harness.targets import toy

load_builtins()
LENGTH = 3


@pytest.fixture(scope="module")
def lm():
    return toy.enumerable_lm()


@pytest.fixture(scope="module")
def texts(lm):
    """Every answer of up to three tokens, padded with its stop token: (40, 1 + 3)."""
    law = toy.law_of(lm, [lm.start_token], LENGTH)
    return torch.tensor([[lm.start_token, *t, *[t[-1]] * (LENGTH - len(t))] for t in law])


def single_try_kernel(chain, target, texts):
    """From every answer to every other: all places to cut, the suffix drawn, accepted or not."""
    state = chain.begin(target, texts, 1, stops=target.stop_tokens)
    M = len(texts)
    kernel = torch.zeros(M, M, dtype=torch.float64)
    lengths, tokens, terms = state.pages.lengths, state.tokens, state.pages.terms
    for cut in range(LENGTH):
        weight = chain.log_weight(state, torch.full((M,), cut))
        same = (
            (tokens[:, None, :cut] == tokens[None, :, :cut]).all(-1) & (lengths > cut)[:, None] & (lengths > cut)[None]
        )
        suffix = terms[:, cut:].sum(-1)
        ratio = (weight[None] - weight[:, None]).clamp(max=0)
        kernel += torch.where(same, (suffix[None] + ratio).exp() / lengths[:, None], 0.0)
    kernel.fill_diagonal_(0.0)
    return kernel + torch.diag(1 - kernel.sum(1)), state


@pytest.mark.parametrize(
    "spec",
    ["qalign", "quest", "qalign[reward=length:2,beta=0.5]", "quest[reward=length:1,beta=2]", "qalign[temperature=0.6]"],
)
def test_the_kernel_is_balanced_and_its_law_the_stated_one(lm, texts, spec):
    chain = decoders.build(spec)
    kernel, state = single_try_kernel(chain, lm, texts)
    law = torch.tensor(list(draws.claimed_law(chain, lm, LENGTH).values()), dtype=torch.float64)
    assert torch.allclose(state.score.softmax(0), law, atol=1e-12)
    assert kernel.min() >= -1e-12
    flow = law[:, None] * kernel
    assert float((flow - flow.T).abs().max()) < 1e-12
    assert torch.allclose(torch.linalg.matrix_power(kernel, 1 << 20)[0], law, atol=1e-9)


def test_without_the_lengths_or_with_mean_log_probabilities_the_law_is_another(lm, texts):
    class NoLengths(type(decoders.build("qalign"))):
        def log_weight(self, state, cut):
            return super().log_weight(state, cut) + state.pages.lengths.double().log()

    class Mean(type(decoders.build("quest"))):
        def log_weight(self, state, cut):
            behind = torch.arange(LENGTH) >= cut[:, None]
            mean = (state.pages.terms * behind).sum(-1) / (state.pages.lengths - cut).clamp(min=1)
            return state.score - mean - state.pages.lengths.double().log()

    for chain in (NoLengths(reward="length:2"), Mean()):
        kernel, state = single_try_kernel(chain, lm, texts)
        stationary = torch.linalg.matrix_power(kernel, 1 << 20)[0]
        assert 0.5 * float((stationary - state.score.softmax(0)).abs().sum()) > 0.05


def test_a_constant_reward_leaves_lengths_and_the_models_law(lm, texts):
    """Acceptance is min(1, |y| / |y'|): length:N is constant where all texts are as long, log-power at beta large."""
    chain = decoders.build("qalign[beta=1000000]")
    kernel, state = single_try_kernel(chain, lm, texts)
    law = torch.tensor(list(toy.law_of(lm, [lm.start_token], LENGTH).values()), dtype=torch.float64)
    assert torch.allclose(torch.linalg.matrix_power(kernel, 1 << 20)[0], law, atol=1e-5)
    weights = chain.log_weight(state, torch.zeros(len(texts), dtype=torch.long))
    assert torch.allclose(weights, -state.pages.lengths.double().log(), atol=1e-4)


def test_a_forced_end_is_no_factor(lm, texts):
    """An answer cut off at the most tokens has the probability of its tokens alone, and all answers together have 1."""
    state = decoders.build("qalign").begin(lm, texts, 1, stops=lm.stop_tokens)
    assert float(state.pages.terms.sum(-1).exp().sum()) == pytest.approx(1.0)
    ended = torch.isin(state.tokens, torch.tensor(sorted(lm.stop_tokens))).any(-1)
    assert bool((state.pages.lengths[~ended] == LENGTH).all())
    assert bool((state.pages.terms[ended].exp().prod(-1) > 0).all())


@pytest.mark.parametrize(
    "spec",
    ["qalign", "quest", "mt-quest[tries=3]", "mt-quest[tries=3,diverse=false]", "mt-quest[tries=2,law=reward,beta=0.5]",
     "mt-quest[tries=5,reward=length:2,beta=0.4]"],
)  # fmt: skip
def test_the_law_stays_where_it_is(lm, texts, spec):
    """From exact draws one step leads to exact draws; with one per cent of the weights wrong it would not."""
    chain, N = decoders.build(spec), 30_000
    law = draws.claimed_law(chain, lm, LENGTH)
    p = torch.tensor(list(law.values()), dtype=torch.float64)
    u = RowRandom(3, [0]).uniforms(N, chain.uniforms(LENGTH) + 1)[0]
    begun = torch.searchsorted(p.cumsum(0), u[:, 0].contiguous()).clamp(max=len(p) - 1)
    state = chain.begin(lm, texts[begun], 1, stops=lm.stop_tokens)
    moved = chain.step(lm, state, u[:, 1:].contiguous())
    found = [tuple(t[:n]) for t, n in zip(moved.tokens.tolist(), moved.pages.lengths.tolist(), strict=True)]
    assert exactness.p_value(*exactness.counted(found, law)) > 1e-3
    assert 0.2 < float(moved.accepted.mean()) <= 1
    again = chain.begin(lm, moved.sequences, 1, stops=lm.stop_tokens)
    for name in ("terms", "below", "lengths"):
        assert torch.allclose(getattr(moved.pages, name), getattr(again.pages, name), atol=1e-9), name
    assert torch.allclose(moved.score, again.score, atol=1e-9)


def test_a_code_leads_back_to_its_answer(lm, texts):
    chain = decoders.build("mt-quest")
    state = chain.begin(lm, texts, 1, stops=lm.stop_tokens)
    for at in (0.001, 0.3, 0.999):
        codes = code_of(state.pages, torch.zeros(len(texts), dtype=torch.long), torch.full((len(texts),), at))
        desk = Desk(lm, chain.shape, lm.stop_tokens)
        none = torch.zeros(len(texts), dtype=torch.long)
        written = desk.write(texts, none, torch.zeros(len(texts), LENGTH).double(), codes.double())
        assert torch.equal(written.tokens, state.tokens)
    order = torch.argsort(state.pages.below[:, 0])
    assert bool((codes[order].diff() >= 0).all()) or len(set(codes.tolist())) == len(texts)


def test_spread_tries_cover_the_law_more_evenly():
    """How many of eight tries begin with a spin up varies less than among independent ones."""
    ring, chains = toy.Ising(4, 0.21), 400
    spread = {}
    for diverse in (True, False):
        chain = decoders.build(f"mt-quest[tries=8,diverse={str(diverse).lower()}]")
        rng = RowRandom(0, range(chains))
        state = next(chain.walk(ring, [[]] * chains, Limits(4), rng, range(chains)))
        cut, u = torch.zeros(chains, dtype=torch.long), rng.uniforms(8, 6)
        codes = chain._lattice(state, cut, u[:, 0, 5]) if diverse else u[:, :, 4]
        tries = chain.written(ring, state, cut, codes, u[:, :, :4].contiguous())
        spread[diverse] = float(tries.tokens.view(chains, 8, 4)[:, :, 0].double().sum(1).var())
    assert spread[False] == pytest.approx(2.0, rel=0.3)
    assert spread[True] < 0.5


def test_what_was_read_is_not_read_again(lm):
    """Of two neighbouring texts only what differs is read; the logits are those of a fresh context."""
    desk = Desk(lm, lambda logits: logits.log_softmax(-1), lm.stop_tokens)
    first = torch.tensor([[0, 2, 3, 2, 2, 3], [0, 3, 3, 3, 2, 2]])
    desk._take_up(first, torch.tensor([6, 5]))
    before = lm.spent.positions
    second = first.clone()
    second[0, 4] = 3
    desk._take_up(second, torch.tensor([5, 5]))
    assert lm.spent.positions - before == 2, "one token per row"
    fresh = lm.open([second[0, :5].tolist(), second[1, :5].tolist()], capacity=6)
    assert torch.allclose(desk._opened.next_logits, fresh.next_logits, atol=1e-9)


def test_a_context_goes_back(lm):
    context = lm.open([[0, 2, 3], [0, 3, 3]], capacity=8)
    context.rewind([2, 3])
    with pytest.raises(RuntimeError, match="rewind"):
        _ = context.next_logits
    context.extend(torch.tensor([[2], [3]]))
    context.keep(1)
    fresh = lm.open([[0, 2, 2], [0, 3, 3, 3]], capacity=8)
    assert torch.allclose(context.next_logits, fresh.next_logits, atol=1e-9)
    with pytest.raises(ValueError, match="cannot go back"):
        context.rewind([9, 1])


@pytest.fixture
def own():
    """Rewards of a user's own, for one test."""
    before = dict(registry.entries)
    yield
    registry.entries.clear()
    registry.entries.update(before)


def test_a_reward_of_ones_own_and_what_can_be_wrong_with_it(lm, own):
    @reward("test-second-token")
    def second(answers):
        return [float(len(a.tokens) > 1 and a.tokens[1] == 2) for a in answers]

    @reward("test-nan")
    def nan(answers):
        return [math.nan] * len(answers)

    @reward("test-raises")
    def raises(answers):
        raise KeyError("no such judge")

    @reward("test-short")
    def short(answers):
        return [0.0]

    def answers(name):
        chain = decoders.build(f"qalign[reward={name},steps=30]")
        return chain.generate(lm, [[0]] * 3000, Limits(LENGTH), RowRandom(0, range(3000)))

    chain = decoders.build("qalign[reward=test-second-token]")
    law = draws.claimed_law(chain, lm, LENGTH)
    found = [tuple(a.tokens) for a in answers("test-second-token")]
    assert exactness.p_value(*exactness.counted(found, law)) > 1e-3
    with pytest.raises(RewardError, match="test-nan is nan"):
        answers("test-nan")
    with pytest.raises(RewardError, match="test-raises raised KeyError"):
        answers("test-raises")
    with pytest.raises(RewardError, match="1 values for 3000 answers"):
        answers("test-short")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("quest[reward=lenght:3]", "did you mean 'length'"),
        ("quest[reward=length]", "takes an argument"),
        ("quest[reward=length:long]", "not a whole number"),
        ("quest[reward=log-power:2]", "takes no argument"),
        ("quest[reward=model:./nowhere]", "no folder"),
        ("quest[beta=0]", "outside"),
        ("mt-quest[tries=0]", "outside"),
        ("smc-quest[particles=1]", "outside"),
    ],
)
def test_bad_parameters_are_refused_before_anything_is_loaded(spec, says):
    with pytest.raises(SpecError, match=says):
        decoders.build(spec)


def test_a_reward_that_reads_text_needs_a_tokenizer(tmp_path):
    with pytest.raises(UnsupportedError, match="text"):
        decoders.build(f"qalign[reward=model:{tmp_path}]").check(toy.Ising(4, 0.2))


def test_an_empty_answer_is_refused(lm):
    for spec in ("quest", "pncg", "smc-quest"):
        with pytest.raises(ValueError, match="at least 1"):
            decoders.build(spec).generate(lm, [[0]], Limits(0), RowRandom(0, [0]))


def test_prompts_of_different_lengths_do_not_touch_one_another(lm):
    for spec in ("qalign[steps=6]", "mt-quest[steps=4,tries=3]", "smc-quest[particles=4,gradient_moves=1]"):
        one = decoders.build(spec)
        together = one.generate(lm, [[0, 2], [0], [0, 3]], Limits(5), RowRandom(0, [1, 2, 3]))
        alone = one.generate(lm, [[0, 3]], Limits(5), RowRandom(0, [3]))
        assert together[2].tokens == alone[0].tokens, spec
        assert together[0].cost.target_calls > 0


def test_one_try_of_many_is_quest(lm, texts):
    """mt-quest with one try moves by the rule of QAlign."""
    one, plain = decoders.build("mt-quest[tries=1,diverse=false]"), decoders.build("qalign")
    u = RowRandom(0, [0]).uniforms(len(texts), plain.uniforms(LENGTH))[0]
    states = [c.step(lm, c.begin(lm, texts, 1, stops=lm.stop_tokens), u) for c in (one, plain)]
    assert torch.equal(states[0].sequences, states[1].sequences)


def test_moves_of_the_bridge_leave_the_law_alone(lm, texts):
    """p-NCG's exchange at a level between: from exact draws of the tempered law to exact draws."""
    bridge, N, level = decoders.build("smc-quest[reward=length:2,beta=0.5,alpha=64]"), 20_000, 0.4
    state = bridge.chain.begin(lm, texts, 1, stops=lm.stop_tokens)
    p = (state.log_prob + level * state.tilt).softmax(0)
    u = RowRandom(5, [0]).uniforms(N, LENGTH + 2)[0]
    begun = torch.searchsorted(p.cumsum(0), u[:, 0].contiguous()).clamp(max=len(p) - 1)
    started = bridge.chain.begin(lm, texts[begun], 1, stops=lm.stop_tokens)
    levels = torch.full((N,), level, dtype=torch.float64)
    started = replace(started, level=levels, score=started.log_prob + levels * started.tilt)
    moved = bridge._exchanged(lm, started, u[:, 1:].contiguous())
    law = dict(zip([tuple(t) for t in texts.tolist()], p.tolist(), strict=True))
    assert exactness.p_value(*exactness.counted([tuple(t) for t in moved.sequences.tolist()], law)) > 1e-3
    assert float((moved.tokens != started.tokens).any(-1).double().mean()) > 0.05, "it moves"


def test_levels_rise_as_far_as_the_particles_stay_effective(lm):
    bridge = decoders.build("smc-quest[beta=0.05,particles=64,ess=0.8]")
    (answer,) = bridge.generate(lm, [[0]], Limits(6), RowRandom(0, [0]))
    levels, shares = [t["level"] for t in answer.trace], [t["ess"] for t in answer.trace]
    assert levels == sorted(levels)
    assert levels[-1] == 1.0
    assert all(s == pytest.approx(0.8, abs=0.02) for s in shares[:-1])
    assert shares[-1] >= 0.8 - 1e-6
    assert len(levels) > 2


def test_an_answer_has_text_where_the_target_has_a_tokenizer(lm):
    assert Answer([0], [2, 1], -1.0, lm).text == "a"
    with pytest.raises(UnsupportedError, match="tokenizer"):
        _ = Answer([0], [1, 0], -1.0, toy.Ising(4, 0.2)).text
