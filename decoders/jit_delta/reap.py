"""Which experts of a mixture matter, after REAP (Lasby et al. 2025, arXiv 2510.13999), and a model without the others.

The saliency of expert j is the mean, over the tokens that are routed to it, of g_j(x) times the norm of its output
f_j(x); g are the router's weights as the model uses them, so renormalised where it renormalises. Who was never routed
to has 0. A model without some experts is another model, and smaller; to read experts only when they are needed (a
packed model with weights=disk) changes nothing and costs time.

Dimensions: T tokens, K experts per token, E width of the model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decodathlon.decoders.jit_delta import pack
from decodathlon.decoders.jit_delta.container import NAMES, Source
from decodathlon.decoders.speculative.layers import written
from decodathlon.harness import models, progress
from decodathlon.harness.commands.command import Command, say
from decodathlon.harness.errors import MissingError, SpecError, UnsupportedError
from decodathlon.harness.lazy import torch
from decodathlon.harness.registry import registry
from decodathlon.harness.results.table import aligned

if TYPE_CHECKING:
    from torch import Tensor

#: Fields of a config that say how many experts a layer has.
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
#: A tensor of an expert in a checkpoint, and the router's.
EXPERT = re.compile(r"^(.*\.experts\.)(\d+)(\..*)$")
ROUTER = re.compile(r"^(.*\.(?:mlp|block_sparse_moe)\.)gate\.(weight|e_score_correction_bias)$")


@dataclass
class Saliency:
    """Of the experts of one layer."""

    #: Sum over tokens of weight times norm, and tokens, by expert.
    total: Tensor
    tokens: Tensor

    @property
    def mean(self) -> Tensor:
        return torch.where(self.tokens > 0, self.total / self.tokens.clamp(min=1), 0.0)


def saliency(target: Any, texts: Iterable[Tensor]) -> dict[str, Saliency]:
    """By the name of each layer's experts in the model.

    Args:
        texts: (L,) each, what the model reads for it.

    Raises:
        UnsupportedError: the model has no experts.
    """
    found: dict[str, Saliency] = {}
    hooks = [module.register_forward_hook(_hook(found, name)) for name, module in mixtures(target).items()]
    target.model.set_experts_implementation("eager")  # the others round otherwise
    try:
        for row in texts:
            target.logits(row[None], torch.tensor([len(row) - 1]))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def mixtures(target: Any) -> dict[str, Any]:
    """The experts of each layer, by name.

    Raises:
        UnsupportedError: the model has none.
    """
    named = target.model.named_modules()
    found = {name: m for name, m in named if name.endswith(".experts") and hasattr(m, "num_experts")}
    if not found:
        raise UnsupportedError("experts", f"{target.name} has none")
    return found


def _hook(found: dict[str, Saliency], name: str) -> Any:
    busy = [False]

    def hook(module: Any, given: tuple[Any, ...], output: Any) -> None:
        if busy[0]:  # it is we who call it
            return
        x, chosen, weights = (g.detach() for g in given)
        count = module.num_experts
        own = found.setdefault(
            name, Saliency(torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.long))
        )
        busy[0] = True
        try:
            for expert in chosen.unique().tolist():
                at, place = torch.where(chosen == expert)
                alone = torch.full((len(at), 1), expert, device=x.device, dtype=chosen.dtype)
                made = module(x[at], alone, torch.ones(len(at), 1, device=x.device, dtype=weights.dtype))
                norms = made.double().norm(dim=-1) * weights[at, place].double()
                own.total[expert] += norms.sum().cpu()
                own.tokens[expert] += len(at)
        finally:
            busy[0] = False

    return hook


def kept(found: dict[str, Saliency], share: float) -> dict[str, list[int]]:
    """By layer, the experts that stay if a share of them goes: the same number everywhere, those that matter least."""
    stay = {}
    for name, one in found.items():
        order = one.mean.argsort(descending=True, stable=True).tolist()
        stay[name] = sorted(order[: len(order) - _gone(share, len(order))])
    return stay


def _gone(share: float, experts: int) -> int:
    return math.floor(round(share * experts, 6))


def prune(folder: Path, out: Path, stay: dict[str, list[int]]) -> None:
    """Write the checkpoint in `folder` without the experts that do not stay; their rows of the router go with them.

    Raises:
        SpecError, MissingError: `out` is not empty, or the checkpoint is none of this kind.
    """
    from safetensors.torch import save_file

    config, counts = check_prunable(folder, out)
    by_layer = {layer_number(name): experts for name, experts in stay.items()}
    new = len(next(iter(by_layer.values())))
    if new < config.get("num_experts_per_tok", 1):
        raise SpecError(f"{new} experts would be left, and a token is routed to {config['num_experts_per_tok']}")
    out.mkdir(parents=True, exist_ok=True)
    where = {}
    for path in pack.sources(folder):
        file, tensors = Source(path), {}
        for name, told in file.tensors.items():
            tensor = file.data(name).view(getattr(torch, NAMES[told["dtype"]])).view(told["shape"])
            there = _renamed(name, tensor, by_layer)
            if there is not None:
                tensors[there[0]] = there[1].contiguous()
        save_file(tensors, out / path.name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, path.name)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        (out / index.name).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.endswith(pack.WEIGHTS) and path.name not in ("config.json", index.name):
            shutil.copy2(path, out / path.name)
    part = out / "config.part"
    part.write_text(json.dumps(config | dict.fromkeys(counts, new), indent=2))
    os.replace(part, out / "config.json")


def check_prunable(folder: Path, out: Path, share: float = 0.0) -> tuple[dict[str, Any], list[str]]:
    """What can be told before a model is loaded. Returns the config, and its fields that count experts.

    Raises:
        SpecError: too few experts would be left without a share of them; `out` is not empty, or the checkpoint has
            experts or routers that are kept otherwise.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SpecError(f"{out} is not an empty folder; take another one")
    config = json.loads((folder / "config.json").read_text())
    counts = [n for n in COUNTS if n in config]
    if not counts:
        raise SpecError(f"{folder / 'config.json'} does not say how many experts there are ({', '.join(COUNTS)})")
    have, routed = int(config[counts[0]]), int(config.get("num_experts_per_tok") or 1)
    if (left := have - _gone(share, have)) < routed:
        raise SpecError(
            f"--prune {share:g} would leave {left} of {have} experts, and a token is routed to {routed}; prune at most "
            f"{(have - routed) / have:g}"
        )
    if int(config.get("n_group") or 1) > 1:
        raise SpecError(f"the experts of {folder} are routed to by groups, which would be others without some of them")
    names = [name for path in pack.sources(folder) for name in Source(path).tensors]
    layers = {layer_number(name) for name in names if EXPERT.match(name)}
    routers = {layer_number(name) for name in names if ROUTER.match(name)}
    if not layers or layers != routers:
        raise SpecError(
            f"{folder} keeps its experts or its routers otherwise than as tensors NAME.experts.NUMBER.* and "
            "NAME.gate.weight"
        )
    return config, counts


