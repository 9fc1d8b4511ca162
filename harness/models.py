"""Model specs to loaded targets: the embedded default, aliases, hub ids, local folders, GGUF files, plugin loaders.

`resolve` is cheap and imports no torch: it says what a spec means, or what is wrong with it, before a run begins.
`load` does the work, in the process that measures. Only safetensors, GGUF and llama2.c files are read.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from decodathlon.harness import embedded, spec
from decodathlon.harness.engines import remote
from decodathlon.harness.errors import MissingError, SpecError, near_miss
from decodathlon.harness.registry import registry

STORIES = "stories-260k"
#: Short names of hub models: the ladder of the founding notes.
ALIASES = {
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.2",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
}
#: What may stand in the brackets of packed models (decoders/jit_delta/loader.py) and on the command line.
OF_PACKED = ("weights", "memory")
#: How long a hub may take to answer before a run gives it up.
HUB_TIMEOUT_S = 8.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """What may stand in the brackets of a model spec.

    Args:
        load: quantise while loading, through bitsandbytes on CUDA.
        revision: commit, tag or branch of a hub model.
        path: folder of a model that is known by name only (`stories-260k`).
    """

    load: Literal["full", "nf4", "int8"] = "full"
    revision: str | None = None
    path: str | None = None


@dataclass(frozen=True)
class Model:
    """A resolved spec."""

    #: What rows call it: alias or hub id or folder name, with the options that differ from their defaults.
    name: str
    kind: Literal["embedded", "stories", "folder", "gguf", "hub", "plugin", "remote"]
    #: Hub id, or path; of a plugin the name of its loader; of a remote one the address of its server.
    location: str
    options: Options
    #: What a plugin's loader is given: the spec as it was typed.
    text: str = ""


def resolve(text: str, url: str = "") -> Model:
    """What a model spec means.

    Args:
        url: of the server of a remote model, `openai:NAME`.

    Raises:
        SpecError: neither a known name, a folder, a file nor a hub id; or a file of a kind that is not read.
        MissingError: a folder that holds no weights we read.
    """
    parsed = spec.parse(text, "model")
    name = parsed.name
    if name.startswith(remote.PREFIX):
        return Model(remote.named(parsed, url), "remote", url, Options(), text)
    if url:
        raise SpecError(
            f"--model-url is the address of a server; it goes with --model {remote.PREFIX}NAME, not {name!r}"
        )
    if name in loaders():
        return Model(text.strip(), "plugin", name, Options(), text.strip())
    if (loader := _of_folder(Path(name).expanduser())) is not None:
        return Model(registry.get("model-loader", loader).named(parsed), "plugin", loader, Options(), text)
    if others := [key for key in OF_PACKED if key in parsed.params]:
        raise SpecError(
            f"model {name!r} has no parameter {others[0]!r}, which is of packed models; "
            f"`decodathlon pack {name} OUT` makes one"
        )
    options: Options = spec.fill(Options, parsed, "model", {})
    shown = spec.render(name, options)
    if name == embedded.NAME:
        return Model(shown, "embedded", name, options)
    if name == STORIES:
        folder = options.path or os.environ.get("DECODATHLON_MODELS")
        if not folder:
            raise SpecError(f"model {STORIES} needs its folder: write {STORIES}[path=FOLDER] or set DECODATHLON_MODELS")
        return Model(STORIES, "stories", folder, options)
    path = Path(name).expanduser()
    if path.is_dir():
        _check_folder(path)
        return Model(spec.render(path.resolve().name, options), "folder", str(path.resolve()), options)
    if path.is_file():
        if path.suffix != ".gguf":
            raise SpecError(
                f"model {name}: only .gguf files and folders with safetensors are read, not {path.suffix!r}"
            )
        return Model(spec.render(path.stem, options), "gguf", str(path.resolve()), options)
    if name in ALIASES:
        return Model(shown, "hub", ALIASES[name], options)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and all(name.split("/")):
        return Model(shown, "hub", name, options)
    known = [embedded.NAME, STORIES, *ALIASES, *loaders()]
    raise SpecError(
        f"there is no model {name!r}: not a known name, a folder, a file or a hub id{near_miss(name, known)}"
    )


def loaders() -> list[str]:
    """Plugins' loaders that a model is named by."""
    return [name for name in registry.names("model-loader") if not _mark(name)]


def _of_folder(path: Path) -> str | None:
    """The loader whose mark this folder has: a file that the loader names. Such a loader has `named`, too, which says
    what rows call a model, or what is wrong with its spec."""
    marks = ((name, _mark(name)) for name in registry.names("model-loader"))
    return next((name for name, mark in marks if mark and (path / mark).is_file()), None)


def _mark(loader: str) -> str:
    return str(getattr(registry.get("model-loader", loader), "marker", ""))


