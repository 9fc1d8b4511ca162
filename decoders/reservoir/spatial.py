"""Many samples of one prompt: the parallel case, in which reservoirs may share what they know.

Answers to equal prompts are one set and grow as a tree: rows with the same beginning are one node, which the model
reads once. Behind a node of n rows the next tokens are drawn together, so that each row alone has the law p of the next
token while the n of them are spread. How often a text comes then strays from B P(text) as little as the design allows;
where each row is exact, no design strays less on average than by 2 f (1 - f), f being the fraction of B P(text).

- `lattice`: the rows' numbers in [0, 1) are evenly spaced, and a token takes those in its stretch of the cumulative
  law, which are then magnified (Vilnis et al. 2023, arithmetic sampling). Every text and every beginning comes as often
  as B P says, rounded up or down: the least that is possible.
- `merge`: every token is a reservoir that holds itself and weighs n p(token). What is whole in a weight is given out.
  The rests are merged two by two as reservoirs are: one of the two is held, in proportion to the weights, and it weighs
  their sum; where that exceeds 1 one is given out and the other weighs the excess (Deville and Tille 1998, the pivotal
  method). Each node by itself comes as near as possible; roundings add up from node to node.
- `systematic`: one number per node, n offsets.
- `independent`: rows draw by themselves, and share no more than what the model reads.

Dimensions: B rows, D nodes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from decodathlon.decoders.arithmetic import RESOLUTION, magnified
from decodathlon.harness import law
from decodathlon.harness.decoder import Completion, Limits, Sampler, decoder
from decodathlon.harness.generation import completions, token_log_prob
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from decodathlon.harness.randomness import RowRandom

Design = Literal["lattice", "merge", "systematic", "independent"]


@dataclass
class _Node:
    """Rows with the same beginning."""

    rows: list[int]
    #: Where in the law of the rest each of them is, and how coarse that number has become: see arithmetic.py.
    at: Tensor
    coarseness: Tensor


@decoder(
    "reservoir-spatial",
    claim=lambda self: "exact" if self.temperature == 1 and self.top_p == 1 else "shaped",
    family="sets",
    bounds={"temperature": "[0.01, 100]", "top_p": "(0, 1]"},
    sweep={"design": ["lattice", "merge", "systematic", "independent"]},
    paper="after Bitterli et al. 2020, ReSTIR (spatial reuse); Vilnis et al. 2023, Arithmetic Sampling; Deville, Tille "
    "1998, Unequal Probability Sampling Without Replacement Through a Splitting Method",
)
class ReservoirSpatial(Sampler):
    """Answers to equal prompts share what the model reads and are spread over its law; each alone is an exact draw.

    A set has the random numbers of its rows, so a row depends on the equal prompts in the same call.
    """

    independent: ClassVar[bool] = False

    design: Design = "lattice"
    temperature: float = 1.0
    top_p: float = 1.0

    def shape(self, logits: Tensor) -> Tensor:
        return law.process(logits, temperature=self.temperature, top_p=self.top_p)

    def definition(self, logits: Sequence[float]) -> list[float]:
        p = law.plainly(logits, self.temperature)
        return [x if sum(other for other in p if other > x) < self.top_p else 0.0 for x in p]

    def generate(
        self, target: Any, prompts: Sequence[Sequence[int]], limits: Limits, rng: RowRandom
    ) -> list[Completion]:
        self.check(target)
        B, T = len(prompts), limits.max_new_tokens
        if T < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {T}")
        stop = frozenset() if limits.ignore_eos else target.stop_tokens
        noise = rng.uniforms(T, 2)
        sets: dict[tuple[int, ...], list[int]] = {}
        for b, prompt in enumerate(prompts):
            sets.setdefault(tuple(prompt), []).append(b)
        nodes = [self._begun(rows, noise) for rows in sets.values()]
        grown = _Grown(B, T)
        for prompt, rows in sets.items():
            grown.positions[rows[0]] += len(prompt)
        with torch.no_grad():
            context = target.open(list(sets), capacity=max(map(len, prompts)) + T)
            for t in range(T):
                log_p = self.shape(context.next_logits.clone()).double().cpu()
                parents: list[int] = []
                children: list[_Node] = []
                for number, node in enumerate(nodes):
                    tokens = self._drawn(log_p[number].exp(), node, noise[:, t], rng)
                    scores = token_log_prob(
                        context.next_logits[number].expand(len(tokens), -1), tokens.to(target.device)
                    )
                    grown.add(node.rows, t, tokens, scores)
                    for child in _split(node, tokens, stop):
                        parents.append(number)
                        children.append(child)
                nodes = children
                if not nodes or t + 1 == T:
                    break
                context.select(parents)
                context.extend(torch.tensor([[int(grown.tokens[node.rows[0], t])] for node in nodes]).to(target.device))
                context.keep(1)
                for node in nodes:
                    grown.positions[node.rows[0]] += 1
        answers = completions(target, prompts, grown.tokens, grown.log_probs, limits)
        for answer, positions in zip(answers, grown.positions, strict=True):
            answer.cost.target_positions = positions
        return answers

    def _begun(self, rows: list[int], noise: Tensor) -> _Node:
        """All rows of a set; on the lattice their numbers are evenly spaced from a random one on, in random order."""
        n = len(rows)
        order = noise[rows, 0, 1].argsort()
        at = (order.double() / n + noise[rows[0], 0, 0]).remainder(1.0)
        return _Node(rows, at, torch.full((n,), RESOLUTION, dtype=torch.float64))

    def _drawn(self, p: Tensor, node: _Node, noise: Tensor, rng: RowRandom) -> Tensor:
        """(n,) the next tokens of a node's rows from the law p (V,); `noise` (B, 2) is of this step."""
        n, own = len(node.rows), noise[node.rows]
        if self.design == "merge" and n > 1:
            numbers = torch.rand(len(p), generator=rng.row(node.rows[0]), dtype=torch.float64)
            return merged(p / p.sum() * n, n, numbers)[own[:, 1].argsort()]
        cumulative = p.cumsum(0)
        cumulative = cumulative / cumulative[-1]
        if self.design == "lattice":
            return _magnified(cumulative, node, own[:, 0])
        if self.design == "systematic" and n > 1:
            at = ((own[:, 1].argsort().double() + own[0, 0]) / n).clamp_(max=1 - RESOLUTION)
        else:
            at = own[:, 0]
        return torch.searchsorted(cumulative, at.contiguous(), right=True).clamp_(max=len(p) - 1)


