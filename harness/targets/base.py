"""The seam between decoders and models: what a `Target` and its `Context` promise.

Three verbs on a context cover autoregressive sampling, speculation, tree verification, beams, SMC resampling and MCMC:
`extend` looks at new tokens, `keep` decides how many of them stay, `select` reorders, duplicates or drops rows.

Dimensions: B rows, Q new tokens per row, V vocabulary, E embedding width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from decodathlon.harness.errors import ContextOverflowError, UnsupportedError
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class WeightReads(NamedTuple):
    """What a target has read of its weights so far."""

    #: Bytes that its passes have read; 0 where that is not known, as of what CUDA graphs replay.
    read: int = 0
    #: Of weights that lie on disk or with the host: bytes that were brought from there, and how often what was asked
    #: for (a layer, an expert) was there or on its way, and how often not.
    fetched: int = 0
    hits: int = 0
    misses: int = 0


@dataclass
class Spent:
    """What a target has computed so far; not what CUDA graphs replay."""

    #: Forward passes, each with its backward pass where there was one.
    calls: int = 0
    #: Tokens that they read, over all rows.
    positions: int = 0
    #: Those of them through which a gradient was taken.
    backward: int = 0

    def add(self, positions: int, *, backward: bool = False) -> None:
        self.calls += 1
        self.positions += positions
        self.backward += positions if backward else 0

    @contextmanager
    def one_call(self) -> Iterator[None]:
        """What is computed inside counts as one call, into however many parts it is split for the sake of memory."""
        before = self.calls
        yield
        self.calls = min(self.calls, before + 1)

    def since(self, before: Spent) -> Spent:
        return Spent(self.calls - before.calls, self.positions - before.positions, self.backward - before.backward)


class Step(NamedTuple):
    """What one `extend` saw."""

    #: (B, Q, V) next-token logits after each new token, in float32 or wider.
    logits: Tensor
    #: Hidden states by number, each (B, Q, E): 0 is the input of the first block, i the output of block i (the residual
    #: stream), and one beyond the last block what its final norm made of that.
    hidden: Mapping[int, Tensor]


class Context(ABC):
    """B rows of text that a target has read.

    `lengths` (B,) counts the tokens that each row keeps; `next_logits` (B, V) follow the last kept token.
    """

    lengths: Tensor
    next_logits: Tensor
    #: The most tokens that a row can hold.
    capacity: int
    #: The number of the residual stream behind the last block, among the hidden states of `extend`; None without any.
    deepest: int | None = None
    #: Hidden states of the prompts that `open` was asked for, by number, each (B, L, E), padded at the end.
    prompt_hidden: Mapping[int, Tensor]

    @property
    def rows(self) -> int:
        return int(self.lengths.shape[0])

    @abstractmethod
    def extend(
        self,
        tokens: Tensor,
        *,
        tree: Tensor | None = None,
        hidden: Sequence[int] = (),
        logits_at: Tensor | None = None,
    ) -> Step:
        """Read Q more tokens per row without keeping them.

        Args:
            tokens: (B, Q) int64.
            tree: (B, Q, Q) or (Q, Q) bool; `tree[b, i, j]` says that new token j is i itself or an ancestor of i.
                Parents come before their children. Without it the tokens are a chain.
            hidden: layers whose residual stream is wanted.
            logits_at: (P,) positions in 0..Q-1 at which logits are wanted; the step then has P of them. Default: all.

        Raises:
            ContextOverflowError: a row would hold more than `capacity` tokens.
        """

    @abstractmethod
    def keep(self, counts: int | Sequence[int] | Tensor, *, path: Tensor | None = None) -> None:
        """Keep the first `counts[b]` tokens of the last `extend`, or the nodes `path[b, :counts[b]]` of its tree.

        Args:
            counts: one number for all rows, or (B,).
            path: (B, P) indices into the Q tokens, ancestors first.
        """

    @abstractmethod
    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget what stands behind the first `lengths[b]` tokens of each row.

        There is no `next_logits` until something was kept again.
        """

    @abstractmethod
    def select(self, rows: Sequence[int] | Tensor) -> None:
        """Make the context consist of these rows, in this order; a row may appear several times or not at all."""