def _check_folder(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise MissingError(f"model folder {path} has no config.json")
    if list(path.glob("*.safetensors")) or list(path.glob("*.safetensors.index.json")):
        return
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        raise MissingError(
            f"model folder {path} has only {pickles[0]}; pickles can run code when they are read and are refused. "
            "Save the model as safetensors (model.save_pretrained)."
        )
    raise MissingError(f"model folder {path} has no .safetensors file")


def load(model: Model, *, device: str, dtype: str, say: Callable[[str], None]) -> Any:
    """The loaded target.

    Args:
        device: auto, cpu or cuda.
        dtype: auto, float32, bfloat16 or float16.
        say: receives one line when something takes long.

    Raises:
        MissingError: weights that cannot be had; the message has the remedy.
        UnsupportedError: an architecture that the targets refuse.
    """
    import torch

    place = pick_device(device)
    if model.kind == "remote":
        return remote.load(model.text, model.location, name=model.name, say=say)
    if model.kind == "plugin":
        # A plugin's loader gets the whole spec, the device and the dtype as typed, and returns a Target.
        return registry.get("model-loader", model.location)(model.text, device=place, dtype=dtype)

    import transformers

    from decodathlon.harness.targets.transformers import TransformersTarget

    transformers.utils.logging.disable_progress_bar()
    kind = getattr(torch, pick_dtype(dtype, place))
    weights, tokenizer, revision = _read(model, kind, place, say)
    weights = weights.to(place) if model.options.load == "full" else weights
    target = TransformersTarget(weights, tokenizer, name=model.name)
    target.revision = revision
    target.file_bytes = file_bytes(Path(fetch(model, say)))
    return target


def file_bytes(source: Path) -> int:
    """Of a file of weights, or of those in a folder."""
    from decodathlon.harness.llama2c import CHECKPOINT

    files = [source] if source.is_file() else [*source.glob("*.safetensors"), *source.glob(CHECKPOINT)]
    return sum(p.stat().st_size for p in files)


def _read(model: Model, dtype: Any, device: str, say: Callable[[str], None]) -> tuple[Any, Any, str]:
    """Weights, tokenizer and, where the source has one, its revision."""
    if model.kind == "stories":
        from decodathlon.harness import llama2c

        weights, tokenizer = llama2c.load(Path(model.location))
        return weights.to(dtype), tokenizer, ""
    source, extra, revision = model.location, _quantisation(model, device), ""
    if model.kind == "embedded":
        source, revision = str(embedded.prepare(say)), f"gguf-sha256-{embedded.GGUF_SHA256}"
    elif model.kind == "hub":
        source = _hub_snapshot(model, say)
        revision = Path(source).name  # the hub's cache calls a snapshot's folder by its commit
    elif model.kind == "gguf":
        source, extra = _gguf(Path(model.location))
    else:
        _check_folder(Path(source))
    return *_from_pretrained(source, dtype, extra, model.name), revision


def fetch(model: Model, say: Callable[[str], None]) -> str:
    """Have the files of a model at hand; returns where they are.

    Raises:
        MissingError: they cannot be had, or the model's plugin keeps them itself.
    """
    if model.kind == "embedded":
        return str(embedded.prepare(say))
    if model.kind == "hub":
        return _hub_snapshot(model, say)
    if model.kind == "plugin":
        raise MissingError(f"model {model.name} comes from a plugin, which fetches what it needs when it is loaded")
    if model.kind == "remote":
        raise MissingError(f"model {model.name} is behind a server; there is nothing to fetch")
    return model.location


def check(model: Model, device: str, dtype: str = "auto") -> None:
    """What can be known to fail before a run begins. Imports torch only where CUDA is asked for, or by a plugin's
    loader that has a `check`.

    Raises:
        MissingError: no CUDA, no bitsandbytes, or a hub model that is neither cached nor reachable.
        DecodathlonError: what the plugin's loader says.
    """
    if model.kind == "remote":
        remote.check(model.text, model.location)
        return
    if device == "cuda":
        pick_device(device)
    if model.options.load != "full":
        _quantisation(model, pick_device(device))
    if model.kind == "hub" and cached_snapshot(model) is None:
        check_hub(f"model {model.location}")
    loader = registry.get("model-loader", model.location) if model.kind == "plugin" else None
    if loader is not None and hasattr(loader, "check"):
        loader.check(model.text, device=pick_device(device), dtype=dtype)


def _from_pretrained(source: str, dtype: Any, extra: dict[str, Any], name: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    only = {} if "gguf_file" in extra else {"use_safetensors": True}
    tokenizer_options = {"gguf_file": extra["gguf_file"]} if "gguf_file" in extra else {}
    try:
        weights, loaded = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **only,
            **extra,
        )
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, **tokenizer_options)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        # Each file format has its own family of exceptions; to the user they are all one thing.
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MissingError(f"model {name} cannot be read from {source}: {first}") from error
    gaps = sorted(map(str, [*loaded["missing_keys"], *loaded["mismatched_keys"]]))
    if gaps:  # they would be filled with random numbers
        raise MissingError(f"model {name} lacks {len(gaps)} weights, among them {gaps[0]}; fetch it again")
    return weights, tokenizer


