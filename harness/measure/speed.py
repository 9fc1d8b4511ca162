"""Speed as paired ratios: decoders run interleaved over the same prompts in one process, mirrored (A B B A, B A A B).

A pair's two runs of each decoder see the same drift of clocks and neighbours, so the ratio within the pair does not;
the median over pairs does not see a stall. Every decoder makes the same number of tokens, stop tokens ignored, unless
answers are to end where they end.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

from decodathlon.harness import law
from decodathlon.harness.decoder import Completion, Decoder, Limits, Sampler
from decodathlon.harness.measure import statistics
from decodathlon.harness.measure.cycles import Traced, longest, loops, seconds
from decodathlon.harness.measure.observations import Observations
from decodathlon.harness.measure.statistics import Estimate
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.targets.base import Target

WARM_UP_TOKENS = 4
#: A second run over the same prompts is warmer, but not by so much.
SUSPICIOUS_GAIN = 2.0
#: Of the batches, how many must have a time per further token, or none is given.
SOUND_SHARE = 0.8


@dataclass
class Pair:
    """One batch of prompts: seconds of the two runs of each decoder, and what the candidate answered."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    #: Seconds to the candidate's first token, and of the prefill alone.
    first: float = math.nan
    prefill: float = math.nan
    answers: dict[str, list[list[int]]] = field(default_factory=dict)
    prompts: Sequence[Sequence[int]] = ()
    #: Whether both runs of every decoder, which have the same seed, gave the same tokens.
    repeatable: bool = True

    def log_ratio(self, rival: str) -> float:
        """log of (rival's time / candidate's time), each the geometric mean of its two runs."""
        mean = {k: sum(map(math.log, v)) / len(v) for k, v in self.seconds.items()}
        return mean[rival] - mean["candidate"]


