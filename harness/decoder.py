"""What a plugin author subclasses: `Sampler` or `Decoder` (or `Chain`, chain.py), and the `@decoder` that registers it.

A decoder is a value: a name, parameters with defaults and bounds, and a claim about the law that it draws from.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, cast, get_args

from decodathlon.harness import law, spec
from decodathlon.harness.errors import SpecError, UnsupportedError
from decodathlon.harness.registry import registry

if TYPE_CHECKING:
    from torch import Tensor

    from decodathlon.harness.randomness import RowRandom
    from decodathlon.harness.targets.base import Target

#: exact: samples the target's own law. greedy-exact: equals greedy search token for token. shaped: samples a stated
#: transform of the law, such as top-p. sharpened: samples p^beta or a reward-tilted law. heuristic: claims nothing.
Claim = Literal["exact", "greedy-exact", "shaped", "sharpened", "heuristic"]
StopReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Limits:
    """When a completion ends.

    Args:
        max_new_tokens: the most tokens a completion may have.
        ignore_eos: go on past stop tokens, so that speed is compared at equal length.
        trace: let decoders that draft keep a record of every cycle.
    """

    max_new_tokens: int
    ignore_eos: bool = False
    trace: bool = False


@dataclass
class Cost:
    """What a completion cost, in calls of the models and in token positions that they computed."""

    target_calls: int = 0
    target_positions: int = 0
    draft_calls: int = 0
    draft_positions: int = 0


@dataclass
class Completion:
    """One answer: its tokens without the prompt, the stop token included."""

    tokens: list[int]
    stop_reason: StopReason
    #: Natural-log probability of the tokens under the target, not under the shaped law; None where it was not computed.
    log_prob: float | None = None
    text: str = ""
    cost: Cost = field(default_factory=Cost)
    #: One mapping per decoding cycle, for decoders that keep a trace.
    trace: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Info:
    """What the registry knows of a decoder class."""

    name: str
    family: str
    claim: Claim | Callable[[Any], Claim]
    sweep: Mapping[str, Sequence[Any]]
    grid: bool
    bounds: Mapping[str, str]
    needs: frozenset[str]
    layout: Mapping[str, str | None]
    headline: str | None
    paper: str
    summary: str


class Decoder(ABC):
    """The general form: prompts in, completions out."""

    info: ClassVar[Info]

    @abstractmethod
    def generate(
        self, target: Target, prompts: Sequence[Sequence[int]], limits: Limits, rng: RowRandom
    ) -> list[Completion]:
        """Complete every prompt. All randomness comes from `rng`; row b may use no other stream than its own."""

    @property
    def spec(self) -> str:
        """The shortest spec string that gives this decoder back."""
        return spec.render(self.info.name, self)

    #: Whether it drafts tokens in cycles, which its completions' traces hold where `Limits.trace` asks for them:
    #: each with
    #: `drafted`, `accepted`, `draft_s`, `verify_s` and `keep_s`.
    drafts: ClassVar[bool] = False

    #: Whether the answers to equal prompts in one call are independent; False where they are spread on purpose.
    independent: ClassVar[bool] = True

    @property
    def claim(self) -> Claim:
        """The claim of this decoder at these parameters."""
        claim = self.info.claim
        return claim(self) if callable(claim) else claim

    def sources(self) -> list[Path]:
        """The files that its behaviour follows from: those of its classes, all parts of one that has several, and what
        they import of other decoders.

        A subclass adds what else it reads. The harness itself goes by the commit of the row.
        """
        found = set()
        for cls in type(self).__mro__:
            if issubclass(cls, Decoder) and not cls.__module__.startswith("decodathlon.harness."):
                file = Path(inspect.getfile(cls)).resolve()
                parts = cls.__module__.startswith("decodathlon.decoders.") and cls.__module__.count(".") > 2
                found |= set(file.parent.glob("*.py")) if parts else {file}
        new = found
        while new := {other for file in new for other in _imported(file)} - found:
            found |= new
        return sorted(found)

    def params(self) -> dict[str, Any]:
        """Every parameter with its value, defaults included."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(cast("Any", self)) if f.init}

    def check(self, target: Target) -> None:
        """
        Raises:
            UnsupportedError: the target lacks a capability that this decoder needs.
        """
        for capability in sorted(self.info.needs - target.capabilities):
            raise UnsupportedError(capability, f"{target.name} does not have it")

    def remarks(self, target: Target) -> list[str]:
        """What a row with this target has to say of these parameters, such as that they leave what was trained."""
        return []


