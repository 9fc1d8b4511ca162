"""The model around the matrices of a packed one: built without memory, then filled in, each parameter with what it is
made of."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from decodathlon.decoders.jit_delta import pack
from decodathlon.decoders.jit_delta.container import NAMES, Reader
from decodathlon.decoders.jit_delta.modules import (
    TYPES,
    Experts,
    Matrix,
    PackedEmbedding,
    PackedLinear,
    Product,
    tensor_of,
)
from decodathlon.harness.errors import MissingError

if TYPE_CHECKING:
    from decodathlon.decoders.jit_delta.target import Packing

#: What checkpoints call the matrices of an expert, by the tensor that the module has for all experts.
EXPERTS = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}


def skeleton(reader: Reader, dtype: torch.dtype) -> Any:
    """The model with parameters that take no memory, and buffers as they should be.

    Raises:
        MissingError: the config cannot be read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    folder = reader.folder
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        with _parameters_without_memory():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            if _parted(model, reader):  # the config ties what the checkpoint has twice, and otherwise
                config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
                model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise MissingError(f"the model in {folder} cannot be read: {str(error).splitlines()[0]}") from error
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the one that reads experts one by one
    return model.eval()


def _parted(model: Any, reader: Reader) -> bool:
    """Whether two names of one parameter are two different tensors of the checkpoint."""
    contents: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in reader.records:
            contents.setdefault(id(parameter), set()).add(reader.records[name].sha256)
    return any(len(some) > 1 for some in contents.values())


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    register = torch.nn.Module.register_parameter

    def without(module: Any, name: str, parameter: Any) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = without  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


@dataclass
class Place:
    """A parameter of the model, or a buffer that checkpoints keep, and the tensors that it is made of."""

    parent: Any
    attribute: str
    module: Any
    key: str
    #: One, or by expert those that stand one above the other.
    sources: list[list[str]]
    #: What it becomes: linear, embedding, experts, or `other`: the parameter of a module of another kind; `buffer`, or
    #: nothing where it stays.
    made: str = ""
    #: Whether it is float32 whatever the model is.
    wide: bool = False

    def dtype(self, value: torch.Tensor, usual: torch.dtype) -> torch.dtype:
        if not value.is_floating_point():
            return value.dtype
        return torch.float32 if self.wide else usual

    @property
    def names(self) -> list[str]:
        return [name for some in self.sources for name in some]

    def fill(self, packing: Packing) -> None:
        room = packing.room
        if self.made == "buffer":
            own = self.module._buffers[self.key]
            value = restored_tensor(packing.reader, self.sources[0][0]).view(own.shape)
            self.module._buffers[self.key] = value.to(room.device, own.dtype)
            return
        if not self.made:
            whole = torch.stack if len(self.sources) > 1 else lambda parts: parts[0]
            value = whole([torch.cat([restored_tensor(packing.reader, n) for n in some]) for some in self.sources])
            shape = self.module._parameters[self.key].shape
            value = value.view(shape).to(room.device, self.dtype(value, room.dtype))
            self.module._parameters[self.key] = torch.nn.Parameter(value, requires_grad=False)
            return
        count = self.module._parameters[self.key].shape[0]
        parts = self.made == "experts" and len(self.sources) == 1  # one tensor for all of them
        products = (
            [Product([Matrix(packing.storage, self.sources[0][0], room, i)], None, room) for i in range(count)]
            if parts
            else [Product([Matrix(packing.storage, n, room) for n in some], None, room) for some in self.sources]
        )
        if self.made == "experts":
            del self.module._parameters[self.key]
            setattr(self.module, self.key, Experts(products))
        elif self.made == "linear":
            setattr(self.parent, self.attribute, PackedLinear(products[0], self.module.bias))
        elif self.made == "embedding":
            scale = getattr(self.module, "embed_scale", None)
            setattr(self.parent, self.attribute, PackedEmbedding(products[0], scale))
        else:
            tensor_of(self.module, self.key, products[0])