def _gguf(path: Path) -> tuple[str, dict[str, Any]]:
    extra: dict[str, Any] = {"gguf_file": path.name}
    extra |= embedded.dense_gguf()
    return str(path.parent), extra


def _quantisation(model: Model, device: str) -> dict[str, Any]:
    if model.options.load == "full":
        return {}
    import importlib.util

    if device != "cuda" or importlib.util.find_spec("bitsandbytes") is None:
        raise MissingError(
            f"model {model.name}: load={model.options.load} needs CUDA and bitsandbytes (pip install -e '.[cuda]')"
        )
    import torch
    from transformers import BitsAndBytesConfig

    if model.options.load == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return {"quantization_config": config, "device_map": {"": 0}}


_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def cached_snapshot(model: Model) -> str | None:
    """Folder of the hub model in the local cache, if its weights are there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            model.location, revision=model.options.revision, allow_patterns=_HUB_FILES, local_files_only=True
        )
    except LocalEntryNotFoundError:
        return None
    return str(folder) if list(Path(folder).glob("*.safetensors")) else None


def _hub_snapshot(model: Model, say: Callable[[str], None]) -> str:
    """Folder of the hub model: the local cache if it is there, else a download."""
    from huggingface_hub import snapshot_download

    cached = cached_snapshot(model)
    if cached is not None:
        return cached
    check_hub(f"model {model.location}")
    say(f"downloading {model.location}")
    try:
        return str(snapshot_download(model.location, revision=model.options.revision, allow_patterns=_HUB_FILES))
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise MissingError(f"model {model.location} cannot be had from the hub: {first}") from error


def check_hub(what: str) -> None:
    """
    Raises:
        MissingError: the hub does not answer within `HUB_TIMEOUT_S`, in one line with the remedy.
    """
    import concurrent.futures
    import urllib.error
    import urllib.request

    from huggingface_hub import constants

    remedy = "put a copy into the hub cache (HF_HOME) or name a local folder"
    if constants.HF_HUB_OFFLINE:
        raise MissingError(f"{what} is not in the hub cache and HF_HUB_OFFLINE is set; {remedy}")

    def ask() -> None:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S / 2).close()
        except urllib.error.HTTPError:
            return  # it answered

    # A thread, because looking up a name has no timeout of its own.
    pool = concurrent.futures.ThreadPoolExecutor(1)
    try:
        pool.submit(ask).result(timeout=HUB_TIMEOUT_S)
    except (OSError, TimeoutError) as error:
        raise MissingError(
            f"{what} is not in the hub cache and the hub cannot be reached ({error}); {remedy}"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def pick_device(device: str) -> str:
    """`auto` to cuda where there is one.

    Raises:
        MissingError: cuda was asked for and there is none.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise MissingError("--device cuda: torch sees no CUDA device here; use --device cpu or a CUDA build of torch")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def pick_dtype(dtype: str, device: str) -> str:
    """`auto` to bfloat16 where the hardware multiplies it, else float32."""
    if dtype != "auto":
        return dtype
    if device == "cuda":
        import torch

        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return "bfloat16" if cpu_has_bfloat16() else "float32"


def cpu_has_bfloat16() -> bool:
    """Whether the CPU has bfloat16 dot products; elsewhere float32 is faster."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


@dataclass(frozen=True)
class _Ising:
    """A spin model whose law is enumerated (targets/toy.py)."""

    n: int = 8
    beta: float = 0.42
    field: float = 0.0
    rows: int = 1


def _load_ising(text: str, *, device: str, dtype: str) -> Any:
    from decodathlon.harness.targets import toy

    asked: _Ising = spec.fill(_Ising, spec.parse(text, "model"), "model", {"n": "[2, 16]", "rows": "[1, 16]"})
    try:
        return toy.Ising(asked.n, asked.beta, asked.field, rows=asked.rows)
    except ValueError as error:
        raise SpecError(f"model {text}: {error}") from None


@dataclass(frozen=True)
class _EnumerableLM:
    """A tiny random transformer in float64 (targets/toy.py)."""

    vocabulary: int = 4
    seed: int = 0


def _load_enumerable(text: str, *, device: str, dtype: str) -> Any:
    from decodathlon.harness.targets import toy

    asked: _EnumerableLM = spec.fill(_EnumerableLM, spec.parse(text, "model"), "model", {"vocabulary": "[3, 64]"})
    return toy.enumerable_lm(asked.vocabulary, asked.seed)


registry.add("model-loader", "ising", _load_ising, __file__)
registry.add("model-loader", "enumerable-lm", _load_enumerable, __file__)