@functools.cache
def _imported(file: Path) -> frozenset[Path]:
    """The files of decoders that a file imports."""
    package, found = "decodathlon.decoders", set()
    root = Path(__file__).resolve().parents[1] / "decoders"
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and f"{node.module}.".startswith(f"{package}."):
            place = root.joinpath(*node.module.split(".")[2:])
            candidates = [place.with_suffix(".py"), *(place / f"{alias.name}.py" for alias in node.names)]
            found |= {candidate for candidate in candidates if candidate.is_file()}
    return frozenset(found)


class Sampler(Decoder):
    """A decoder that draws each token from a next-token law. Generation, perplexity and audit come for free.

    A stateless sampler defines `shape` only, and `draw` where it has a way of its own to draw from it. One with per-row
    state defines `start`, `next_law` and `advance`. (`candidates.py` has the form for laws on a few tokens.)
    """

    @property
    def uniforms(self) -> int:
        """Uniform numbers per row and token that `next_law` or `draw` wants besides the one that draws the token."""
        return 0

    #: Whether the state is a tuple of tensors whose shapes never change, so that a step can be captured on a GPU.
    static_state: ClassVar[bool] = False

    def shape(self, logits: Tensor) -> Tensor:
        """(N, V) logits to (N, V) natural log-probabilities that sum to one, -inf where cut."""
        raise NotImplementedError(f"{type(self).__name__} defines neither shape nor next_law")

    def definition(self, logits: Sequence[float]) -> list[float]:
        """The law of one token as its paper defines it, in plain Python: what the audit holds `shape` against.

        It shares no code with `shape`, or it proves nothing. Weights need not be normalised.

        Raises:
            UnsupportedError: the decoder has none; it is then audited against its own `shape`.
        """
        raise UnsupportedError("a definition", f"{self.spec} states its law by shape only")

    @property
    def stateless(self) -> bool:
        """Whether `shape` alone is the law that tokens are drawn from."""
        own, base = type(self), Sampler
        plain = (own.start, own.next_law, own.advance) == (base.start, base.next_law, base.advance)
        # Greedy search may pick its one token without drawing; any other `choose` of its own may draw from anything.
        return plain and own.shape is not base.shape and (own.choose is base.choose or self.claim == "greedy-exact")

    def draw(self, logits: Tensor, u: Tensor) -> Tensor:
        """(B,) tokens from the law `shape`; `u` is (B, 1 + uniforms) in [0, 1). The audit checks that they have it."""
        return law.draw(self.shape(logits), u[:, 0])

    def start(self, rows: int) -> Any:
        """State of so many fresh rows."""
        return None

    def next_law(self, logits: Tensor, state: Any, u: Tensor) -> tuple[Tensor, Any]:
        """Law (B, V) of the next token, given the state; `u` is (B, uniforms)."""
        return self.shape(logits), state

    def advance(self, state: Any, tokens: Tensor) -> Any:
        """State after the tokens (B,) were taken."""
        return state

    def choose(self, logits: Tensor, state: Any, u: Tensor) -> tuple[Tensor, Any]:
        """Draw the next tokens (B,); `u` is (B, 1 + uniforms) in [0, 1)."""
        if type(self).next_law is Sampler.next_law:
            tokens = self.draw(logits, u)
        else:
            log_probs, state = self.next_law(logits, state, u[:, 1:])
            tokens = law.draw(log_probs, u[:, 0])
        return tokens, self.advance(state, tokens)

    def generate(
        self, target: Target, prompts: Sequence[Sequence[int]], limits: Limits, rng: RowRandom
    ) -> list[Completion]:
        from decodathlon.harness.generation import autoregressive

        return autoregressive(self, target, prompts, limits, rng)


