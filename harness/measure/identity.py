"""Which model a cell measured, as the process that holds it can tell: a name alone does not say which weights."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

#: Values per tensor that go into the fingerprint, from all over it.
_PROBED = 64


def record(target: Any) -> dict[str, Any]:
    """What a row stores of its target."""
    found: dict[str, Any] = {
        "name": target.name,
        "dtype": str(target.dtype).removeprefix("torch."),
        "device": str(target.device),
        "parameters": target.parameters,
    }
    if getattr(target, "processor", ""):
        found["processor"] = target.processor
    elif getattr(target.device, "type", "cpu") == "cuda":
        found["processor"] = torch.cuda.get_device_name(target.device)
    else:
        found["threads"] = torch.get_num_threads()
    model, tokenizer = getattr(target, "model", None), getattr(target, "tokenizer", None)
    if isinstance(model, torch.nn.Module):
        found["weights_fingerprint"] = weights_fingerprint(model)
        found["architecture"] = type(model).__name__
        quantisation = getattr(getattr(model, "config", None), "quantization_config", None)
        if quantisation is not None:
            found["quantisation"] = str(getattr(quantisation, "quant_method", quantisation))
    if getattr(target, "weights_fingerprint", ""):
        found["weights_fingerprint"] = target.weights_fingerprint
    if getattr(target, "revision", ""):
        found["revision"] = target.revision
    if tokenizer is not None:
        found["tokenizer_sha256"] = _tokenizer_hash(tokenizer)
        template = getattr(tokenizer, "chat_template", None)
        if template:
            found["chat_template_sha256"] = hashlib.sha256(str(template).encode()).hexdigest()
    return found


def gpu_uuid(device: Any) -> str | None:
    """What the driver calls the GPU that computes; None on a CPU, and where torch does not tell."""
    if getattr(device, "type", "cpu") != "cuda":
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return f"GPU-{uuid}" if uuid is not None else None


@torch.no_grad()
def weights_fingerprint(model: torch.nn.Module) -> str:
    """A hash of every tensor's name, shape, dtype and some of its values: other weights give another one.

    It is quick (no tensor is read whole), so a change of single values between those that it reads is not seen.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.reshape(-1)
        step = max(1, flat.numel() // _PROBED)
        digest.update(flat[::step][: 2 * _PROBED].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _tokenizer_hash(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        text = backend.to_str()
    elif hasattr(tokenizer, "get_vocab"):
        text = repr(sorted(tokenizer.get_vocab().items()))
    else:
        text = repr(getattr(tokenizer, "pieces", type(tokenizer).__name__))
    return hashlib.sha256(text.encode()).hexdigest()
