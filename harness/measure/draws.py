"""Outcomes of a decoder on a target whose law is known: which law it claims, and what it drew, trial by trial."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from decodathlon.harness import law
from decodathlon.harness.candidates import CandidateSampler
from decodathlon.harness.chain import Chain
from decodathlon.harness.decoder import Decoder, Limits, Sampler
from decodathlon.harness.errors import RewardError, UnsupportedError
from decodathlon.harness.lazy import torch
from decodathlon.harness.measure import exactness, mixing
from decodathlon.harness.measure.statistics import Estimate
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.rewards import Answer, Tilted
from decodathlon.harness.targets import toy

if TYPE_CHECKING:
    from torch import Tensor

    from decodathlon.harness.targets.base import Target


#: Answers of a set of which an audit takes one.
SET = 4
#: Answers whose cycles are looked at, and what says where a cycle is, not what it did.
TRACED, PLACES = 50, {"position", "context", "nodes"}
#: Laws, and tokens of each, on which a shape is compared with its definition.
LAWS, TOKENS = 200, 64


class Mark(NamedTuple):
    """How far a trial was after some draws."""

    draws: int
    tvd: float
    #: Seconds that they took; of trials that run side by side each has its share.
    seconds: float


class Trial(NamedTuple):
    """What one trial drew."""

    #: (K + 1,) how often each outcome came; the last cell is what the law does not know.
    counts: exactness.Array
    #: Share of accepted moves, of a chain.
    accepted: float | None
    #: How far it was on the way.
    curve: tuple[Mark, ...] = ()


def claimed_law(decoder: Decoder, target: Target, length: int) -> Mapping[tuple[int, ...], float]:
    """The exact law over whole texts behind no prompt that a decoder claims on this target.

    What is `shaped` is enumerated by the decoder's definition where it has one, else by its own `shape` or, of one with
    a state, by its own `next_law`. What is `sharpened` is the law of its proposals times the tilt that it states.

    Raises:
        UnsupportedError: it claims a law that cannot be enumerated from what it states, or none.
    """
    claim, head = decoder.claim, beginning(target)
    if claim == "greedy-exact":
        return toy.law_of(target, head, length, law.one_hot)
    if claim == "exact":
        return toy.law_of(target, head, length)
    if claim == "shaped" and isinstance(decoder, Sampler):
        by_shape = isinstance(decoder, CandidateSampler) and type(decoder).shape is not Sampler.shape
        if not decoder.stateless and not by_shape:
            return _followed(decoder, target, length)
        return toy.law_of(target, head, length, _defined(decoder) if is_defined(decoder) else decoder.shape)
    if isinstance(decoder, Tilted) and claim in ("sharpened", "heuristic"):
        return _tilted(decoder, target, length)
    # For information: what a heuristic would have if it were exact.
    if claim == "heuristic" and isinstance(decoder, Chain):
        return toy.law_of(target, head, length)
    if claim == "heuristic" and isinstance(decoder, Sampler) and type(decoder).shape is not Sampler.shape:
        return toy.law_of(target, head, length, decoder.shape)
    raise UnsupportedError("a law that can be enumerated", f"it claims to be {claim} and does not state its law")


def is_defined(decoder: Decoder) -> bool:
    """Whether its law is known from elsewhere than its own code: of a shaped sampler, by a definition."""
    if decoder.claim == "shaped" and isinstance(decoder, Sampler):
        return type(decoder).definition is not Sampler.definition
    return True


@torch.no_grad()
def definition_gap(decoder: Decoder, target: Target, length: int) -> Estimate | None:
    """What can be said without a draw: the largest difference of a probability, over how many laws or texts.

    Of a shaped sampler between its `shape` and its definition, over laws of 64 tokens from flat to spiky, because on
    the four tokens of the audit's target a nucleus or the fifty likeliest tokens may cut nothing. Of a chain that
    states its transition matrix between the target's law of all texts and the same law after a step.
    """
    if isinstance(decoder, Chain):
        return _step_gap(decoder, target, length)
    if (
        not isinstance(decoder, Sampler)
        or decoder.claim != "shaped"
        or not decoder.stateless
        or not is_defined(decoder)
    ):
        return None
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(0.2, 6.0, LAWS, dtype=torch.float64)[:, None]
    logits = spread * torch.randn(LAWS, TOKENS, generator=generator, dtype=torch.float64)
    return Estimate(float((decoder.shape(logits).exp() - _defined(decoder)(logits).exp()).abs().max()), n=LAWS)


def _step_gap(chain: Chain, target: Target, length: int) -> Estimate | None:
    if chain.claim != "exact" or chain.burn_in:
        return None
    matrix = mixing.transitions(chain, target, length)
    if matrix is None:
        return None
    law = target.score(*mixing.all_texts(chain, target, length)).softmax(0)
    return Estimate(float((law @ matrix - law).abs().max()), n=len(law))


def _defined(decoder: Sampler) -> Callable[[Tensor], Tensor]:
    def shape(logits: Tensor) -> Tensor:
        rows = torch.tensor([decoder.definition(row) for row in logits.tolist()], dtype=torch.float64)
        return (rows / rows.sum(-1, keepdim=True)).log()

    return shape


def _tilted(decoder: Tilted, target: Target, length: int) -> Mapping[tuple[int, ...], float]:
    head = beginning(target)
    base = toy.law_of(target, head, length, decoder.shape)
    possible = {text: p for text, p in base.items() if p > 0}
    answers = [Answer(head, text, math.log(p), target) for text, p in possible.items()]
    tilt = decoder.log_tilt(answers)
    if not torch.allclose(tilt, decoder.log_tilt(answers)):
        raise RewardError(
            f"{decoder.spec}: the reward gave equal answers different values; it must depend on them alone"
        )
    log_law = torch.tensor([math.log(p) for p in possible.values()], dtype=torch.float64) + tilt
    return dict.fromkeys(base, 0.0) | dict(zip(possible, log_law.softmax(0).tolist(), strict=True))


def _followed(decoder: Sampler, target: Target, length: int) -> Mapping[tuple[int, ...], float]:
    """The law of a sampler with a state, which goes along every text; only where its law takes no random numbers."""
    if decoder.uniforms:
        raise UnsupportedError("a law that can be enumerated", "its state is random")
    head = beginning(target)
    found: dict[tuple[int, ...], float] = {}
    texts: list[tuple[tuple[int, ...], float, Any]] = [((), 1.0, decoder.start(1))]
    for place in range(length):
        grown = []
        for text, p, state in texts:
            logits = target.open([[*head, *text]], capacity=len(head) + length).next_logits
            log_probs, after = decoder.next_law(logits.clone(), state, torch.zeros(1, 0))
            for token, term in enumerate(log_probs[0].tolist()):
                longer = (*text, token)
                if token in target.stop_tokens or place + 1 == length:
                    found[longer] = p * math.exp(term)
                elif term > -math.inf:
                    advanced = decoder.advance(copy.deepcopy(after), torch.tensor([token]))
                    grown.append((longer, p * math.exp(term), advanced))
        texts = grown
    return found


def beginning(target: Target) -> list[int]:
    """What stands before the first token of a text."""
    return [] if target.start_token is None else [target.start_token]


def answers(decoder: Decoder, target: Target, draws: int, length: int, seed: int) -> list[tuple[int, ...]]:
    """Independent answers to the empty prompt; of what is spread over equal prompts on purpose one of each set."""
    rng, limits = RowRandom(seed, [f"draw-{i}" for i in range(draws)]), Limits(length)
    # A chain begins behind no prompt as it does for a user; what it puts there is part of what is audited.
    prompt = [] if isinstance(decoder, Chain) else beginning(target)
    if decoder.independent:
        return [tuple(a.tokens) for a in decoder.generate(target, [prompt] * draws, limits, rng)]
    found = []
    for i in range(draws):  # one of each set, every place in turn
        one = RowRandom(seed, [f"draw-{i}-{place}" for place in range(SET)])
        found.append(tuple(decoder.generate(target, [prompt] * SET, limits, one)[i % SET].tokens))
    return found


def untouched(decoder: Decoder, target: Target, length: int, seed: int) -> list[str]:
    """What a decoder that drafts counts in its cycles and was 0 in all of some answers: of that their law says nothing.

    `seeded` in texts too short for a second draft, say.
    """
    if not decoder.drafts:
        return []
    rng = RowRandom(seed, [f"draw-{i}" for i in range(TRACED)])
    found = decoder.generate(target, [beginning(target)] * TRACED, Limits(length, trace=True), rng)
    cycles = [cycle for answer in found for cycle in answer.trace]
    counts = {name for cycle in cycles for name, value in cycle.items() if isinstance(value, int)} - PLACES
    return sorted(name for name in counts if not any(cycle.get(name) for cycle in cycles))


def trials(
    decoder: Decoder, target: Target, known: Mapping[tuple[int, ...], float], count: int, draws: int, seed: int
) -> Iterator[Trial]:
    """So many trials of so many draws each; a chain draws one state after the other, all others answer by answer.

    A chain's target must have no stop tokens: every state is counted as a whole text.
    """
    length = max(map(len, known))
    if isinstance(decoder, Chain):
        yield from _walked(decoder, target, known, count, draws, seed, length)
        return
    for trial in range(count):
        rng = RowRandom(seed, [f"trial-{trial}-{i}" for i in range(draws)])
        began = time.perf_counter()
        found = decoder.generate(target, [beginning(target)] * draws, Limits(length), rng)
        taken = time.perf_counter() - began
        texts = [tuple(a.tokens) for a in found]
        curve = tuple(
            Mark(n, exactness.tvd(*exactness.counted(texts[:n], known)), taken * n / draws) for n in marks(draws)
        )
        yield Trial(exactness.counted(texts, known)[0], None, curve)


def marks(draws: int) -> list[int]:
    """Where the distance is looked at on the way: 10, 20, 50, 100 and so on, and at the end."""
    return [n for n in (d * 10**k for k in range(1, 7) for d in (1, 2, 5)) if n < draws] + [draws]


def _walked(
    chain: Chain,
    target: Target,
    known: Mapping[tuple[int, ...], float],
    count: int,
    draws: int,
    seed: int,
    length: int,
) -> Iterator[Trial]:
    """All trials side by side; the states that they start from are not counted."""
    rng = RowRandom(seed, [f"trial-{i}" for i in range(count)])
    place = target.vocab_size ** torch.arange(length - 1, -1, -1)
    codes = torch.empty(draws, count, dtype=torch.long)
    at, seconds = set(marks(draws)), {}
    with torch.inference_mode():
        walk = chain.walk(target, chain.heads(target, [[]] * count), Limits(length), rng, range(count))
        began = time.perf_counter()  # a burn-in counts
        next(walk)
        for i, state in enumerate(itertools.islice(walk, draws)):
            codes[i] = (state.tokens.cpu() * place).sum(1)
            if i + 1 in at:
                seconds[i + 1] = (time.perf_counter() - began) / count
        accepted = (state.accepted / draws).tolist()
    order = [int(sum(t * int(p) for t, p in zip(text, place, strict=True))) for text in known]
    law_of_known = np.array([*known.values(), 0.0])

    def counted(trial: int, first: int) -> exactness.Array:
        counts = np.bincount(codes[:first, trial].numpy(), minlength=target.vocab_size**length)[order]
        return np.append(counts, 0).astype(np.float64)

    for trial in range(count):
        curve = tuple(Mark(n, exactness.tvd(counted(trial, n), law_of_known), taken) for n, taken in seconds.items())
        yield Trial(counted(trial, draws), accepted[trial], curve)
