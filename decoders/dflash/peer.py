"""Transformers' own DFlash loop with the same drafter: what ours is held against."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from decodathlon.decoders.dflash import checkpoint as checkpoints
from decodathlon.decoders.dflash.block import PAPER
from decodathlon.decoders.speculative.peers import Assisted
from decodathlon.harness.decoder import decoder
from decodathlon.harness.errors import UnsupportedError

#: Our names of parameters, and those of the one model of this kind that transformers has a class for.
RENAMED = {"fc.": "encoder.fc.", "hidden_norm.": "encoder.output_norm_enc."}


class _Assistant:
    """A drafter as `Assisted` takes one."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @contextmanager
    def native(self) -> Iterator[Any]:
        yield self.model


@decoder(
    "hf-dflash",
    claim="greedy-exact",
    family="hf-assisted",
    needs=["hf-model", "hidden"],
    paper=f"{PAPER}, as transformers has it",
)
class HFDFlash(Assisted):
    """`transformers.generate` with `speculation_type="dflash"` and the drafter of `dflash`; whole blocks as trained."""

    checkpoint: str = checkpoints.AUTO

    def __post_init__(self) -> None:
        checkpoints.check_named(self.checkpoint, self.info.name)

    def sources(self) -> list[Path]:
        return sorted({*super().sources(), *checkpoints.files(self.checkpoint)})

    def remarks(self, target: Any) -> list[str]:
        return [f"drafter: {checkpoints.told(self.checkpoint, target)}"]

    def check(self, target: Any) -> None:
        super().check(target)
        self._model(target)

    def assistance(self, target: Any) -> tuple[dict[str, Any], Any]:
        return {"speculation_type": "dflash"}, _Assistant(self._model(target))

    def _model(self, target: Any) -> Any:
        key = ("hf-dflash", self.checkpoint, *checkpoints.stamps(self.checkpoint))
        if key not in target.kept:
            target.kept[key] = _of_transformers(checkpoints.load(self.checkpoint, target), target)
        return target.kept[key]


def _of_transformers(network: Any, target: Any) -> Any:
    """
    Raises:
        UnsupportedError: this transformers has no such model, or its class cannot hold this drafter.
    """
    try:
        from transformers import MuseGlimmerAssistantConfig, MuseGlimmerAssistantModel
    except ImportError as error:
        raise UnsupportedError("transformers' DFlash", "this transformers has none; it came with 5.23") from error
    config = network.config
    unlike = {"attention_bias", "input_embedding_scale", "output_multiplier", "final_logit_softcapping"}
    usual = type(config).__dataclass_fields__
    for name in sorted(unlike):
        if getattr(config, name) != usual[name].default:
            raise UnsupportedError("transformers' DFlash", f"its class has no {name}, and this drafter does")
    if config.is_causal or "sliding_attention" in config.layer_types:
        raise UnsupportedError("transformers' DFlash", "its class sees windows otherwise than this drafter")
    made = MuseGlimmerAssistantConfig(
        hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.heads,
        num_key_value_heads=config.key_heads, head_dim=config.head_dim, rms_norm_eps=config.rms_norm_eps,
        rope_parameters=dict(config.rope), max_position_embeddings=config.max_position_embeddings,
        layer_types=["full_attention"] * config.num_hidden_layers, block_size=config.block_size,
        mask_token_id=config.mask_token_id, target_layer_ids=list(config.target_layer_ids),
    )  # fmt: skip
    model = MuseGlimmerAssistantModel(made)
    weights = {}
    for name, tensor in network.state_dict().items():
        begin = next((b for b in RENAMED if name.startswith(b)), "")
        weights[RENAMED.get(begin, begin) + name.removeprefix(begin)] = tensor
    model.load_state_dict(weights)
    return model.to(device=target.device, dtype=target.dtype).eval()