D = TypeVar("D", bound=Decoder)


def _first_sentence(text: str) -> str:
    """Of a docstring, whose lines are as long as the file's."""
    paragraph = " ".join(text.partition("\n\n")[0].split())
    return paragraph.partition(". ")[0].rstrip(".") + "." if paragraph else ""


def decoder(
    name: str,
    *,
    claim: Claim | Callable[[Any], Claim],
    family: str | None = None,
    sweep: Mapping[str, Sequence[Any]] | None = None,
    grid: bool = False,
    bounds: Mapping[str, str] | None = None,
    needs: Sequence[str] = (),
    layout: Mapping[str, str | None] | None = None,
    headline: str | None = None,
    paper: str = "",
) -> Callable[[type[D]], type[D]]:
    """Register a decoder class under `name`. Its annotated attributes are the parameters; each has a default.

    Args:
        claim: the law that it draws from, or a function from the decoder to that.
        family: what the board groups it under; default the name.
        sweep: values per parameter that `--sweep` tries, one parameter at a time.
        grid: let `--sweep` try every combination of them.
        bounds: intervals per parameter, such as {"p": "(0, 1]"}.
        needs: capabilities that the target must have (see `Target.CAPABILITIES`).
        layout: parameters by the dotted keys that a file for --decoder-config has them under, and spec strings may use;
            None for what such a file may say and the harness has its own options for.
        headline: the spec by which it stands in the headline set; None leaves it out.
        paper: who proposed it, as a citation.

    Raises:
        SpecError: the name is taken or malformed, a claim is unknown, or a sweep or bound names no parameter.
    """

    def register(cls: type[D]) -> type[D]:
        cls = dataclass(frozen=True, kw_only=True)(cls)
        source = inspect.getfile(cls)
        where = f"decoder {name!r} ({source})"
        parameters = {f.name for f in dataclasses.fields(cast("Any", cls)) if f.init}
        if not callable(claim) and claim not in get_args(Claim):
            raise SpecError(f"{where}: claim {claim!r} is not one of {', '.join(get_args(Claim))}")
        for key in {**(sweep or {}), **(bounds or {})}:
            if key not in parameters:
                raise SpecError(f"{where}: {key!r} in sweep or bounds is not a parameter")
        for dotted, parameter in (layout or {}).items():
            if parameter is not None and parameter not in parameters:
                raise SpecError(f"{where}: {parameter!r}, for {dotted} in layout, is not a parameter")
        for key, values in (sweep or {}).items():
            for value in values:
                spec.check_bounds(value, (bounds or {}).get(key), f"{where}: sweep {key}={value}")
        cls.info = Info(
            name=name,
            family=family or name,
            claim=claim,
            sweep=dict(sweep or {}),
            grid=grid,
            bounds=dict(bounds or {}),
            needs=frozenset(needs),
            layout=dict(layout or {}),
            headline=headline,
            paper=paper,
            summary=_first_sentence(inspect.getdoc(cls) or ""),
        )
        registry.add("decoder", name, cls, source)
        return cls

    return register


def build(text: str) -> Decoder:
    """The decoder that a spec string names.

    Raises:
        SpecError: see `spec.fill`.
    """
    parsed = spec.parse(text)
    cls = registry.get("decoder", parsed.name)
    parsed = spec.by_layout(parsed, "decoder", cls.info.layout)
    instance: Decoder = spec.fill(cls, parsed, "decoder", cls.info.bounds)
    return instance


def swept(instance: Decoder) -> list[Decoder]:
    """The decoder and its neighbours: every sweep value of every parameter, one at a time or in every combination."""
    sweep = instance.info.sweep
    one_by_one = ({key: value} for key, values in sweep.items() for value in values)
    grid = (dict(zip(sweep, values, strict=True)) for values in itertools.product(*sweep.values()))
    changes = grid if instance.info.grid and sweep else one_by_one
    return list(dict.fromkeys([instance, *(dataclasses.replace(cast("Any", instance), **c) for c in changes)]))
