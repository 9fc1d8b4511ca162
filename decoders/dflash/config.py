"""What a DFlash drafter's `config.json` says, and whether it fits a target."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decodathlon.harness.errors import MissingError, SpecError

#: Fields that may stand in `dflash_config` or beside it.
EITHER = (
    "target_layer_ids", "mask_token_id", "block_size", "input_embedding_scale", "output_multiplier",
    "final_logit_softcapping",
)  # fmt: skip
#: Parts of DFlash 2, which this network does not have.
SECOND = ("selector_rank", "conv_kernel_size")
#: What may stand in `dflash_config`; more would change what the network computes.
KNOWN = {*EITHER, "causal", "use_swa"}
#: Tokens of the largest block.
LARGEST = 64


@dataclass(frozen=True)
class Config:
    """The fields that the network depends on; names as in the released files where these have one."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    heads: int
    key_heads: int
    head_dim: int
    rms_norm_eps: float
    vocab_size: int
    #: Layers that the target has; 0 where the file does not say.
    num_target_layers: int
    #: Of the target; its hidden states behind them are what the drafter sees.
    target_layer_ids: tuple[int, ...]
    mask_token_id: int
    block_size: int
    attention_bias: bool = False
    layer_types: tuple[str, ...] = ()
    sliding_window: int | None = None
    #: Whether all layers are causal; None: those with a window are.
    is_causal: bool | None = None
    input_embedding_scale: float = 1.0
    output_multiplier: float = 1.0
    final_logit_softcapping: float = 0.0
    #: As transformers takes it.
    rope: Mapping[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    max_position_embeddings: int = 40960

    def window(self, number: int) -> int | None:
        """How far a layer sees; None: as far as there is text."""
        return self.sliding_window if self._slides(number) else None

    def causal(self, number: int) -> bool:
        return self._slides(number) if self.is_causal is None else self.is_causal

    def _slides(self, number: int) -> bool:
        return bool(self.layer_types) and self.layer_types[number] == "sliding_attention"

    def rotary(self) -> Any:
        """transformers' rotations for this config."""
        from transformers import Qwen3Config
        from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

        return Qwen3RotaryEmbedding(
            Qwen3Config(
                hidden_size=self.hidden_size, num_attention_heads=self.heads, head_dim=self.head_dim,
                max_position_embeddings=self.max_position_embeddings, rope_parameters=dict(self.rope),
            )
        )  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """As the released files have it."""
        return {
            "architectures": ["DFlashDraftModel"],
            "model_type": "qwen3",
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.rms_norm_eps,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": self.rope.get("rope_theta"),
            "rope_scaling": None if self.rope.get("rope_type", "default") == "default" else dict(self.rope),
            "attention_bias": self.attention_bias,
            "layer_types": list(self.layer_types) or None,
            "sliding_window": self.sliding_window,
            **({} if self.is_causal is None else {"is_causal": self.is_causal}),
            "num_target_layers": self.num_target_layers,
            "block_size": self.block_size,
            "dflash_config": {
                "mask_token_id": self.mask_token_id,
                "target_layer_ids": list(self.target_layer_ids),
                **{
                    name: value
                    for name, value, usual in (
                        ("input_embedding_scale", self.input_embedding_scale, 1.0),
                        ("output_multiplier", self.output_multiplier, 1.0),
                        ("final_logit_softcapping", self.final_logit_softcapping, 0.0),
                    )
                    if value != usual
                },
            },
        }


def read(path: Path) -> Config:
    """
    Raises:
        MissingError: there is no such file.
        SpecError: it is not of a drafter that we have the network of; the message names the field.
    """
    try:
        raw = json.loads(path.read_text())
    except OSError as error:
        raise MissingError(f"the drafter's {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise SpecError(f"the drafter's {path} is no JSON: {error}") from error
    return parse(raw, str(path))


def parse(raw: Any, where: str) -> Config:
    """The config in a JSON object; see `read`."""
    if not isinstance(raw, dict):
        raise SpecError(f"{where}: a drafter's config is an object, not {type(raw).__name__}")
    own = raw.get("dflash_config")
    if not isinstance(own, dict):
        raise SpecError(f"{where}: there is no dflash_config, so this is not a DFlash drafter")
    if any(name in own or name in raw for name in SECOND):
        raise SpecError(f"{where}: this is a drafter of DFlash 2 (it has {SECOND[0]}), whose network is another one")
    if raw.get("hidden_act", "silu") != "silu":
        raise SpecError(f"{where}: hidden_act is {raw['hidden_act']!r}; the network has silu")
    strange = sorted(set(own) - KNOWN) + (["use_swa"] if own.get("use_swa") else [])
    if strange:
        raise SpecError(f"{where}: dflash_config has {strange[0]}, which the network here does not know")
    found = {name: own.get(name, raw.get(name)) for name in EITHER}

    def number(name: str, kind: type = int, default: Any = None) -> Any:
        value = found[name] if name in found else raw.get(name)
        value = default if value is None else value
        sound = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not sound or kind(value) != value:
            raise SpecError(f"{where}: {name} has to be {'a whole number' if kind is int else 'a number'}, not {value}")
        return kind(value)

    ids = found["target_layer_ids"]
    if not isinstance(ids, list) or not ids or any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise SpecError(f"{where}: target_layer_ids has to be a list of whole numbers, not {ids}")
    heads, layers = number("num_attention_heads"), number("num_hidden_layers")
    config = Config(
        hidden_size=number("hidden_size"),
        intermediate_size=number("intermediate_size"),
        num_hidden_layers=layers,
        heads=heads,
        key_heads=number("num_key_value_heads", default=heads),
        head_dim=number("head_dim", default=raw.get("hidden_size", 0) // max(1, heads)),
        rms_norm_eps=number("rms_norm_eps", float, 1e-6),
        vocab_size=number("vocab_size"),
        num_target_layers=number("num_target_layers", default=0),
        target_layer_ids=tuple(ids),
        mask_token_id=number("mask_token_id"),
        block_size=number("block_size", default=16),
        attention_bias=bool(raw.get("attention_bias", False)),
        layer_types=tuple(raw.get("layer_types") or ()),
        sliding_window=number("sliding_window", default=0) or None,
        is_causal=raw.get("is_causal", own.get("causal")),
        input_embedding_scale=number("input_embedding_scale", float, 1.0),
        output_multiplier=number("output_multiplier", float, 1.0),
        final_logit_softcapping=number("final_logit_softcapping", float, 0.0),
        rope=_rope(raw, where),
        max_position_embeddings=number("max_position_embeddings", default=40960),
    )
    _check(config, where)
    return config


def _rope(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Files before transformers 5 say `rope_theta` and `rope_scaling`, later ones `rope_parameters`."""
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise SpecError(f"{where}: rotations are described by an object, not by {given!r}")
    theta = given.get("rope_theta") or raw.get("rope_theta") or 10000.0
    return {"rope_type": given.get("rope_type") or given.get("type") or "default", **given, "rope_theta": float(theta)}


def _check(config: Config, where: str) -> None:
    least = {"hidden_size": 1, "intermediate_size": 1, "num_hidden_layers": 1, "heads": 1, "key_heads": 1,
             "head_dim": 2, "vocab_size": 1, "block_size": 2, "mask_token_id": 0}  # fmt: skip
    for name, low in least.items():
        if getattr(config, name) < low:
            raise SpecError(f"{where}: {name} is {getattr(config, name)}; the least is {low}")
    if config.block_size > LARGEST:
        raise SpecError(f"{where}: block_size is {config.block_size}; the most is {LARGEST}")
    if config.sliding_window is not None and config.sliding_window < 1:
        raise SpecError(f"{where}: sliding_window is {config.sliding_window}; the least is 1")
    if config.heads % config.key_heads:
        raise SpecError(f"{where}: {config.heads} query heads cannot share {config.key_heads} key heads")
    if config.layer_types and len(config.layer_types) != config.num_hidden_layers:
        raise SpecError(f"{where}: {len(config.layer_types)} layer_types for {config.num_hidden_layers} layers")
    strange = set(config.layer_types) - {"full_attention", "sliding_attention"}
    if strange:
        raise SpecError(f"{where}: layers of the kind {sorted(strange)[0]!r} are not known here")
    if "sliding_attention" in config.layer_types and not config.sliding_window:
        raise SpecError(f"{where}: layers with a window, and no sliding_window")


def layer_ids(layers: int, count: int) -> tuple[int, ...]:
    """The target's layers that the released drafters look at: evenly from the second to the third before the last."""
    if count == 1:
        return (layers // 2,)
    return tuple(round(1 + i * (layers - 4) / (count - 1)) for i in range(count))


def check_fits(config: Config, target: Any, where: str) -> None:
    """
    Raises:
        SpecError: the drafter was made for another model; both are described.
    """
    own = target.config
    theirs = {"layers": int(own.num_hidden_layers), "width": int(own.hidden_size), "vocabulary": target.vocab_size}
    ours = {"layers": config.num_target_layers, "width": config.hidden_size, "vocabulary": config.vocab_size}
    if any(ours[name] and ours[name] != theirs[name] for name in theirs):
        described = " and ".join(
            f"{who} {', '.join(f'{name} {value}' for name, value in numbers.items())}"
            for who, numbers in (("the drafter is for", ours), (f"{target.name} has", theirs))
        )
        raise SpecError(f"the drafter in {where} is for another model: {described}")
    try:
        config.rotary()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SpecError(
            f"the drafter in {where} turns by {dict(config.rope)}, which transformers cannot: {error}"
        ) from error
    outside = [i for i in config.target_layer_ids if not 0 <= i < theirs["layers"]]
    if outside:
        raise SpecError(
            f"the drafter in {where} looks at layer {outside[0]} (target_layer_ids {list(config.target_layer_ids)}), "
            f"and {target.name} has layers 0 to {theirs['layers'] - 1}"
        )
    rows = int(target.model.get_input_embeddings().weight.shape[0])
    if config.mask_token_id >= rows:
        raise SpecError(
            f"the drafter in {where} has the mask token {config.mask_token_id}, and {target.name} has embeddings for "
            f"{rows} tokens"
        )
