"""The weights of a model folder as a GGUF file in Q4_0, to stand beside packed weights of the same model.

    python scripts/as_q4.py FOLDER LIKE.gguf OUT.gguf

What is not weights (tokenizer, sizes) comes from LIKE, a GGUF file of the same architecture and sizes. Matrices become
Q4_0 by the rounding of the gguf package, which is the plain one of llama.cpp; the table of embeddings Q8_0, as it is
the output matrix of models that tie them; vectors stay in float32.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file

from decodathlon.harness.commands.command import say

Q4, Q8 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0


def by_name(folder: Path, like: gguf.GGUFReader) -> dict[str, torch.Tensor]:
    """The tensors of the folder in float32, as the file calls and orders them."""
    arch = str(like.get_field("general.architecture").contents())
    sizes = {
        k: like.get_field(f"{arch}.{k}") for k in ("block_count", "attention.head_count", "attention.head_count_kv")
    }
    layers, heads, key_heads = (int(field.contents()) for field in sizes.values())
    kind = {name: a for a, name in gguf.MODEL_ARCH_NAMES.items()}[arch]
    names, found = gguf.get_tensor_name_map(kind, layers), {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            rotated = heads if "q_proj" in name else key_heads if "k_proj" in name else 0
            if rotated and arch == "llama":  # there rotations pair neighbours, in transformers halves
                pairs = tensor.view(rotated, 2, len(tensor) // rotated // 2, -1)
                tensor = pairs.transpose(1, 2).reshape(tensor.shape)
            found[names.get_name(name, try_suffixes=(".weight", ".bias")) or name] = tensor.float().contiguous()
    return found


def copied(like: gguf.GGUFReader, out: Path) -> gguf.GGUFWriter:
    """A writer with what the file says beside its weights."""
    writer = gguf.GGUFWriter(out, str(like.get_field("general.architecture").contents()))
    for field in like.fields.values():
        if field.name != gguf.Keys.General.ARCHITECTURE and not field.name.startswith("GGUF."):
            several = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            value = gguf.LlamaFileType.MOSTLY_Q4_0 if field.name == gguf.Keys.General.FILE_TYPE else field.contents()
            writer.add_key_value(field.name, value, field.types[0], sub_type=several)
    return writer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, what in (("folder", "of the model"), ("like", "a GGUF file of its kind"), ("out", "the file to be")):
        parser.add_argument(name, type=Path, help=what)
    options = parser.parse_args()
    like = gguf.GGUFReader(options.like)
    tensors, writer = by_name(options.folder, like), copied(like, options.out)
    for there in like.tensors:
        tensor = tensors.get(there.name)
        if tensor is None or list(tensor.shape) != [int(n) for n in reversed(there.shape)]:
            parser.error(f"{options.folder} has no {there.name} of shape {list(reversed(there.shape.tolist()))}")
        if tensor.dim() == 1:
            writer.add_tensor(there.name, tensor.numpy())
            continue
        kind = Q8 if there.name == "token_embd.weight" else Q4
        writer.add_tensor(there.name, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    say(f"{options.out}: {options.out.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
