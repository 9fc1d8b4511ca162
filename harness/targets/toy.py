"""Targets whose whole law is known: every decoder can be held against it.

`Ising` serves a spin model as a language of two words. `enumerable_lm` is a tiny random transformer in float64, driven
through the very same `TransformersTarget` as a real model; `law_of` enumerates what either of them generates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from decodathlon.harness.errors import ContextOverflowError, UnsupportedError
from decodathlon.harness.targets.base import Context, Step, Target

#: More outcomes than this are not enumerated.
MOST_OUTCOMES = 1 << 16


class Ising(Target):
    """Spins, p(s) proportional to exp(beta * sum over bonds of s_i s_j + field * sum of s_i).

    The bonds are those of a ring of n spins, or of a torus where `rows` says how many rows it has. Token 1 is spin +1,
    token 0 spin -1. A text is the spins in order, without BOS or EOS; exact by enumeration.
    """

    stop_tokens = frozenset()
    capabilities = frozenset({"logits", "gradient", "energy"})

    def __init__(self, n: int, beta: float, field: float = 0.0, *, rows: int = 1) -> None:
        """
        Args:
            n: spins, 2 to 16.
            beta: inverse temperature.
            field: external field; a small one breaks the tie between a state and its mirror image.
            rows: of a torus with n / rows columns; 1 is a ring.
        """
        if not 2 <= n <= 16:
            raise ValueError(f"Ising is enumerated, so n must be 2 to 16, not {n}")
        if rows < 1 or n % rows:
            raise ValueError(f"Ising: {n} spins make no {rows} rows of equal length")
        self.name = f"ising-{n}" if rows == 1 else f"ising-{rows}x{n // rows}"
        place = torch.arange(n).view(rows, -1)
        self._bonds = torch.zeros(n, n, dtype=torch.float64)
        for axis in (0, 1) if rows > 1 else (1,):
            pairs = torch.stack([place, place.roll(-1, axis)], -1).view(-1, 2)
            self._bonds.index_put_((pairs[:, 0], pairs[:, 1]), torch.tensor(1.0, dtype=torch.float64), accumulate=True)
        self._bonds = self._bonds + self._bonds.T
        self.n, self.beta, self.field = n, beta, field
        self.vocab_size, self.context_length = 2, n
        self.device, self.dtype = torch.device("cpu"), torch.float64
        states = torch.tensor(list(itertools.product((0, 1), repeat=n)))
        self.log_law = (-self.energy(states)).log_softmax(0)
        beginnings = [self.log_law.view(2**k, -1).logsumexp(1) for k in range(n + 1)]
        #: Level k: (2^k, 2) log-laws of the next spin behind each of the beginnings.
        self._nexts = [level.view(-1, 2).log_softmax(-1) for level in beginnings[1:]]

    def energy(self, sequences: Tensor) -> Tensor:
        return self._energy_of_spins(2.0 * sequences.double() - 1.0)

    def _energy_of_spins(self, spins: Tensor) -> Tensor:
        return -(0.5 * self.beta * (spins @ self._bonds * spins).sum(-1) + self.field * spins.sum(-1))

    @property
    def embeddings(self) -> Tensor:
        """(2, 1): the spin itself."""
        return torch.tensor([[-1.0], [1.0]], dtype=torch.float64)

    def embedding_gradient(self, sequences: Tensor, given: int = 0) -> tuple[Tensor, Tensor]:
        """Minus energy (B,) and its gradient with respect to the spins (B, n, 1)."""
        spins = 2.0 * sequences.double() - 1.0
        slope = self.beta * spins @ self._bonds + self.field
        return 0.5 * ((slope + self.field) * spins).sum(-1), slope[..., None]

    def score(self, sequences: Tensor, free: int) -> Tensor:
        self.spent.add(sequences.numel())
        return -self.energy(sequences)

    def local_changes(self, sequences: Tensor, free: int, *, label_term: bool = True) -> tuple[Tensor, Tensor]:
        self.spent.add(sequences.numel(), backward=True)
        score, gradient = self.embedding_gradient(sequences)
        other = (
            self.embeddings[:, 0] - self.embeddings[sequences]
        )  # (B, n, 2): what each spin would become, less what it is
        return score, (other * gradient)[:, free:]

    def next_logits_of(self, prefix: Sequence[int]) -> Tensor:
        """(2,) log-probabilities of the next spin; of no meaning (both zero) behind the last one."""
        if len(prefix) >= self.n:
            return torch.zeros(2, dtype=torch.float64)
        return self._nexts[len(prefix)][_code(prefix)]

    def next_logits_of_all(self, prefixes: Sequence[Sequence[int]]) -> Tensor:
        """(len(prefixes), 2): the same of many, in one go where they are equally long."""
        (length, *others) = {len(p) for p in prefixes}
        if others or length >= self.n:
            return torch.stack([self.next_logits_of(p) for p in prefixes])
        return self._nexts[length][[_code(p) for p in prefixes]]

    def open(
        self, prompts: Sequence[Sequence[int]], *, capacity: int | None = None, hidden: Sequence[int] = ()
    ) -> TableContext:
        if hidden:
            raise UnsupportedError("hidden", f"{self.name} has no hidden states")
        self.check_room(prompts, capacity if capacity is not None else self.n)
        return TableContext(self, prompts, capacity if capacity is not None else self.n)


class Coins(Target):
    """Texts of independent tosses that never end by themselves: p^b is known in closed form at any length.

    Token 1 has the probability `share`. Behind the power b it has share^b / (share^b + (1 - share)^b), again
    independently, and the constant of a text of n tokens is (share^b + (1 - share)^b)^n.
    """

    stop_tokens = frozenset()
    start_token = 0

    def __init__(self, share: float = 0.3, length: int = 1024) -> None:
        self.name, self.vocab_size, self.context_length = f"coins-{share:g}", 2, length
        self.device, self.dtype = torch.device("cpu"), torch.float64
        self.share = share
        self._law = torch.tensor([1 - share, share], dtype=torch.float64).log()

    def power(self, b: float, length: int) -> tuple[float, float]:
        """Under p^b: how many ones a text of `length` tokens has on average, and the log of the constant."""
        one, total = self.share**b, self.share**b + (1 - self.share) ** b
        return length * one / total, length * math.log(total)

    def next_logits_of_all(self, prefixes: Sequence[Sequence[int]]) -> Tensor:
        """(len(prefixes), 2) log-probabilities of the next token."""
        return self._law.expand(len(prefixes), 2).clone()

    def open(
        self, prompts: Sequence[Sequence[int]], *, capacity: int | None = None, hidden: Sequence[int] = ()
    ) -> TableContext:
        if hidden:
            raise UnsupportedError("hidden", f"{self.name} has no hidden states")
        capacity = capacity if capacity is not None else self.context_length
        self.check_room(prompts, capacity)
        return TableContext(self, prompts, capacity)


def _code(prefix: Sequence[int]) -> int:
    """A beginning as a number."""
    return int("".join(map(str, prefix)) or "0", 2)


class TableContext(Context):
    """A context over a target that tells the law behind any prefix; keeps plain lists."""

    def __init__(self, target: Ising | Coins, prompts: Sequence[Sequence[int]], capacity: int) -> None:
        self._target, self.capacity = target, capacity
        self._texts = [list(p) for p in prompts]
        self._paths: list[list[list[int]]] = []
        self._refresh()

    def _refresh(self) -> None:
        self.lengths = torch.tensor([len(t) for t in self._texts])
        self.next_logits = self._target.next_logits_of_all(self._texts)

    def extend(
        self,
        tokens: Tensor,
        *,
        tree: Tensor | None = None,
        hidden: Sequence[int] = (),
        logits_at: Tensor | None = None,
    ) -> Step:
        B, Q = tokens.shape
        self._target.spent.add(B * Q)
        chain = torch.ones(Q, Q, dtype=torch.bool).tril()
        mask = (chain if tree is None else tree).expand(B, Q, Q)
        if int((self.lengths[:, None] + mask.sum(-1)).max()) > self.capacity:
            raise ContextOverflowError(f"{self._target.name} has no more than {self.capacity} tokens in a row")
        self._paths = [[row[mask[b, q]].tolist() for q in range(Q)] for b, row in enumerate(tokens)]
        wanted = range(Q) if logits_at is None else logits_at.tolist()
        prefixes = [t + p[q] for t, p in zip(self._texts, self._paths, strict=True) for q in wanted]
        return Step(self._target.next_logits_of_all(prefixes).view(B, len(wanted), 2), {})

    def keep(self, counts: int | Sequence[int] | Tensor, *, path: Tensor | None = None) -> None:
        count = [counts] * self.rows if isinstance(counts, int) else [int(c) for c in counts]
        for b, c in enumerate(count):
            if c:
                self._texts[b] += self._paths[b][c - 1 if path is None else int(path[b, c - 1])]
        self._refresh()

    def rewind(self, lengths: Sequence[int]) -> None:
        self._texts = [text[:n] for text, n in zip(self._texts, lengths, strict=True)]
        self._refresh()

    def select(self, rows: Sequence[int] | Tensor) -> None:
        self._texts = [list(self._texts[int(r)]) for r in rows]
        self._refresh()


def enumerable_lm(vocabulary: int = 4, seed: int = 0) -> Target:
    """A random two-layer Llama in float64 with tokens 0 (BOS), 1 (EOS) and `vocabulary - 2` words."""
    import transformers

    from decodathlon.harness.targets.transformers import TransformersTarget

    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=32, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config).double()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.6)
    return TransformersTarget(model, Letters(), name=f"enumerable-lm-{vocabulary}")


class Letters:
    """The words of the tiny transformer are a, b, c, ..., so that rewards that read text can be audited, too."""

    bos_token_id, eos_token_id = 0, 1
    chat_template = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [0] * add_special_tokens + [ord(letter) - ord("a") + 2 for letter in text]}

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(ord("a") + token - 2) for token in tokens if token > 1)


@torch.no_grad()
def law_of(
    target: Target, prompt: Sequence[int], length: int, shape: Callable[[Tensor], Tensor] | None = None
) -> Mapping[tuple[int, ...], float]:
    """Probability of every completion of up to `length` tokens; one that stops earlier ends with its stop token.

    Args:
        shape: what is done to the (N, V) logits of every token, to log-probabilities; by default nothing.
    """
    if target.vocab_size**length > MOST_OUTCOMES:
        raise ValueError(f"{target.vocab_size}^{length} completions are too many to enumerate")
    law: dict[tuple[int, ...], float] = {}
    open_texts: dict[tuple[int, ...], float] = {(): 0.0}
    for step in range(length):
        context = target.open([[*prompt, *t] for t in open_texts], capacity=len(prompt) + length)
        logits = context.next_logits.double()
        log_probs = logits.log_softmax(-1) if shape is None else shape(logits)
        grown: dict[tuple[int, ...], float] = {}
        for (text, score), row in zip(open_texts.items(), log_probs.tolist(), strict=True):
            for token, term in enumerate(row):
                ended = token in target.stop_tokens or step + 1 == length
                (law if ended else grown)[(*text, token)] = score + term
        open_texts = grown
    return {text: float(torch.tensor(score, dtype=torch.float64).exp()) for text, score in law.items()}
