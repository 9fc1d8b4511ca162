"""Perplexity per word and per byte by the protocol of lm-eval's `wikitext` task, the only numbers compared with it.

Whole pages, each detokenised and read from its beginning; disjoint windows as long as the model reads; words and bytes
are counted in the page before it was detokenised (lm-evaluation-harness 0.4, tasks/wikitext). Compared with the sliding
window of perplexity.py the first tokens of every window have little context, so the numbers are higher.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from decodathlon.harness.datasets import Text
from decodathlon.harness.measure.observations import Observations
from decodathlon.harness.measure.perplexity import judge_of

if TYPE_CHECKING:
    from decodathlon.harness.decoder import Decoder
    from decodathlon.harness.targets.base import Target

#: Tokens whose logits are held at once; 1024 rows of 50,000 in float32 are 200 MB.
TOKENS_AT_ONCE = 1024
#: Rows of a text without headings that make a page.
ROWS_PER_PAGE = 40
#: A line that begins a page: ` = Title = `, but not a section's ` = = Title = = `.
_HEADING = re.compile(r"= [^=].*[^=] =")

#: What the corpus did to words and what undoes it, in this order (a plain text is replaced everywhere).
_PLAIN_FIRST = [("s '", "s'")]
_PLAIN = [(" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), *[(f" {mark} ", f"{mark} ") for mark in ":;.!?,"]]
_PAIRS = [("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'")]
_PLAIN_LAST = [("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°"), (" \n", "\n"), ("\n ", "\n"),
               (" N ", " 1 "), (" 's", "'s")]  # fmt: skip


class Page(NamedTuple):
    name: str
    #: As it stands in the corpus.
    raw: str
    #: What the model reads.
    text: str

    @property
    def words(self) -> int:
        return len(re.split(r"\s+", self.raw))

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.raw.encode("utf-8"))


def pages(text: Text, count: int | None = None) -> list[Page]:
    """The first `count` pages of a data set (all for None): what stands between two titles."""
    lines = [row.removesuffix("\n") if row else " " for row in text.rows]
    starts = [i for i, line in enumerate(lines) if _HEADING.fullmatch(line.strip())]
    if not starts:  # stand-in text
        lines, starts = list(text.rows), list(range(0, len(text.rows), ROWS_PER_PAGE))
    ends = [*starts[1:], len(lines)]
    raw = ["\n".join(lines[a:b]) for a, b in zip(starts, ends, strict=True)][:count]
    return [Page(f"page-{i}-{text.row_hash(starts[i])}", page, detokenised(page)) for i, page in enumerate(raw)]


def detokenised(page: str) -> str:
    """The page as a person would have typed it."""
    for old, new in [*_PLAIN_FIRST, *_PLAIN]:
        page = page.replace(old, new)
    for left, right in _PAIRS:
        opening, closing = re.escape(left), re.escape(right)
        page = re.sub(rf"{opening}\s*([^{closing}]*?)\s*{closing}", rf"{left}\1{right}", page)
    for old, new in _PLAIN_LAST:
        page = page.replace(old, new)
    return page


def windows(length: int, width: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first counted) over the prefix token and `length` tokens; each token is counted once.

    Windows do not overlap, except that the last one is filled up with context to its full width.
    """
    counted = 1
    while counted <= length:
        end = min(counted + width, length + 1)
        begin = max(0, end - 1 - width) if counted > 1 else 0
        yield begin, end, counted
        counted = end


@torch.no_grad()
def nats(decoder: Decoder, target: Target, page: Page) -> float:
    """Minus the log-probability of the page under the decoder's law; infinite where it cuts a token."""
    judge = judge_of(decoder)
    prefix = target.start_token
    tokens = [*([] if prefix is None else [prefix]), *target.encode(page.text, special=False)]
    total = 0.0
    for begin, end, counted in windows(len(tokens) - 1, target.context_length):
        read = tokens[begin : end - 1]
        # The last token is only predicted; those before `counted` are context.
        context = target.open([read[: counted - begin]], capacity=len(read))
        logits = context.next_logits
        at = counted
        while True:
            total -= float(judge(logits, torch.tensor(tokens[at : at + len(logits)], device=logits.device))[0].sum())
            at += len(logits)
            if at >= end:
                break
            chunk = tokens[at - 1 : min(at - 1 + TOKENS_AT_ONCE, end - 1)]
            logits = context.extend(torch.tensor([chunk])).logits[0]
            context.keep(len(chunk))
    return total


def metrics(
    decoder: Decoder,
    target: Target,
    some: Sequence[Page],
    until_late: Callable[[Sequence[Page]], Iterable[Page]] = iter,
) -> dict[str, Observations]:
    """`ppl_word` and `ppl_byte`; every page is a unit."""
    read = [(page, nats(decoder, target, page)) for page in until_late(some)]
    names, totals = [p.name for p, _ in read], [n for _, n in read]
    return {
        "ppl_word": Observations(names, totals, [p.words for p, _ in read], scale="exp"),
        "ppl_byte": Observations(names, totals, [p.size for p, _ in read], scale="exp"),
    }
