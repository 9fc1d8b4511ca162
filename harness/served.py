"""Decoders on a server: how one does its work through answers that a server writes, where it shows no logits.

`@served` registers such a form under the decoder's name, beside the decoder itself; `Decoder.on` puts it in its place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from decodathlon.harness.decoder import Claim, Completion, Cost, Decoder, Info, Limits
from decodathlon.harness.errors import SpecError, UnsupportedError
from decodathlon.harness.lazy import torch
from decodathlon.harness.registry import registry

if TYPE_CHECKING:
    from decodathlon.harness.engines.dialects import Law
    from decodathlon.harness.randomness import RowRandom
    from decodathlon.harness.targets.base import Target
    from decodathlon.harness.targets.remote import RemoteTarget, Written

#: As `Decoder.generate`, of the decoder that it is given.
Form = Callable[[Any, Any, Sequence[Sequence[int]], Limits, Any], list[Completion]]
#: Seeds that servers take.
SEEDS = 1 << 31


@dataclass(frozen=True)
class Registered:
    """A form in the registry."""

    form: Form
    #: The law that a decoder asks the server for.
    law: Callable[[Any], Law]
    #: Raises UnsupportedError where these parameters, on this target, cannot be done.
    check: Callable[[Any, Any], None] | None
    #: Whether an answer is one request, so that it can be streamed.
    streams: bool
    #: Whether parts of answers are sent to be gone on with.
    goes_on: bool


def served(
    name: str,
    *,
    law: Callable[[Any], Law],
    check: Callable[[Any, Any], None] | None = None,
    streams: bool = False,
    goes_on: bool = False,
) -> Callable[[Form], Form]:
    """Register how the decoder `name` generates on a server.

    Args:
        law: of the decoder, the next-token law that its requests state; a server that does not follow it is refused.
        check: of the decoder and the target, raises UnsupportedError where more is missing.
        streams: an answer is one request that states the law and a seed.
        goes_on: beginnings of answers are sent for the server to go on with.
    """

    def register(form: Form) -> Form:
        registry.add("served", name, Registered(form, law, check, streams, goes_on), inspect.getfile(form))
        return form

    return register


class Served(Decoder):
    """A decoder in the form that it has on servers."""

    def __init__(self, decoder: Decoder, found: Registered) -> None:
        self.decoder, self._found = decoder, found

    @property
    def info(self) -> Info:  # type: ignore[override]
        return self.decoder.info

    @property
    def spec(self) -> str:
        return self.decoder.spec

    @property
    def claim(self) -> Claim:
        return self.decoder.claim

    @property
    def law(self) -> Law:
        """What its requests state."""
        return self._found.law(self.decoder)

    @property
    def streams(self) -> bool:
        return self._found.streams

    def params(self) -> dict[str, Any]:
        return self.decoder.params()

    def sources(self) -> list[Path]:
        return sorted({*self.decoder.sources(), Path(inspect.getfile(self._found.form)).resolve()})

    def check(self, target: Target) -> None:
        remote = cast("RemoteTarget", target)
        for part in sorted(self.law.stated - remote.parts):
            raise UnsupportedError(f"{part} on the server", f"{target.name} does not follow it when it is told to")
        if self._found.goes_on:
            needs("prefix", "it has answers gone on with", target)
        if self._found.check is not None:
            self._found.check(self.decoder, target)

    def remarks(self, target: Target) -> list[str]:
        cut = "tokens" if "log-probs" in target.capabilities else "words"
        told = f"what is kept of an answer goes back to the server as text, cut between {cut}"
        return [*self.decoder.remarks(target), *[told] * self._found.goes_on]

    def generate(
        self, target: Target, prompts: Sequence[Sequence[int]], limits: Limits, rng: RowRandom
    ) -> list[Completion]:
        self.check(target)
        return self._found.form(self.decoder, target, prompts, limits, rng)


def on(decoder: Decoder, target: Target) -> Decoder:
    """The decoder as it works on this target.

    Raises:
        UnsupportedError: it needs logits, and the target shows none.
    """
    if "logits" in target.capabilities or isinstance(decoder, Served):
        return decoder
    try:
        found: Registered = registry.get("served", decoder.info.name)
    except SpecError:
        raise UnsupportedError("logits", f"{target.name} is a server, which shows none") from None
    return Served(decoder, found)


def seed(rng: RowRandom, row: int) -> int:
    """A seed for one request, from the stream of its row."""
    return int(torch.randint(SEEDS, (1,), generator=rng.row(row)))


def add_cost(cost: Cost, one: Written) -> None:
    """What a server has computed for an answer, as far as it tells: a call per token, and what it read and wrote."""
    cost.target_calls += len(one.tokens)
    cost.target_positions += max(0, one.read + len(one.tokens) - 1)


def by_model(target: RemoteTarget, law: Law) -> bool:
    """Whether the log-probabilities that the server tells are those of the model's own law."""
    return "log-probs" in target.capabilities and (target.raw_log_probs or not law.stated)


def whole(log_probs: Sequence[float] | None) -> float | None:
    """Of an answer; None where the server tells none."""
    return None if log_probs is None else float(sum(log_probs))


def completion(
    target: RemoteTarget,
    tokens: Sequence[int],
    log_prob: float | None,
    cost: Cost,
    trace: Sequence[dict[str, Any]] = (),
) -> Completion:
    """An answer of a server, as decoders give theirs."""
    ended = bool(tokens) and tokens[-1] in target.stop_tokens
    text = target.decode(tokens)
    return Completion(list(tokens), "stop" if ended else "length", log_prob, text, cost, [dict(e) for e in trace])


def needs(capability: str, why: str, target: Target) -> None:
    """
    Raises:
        UnsupportedError: the server was not seen to have it.
    """
    if capability not in target.capabilities:
        raise UnsupportedError(f"{capability} of the server", f"{why}, and {target.name} was not seen to have it")
