"""What a server does with what it is told, found out by telling it.

Servers ignore parameters that they do not know, and a row of `top-p` that was drawn without any truncation would be a
wrong number. So each part of a law is asked for in its extreme, which leaves one token only: at a high temperature and
with several seeds the texts must all be that of greedy search, and without it they must differ. That an answer can be
gone on with is seen where the greedy text, cut, goes on as it did. What is not seen is `unsupported`, and says so.
Between its extremes a law is not looked at, but for `top_k=2`: what follows a parameter at one end is taken to follow
it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from decodathlon.harness.engines.client import EngineDownError, EngineError
from decodathlon.harness.engines.dialects import Law
from decodathlon.harness.errors import MissingError

if TYPE_CHECKING:
    from decodathlon.harness.targets.remote import RemoteTarget, Written

#: What is asked, how many tokens of it are looked at, by how many seeds, how hot.
QUESTION, TOKENS, SEEDS, HOT = "Tell me a short story about a place that nobody has seen.", 12, (1, 2, 3, 4), 1.5
#: A temperature at which a draw is greedy search, unless two tokens are as good as equal; and of how many tokens.
COLD, BEGINNING = 0.02, 4
#: Requests of that length in all, and seconds that are worth a line.
MOST, WORTH_SAYING = 30, 10.0
#: Draws of one token each by which `top_k=2` is looked at.
FEW = 8
#: The dialect of engines that we do not know.
UNKNOWN = "openai"
#: Each part of a law where it leaves only the likeliest token.
EXTREMES = {"top_k": 1, "top_p": 1e-4, "min_p": 1.0}
#: By how much log-probabilities of the same law may differ on an engine that rounds.
NEAR = 0.05


def probe(target: RemoteTarget, say: Callable[[str], None] = lambda text: None) -> None:
    """Set what the target can do, and remark on what it cannot.

    Args:
        say: hears how long it will take, where that is long.

    Raises:
        MissingError: it answers nothing that can be used.
    """
    prompt = _prompt(target)
    begun = time.monotonic()
    greedy = _texts(target, prompt, Law(temperature=0.0), (0,))[0]
    if (seconds := MOST * (time.monotonic() - begun)) > WORTH_SAYING:
        say(f"  that will take up to {seconds:.0f} s: it is not quick")
    again = _texts(target, prompt, Law(temperature=0.0), (1, 1))
    if not target.decode(greedy.tokens).strip():
        raise MissingError(f"the model {target.name} answers nothing to a plain question")
    notes, parts = [], set(target.parts)
    if target.engine.dialect.name == UNKNOWN:
        notes.append("an engine that is not known here: what it adds to a request that leaves it unsaid is not known")
    if all(one.tokens == greedy.tokens for one in again):
        parts.add("greedy")
    else:
        notes.append("the server's greedy search does not repeat its own text")
    hot = _texts(target, prompt, Law(temperature=HOT), SEEDS)
    if len({tuple(one.tokens) for one in hot}) < 2:
        notes.append("the server draws the same text at every temperature and seed")
    elif "greedy" in parts and _cold(target, prompt, greedy):
        # from next to greedy search to free draws: it follows the temperature, and not only whether there is one
        parts.add("temperature")
        for part, extreme in EXTREMES.items():
            law = replace(Law(temperature=HOT), **{part: extreme})  # type: ignore[arg-type]
            if part in target.engine.dialect.parts and _only(target, prompt, law, greedy):
                parts.add(part)
        if "top_k" in parts and not _two_at_most(target, prompt):
            parts.discard("top_k")
        twice = _texts(target, prompt, Law(temperature=HOT), SEEDS[:1])
        if twice[0].tokens != hot[0].tokens:
            notes.append("the server does not draw by the seed that it is given: the same run gives other texts")
    capabilities = set(target.capabilities)
    if greedy.log_probs is not None:
        capabilities.add("log-probs")
        _look_at_log_probs(target, prompt, greedy, hot, parts)
    if _goes_on(target, prompt, greedy):
        capabilities.add("prefix")
    target.parts, target.capabilities = frozenset(parts), frozenset(capabilities)
    target.notes = (*target.notes, *notes)


def _prompt(target: RemoteTarget) -> list[int]:
    """A talk where the server takes one, else the text."""
    target.parts = frozenset({"chat"})
    asked = target.chat([{"role": "user", "content": QUESTION}]) or []
    try:
        _texts(target, asked, Law(temperature=0.0), (0,), tokens=1)
        return asked
    except EngineDownError:
        raise
    except EngineError as refused:
        target.parts = frozenset()
        text = target.encode(QUESTION)
        try:
            _texts(target, text, Law(temperature=0.0), (0,), tokens=1)
        except EngineDownError:
            raise
        except EngineError as error:
            hint = "; does --model-url lack /v1, or is the model called otherwise there?" if error.code == 404 else ""
            told = f"{target.name} answers neither a talk ({refused}) nor a text ({error}){hint}"
            raise MissingError(told) from None
        return text


def _texts(
    target: RemoteTarget, prompt: list[int], law: Law, seeds: tuple[int, ...], *, tokens: int = TOKENS
) -> list[Written]:
    """Answers by these seeds, one after another: some servers have one seed for all that they do at once."""
    from decodathlon.harness.targets.remote import Ask

    return [target.write([Ask(prompt=prompt, tokens=tokens, law=law, seed=seed)])[0] for seed in seeds]


def _only(target: RemoteTarget, prompt: list[int], law: Law, greedy: Written) -> bool:
    """Whether this law, which leaves one token, leaves greedy search."""
    try:
        return all(one.tokens == greedy.tokens for one in _texts(target, prompt, law, SEEDS))
    except EngineDownError:
        raise
    except EngineError:  # it does not know the word, and says so
        return False


def _cold(target: RemoteTarget, prompt: list[int], greedy: Written) -> bool:
    """Whether draws at a low temperature begin as greedy search does; one may part at tokens as good as equal."""
    drawn = _texts(target, prompt, Law(temperature=COLD), SEEDS)
    return sum(one.tokens[:BEGINNING] == greedy.tokens[:BEGINNING] for one in drawn) >= len(SEEDS) - 1


def _two_at_most(target: RemoteTarget, prompt: list[int]) -> bool:
    """Whether `top_k=2` leaves two first tokens, and not only `top_k=1` one."""
    drawn = _texts(target, prompt, Law(temperature=HOT, top_k=2), tuple(range(FEW)), tokens=1)
    return len({tuple(one.tokens) for one in drawn}) <= 2


def _look_at_log_probs(
    target: RemoteTarget, prompt: list[int], greedy: Written, hot: list[Written], parts: set[str]
) -> None:
    """Whether they are of the model's own law: the same token then has the same one at every temperature."""
    known = [*hot, *(_texts(target, prompt, Law(temperature=HOT, top_k=1), SEEDS[:1]) if "top_k" in parts else [])]
    same = [one for one in known if one.log_probs and one.tokens[0] == greedy.tokens[0]]
    # nothing to compare with: not believed
    first = greedy.log_probs[0] if greedy.log_probs else 0.0
    target.raw_log_probs = bool(same) and all(abs(one.log_probs[0] - first) < NEAR for one in same if one.log_probs)


def _goes_on(target: RemoteTarget, prompt: list[int], greedy: Written) -> bool:
    """Whether the greedy text, cut behind one of its tokens (or words, where none are told), goes on as it did."""
    from decodathlon.harness.targets.remote import Ask

    whole = target.decode(greedy.tokens)
    if greedy.log_probs is not None:
        cut = len(target.decode(greedy.tokens[: len(greedy.tokens) // 2]))
    else:
        cut = whole.find(" ", len(whole) // 2)
    if cut <= 0 or not whole[:cut].strip():
        return False
    begun = target.encode(whole[:cut])
    try:
        (rest,) = target.write([Ask(prompt=prompt, begun=begun, tokens=TOKENS, law=Law(temperature=0.0), seed=0)])
    except EngineDownError:
        raise
    except EngineError:
        return False
    found = whole[:cut] + target.decode(rest.tokens)
    return len(found) > cut and (found.startswith(whole) or whole.startswith(found))
