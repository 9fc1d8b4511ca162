"""Any decoder as a model of lm-eval: likelihoods under the decoder's own law, and answers that it draws itself.

Every reply is kept as it comes (`Cell.lines`), so a resumed run asks only for what is missing.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import TemplateLM

from decodathlon.harness.decoder import Limits
from decodathlon.harness.errors import UnsupportedError
from decodathlon.harness.measure.asking import Answer
from decodathlon.harness.measure.perplexity import judge_of
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.suite import LateError

if TYPE_CHECKING:
    from decodathlon.harness.suite import Cell

#: Rows that are read, and answers that are drawn, side by side.
ROWS = 16
#: New tokens of an answer where the task does not say, as lm-eval has it.
MOST_TOKENS = 256
Pair = tuple[tuple[str, str], list[int], list[int]]


class DecoderLM(TemplateLM):  # type: ignore[misc]
    """What lm-eval sees of a cell's decoder and model.

    Args:
        most_tokens: the most new tokens of an answer, whatever the task allows.
    """

    def __init__(self, cell: Cell, most_tokens: int | None = None) -> None:
        super().__init__()
        if "text" not in cell.target.capabilities:
            raise UnsupportedError("text", f"{cell.target.name} has no tokenizer")
        self.cell, self.target, self.decoder = cell, cell.target, cell.decoder
        self._most_tokens = most_tokens
        #: What it was asked to write, for `asking.costs`.
        self.answers: dict[str, Answer] = {}

    @property
    def eot_token_id(self) -> int:
        start = self.target.start_token
        if start is None:
            raise UnsupportedError("a start token", f"{self.target.name} has none for texts without a beginning")
        return start

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.target.encode(string, special=add_special_tokens is not False)

    # -- likelihoods -------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(self, requests: list[Pair], **kwargs: Any) -> list[tuple[float, bool]]:
        judge_of(self.decoder)  # says what is missing before anything is read
        groups: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
        for _, context, continuation in requests:
            groups.setdefault(tuple(context), {})[tuple(continuation)] = None
        found: dict[str, tuple[float, bool]] = {}
        for context, continuations in self._in_time(list(groups.items())):
            keys = {c: _key("likelihood", context, c) for c in continuations}
            missing = [c for c in continuations if keys[c] not in self.cell.lines.earlier]
            fresh = dict(zip(missing, self._scored(context, missing), strict=True))
            for c, key in keys.items():
                if c in fresh:
                    self.cell.lines.write(key, log_prob=fresh[c][0], greedy=fresh[c][1])
                    found[key] = fresh[c]
                else:
                    line = self.cell.lines.earlier[key]
                    found[key] = (float(line["log_prob"]), bool(line["greedy"]))
        return [found[_key("likelihood", context, continuation)] for _, context, continuation in requests]

    @torch.no_grad()
    def _scored(self, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation under the decoder's law, and whether it is the likeliest throughout."""
        # As lm-eval does, the beginning of an overlong context is left out, for each continuation as much as it needs;
        # its last token is not read.
        room = [max(1, self.target.context_length + 1 - len(c)) for c in continuations]
        kept = [min(len(context), r) for r in room]
        scores: dict[int, tuple[float, bool]] = {}
        for length in dict.fromkeys(kept):
            alike = [i for i, k in enumerate(kept) if k == length]
            for begin in range(0, len(alike), ROWS):
                rows = alike[begin : begin + ROWS]
                found = self._scored_together(list(context)[-length:], [list(continuations[i]) for i in rows])
                scores |= dict(zip(rows, found, strict=True))
        return [scores[i] for i in range(len(continuations))]

    def _scored_together(self, head: list[int], some: Sequence[list[int]]) -> list[tuple[float, bool]]:
        """The same of continuations of one context that fits."""
        width = max(map(len, some))
        opened = self.target.open([head], capacity=len(head) + width - 1)
        opened.select([0] * len(some))
        logits = opened.next_logits[:, None]
        if width > 1:
            padded = torch.zeros(len(some), width - 1, dtype=torch.long)
            for b, tokens in enumerate(some):
                padded[b, : len(tokens) - 1] = torch.tensor(tokens[:-1], dtype=torch.long)
            logits = torch.cat([logits, opened.extend(padded).logits], 1)
        scores = []
        for row, tokens in zip(logits, some, strict=True):
            real = torch.tensor(tokens, device=row.device)
            own = judge_of(self.decoder)(row[: len(tokens)], real)[0]
            greedy = bool((row[: len(tokens)].argmax(-1) == real).all())
            scores.append((float(own.sum()), greedy))
        return scores

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        found = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.target.context_length,
                context_len=1,
            )
            pairs = [((text, ""), *make_disjoint_window(window)) for window in windows]
            found.append(sum(score for score, _ in self._loglikelihood_tokens(pairs)))
        return found

    # -- answers -----------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        times: dict[str, int] = {}
        asked = []
        for request in requests:
            context, options = request.args
            settings = json.dumps(options, sort_keys=True, default=str)
            repeat = times[context + settings] = times.get(context + settings, -1) + 1
            asked.append((context, options, _key_of(context, options, repeat)))
        batches = [asked[i : i + ROWS] for i in range(0, len(asked), ROWS)]
        for batch in self._in_time(batches):
            for _, _, key in batch:
                if key in self.cell.lines.earlier:
                    self.answers[key] = Answer.from_line(self.cell.lines.earlier[key])
            self._answer([one for one in batch if one[2] not in self.answers])
        return [self.answers[key].text for _, _, key in asked]

    def answer_to(self, context: str, options: dict[str, Any]) -> Answer:
        """The first answer to a request."""
        return self.answers[_key_of(context, options, 0)]

    def _answer(self, asked: Sequence[tuple[str, dict[str, Any], str]]) -> None:
        """Draw answers. The decoder decides how it draws; of the task's settings the length and the stops count."""
        lengths = {key: self._length(options) for _, options, key in asked}
        for length in sorted(set(lengths.values())):
            some = [one for one in asked if lengths[one[2]] == length]
            room = self.target.context_length - length
            prompts = [self.target.encode(context)[-room:] for context, _, _ in some]
            rng = RowRandom(self.cell.seed, [key for _, _, key in some])
            begun = time.perf_counter()
            drawn = self.decoder.generate(self.target, prompts, Limits(length), rng)
            each = (time.perf_counter() - begun) / len(some)
            for (_, options, key), one in zip(some, drawn, strict=True):
                until = options.get("until") or []
                text = one.text
                for stop in [until] if isinstance(until, str) else until:
                    text = text.partition(stop)[0] if stop else text
                self.answers[key] = Answer.of(key, 0, text, one, each)
                self.cell.lines.write(key, **self.answers[key].as_line())

    def _length(self, options: dict[str, Any]) -> int:
        wanted = int(options.get("max_gen_toks") or options.get("max_new_tokens") or MOST_TOKENS)
        most = min(wanted, self._most_tokens or wanted, self.target.context_length - 1)
        return max(1, most)

    def _in_time(self, units: list[Any]) -> Any:
        """The units, one by one.

        Raises:
            LateError: there was no time for all of them; what was done is kept for `--resume`.
        """
        yield from self.cell.until_late(units)
        if self.cell.late:
            raise LateError(f"{self.cell.late}; they are kept, --resume goes on behind them")


def _key_of(context: str, options: dict[str, Any], repeat: int) -> str:
    return _key("answer", context, json.dumps(options, sort_keys=True, default=str), repeat)


def _key(*parts: object) -> str:
    """A name for a request that is the same in every run."""
    plain = json.dumps(parts, default=list)
    return f"{parts[0]}-{hashlib.sha256(plain.encode()).hexdigest()[:16]}"