def layer_number(name: str) -> int:
    """Of a module or a tensor.

    Raises:
        MissingError: its name has none.
    """
    found = re.search(r"\.(\d+)\.", name)
    if found is None:
        raise MissingError(f"{name} does not say which layer it is of")
    return int(found.group(1))


def _renamed(name: str, tensor: Tensor, stay: dict[int, list[int]]) -> tuple[str, Tensor] | None:
    """A tensor's name and content in the smaller model; None if it goes."""
    expert, router = EXPERT.match(name), ROUTER.match(name)
    if expert is None and router is None:
        return name, tensor
    left = stay.get(layer_number(name))
    if left is None:  # a layer without a mixture
        return name, tensor
    if router is not None:
        return name, tensor[left]
    assert expert is not None
    number = int(expert.group(2))
    return (f"{expert.group(1)}{left.index(number)}{expert.group(3)}", tensor) if number in left else None


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a mixture of experts: a folder, a hub id, or what --model takes")
    parser.add_argument("--texts", type=int, default=16, metavar="N", help="texts that it writes to be judged by (16)")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="tokens of each (64)")
    parser.add_argument("--prune", type=float, metavar="SHARE", help="write a model without this share of the experts")
    parser.add_argument("--out", type=Path, help="folder for that model, which must be empty")


def _run(options: argparse.Namespace) -> int:
    if (options.prune is None) != (options.out is None):
        raise SpecError("--prune SHARE and --out FOLDER go together")
    if not 0 <= (options.prune or 0) < 1:
        raise SpecError(f"--prune {options.prune:g} is no share of the experts; give one below 1, such as 0.25")
    model = models.resolve(options.model)
    if options.out and model.kind == "plugin":
        raise SpecError(f"{options.model} has no checkpoint to prune; `decodathlon unpack` gives a packed one back")
    models.check(model, "auto")
    folder = Path(models.fetch(model, say)) if options.out else None
    if folder is not None:
        check_prunable(folder, options.out, options.prune)
    target = models.load(model, device="auto", dtype="auto", say=say)
    mixtures(target)
    say(f"{target.name} writes {options.texts} texts of {options.tokens} tokens")
    texts = written(target, options.texts, options.tokens, drawn=True)[0]
    found = saliency(target, progress.told(list(texts), "texts", say))
    for line in aligned(table(found)):
        say(line)
    if folder is not None:
        prune(folder, options.out, kept(found, options.prune))
        say(f"{options.out}: another, smaller model; --model {options.out} runs it beside the whole one")
    return 0


def table(found: dict[str, Saliency]) -> list[list[str]]:
    """A line per layer: how many experts were ever routed to, the spread of their saliencies, and who matters least."""
    lines = [["layer", "experts", "routed to", "least", "median", "greatest", "least first"]]
    for name, one in found.items():
        means = one.mean
        order = means.argsort(stable=True)
        lines.append(
            [name, str(len(means)), str(int((one.tokens > 0).sum())), f"{means.min():.3g}", f"{means.median():.3g}",
             f"{means.max():.3g}", " ".join(map(str, order[:8].tolist()))]
        )  # fmt: skip
    return lines


_COMMAND = Command("which experts of a mixture matter, and a model without the others", _arguments, _run)
registry.add("command", "experts", _COMMAND, __file__)
