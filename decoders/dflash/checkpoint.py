"""Where a drafter's weights come from: what ships with the project, a released one, a folder, or random numbers."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decodathlon.decoders.dflash import config as configs
from decodathlon.harness import models
from decodathlon.harness.errors import MissingError, SpecError, UnsupportedError
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from decodathlon.decoders.dflash.network import Network

#: What a checkpoint's parameter may be called besides a folder or a hub id.
AUTO, RANDOM = "auto", "random"
#: One folder for each model that a drafter ships for.
SHIPPED = Path(__file__).parent / "drafters"
#: Released drafters whose targets have nothing but attention, by the hub id of the target.
RELEASED = {
    "Qwen/Qwen3-4B": "z-lab/Qwen3-4B-DFlash-b16",
    "Qwen/Qwen3-8B": "z-lab/Qwen3-8B-DFlash-b16",
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": "z-lab/Qwen3-Coder-30B-A3B-DFlash",
    "meta-llama/Llama-3.1-8B-Instruct": "z-lab/LLaMA3.1-8B-Instruct-DFlash-UltraChat",
    "openai/gpt-oss-20b": "z-lab/gpt-oss-20b-DFlash",
    "openai/gpt-oss-120b": "z-lab/gpt-oss-120b-DFlash",
}
#: Shape of random drafters.
LAYERS, BLOCK = 2, 16
#: What older files hold beside the weights: it follows from the config.
IGNORED = "rotary_emb.inv_freq"


def check_named(checkpoint: str, who: str) -> None:
    """What is wrong with a name can be told before a model is loaded.

    Raises:
        SpecError, MissingError: there is no such checkpoint, or its config is of something else.
    """
    if checkpoint in (AUTO, RANDOM):
        return
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        configs.read(folder / "config.json")
        return
    if not _is_hub(checkpoint):
        raise SpecError(
            f"{who}: checkpoint={checkpoint} is neither a folder nor a hub id (ORG/NAME, or ORG/NAME@REVISION); {AUTO} "
            f"and {RANDOM} are known"
        )
    models.check(_hub(checkpoint), "cpu")


def _is_hub(checkpoint: str) -> bool:
    return checkpoint.count("/") == 1 and not checkpoint.startswith((".", "/", "~"))


@cache
def _cached(checkpoint: str) -> str | None:
    """The folder of a hub id in the local cache; asked once, for requests ask what their drafter consists of."""
    return models.cached_snapshot(_hub(checkpoint))


def _hub(checkpoint: str) -> models.Model:
    """A hub id, perhaps with a revision behind it."""
    name, _, revision = checkpoint.partition("@")
    return models.resolve(f"{name}[revision={revision}]" if revision else name)


def folder_for(checkpoint: str, target: Any) -> Path | None:
    """Where the weights lie; None for random ones.

    Raises:
        UnsupportedError: nobody made a drafter for this model, as far as is known here.
        MissingError: the hub has it and cannot be reached.
    """
    if checkpoint == RANDOM or (checkpoint == AUTO and not target.revision and _is_random(target)):
        return None
    if checkpoint == AUTO:
        name = target.name.partition("[")[0]
        if (SHIPPED / name / "config.json").is_file():
            return SHIPPED / name
        checkpoint = RELEASED.get(models.ALIASES.get(name, name), "")
        if not checkpoint:
            raise UnsupportedError(
                "a DFlash drafter",
                f"none ships for {target.name}, and none of the released ones is for it. Give checkpoint=FOLDER or a "
                "hub id, train one (decodathlon draft train), or take checkpoint=random to try the loop",
            )
    folder = Path(checkpoint).expanduser()
    return folder if folder.is_dir() else Path(models.fetch(_hub(checkpoint), lambda text: None))


def files(checkpoint: str) -> list[Path]:
    """What the drafter consists of, where its folder is known without a model: of `auto`, all that ship; of a hub id
    what lies in the cache. (Which released one `auto` took, the row says.)"""
    if checkpoint == RANDOM:
        return []
    folders = SHIPPED.glob("*/") if checkpoint == AUTO else [Path(checkpoint).expanduser()]
    if _is_hub(checkpoint) and not Path(checkpoint).expanduser().is_dir():
        cached = _cached(checkpoint)
        folders = [Path(cached)] if cached else []
    return [file for f in folders for name in ("config.json", "*.safetensors") for file in sorted(f.glob(name))]


def stamps(checkpoint: str) -> list[tuple[str, int, int]]:
    """What tells the files of one training from those of the next."""
    found = [(file.name, file.stat()) for file in files(checkpoint)]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]


def told(checkpoint: str, target: Any) -> str:
    """Which drafter it is, for a row."""
    folder = folder_for(checkpoint, target)
    if folder is None:
        return "random weights of seed 0"
    kind = (
        "shipped" if folder.parent == SHIPPED else "folder" if Path(checkpoint).expanduser().is_dir() else "hub commit"
    )
    return f"{kind} {folder.name}"


def _is_random(target: Any) -> bool:
    """Whether the target's own weights are random numbers, as those of the audit."""
    return bool(target.name.startswith("enumerable-lm"))


