"""DFlash drafters of random weights, in the layout of the released ones."""

import torch

from decodathlon.decoders.dflash import config
from decodathlon.decoders.dflash.network import Network

#: A released file's fields (Qwen3-4B-DFlash-b16), at a tiny size.
RELEASED = {
    "architectures": ["DFlashDraftModel"], "attention_bias": False, "attention_dropout": 0.0, "block_size": 16,
    "dflash_config": {"mask_token_id": 50, "target_layer_ids": [1, 3]}, "dtype": "bfloat16", "head_dim": 8,
    "hidden_act": "silu", "hidden_size": 24, "initializer_range": 0.02, "intermediate_size": 40,
    "layer_types": ["full_attention", "full_attention"], "max_position_embeddings": 40960, "max_window_layers": 2,
    "model_type": "qwen3", "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2,
    "num_target_layers": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 61,
}  # fmt: skip
SLIDING = {**RELEASED, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}


def network_of(raw=RELEASED, seed=0):
    torch.manual_seed(seed)
    made = Network(config.parse(raw, "test"))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, 0.5 if parameter.dim() == 1 else 0.0, 0.3)
    return made.double().eval().requires_grad_(False)
