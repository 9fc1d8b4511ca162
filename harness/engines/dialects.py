"""What engines call the same things: the law that a request is drawn from, without anything that an engine would add.

Servers fill in what a request leaves out: the model's own generation_config.json, defaults of their own, penalties. So
every request states everything that the engine is known to have. That it does what it was told is not believed but
tried (probes.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from decodathlon.harness.engines.client import Client, EngineError


@dataclass(frozen=True, kw_only=True)
class Law:
    """The next-token law of a request: temperature first, then one truncation or several (harness/law.py)."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    @property
    def stated(self) -> set[str]:
        """What differs from the model's own law."""
        found = {f.name for f in fields(self) if getattr(self, f.name) != f.default}
        return {"greedy"} if self.temperature == 0 else found


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How one kind of engine is told."""

    name: str
    #: What switches everything off that is not asked for.
    neutral: Mapping[str, Any] = field(default_factory=dict)
    #: What stands for no top_k.
    no_top_k: int = 0
    #: Names of the four parts of a law that it has at all.
    parts: frozenset[str] = frozenset({"temperature", "top_p", "top_k", "min_p"})
    #: What makes it go on with the last message of a talk, instead of answering it; None where it cannot.
    go_on: Mapping[str, Any] | None = None
    #: Whether log-probabilities are of the model's own law at any temperature, not of the shaped one.
    raw_log_probs: bool = True
    #: Whether a law is one JSON string under `generation_config`.
    as_config: bool = False
    #: What /completions wants where the text has its special tokens already.
    plain_text: Mapping[str, Any] = field(default_factory=dict)
    #: What makes answers go on past stop tokens; None where it cannot.
    ignore_eos: Mapping[str, Any] | None = None
    #: What asks for the ids of tokens.
    token_ids: Mapping[str, Any] = field(default_factory=dict)

    def sampling(self, law: Law, tokens: int) -> dict[str, Any]:
        """The part of a request's body that states the law and the length."""
        if self.as_config:
            greedy = law.temperature == 0
            config: dict[str, Any] = {**self.neutral, "do_sample": not greedy, "max_new_tokens": tokens}
            if not greedy:
                config |= {"temperature": law.temperature, "top_p": law.top_p, "top_k": law.top_k, "min_p": law.min_p}
            return {"generation_config": json.dumps(config), "max_tokens": tokens}
        stated: dict[str, Any] = {"temperature": law.temperature, "top_p": law.top_p, "min_p": law.min_p}
        stated["top_k"] = law.top_k or self.no_top_k
        kept = {name: value for name, value in stated.items() if name in self.parts}
        return {**self.neutral, **kept, "max_tokens": tokens}


_PENALTIES = {"presence_penalty": 0.0, "frequency_penalty": 0.0}
_LAST = {"add_generation_prompt": False, "continue_final_message": True}
DIALECTS = {
    d.name: d
    for d in (
        # what the protocol itself has; anything more might be an error
        Dialect(name="openai", parts=frozenset({"temperature", "top_p"}), neutral=_PENALTIES),
        Dialect(
            name="vllm",
            neutral={**_PENALTIES, "repetition_penalty": 1.0},
            go_on=_LAST,
            plain_text={"add_special_tokens": False},
            ignore_eos={"ignore_eos": True},
            token_ids={"return_token_ids": True},
        ),
        Dialect(
            name="sglang",
            neutral={**_PENALTIES, "repetition_penalty": 1.0},
            no_top_k=-1,
            go_on={"continue_final_message": True},
            raw_log_probs=False,
            ignore_eos={"ignore_eos": True},
        ),
        Dialect(
            name="llama.cpp",
            neutral={
                **_PENALTIES, "repeat_penalty": 1.0, "typical_p": 1.0, "dry_multiplier": 0.0, "xtc_probability": 0.0,
                "mirostat": 0, "samplers": ["temperature", "top_k", "top_p", "min_p"],
            },
            go_on={"add_generation_prompt": False},
            ignore_eos={"ignore_eos": True},
        ),
        Dialect(name="transformers", neutral={"repetition_penalty": 1.0}, as_config=True),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Engine:
    """What answers at an address."""

    dialect: Dialect
    #: As it tells it; empty where it does not.
    version: str = ""
    #: The longest text that it reads, in tokens; 0 where it does not tell.
    context: int = 0
    #: What it tells of the files of its model.
    told: str = ""

    @property
    def label(self) -> str:
        return f"{self.dialect.name} {self.version}".strip()


def recognised(client: Client, model: str) -> Engine:
    """Which engine it is, by what only it has.

    Raises:
        EngineDownError: nobody answers.
    """
    listed = _listed(client, model)
    context, told = int(listed.get("max_model_len") or 0), str(listed.get("root") or "")
    if isinstance(found := _asked(client, "/version"), dict) and isinstance(found.get("version"), str):
        return Engine(DIALECTS["vllm"], found["version"], context, told)
    for path in ("/server_info", "/get_server_info"):
        if isinstance(found := _asked(client, path), dict) and "version" in found:
            told = str(found.get("model_path") or told)
            return Engine(
                DIALECTS["sglang"], str(found["version"]), context or int(found.get("context_length") or 0), told
            )
    if isinstance(found := _asked(client, "/props"), dict) and "build_info" in found:
        settings, told = found.get("default_generation_settings") or {}, str(found.get("model_path") or told)
        context = context or int(settings.get("n_ctx") or 0)
        return Engine(DIALECTS["llama.cpp"], str(found["build_info"]), context, told)
    if isinstance(found := _asked(client, "/openapi.json"), dict) and "/load_model" in (found.get("paths") or {}):
        return Engine(DIALECTS["transformers"], "", context, told)
    return Engine(DIALECTS["openai"], "", context, told)


def _listed(client: Client, model: str) -> dict[str, Any]:
    """What the list of models says of ours; nothing where it does not."""
    try:
        listed = client.get("models", tries=2)
    except EngineError as error:
        if error.code == 0 or error.code in (401, 403):  # nobody there, or nobody who knows us
            raise
        return {}  # an engine that cannot list its models may well run one
    some = listed.get("data") if isinstance(listed, dict) else None
    every = [m for m in some if isinstance(m, dict)] if isinstance(some, list) else []
    return next((m for m in every if m.get("id") == model), {})


def _asked(client: Client, path: str) -> Any:
    try:
        return client.get(path, tries=1)
    except EngineError:
        return None