def load(checkpoint: str, target: Any) -> Network:
    """The drafter for a target, on its device and in its type.

    Raises:
        SpecError: it is for another model, or tensors are missing, too many, or of other shapes.
        MissingError: it cannot be read.
    """
    folder = folder_for(checkpoint, target)
    if folder is None:
        return random(target)
    config = configs.read(folder / "config.json")
    configs.check_fits(config, target, str(folder))
    return read(folder, config).to(device=target.device, dtype=target.dtype)


def read(folder: Path, config: configs.Config) -> Network:
    """The weights in a folder, in the type that they are stored in."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from decodathlon.decoders.dflash.network import Network

    with torch.device("meta"):
        network = Network(config)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise MissingError(f"the drafter in {folder} has no .safetensors file")
    try:
        found = {name: tensor for file in files for name, tensor in load_file(str(file)).items()}
    except (OSError, SafetensorError) as error:
        raise MissingError(f"the drafter in {folder} cannot be read: {error}") from error
    found = {name: tensor for name, tensor in found.items() if not name.endswith(IGNORED)}
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    for names, what in (
        (wanted.keys() - found.keys(), "lacks"),
        (found.keys() - wanted.keys(), "has, and should not,"),
    ):
        if names:
            raise SpecError(f"the drafter in {folder} {what} {len(names)} tensors, the first of them {min(names)}")
    for name, shape in wanted.items():
        if tuple(found[name].shape) != shape:
            raise SpecError(
                f"the drafter in {folder}: {name} is {tuple(found[name].shape)}, and its config asks for {shape}"
            )
    network.load_state_dict(found, assign=True)
    return network.eval().requires_grad_(False)


def save(network: Network, folder: Path) -> None:
    """Write it as the released drafters are: `config.json` and `model.safetensors`, in bfloat16."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    work = folder / "model.part"
    tensors = {name: t.detach().to("cpu", torch.bfloat16).contiguous() for name, t in network.state_dict().items()}
    save_file(tensors, str(work), metadata={"format": "pt"})
    os.replace(work, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(network.config.as_json(), indent=2) + "\n")


def shape_for(target: Any, *, layers: int, fused: int, block: int, intermediate: int = 0) -> configs.Config:
    """The config of a drafter for this target, with blocks of its own kind, that sees `fused` of its hidden states."""
    own = target.config
    lacking = [n for n in ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size")
               if not hasattr(own, n)]  # fmt: skip
    if lacking:
        raise UnsupportedError("a DFlash drafter", f"the config of {target.name} has no {lacking[0]} to shape it by")
    depth, heads = int(own.num_hidden_layers), int(own.num_attention_heads)
    width = int(own.hidden_size)
    if fused > 1 and depth < fused + 3:
        raise SpecError(
            f"{target.name} has {depth} layers; a drafter can look at {max(1, depth - 3)} of them, not {fused}"
        )
    return configs.Config(
        hidden_size=width, intermediate_size=intermediate or int(own.intermediate_size), num_hidden_layers=layers,
        heads=heads, key_heads=int(getattr(own, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(own, "head_dim", None) or width // heads),
        rms_norm_eps=float(getattr(own, "rms_norm_eps", 1e-6)), vocab_size=target.vocab_size, num_target_layers=depth,
        target_layer_ids=configs.layer_ids(depth, fused), mask_token_id=mask_for(target), block_size=block,
        rope={"rope_type": "default", "rope_theta": _theta(own)},
        max_position_embeddings=min(target.context_length, 40960),
        final_logit_softcapping=float(getattr(own, "final_logit_softcapping", None) or 0.0),
        output_multiplier=float(getattr(own, "logit_scale", None) or 1.0) / float(getattr(own, "logits_scaling", 1.0)),
    )  # fmt: skip


def mask_for(target: Any) -> int:
    """A token that texts do not have: one of the tokenizer's spare ones where there are some, else the last."""
    tokenizer = getattr(target, "tokenizer", None)
    rows = int(target.model.get_input_embeddings().weight.shape[0])
    if not hasattr(tokenizer, "__len__"):
        return rows - 1
    if rows > len(tokenizer):
        return len(tokenizer)
    special = set(getattr(tokenizer, "all_special_ids", ())) - set(target.stop_tokens) - {target.start_token}
    return max(special, default=rows - 1)


def _theta(own: Any) -> float:
    parameters = getattr(own, "rope_parameters", None) or {}
    return float(parameters.get("rope_theta") or getattr(own, "rope_theta", None) or 10000.0)


def random(target: Any, seed: int = 0) -> Network:
    """A drafter that guesses at random, always the same: for the loop and its laws, and for what the passes cost."""
    from decodathlon.decoders.dflash.network import Network

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fused = min(5, max(1, int(target.config.num_hidden_layers) - 3))
        network = Network(shape_for(target, layers=LAYERS, fused=fused, block=BLOCK))
    return network.to(device=target.device, dtype=target.dtype).eval().requires_grad_(False)
