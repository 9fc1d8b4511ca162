"""Tiny random transformers of several architectures, and the plainest attention to hold ours against."""

from __future__ import annotations

import functools

import torch
import transformers as hf
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.masking_utils import sdpa_mask

VOCABULARY = 61
WINDOW = 5
_BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ALTERNATE = ["sliding_attention", "full_attention"] * 2

CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**_BASE),
    "qwen2": lambda: hf.Qwen2Config(**_BASE),
    "qwen3": lambda: hf.Qwen3Config(**_BASE),
    "mistral": lambda: hf.MistralConfig(**_BASE, sliding_window=WINDOW),
    "gemma2": lambda: hf.Gemma2Config(**_BASE, sliding_window=WINDOW, query_pre_attn_scalar=8),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **_BASE, sliding_window=WINDOW, query_pre_attn_scalar=8, layer_types=_ALTERNATE
    ),
    "mixtral": lambda: hf.MixtralConfig(**_BASE, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": lambda: hf.Qwen3MoeConfig(**_BASE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "gpt2": lambda: hf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=4, n_head=4, n_positions=128),
    "gpt-oss": lambda: hf.GptOssConfig(
        **_BASE, sliding_window=WINDOW, layer_types=_ALTERNATE, num_local_experts=4, num_experts_per_tok=2
    ),
}
WINDOWED = {"mistral", "gemma2", "gemma3", "gpt-oss"}


def _plain_attention(module, q, k, v, attention_mask, scaling=None, dropout=0.0, softcap=None, s_aux=None, **kwargs):
    """Attention in the dtype of its input, whatever that is (Hugging Face's eager form goes through float32)."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~attention_mask, float("-inf"))
    if s_aux is not None:
        sink = s_aux.view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1).to(scores.dtype)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return (weights @ v).transpose(1, 2), None


AttentionInterface.register("plain64", _plain_attention)
AttentionMaskInterface.register("plain64", lambda *a, **k: sdpa_mask(*a, **{**k, "allow_is_causal_skip": False}))


@functools.cache
def _state(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](), attn_implementation="plain64").double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * (0.15 if p.dim() > 1 else 0.3) + (1.0 if "norm" in name else 0.0))
    return model.state_dict()


def build(kind, attention="plain64"):
    """A fresh float64 model with the same random weights at every call."""
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](), attn_implementation=attention).double().eval()
    model.load_state_dict(_state(kind))
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped form rounds to float32
    return model


def save_folder(path, context=512, **more):
    """A random Llama with a tokenizer of single bytes, as a model folder that the harness loads like any other."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.save_pretrained(path)
    changed = {"vocab_size": len(vocabulary), "max_position_embeddings": context, "bos_token_id": 0, "eos_token_id": 1}
    config = hf.LlamaConfig(**{**_BASE, **changed, **more})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path
