"""Rewards for particles: per token, by a process reward model, by both, by a program.

A process reward model reads a problem and its answer, the steps of which (paragraphs) end with a mark, and says at each
mark how likely the answer is right so far (Zhang et al. 2025, The Lessons of Developing Process Reward Models in
Mathematical Reasoning, arXiv 2501.07301; the layout is that of Qwen2.5-Math-PRM). Its mean over the marks counts, as
in the founding note.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decodathlon.harness.errors import MissingError, RewardError, SpecError
from decodathlon.harness.lazy import torch
from decodathlon.harness.rewards import BATCH, Answer, folder_or_hub_id, reward

if TYPE_CHECKING:
    from collections.abc import Callable

#: What ends each step of an answer, and what the model is told first.
MARK = "<extra_0>"
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
#: Files that a process reward model's folder must have; its weights come in one file or several.
_FILES = ("config.json", "tokenizer_config.json")
#: Values that are kept, so that what did not grow is not read again.
_KEPT = 65536
#: Seconds that a program has for a batch of answers.
_PATIENCE = 60.0


@reward("mean-log-prob")
def mean_log_prob(answers: Sequence[Answer]) -> list[float]:
    """The answer's own log-probability per token."""
    return [a.log_prob / max(1, len(a.tokens)) for a in answers]


@reward("prm", needs=["text"], argument=folder_or_hub_id)
def prm(answers: Sequence[Answer], where: str) -> list[float]:
    """A process reward model in the layout of Qwen2.5-Math-PRM, a folder or hub id: 0 to 1, the mean over steps."""
    if not answers:
        return []
    stamp = max((f.stat().st_mtime_ns for f in Path(where).glob("*")), default=0)  # it may be written anew
    read, known = _prm(where, str(answers[0].target.device), stamp)
    texts = [(a.problem, a.text) for a in answers]
    unread = list(dict.fromkeys(text for text in texts if text not in known))
    for start in range(0, len(unread), BATCH):
        some = unread[start : start + BATCH]
        known.update(zip(some, read(some), strict=True))
    found = [known[text] for text in texts]
    for old in list(known)[: max(0, len(known) - _KEPT)]:
        del known[old]
    return found


def _share_and_model(text: str) -> tuple[float, str]:
    share, at, where = text.partition("@")
    try:
        a = float(share)
    except ValueError:
        a = -1.0
    if not at or not 0 <= a <= 1:
        raise ValueError(f"{text!r} is not of the form SHARE@MODEL with a share from 0 to 1")
    return a, folder_or_hub_id(where)


@reward("hybrid", needs=["text"], argument=_share_and_model)
def hybrid(answers: Sequence[Answer], share_and_model: tuple[float, str]) -> list[float]:
    """a times what a process reward model says, plus 1 - a times the answer's own log-probability: `hybrid:a@MODEL`."""
    a, where = share_and_model
    values = prm(answers, where) if a > 0 else [0.0] * len(answers)
    return [a * value + (1 - a) * one.log_prob for value, one in zip(values, answers, strict=True)]


def _program(text: str) -> tuple[str, ...]:
    words = tuple(shlex.split(text))
    if not words or not Path(words[0]).expanduser().is_file():
        raise ValueError(f"there is no program {words[0] if words else text!r}")
    return (str(Path(words[0]).expanduser().resolve()), *words[1:])


@reward("verifier", needs=["text"], argument=_program)
def verifier(answers: Sequence[Answer], words: tuple[str, ...]) -> list[float]:
    """A program of yours: it reads one JSON line per answer (prompt, text) and writes one number per line."""
    lines = "".join(json.dumps({"prompt": a.problem, "text": a.text}) + "\n" for a in answers)
    try:
        done = subprocess.run(words, input=lines, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        raise RewardError(f"verifier {words[0]} took longer than {_PATIENCE:g} s for {len(answers)} answers") from None
    except OSError as error:
        raise RewardError(f"verifier {words[0]} cannot be run: {error.strerror}") from None
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise RewardError(f"verifier {words[0]} ended with {done.returncode}: {said}")
    return [float(line) for line in done.stdout.split()]


def steps(text: str) -> list[str]:
    """The paragraphs of an answer; at least one. A mark that it has written itself is none."""
    text = text.replace(MARK, "")
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()] or [text.strip() or "..."]