@dataclass
class _Grown:
    """What the rows have so far, and what the model read for them; what rows share counts for the first of them."""

    rows: int
    steps: int
    positions: list[int] = field(init=False)
    tokens: Tensor = field(init=False)
    log_probs: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.positions = [0] * self.rows
        self.tokens = torch.zeros(self.rows, self.steps, dtype=torch.long)
        self.log_probs = torch.zeros(self.rows, self.steps, dtype=torch.float64)

    def add(self, rows: Sequence[int], step: int, tokens: Tensor, log_probs: Tensor) -> None:
        self.tokens[rows, step] = tokens
        self.log_probs[rows, step] = log_probs.double().cpu()


def _split(node: _Node, tokens: Tensor, stop: frozenset[int]) -> list[_Node]:
    """A node per token that goes on, in the order of their first rows."""
    children = []
    for token in dict.fromkeys(tokens.tolist()):
        if token not in stop:
            mine = (tokens == token).nonzero()[:, 0]
            rows = [node.rows[i] for i in mine.tolist()]
            children.append(_Node(rows, node.at[mine], node.coarseness[mine]))
    return children


def _magnified(cumulative: Tensor, node: _Node, fresh: Tensor) -> Tensor:
    """The tokens whose stretch of the cumulative law (V,) holds the rows' numbers, which then are magnified to it.

    Digits that a number has lost are filled with fresh ones, `fresh` (n,).
    """
    at = (node.at + fresh * node.coarseness).remainder(1.0)
    tokens = torch.searchsorted(cumulative, at, right=True).clamp_(max=len(cumulative) - 1)
    high = cumulative[tokens]
    low = torch.where(tokens > 0, cumulative[(tokens - 1).clamp(min=0)], 0.0)
    node.at, node.coarseness = magnified(at, node.coarseness, low, high)
    return tokens


def merged(weights: Tensor, n: int, u: Tensor) -> Tensor:
    """(n,) tokens, each as often as its weight says, rounded up or down, and on average exactly so often.

    Args:
        weights: (V,) that sum to n.
        u: (V,) uniforms in [0, 1).
    """
    whole = weights.floor()
    given = [torch.arange(len(weights)).repeat_interleave(whole.long())]
    rest = weights - whole
    held = rest.nonzero()[:, 0]
    rest, used = rest[held], 0
    while len(held) > 1:
        pairs = len(held) // 2
        a, b = rest[: 2 * pairs : 2], rest[1 : 2 * pairs : 2]
        total, mine = a + b, u[used : used + pairs]
        used += pairs
        full = total > 1
        # One of the two is held and weighs their sum; or it is given out, and the other weighs the excess.
        first = mine * torch.where(full, 2 - total, total) < torch.where(full, 1 - b, a)
        left, right = held[: 2 * pairs : 2], held[1 : 2 * pairs : 2]
        taken, other = torch.where(first, left, right), torch.where(first, right, left)
        given.append(taken[full])
        held = torch.cat([torch.where(full, other, taken), held[2 * pairs :]])
        rest = torch.cat([torch.where(full, total - 1, total), rest[2 * pairs :]])
    missing = n - sum(len(g) for g in given)  # 0 or 1: the last weight, which rounding may have left near either
    return torch.cat([*given, held[:missing]])