class Target(ABC):
    """A law over token sequences that decoders draw from.

    `capabilities` names what this target can do beyond sampling; a decoder that `needs` more is `unsupported` on it.
    """

    name: str
    vocab_size: int
    #: Tokens that end a text.
    stop_tokens: frozenset[int]
    #: What stands before the first token of a text where something must: BOS, or where there is none EOS.
    start_token: int | None = None
    #: The longest text, in tokens, that the target reads.
    context_length: int
    device: Any
    dtype: Any
    #: Every name that `capabilities` may hold.
    CAPABILITIES: ClassVar[frozenset[str]] = frozenset(
        {"logits", "hidden", "gradient", "energy", "text", "hf-model", "server", "log-probs", "prefix"}
    )
    capabilities: frozenset[str] = frozenset({"logits"})
    #: Whether targets/graphs.py can drive it.
    static_loop: bool = False
    #: Remarks that belong into the record, such as a lean forward left aside.
    notes: tuple[str, ...] = ()
    #: Commit or hash of the source of the weights, where it has one.
    revision: str = ""
    #: Parameters of the model, for FLOP estimates; 0 where it has none.
    parameters: int = 0
    #: Bytes that a weight takes while the model runs, in bits and on average; 0 where that is not known.
    bits_per_weight: float = 0.0

    #: Bytes of the files that the weights were loaded from; 0 where there are none, or they are not known.
    file_bytes: int = 0

    #: Whether `weight_reads` has what drafters read that are made of the target's own weights.
    counts_drafts: bool = False

    @property
    def weight_reads(self) -> WeightReads:
        """As far as it is known."""
        return WeightReads()

    @cached_property
    def incidents(self) -> list[str]:
        """What went otherwise than meant since the last cell took note of it."""
        return []

    def happened(self, what: str) -> None:
        """Have the cell that is measured now say so."""
        if what not in self.incidents:
            self.incidents.append(what)

    @cached_property
    def spent(self) -> Spent:
        """The ledger of this target."""
        return Spent()

    @abstractmethod
    def open(
        self, prompts: Sequence[Sequence[int]], *, capacity: int | None = None, hidden: Sequence[int] = ()
    ) -> Context:
        """Read the prompts, ragged or not, once; every row can then grow to `capacity` tokens.

        Args:
            hidden: hidden states of the prompts that are wanted, as in `Context.extend`.
        """

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Tokens of `text`; `special` adds what the model expects at the start (BOS)."""
        raise UnsupportedError("text", f"{self.name} has no tokenizer")

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`, special tokens left out."""
        raise UnsupportedError("text", f"{self.name} has no tokenizer")

    def chat(self, messages: Sequence[Mapping[str, str]], *, thinking: bool = True) -> list[int] | None:
        """Tokens of a talk (role and content by turn) up to where the assistant's answer begins, by the model's own
        template; None where it has none. `thinking=False` asks models that think first not to."""
        return None

    def log_prob(self, sequences: Sequence[Sequence[int]], given: int | Sequence[int] = 1) -> Tensor:
        """(B,) float64 natural log-probability of each sequence, given its first `given` tokens."""
        heads = [given] * len(sequences) if isinstance(given, int) else list(given)
        width = max(len(s) - g for s, g in zip(sequences, heads, strict=True))
        if width < 1:
            raise ValueError("log_prob needs at least one token after the given ones in some sequence")
        context = self.open(
            [list(s[:g]) for s, g in zip(sequences, heads, strict=True)],
            capacity=max(heads) + width,
        )
        padded = torch.zeros(len(sequences), width, dtype=torch.long)
        mask = torch.zeros(len(sequences), width, dtype=torch.bool)
        for b, (s, g) in enumerate(zip(sequences, heads, strict=True)):
            padded[b, : len(s) - g] = torch.tensor(list(s[g:]), dtype=torch.long)
            mask[b, : len(s) - g] = True
        padded, mask = padded.to(context.lengths.device), mask.to(context.lengths.device)
        law = context.next_logits[:, None].double()
        if width > 1:
            law = torch.cat([law, context.extend(padded[:, :-1]).logits.double()], dim=1)
        terms = law.log_softmax(-1).gather(-1, padded[..., None])[..., 0]
        return terms.masked_fill(~mask, 0.0).sum(-1)

    def logits(self, tokens: Tensor, at: Tensor) -> Tensor:
        """(B, P, V) next-token logits behind the tokens (B, L) at the positions `at` (P,), ascending within 0..L-1.

        Reads everything in one go, for teacher forcing.
        """
        context = self.open([row[:1].tolist() for row in tokens], capacity=tokens.shape[1])
        parts = [context.next_logits[:, None]] if int(at[0]) == 0 else []
        rest = at[at > 0] - 1
        if len(rest):
            parts.append(context.extend(tokens[:, 1:], logits_at=rest).logits)
        return torch.cat(parts, dim=1)

    def row_bytes(self, capacity: int) -> int:
        """About what a row of so many tokens takes in memory beside the weights; 0 where that is next to nothing."""
        return 0

    @property
    def embeddings(self) -> Tensor:
        """(V, E) input embeddings."""
        raise UnsupportedError("gradient", f"{self.name} has no embeddings")

    def embedding_gradient(self, sequences: Tensor, given: int = 1) -> tuple[Tensor, Tensor]:
        """Log-probability (B,) of the sequences (B, L) after their first `given` tokens, and its gradient (B, L, E)."""
        raise UnsupportedError("gradient", f"{self.name} has no gradients")

    def score(self, sequences: Tensor, free: int) -> Tensor:
        """(B,) float64 log-probability, up to a constant, of the tokens (B, L) from position `free` on.

        Without any token before them the first one counts as uniform, unless the target knows its law.
        """
        raise UnsupportedError("energy", f"{self.name} has no energy")

    def local_changes(self, sequences: Tensor, free: int, *, label_term: bool = True) -> tuple[Tensor, Tensor]:
        """The score (B,), and to first order its change (B, L - free, V) if one free position takes another token.

        Args:
            label_term: add by how much the token's own log-probability changes, which is known exactly. The gradient of
                the inputs says only what becomes of the tokens behind it; without this the last position feels nothing.
        """
        raise UnsupportedError("gradient", f"{self.name} has no gradients")

    def energy(self, sequences: Tensor) -> Tensor:
        """(B,) float64 energy of whole sequences: minus the log-probability, up to a constant."""
        raise UnsupportedError("energy", f"{self.name} has no energy")

    @property
    def lean(self) -> Any:
        """A forward whose parts a drafter may replace (targets/lean.py)."""
        raise UnsupportedError("a forward whose parts can be replaced", f"{self.name} has none")

    @cached_property
    def kept(self) -> dict[Hashable, Any]:
        """What decoders keep with this target between requests: a drafter made of it, what they have learnt."""
        return {}

    def release(self) -> None:
        """Drop what is kept between requests, so that memory can be measured."""
        self.kept.clear()

    def check_room(self, prompts: Sequence[Sequence[int]], capacity: int) -> None:
        """Refuse an empty prompt and a capacity beyond the context, with the numbers.

        Raises:
            ValueError: there is no prompt.
            ContextOverflowError: `capacity` tokens do not fit.
        """
        if not prompts:
            raise ValueError(f"{self.name}: no prompts were given")
        if capacity > self.context_length:
            longest = max(map(len, prompts))
            raise ContextOverflowError(
                f"{self.name} reads at most {self.context_length} tokens; the longest prompt has {longest} and the "
                f"request needs {capacity} in all. Shorten the prompt or ask for fewer new tokens."
            )