@lru_cache(maxsize=2)
def _prm(
    where: str, device: str, stamp: int
) -> tuple[Callable[[Sequence[tuple[str, str]]], list[float]], dict[tuple[str, str], float]]:
    """What reads problems and answers, and an empty store of its values.

    Raises:
        MissingError: there is no such model here.
        SpecError: it is not in the layout.
    """
    import transformers
    from safetensors.torch import load_file

    folder = _folder(where)
    for name in _FILES:
        if not (folder / name).is_file():
            raise SpecError(f"reward prm:{where}: the folder has no {name}")
    weights: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    head = {name.removeprefix("score."): weights.pop(name) for name in list(weights) if name.startswith("score.")}
    if set(head) != {"0.weight", "0.bias", "2.weight", "2.bias"}:
        there = ", ".join(sorted(head)) or "none of them"
        raise SpecError(
            f"reward prm:{where} has no head of a process reward model (score.0 and score.2, weight and bias); "
            f"there is {there}. An ordinary language model cannot score steps."
        )
    config = transformers.Qwen2Config.from_pretrained(folder)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    mark = tokenizer.convert_tokens_to_ids(MARK)
    if mark is None or mark == tokenizer.unk_token_id or tokenizer.encode(MARK, add_special_tokens=False) != [mark]:
        raise SpecError(f"reward prm:{where}: its tokenizer has no token {MARK}; it belongs to another model")
    if len(tokenizer) > config.vocab_size:
        raise SpecError(
            f"reward prm:{where}: its tokenizer has {len(tokenizer)} tokens, its model {config.vocab_size}; it belongs "
            "to another model"
        )
    body = transformers.Qwen2Model(config)
    own = {name.removeprefix("model."): value for name, value in weights.items() if name.startswith("model.")}
    missing, unexpected = body.load_state_dict(own, strict=False)
    if missing or unexpected:
        raise SpecError(
            f"reward prm:{where}: weights are missing or too many: {', '.join([*missing, *unexpected][:3])}"
        )
    width, labels = config.hidden_size, head["2.weight"].shape[0]
    score = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, labels))
    score.load_state_dict(head)
    dtype = next(iter(own.values())).dtype
    body, score = body.to(device, dtype).eval(), score.to(device, dtype).eval()

    def read(some: Sequence[tuple[str, str]]) -> list[float]:
        texts = [_conversation(tokenizer, problem, answer) for problem, answer in some]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
        longest = batch["input_ids"].shape[1]
        if longest > config.max_position_embeddings:
            raise RewardError(
                f"reward prm:{where} reads {config.max_position_embeddings} tokens, and an answer with its problem has "
                f"{longest}"
            )
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        with torch.inference_mode():
            right = score(body(ids, attention_mask=mask).last_hidden_state).double().softmax(-1)[..., 1]
        marked = ids == mark
        return ((right * marked).sum(-1) / marked.sum(-1)).tolist()

    return read, {}


def _conversation(tokenizer: Any, problem: str, answer: str) -> str:
    """A talk in the tokenizer's own template, each step of the answer with its mark."""
    marked = "".join(step + MARK for step in steps(answer))
    talk = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": problem.replace(MARK, "")},
        {"role": "assistant", "content": marked},
    ]
    if not tokenizer.chat_template:
        return f"{problem.replace(MARK, '')}\n\n{marked}"
    text: str = tokenizer.apply_chat_template(talk, tokenize=False)
    return text


def _folder(where: str) -> Path:
    from huggingface_hub import snapshot_download

    if Path(where).is_dir():
        return Path(where)
    try:
        return Path(snapshot_download(where, local_files_only=True))
    except Exception as error:
        raise MissingError(f"reward prm:{where} is not here; name a folder, or have it in the hub's cache") from error