def timed(target: Target, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of wall-clock and the result; on CUDA the device is idle before and after."""
    on_gpu = getattr(target.device, "type", "cpu") == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    result = work()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - begin, result


def generate(
    decoder: Decoder, target: Target, prompts: Sequence[Sequence[int]], tokens: int, seed: int, *,
    trace: bool = False, ending: bool = False,
) -> list[Completion]:  # fmt: skip
    """Exactly `tokens` new tokens per prompt, or with `ending` at most so many; with `trace` the cycles of a decoder
    that drafts are kept.

    Raises:
        ValueError: the decoder returned another number of completions or tokens, or a token outside the vocabulary.
    """
    limits = Limits(tokens, ignore_eos=not ending, trace=trace)
    answers = decoder.generate(target, prompts, limits, RowRandom(seed, range(len(prompts))))
    if len(answers) != len(prompts):
        raise ValueError(f"{decoder.spec} returned {len(answers)} completions for {len(prompts)} prompts")
    for answer in answers:
        ended = (
            ending and len(answer.tokens) <= tokens and answer.tokens[-1:] and answer.tokens[-1] in target.stop_tokens
        )
        if len(answer.tokens) != tokens and not ended:
            raise ValueError(f"{decoder.spec} returned {len(answer.tokens)} tokens where exactly {tokens} were due")
        if answer.log_prob is not None and not math.isfinite(answer.log_prob):
            raise ValueError(f"{decoder.spec} drew a token whose probability is {answer.log_prob} or NaN")
        if not all(0 <= token < target.vocab_size for token in answer.tokens):
            raise ValueError(f"{decoder.spec} returned a token outside the vocabulary of {target.vocab_size}")
    return answers


def measure(
    decoder: Decoder,
    rivals: Mapping[str, Decoder],
    target: Target,
    batches: Iterable[Sequence[Sequence[int]]],
    tokens: int,
    seed: int,
    *,
    ending: bool = False,
) -> Iterator[Pair]:
    """One `Pair` per batch of prompts, as soon as it is measured; the first batch also warms everybody up. With
    `ending` answers end at their stop token."""
    runners = {"candidate": decoder, **rivals}
    # On a GPU the warm-up is as long as what is timed, so that every graph has been captured.
    warm_up = tokens if target.device.type == "cuda" else min(tokens, WARM_UP_TOKENS)
    for number, prompts in enumerate(batches):
        if number == 0:
            for runner in runners.values():
                _check_law(runner, target, prompts)
                generate(runner, target, prompts, warm_up, seed)
        pair = Pair(prompts=prompts)
        # Who runs first, and who runs twice in a row in the middle, changes from pair to pair: either place has its own
        # speed (caches are cold after another engine, warm after oneself), and a fixed order would favour one decoder.
        turn = number % len(runners)
        forth = [*list(runners)[turn:], *list(runners)[:turn]]
        for name in [*forth, *reversed(forth)]:
            work = partial(generate, runners[name], target, prompts, tokens, seed + number, ending=ending)
            seconds, answers = timed(target, work)
            pair.seconds.setdefault(name, []).append(seconds)
            tokens_now = [a.tokens for a in answers]
            pair.repeatable &= pair.answers.setdefault(name, tokens_now) == tokens_now
        pair.first, _ = timed(target, partial(generate, decoder, target, prompts, 1, seed + number))
        pair.prefill, _ = timed(target, partial(target.open, prompts, capacity=max(map(len, prompts)) + tokens))
        yield pair


@torch.no_grad()
def _check_law(decoder: Decoder, target: Target, prompts: Sequence[Sequence[int]]) -> None:
    """
    Raises:
        ValueError: a sampler's law is none (`draw` would renormalise it silently), or the model's logits have NaN.
    """
    logits = target.open(prompts, capacity=max(map(len, prompts)) + 1).next_logits
    stated = decoder.shape(logits) if isinstance(decoder, Sampler) and decoder.stateless else law.one_hot(logits)
    law.check(stated, logits, decoder.spec)


def metrics(pairs: Sequence[Pair], tokens: int) -> dict[str, Estimate | Observations]:
    """Absolute speeds of the candidate, by metric name; medians over pairs."""
    rows, names = len(pairs[0].prompts), _names(pairs)
    whole = [sum(p.seconds["candidate"]) / len(p.seconds["candidate"]) for p in pairs]
    lengths = [[len(a) for a in p.answers.get("candidate", [])] or [tokens] * rows for p in pairs]
    steady: dict[str, Estimate | Observations] = {}
    later = [(n, t - p.first, a) for n, t, p, a in zip(names, whole, pairs, lengths, strict=True) if max(a) > 1]
    # who makes many tokens at once may need as long for one of them; few such batches are left out
    sound = [x for x in later if x[1] > 0]
    if len(sound) > SOUND_SHARE * len(later):
        later, some = sound, [name for name, _, _ in sound]
        steady["tokens_per_s"] = Observations.each(some, [(sum(a) - len(a)) / t for _, t, a in later])
        steady["tpot_s"] = Observations.each(some, [t / (max(a) - 1) for _, t, a in later])
    return {
        **steady,
        "ttft_s": Observations.each(names, [p.first for p in pairs]),
        "prefill_tokens_per_s": Observations.each(names, [sum(map(len, p.prompts)) / p.prefill for p in pairs]),
        "generated_tokens": Estimate(float(2 * sum(map(sum, lengths))), n=len(pairs)),
    }


def ratio(pairs: Sequence[Pair], rival: str, *, leaving: Sequence[Pair] = ()) -> Observations | None:
    """Rival's time over the candidate's, without some pairs; None where those are all."""
    left_out = {id(pair) for pair in leaving}
    some = [(name, pair) for name, pair in zip(_names(pairs), pairs, strict=True) if id(pair) not in left_out]
    if not some:
        return None
    return Observations.each([name for name, _ in some], [p.log_ratio(rival) for _, p in some], scale="exp")


def decode_ratio(pairs: Sequence[Pair], rival: str) -> Observations | None:
    """As `ratio`, the prompt apart: the same prefill, the candidate's, is taken off both sides, so the rival must have
    the candidate's engine."""
    found = []
    for name, pair in zip(_names(pairs), pairs, strict=True):
        theirs, ours = ([s - pair.prefill for s in pair.seconds[side]] for side in (rival, "candidate"))
        if min(*theirs, *ours) > 0:
            log = sum(map(math.log, theirs)) / len(theirs) - sum(map(math.log, ours)) / len(ours)
            found.append((name, log))
    if not found:
        return None
    return Observations.each([name for name, _ in found], [log for _, log in found], scale="exp")


def lengths_ratio(pairs: Sequence[Pair], rival: str) -> Observations:
    """All of the candidate's tokens over all of the rival's."""
    ours, theirs = ([float(sum(map(len, p.answers[side]))) for p in pairs] for side in ("candidate", rival))
    return Observations(_names(pairs), ours, theirs)


def token_ratio(pairs: Sequence[Pair], rival: str) -> Observations:
    """As `ratio`, by token: where answers end by themselves, texts may differ in length."""
    longer = [sum(map(len, p.answers["candidate"])) / sum(map(len, p.answers[rival])) for p in pairs]
    logs = [p.log_ratio(rival) + math.log(n) for p, n in zip(pairs, longer, strict=True)]
    return Observations.each(_names(pairs), logs, scale="exp")


def remarks(pairs: Sequence[Pair]) -> list[str]:
    """What looks wrong about the candidate's runs."""
    found = []
    if not all(pair.repeatable for pair in pairs):
        found.append("the same seed gave other tokens the second time")
    gains = [p.seconds["candidate"][0] / p.seconds["candidate"][1] for p in pairs]
    several = [p for p in pairs if max(map(len, p.answers.get("candidate", [[0, 0]]))) > 1]
    if short := sum(p.first >= sum(p.seconds["candidate"]) / 2 for p in several):
        found.append(
            f"one token took as long as all of them in {short} of {len(several)} batches, which have no time per "
            "further token"
        )
    if min(gains) > SUSPICIOUS_GAIN:  # every time: a neighbour on the machine disturbs one run, not all the first ones
        gain = statistics.median(gains).value
        found.append(f"the second run over the same prompts was {gain:.1f} times as fast: does it remember answers?")
    return found


def _names(pairs: Sequence[Pair]) -> list[str]:
    """A pair is named by its place and its prompts: in another run it is the same one only on the same prompts."""
    prompts = [repr([list(p) for p in pair.prompts]).encode() for pair in pairs]
    return [f"pair-{i}-{hashlib.blake2b(text, digest_size=4).hexdigest()}" for i, text in enumerate(prompts)]


def traced(
    decoder: Decoder, target: Target, pairs: Sequence[Pair], tokens: int, seed: int, *, ending: bool = False
) -> list[Traced]:
    """The cycles of a decoder that drafts, in a further run per pair, which is not timed."""
    found = []
    for i, (name, pair) in enumerate(zip(_names(pairs), pairs, strict=True)):
        answers = generate(decoder, target, pair.prompts, tokens, seed + i, trace=True, ending=ending)
        found += [Traced(f"{name}-row-{b}", a.tokens, a.trace) for b, a in enumerate(answers)]
    return found


def predicted(pairs: Sequence[Pair], answers: Sequence[Traced]) -> Observations | None:
    """Greedy search's seconds behind the prompt over those of all cycles, pair by pair; `answers` are those of
    `traced`. None where no pair has both."""
    found, begin = [], 0
    for name, pair in zip(_names(pairs), pairs, strict=True):
        mine = answers[begin : begin + len(pair.prompts)]
        begin += len(mine)
        spent, greedy = sum(map(seconds, longest(mine).values())), pair.seconds.get("ratio_to_greedy")
        if spent and greedy and (alone := sum(greedy) / len(greedy) - pair.prefill) > 0:
            found.append((name, math.log(alone / spent)))
    if not found:
        return None
    return Observations.each([name for name, _ in found], [log for _, log in found], scale="exp")


def looping(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs in which a text of the candidate loops."""
    return [pair for pair in pairs if any(loops(tokens) for tokens in pair.answers["candidate"])]


def sampler_shares(
    sampler: Sampler, target: Target, pairs: Sequence[Pair], tokens: int, seed: int, *, ending: bool = False
) -> Observations | None:
    """What the draws (law and sampling) take of the time from the first token to the last, in a further run per pair.

    Draws that are repeated by themselves find the logits in a warm cache and would look cheaper than they are.

    Returns:
        None where it has a loop of its own, which does not draw by `choose`.
    """
    shares: list[float] = []
    for i, pair in enumerate(pairs):
        share = _sampler_share(sampler, target, pair.prompts, tokens, seed + i, ending)
        if share is None:
            return None
        shares.append(share)
    return Observations.each(_names(pairs), shares)


def _sampler_share(
    sampler: Sampler, target: Target, prompts: Sequence[Sequence[int]], tokens: int, seed: int, ending: bool
) -> float | None:
    spent: list[float] = []
    ended: list[float] = []
    drawn = sampler.choose

    def watched(*args: Any) -> Any:
        seconds, result = timed(target, partial(drawn, *args))
        spent.append(seconds)
        ended.append(time.perf_counter())
        return result

    object.__setattr__(sampler, "choose", watched)
    try:
        generate(sampler, target, prompts, tokens, seed, ending=ending)
    finally:
        object.__delattr__(sampler, "choose")
    return sum(spent[1:]) / (ended[-1] - ended[0]) if len(ended) > 1 else None


class Divergence(NamedTuple):
    """Where a text leaves that of greedy search, and the gap between the two greatest logits there."""

    pair: int
    row: int
    position: int
    top2_gap: float


@torch.no_grad()
def divergences(target: Target, pairs: Sequence[Pair], reference: str) -> list[Divergence]:
    """The first difference of every candidate's text from the reference rival's.

    A gap within the rounding of the logits says that both are greedy; a wide gap says that one of them is wrong.
    """
    found = []
    for number, pair in enumerate(pairs):
        for row, (ours, theirs) in enumerate(zip(pair.answers["candidate"], pair.answers[reference], strict=True)):
            place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
            if place is None and len(ours) != len(theirs):
                place = min(len(ours), len(theirs))
            if place is not None:
                read = [*pair.prompts[row], *theirs[:place]]
                top = target.open([read], capacity=len(read)).next_logits[0].topk(2).values
                found.append(Divergence(number, row, place, float(top[0] - top[1])))
    return found
