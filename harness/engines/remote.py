"""Models behind a server, as --model names them: `openai:NAME[...]` with --model-url, to a loaded target."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decodathlon.harness import spec
from decodathlon.harness.engines import client, dialects
from decodathlon.harness.errors import MissingError, SpecError

if TYPE_CHECKING:
    from decodathlon.harness.targets.remote import RemoteTarget, Template, Turn

#: What the names of remote models begin with.
PREFIX = "openai:"
#: Seconds in which a server must say something before a run begins.
HELLO = 20.0
#: Letters of an address's hash that tell two servers apart in a row's model.
LETTERS = 6


@dataclass(frozen=True, kw_only=True)
class Options:
    """What may stand in the brackets of a remote model.

    Args:
        context: tokens that it reads, where the server does not say.
        concurrency: answers that are asked for at once.
        tokenizer: a folder; talks are then rendered here, by its template, and sent as text.
        hardware: what the server computes on, such as 8xH100: it cannot tell.
        timeout: seconds that one answer may take.
    """

    context: int = 0
    concurrency: int = 8
    tokenizer: str | None = None
    hardware: str = ""
    timeout: float = client.TIMEOUT


_BOUNDS = {"context": "[0, 100000000]", "concurrency": "[1, 1024]", "timeout": "(0, 86400]"}


def _options(parsed: spec.Spec) -> Options:
    found: Options = spec.fill(Options, parsed, "model", _BOUNDS)
    return found


def named(parsed: spec.Spec, url: str) -> str:
    """What rows call it: servers at different addresses may call other models by the same name.

    Raises:
        SpecError: no name, no address, or a parameter that it does not have.
    """
    if not parsed.name.removeprefix(PREFIX):
        raise SpecError(
            f"--model {parsed.name}: the name that the server has for the model is missing, as in openai:qwen3"
        )
    if not url:
        raise SpecError(f"--model {parsed.name} needs --model-url, such as http://127.0.0.1:8000/v1")
    client.check_url("--model-url", url)
    options = _options(parsed)
    name = parsed.name.removeprefix(PREFIX).rstrip("/").rpartition("/")[2] if _is_path(parsed.name) else parsed.name
    where = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:LETTERS]
    shown = name if name.startswith(PREFIX) else PREFIX + name
    # talks that are rendered here may be other prompts than those that the server would make
    return f"{shown}@{where}" + (f"[tokenizer={Path(options.tokenizer).name}]" if options.tokenizer else "")


def _is_path(name: str) -> bool:
    return name.removeprefix(PREFIX).startswith(("/", ".", "~"))


def check(text: str, url: str) -> None:
    """Whether the server is there, before a run begins.

    Raises:
        MissingError: it is not, or does not know us; or the folder of the tokenizer is none.
    """
    options = _options(spec.parse(text, "model"))
    _template(options.tokenizer)
    asking = client.Client(url, timeout=HELLO, tries=2)
    try:
        asking.get("models")
    except client.EngineError as error:
        if error.code in (401, 403):
            raise MissingError(f"{error}; set {' or '.join(client.KEYS)} to its key") from None
        if isinstance(error, client.EngineDownError) and not error.code:
            raise MissingError(
                f"--model-url {url}: no server answers there ({error}); start it, or mend the address"
            ) from None


def load(text: str, url: str, *, name: str, say: Callable[[str], None]) -> RemoteTarget:
    """The target, after it was seen what the server can do.

    Raises:
        MissingError: the server is gone, or answers nothing that can be used.
    """
    from decodathlon.harness.engines import probes
    from decodathlon.harness.targets.remote import RemoteTarget

    parsed = spec.parse(text, "model")
    options, model = _options(parsed), parsed.name.removeprefix(PREFIX)
    asking = client.Client(url, timeout=options.timeout)
    try:
        engine = dialects.recognised(asking, model)
        target = RemoteTarget(
            asking,
            model,
            engine,
            name=name,
            hardware=options.hardware,
            context=options.context,
            concurrency=options.concurrency,
            template=_template(options.tokenizer),
        )
        say(f"trying what the server does with what it is told ({engine.label})")
        probes.probe(target, say)
    except client.EngineError as error:
        raise MissingError(str(error)) from None
    able = ", ".join(sorted({*target.parts, *target.capabilities} - {"server", "text"}))
    say(f"the server was seen to have: {able or 'nothing but greedy answers'}")
    return target


def _template(folder: str | None) -> Template | None:
    """Renders a talk by the chat template of a tokenizer.

    Raises:
        MissingError: there is no such folder, or it has no template.
    """
    if folder is None:
        return None
    path = Path(folder).expanduser()
    if not (path / "tokenizer_config.json").is_file():
        raise MissingError(f"tokenizer={folder} is no folder with a tokenizer_config.json")
    import transformers

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    if not tokenizer.chat_template:
        raise MissingError(f"tokenizer={folder} has no chat template")
    # what the model's tokenizer, at the server as here, puts before every text that it is not told to leave as it is
    own = tokenizer.bos_token if tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id] else ""

    def rendered(talk: Sequence[Turn], bare: bool) -> str:
        messages = [{"role": who, "content": text} for who, text in talk]
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text.removeprefix(own) if bare and own else text

    return rendered