def restored_tensor(reader: Reader, name: str) -> torch.Tensor:
    """A tensor as the checkpoint has it."""
    record = reader.records[name]
    return pack.restored(reader, name).view(getattr(torch, NAMES[record.dtype])).view(record.shape)  # type: ignore[no-any-return]


def placed(model: Any, reader: Reader) -> list[Place]:
    """Every parameter of the model, and every buffer that the checkpoint has, with the tensors that it is made of.

    Raises:
        LookupError: a parameter has none, or a tensor belongs to none.
    """
    records, found, lacking = reader.records, [], []
    wide = _kept_wide(model)
    by_object: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in records:
            by_object.setdefault(id(parameter), name)
    for path, module in model.named_modules(remove_duplicate=False):
        parent, _, attribute = path.rpartition(".")
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{path}.{key}"
            own = by_object.get(id(parameter)) or next((n for n in _also(name) if n in records), None)
            sources = [[own]] if own else _experts(name, parameter.shape[0], records) if parameter.dim() == 3 else []
            if not sources:
                lacking.append(name)
                continue
            place = Place(model.get_submodule(parent), attribute, module, key, sources)
            place.made = _made(place, records)
            place.wide = wide.search(name) is not None
            found.append(place)
        for key, buffer in module._buffers.items():
            name = f"{path}.{key}"
            own = next((n for n in _also(name) if n in records), None)
            if buffer is not None and own is not None:
                found.append(Place(model.get_submodule(parent), attribute, module, key, [[own]], "buffer"))
    if lacking:
        raise LookupError(f"nothing that is called {lacking[0]}")
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    extra = records.keys() - {n for place in found for n in place.names}
    extra = {n for n in extra if not n.endswith("rotary_emb.inv_freq") and not any(re.search(i, n) for i in ignored)}
    tied = {n for n, p in model.named_parameters(remove_duplicate=False) if id(p) in by_object}
    if extra - tied:
        raise LookupError(f"{min(extra - tied)}, which the model has no parameter for")
    return sorted(found, key=lambda place: bool(place.made))  # biases are there when their module is replaced


def _kept_wide(model: Any) -> re.Pattern[str]:
    """Parameters that transformers keeps in float32 whatever the model's type is: some architectures name such."""
    names = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if next(model.parameters()).dtype == torch.float16:
        names |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    parts = "|".join(rf"(?:^|\.){re.escape(name)}(?:$|\.)" for name in sorted(names))
    return re.compile(parts or "(?!)")


def _experts(name: str, count: int, records: Any) -> list[list[str]]:
    """The matrices of all experts that a tensor of a module consists of; none where it is no such tensor."""
    base, _, key = name.rpartition(".")
    for parts in EXPERTS.get(key, ()):
        for place in _also(base):
            sources = [[f"{place}.{i}.{part}.weight" for part in parts] for i in range(count)]
            if all(n in records for some in sources for n in some):
                return sources
    return []


def _also(name: str) -> tuple[str, str]:
    """What a module or its parameter is called in a checkpoint: the same, or as Mixtral's have it."""
    return name, name.replace(".mlp.", ".block_sparse_moe.")


def _made(place: Place, records: Any) -> str:
    """What a parameter becomes."""
    some = [records[n] for n in place.names]
    if any(r.dtype not in TYPES or not 2 <= len(r.shape) <= 3 for r in some):
        return ""
    if type(place.module) is torch.nn.Linear and place.key == "weight":
        return "linear"  # small ones too, for they may be read in one product with large ones
    if any(r.form == "raw" for r in some):
        return ""
    if place.module._parameters[place.key].dim() == 3:
        return "experts" if place.key in EXPERTS else ""
    plain = type(place.module) is torch.nn.Embedding or hasattr(place.module, "embed_scale")
    return "embedding" if isinstance(place.module, torch.nn.Embedding) and plain else "other"
